//! The files that a VM is made from, opened and examined before anything is touched: images to boot, disks, media, flash.

use std::fs::File;
use std::sync::Arc;

use super::shape::Shape;
use crate::block::{self, BlockBackend, FileId, ImageSpec};
use crate::boot::{BootPlan, BootSource};
use crate::cli::{ExitStatus, Failure, Mac, RunConfig};
use crate::flash::{Bank, VariableStore};
use crate::layout::MemoryLayout;
use crate::net::{NetBackend, StreamBackend};

/// What messages call the file of `--nvram`.
const VARIABLES: &str = "variable store";

/// What the machine's devices hold.
pub(super) struct Media {
    /// Firmware's flash; none: its firmware is ROM, or there is none.
    pub(super) flash: Option<Vec<Bank>>,
    /// Disks, in their order on the command line.
    pub(super) disks: Vec<Disk>,
    /// What is in the CD-ROM drive.
    pub(super) cdrom: Option<Arc<dyn BlockBackend>>,
    /// Network interfaces, likewise.
    pub(super) nets: Vec<Net>,
}

impl Media {
    /// How many devices it makes behind root ports.
    pub(super) fn devices(config: &RunConfig) -> usize {
        config.disks.len() + config.nets.len()
    }

    /// What a file is if it is one that the VM's devices hold.
    pub(super) fn role_of(&self, file: &File) -> Option<&'static str> {
        let metadata = file.metadata().ok()?;
        let id = FileId::of(&metadata);
        let place = |image: &Arc<dyn BlockBackend>| image.files().iter().position(|file| *file == id);
        let disk = |disk: &Disk| place(&disk.image).map(|n| if n == 0 { "disk image" } else { "disk's backing file" });
        let cdrom = || self.cdrom.as_ref().and_then(place).map(|_| "CD-ROM's image");
        let mut stores = self.flash.iter().flatten().filter_map(|bank| bank.store.as_ref());
        let nvram = || stores.any(|store| store.is(&metadata)).then_some(VARIABLES);
        self.disks.iter().find_map(disk).or_else(cdrom).or_else(nvram)
    }
}

/// A disk.
pub(super) struct Disk {
    pub(super) image: Arc<dyn BlockBackend>,
    /// Its name, which the guest sees as its serial number.
    pub(super) id: String,
}

/// A network interface.
pub(super) struct Net {
    pub(super) backend: Box<dyn NetBackend>,
    pub(super) mac: Mac,
    pub(super) id: String,
}

/// Refuses a disk that would write what the VM is booted from.
fn check_written(disk: &ImageSpec, plan: &BootPlan, store: Option<&VariableStore>) -> Result<(), Failure> {
    // What is wrong with a file that isn't there is told by who opens it.
    let Some(file) = std::fs::metadata(&disk.path).ok().filter(|_| !disk.read_only) else { return Ok(()) };
    let role = plan.role_of(&file).map(|role| format!("{role} image"));
    let role = role.or_else(|| store.filter(|store| store.is(&file)).map(|_| VARIABLES.to_owned()));
    role.map_or(Ok(()), |role| {
        let path = disk.path.display();
        let why = format!("--disk: {path} is also the {role} of this VM: give a copy, or say readonly=on");
        Err(Failure::new(ExitStatus::Usage, why))
    })
}

/// Opens all that `config` names.
///
/// # Errors
/// A file is missing, unreadable, wrong or damaged: which option, which file.
pub(super) fn open(config: &RunConfig, layout: &MemoryLayout) -> Result<(BootPlan, Media), Failure> {
    let wrong = |option: &str, e: &dyn std::error::Error| Failure::of(ExitStatus::Usage, option, e);
    let (plan, flash) = match &config.boot {
        BootSource::Firmware { code, nvram: Some(nvram) } => {
            let (store, variables) = VariableStore::open(nvram).map_err(|e| wrong("--nvram", &e))?;
            let plan = BootPlan::in_flash(code, variables.len() as u64).map_err(|e| wrong("", &e))?;
            let code = plan.first_image().map_err(|e| wrong("", &e))?;
            let [top, below] = [0, 1].map(|bank: usize| plan.roms()[bank].start);
            let banks = vec![
                Bank { base: top, bytes: code, read_only: true, store: None },
                Bank { base: below, bytes: variables, read_only: false, store: Some(store) },
            ];
            (plan, Some(banks))
        }
        source => {
            let acpi = Shape::new(config, layout).acpi(None);
            (BootPlan::new(source, layout, &acpi).map_err(|e| wrong("", &e))?, None)
        }
    };
    let store = flash.iter().flatten().find_map(|bank: &Bank| bank.store.as_ref());
    let disks = config.disks.iter().enumerate().map(|(index, disk)| {
        check_written(&disk.image, &plan, store)?;
        let image = block::open(&disk.image).map_err(|e| wrong("--disk", &e))?;
        Ok(Disk { image, id: disk.id_at(index) })
    });
    let disks = disks.collect::<Result<_, Failure>>()?;
    let cdrom = config.cdrom.as_ref().map(|cdrom| block::open(&cdrom.image)).transpose();
    let cdrom = cdrom.map_err(|e| wrong("--cdrom", &e))?;
    let nets = config.nets.iter().enumerate().map(|(index, net)| {
        let path = &net.stream;
        let connected = StreamBackend::connect(path).map_err(|e| {
            let todo = match e.kind() {
                std::io::ErrorKind::TimedOut => "its peer accepts nobody: is it stopped, or has it a client already?",
                _ => "start its peer (passt, say) first",
            };
            let why = format!("--net: can't connect to {}: {e}; {todo}", path.display());
            Failure::new(ExitStatus::Usage, why)
        })?;
        let mac = net.mac.unwrap_or_else(|| Mac::of(config.name.as_str(), index));
        let id = net.id_at(index);
        Ok(Net { backend: Box::new(connected), mac, id })
    });
    let nets = nets.collect::<Result<_, Failure>>()?;
    Ok((plan, Media { flash, disks, cdrom, nets }))
}
