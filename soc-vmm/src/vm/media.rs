//! The files that a VM is made from, opened and examined before anything is touched: images to boot, disks, media, flash.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::shape::Shape;
use crate::block::{self, BlockBackend};
use crate::boot::{BootPlan, BootSource};
use crate::cli::{ExitStatus, Failure, Mac, RunConfig};
use crate::flash::{Bank, VariableStore};
use crate::layout::MemoryLayout;
use crate::net::{NetBackend, StreamBackend};

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

/// What a file is if it is one that the VM's devices hold.
pub(super) fn role_of(config: &RunConfig, file: &File) -> Option<&'static str> {
    let this = file.metadata().ok()?;
    let nvram = match &config.boot {
        BootSource::Firmware { nvram, .. } => nvram.as_ref(),
        BootSource::Kernel { .. } => None,
    };
    let disks = config.disks.iter().map(|disk| ("disk image", &disk.image.path));
    let cdrom = config.cdrom.iter().map(|cdrom| ("CD-ROM's image", &cdrom.image.path));
    let mut all = disks.chain(cdrom).chain(nvram.map(|path| ("variable store", path)));
    let is_it = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (this.dev(), this.ino()));
    all.find(|(_, path)| is_it(path)).map(|(role, _)| role)
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
    let disks = config.disks.iter().enumerate().map(|(index, disk)| {
        let image = block::open(&disk.image).map_err(|e| wrong("--disk", &e))?;
        Ok(Disk { image, id: disk.id.clone().unwrap_or_else(|| format!("disk{index}")) })
    });
    let disks = disks.collect::<Result<_, Failure>>()?;
    let cdrom = config.cdrom.as_ref().map(|cdrom| block::open(&cdrom.image)).transpose();
    let cdrom = cdrom.map_err(|e| wrong("--cdrom", &e))?;
    let nets = config.nets.iter().enumerate().map(|(index, net)| {
        let path = &net.stream;
        let connected = StreamBackend::connect(path).map_err(|e| {
            let why = format!("--net: can't connect to {}: {e}; start its peer (passt, say) first", path.display());
            Failure::new(ExitStatus::Usage, why)
        })?;
        let mac = net.mac.unwrap_or_else(|| Mac::of(config.name.as_str(), index));
        let id = net.id.clone().unwrap_or_else(|| format!("net{index}"));
        Ok(Net { backend: Box::new(connected), mac, id })
    });
    let nets = nets.collect::<Result<_, Failure>>()?;
    Ok((plan, Media { flash, disks, cdrom, nets }))
}
