//! The files that a VM is made from, opened and examined before anything is touched: images to boot, disks, media, flash.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use super::shape::Shape;
use crate::block::{self, BlockBackend, FileId};
use crate::boot::{BootPlan, BootSource};
use crate::cli::{AnyDisk, AnyNet, ChannelSpec, DebugconSpec, ExitStatus, Failure, Mac, RunConfig, SerialSpec};
use crate::control::ListeningSocket;
use crate::flash::{Bank, VariableStore};
use crate::layout::MemoryLayout;
use crate::slots::{self, NewKind, NewNet, Reserved};
use crate::virtio::console::{HostEnd, PortConfig};

/// What messages call the file of `--nvram`.
const VARIABLES: &str = "variable store";

/// What the machine's devices hold.
pub(super) struct Media {
    /// Firmware's flash; none: its firmware is ROM, or there is none.
    pub(super) flash: Option<Vec<Bank>>,
    /// What stands in slots from the start, each with its name: disks first, so that guests find them in that order.
    pub(super) devices: Vec<(String, NewKind)>,
    /// What is in the CD-ROM drive.
    pub(super) cdrom: Option<Arc<dyn BlockBackend>>,
    /// The files that disks may not write.
    pub(super) reserved: Arc<Reserved>,
}

impl Media {
    /// How many devices it makes behind root ports.
    pub(super) fn devices(config: &RunConfig) -> usize {
        let once =
            [config.entropy.is_some(), !config.channels.is_empty(), config.vsock.is_some(), config.balloon.is_some()];
        config.disks.len()
            + config.nets.len()
            + config.file_systems.len()
            + once.into_iter().filter(|device| *device).count()
    }

    /// What a file is if it is one that the VM's devices hold.
    pub(super) fn role_of(&self, file: &File) -> Option<&'static str> {
        let metadata = file.metadata().ok()?;
        let id = FileId::of(&metadata);
        let place = |image: &Arc<dyn BlockBackend>| image.files().iter().position(|file| *file == id);
        let disk = |(_, device): &(String, NewKind)| {
            let NewKind::Disk(image, _) = device else { return None };
            place(image).map(|n| if n == 0 { "disk image" } else { "disk's backing file" })
        };
        let cdrom = || self.cdrom.as_ref().and_then(place).map(|_| "CD-ROM's image");
        let mut stores = self.flash.iter().flatten().filter_map(|bank| bank.store.as_ref());
        let nvram = || stores.any(|store| store.is(&metadata)).then_some(VARIABLES);
        self.devices.iter().find_map(disk).or_else(cdrom).or_else(nvram)
    }
}

/// The files that the VM is started from, and those that it writes itself.
fn reserved(config: &RunConfig, plan: &BootPlan) -> Reserved {
    let (paths, nvram) = match &config.boot {
        BootSource::Kernel { kernel, initrd, .. } => ([Some(kernel), initrd.as_ref()], None),
        BootSource::Firmware { code, nvram } => ([Some(code), None], nvram.clone()),
    };
    let image = |path: &PathBuf| {
        let file = std::fs::metadata(path).ok()?;
        Some((FileId::of(&file), format!("{} image", plan.role_of(&file)?)))
    };
    let images = paths.into_iter().flatten().filter_map(image).collect();
    let written = |path: PathBuf, role: &str| (path, role.to_owned());
    let mut paths: Vec<_> = nvram.into_iter().map(|path| written(path, VARIABLES)).collect();
    if let SerialSpec::File(path) = &config.serial {
        paths.push(written(path.clone(), "serial port's output"));
    }
    if let Some(DebugconSpec::File(path)) = &config.debugcon {
        paths.push(written(path.clone(), "debug console's output"));
    }
    Reserved { images, paths }
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
    let reserved = reserved(config, &plan);
    let devices = devices(config, &reserved)?;
    let cdrom = config.cdrom.as_ref().map(|cdrom| block::open(&cdrom.image)).transpose();
    let cdrom = cdrom.map_err(|e| wrong("--cdrom", &e))?;
    Ok((plan, Media { flash, devices, cdrom, reserved: Arc::new(reserved) }))
}

/// What stands in slots from the start, but a balloon, which needs the VM.
fn devices(config: &RunConfig, reserved: &Reserved) -> Result<Vec<(String, NewKind)>, Failure> {
    let wrong = |option: &str, e: &dyn std::error::Error| Failure::of(ExitStatus::Usage, option, e);
    let mut devices = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let kind = match disk {
            AnyDisk::Image(disk) => {
                let image = slots::open_disk(&disk.image, reserved).map_err(|e| wrong("--disk", &e))?;
                NewKind::Disk(image, disk.tuning)
            }
            AnyDisk::Vhost(disk) => NewKind::Vhost(slots::open_vhost(disk).map_err(|e| wrong("--disk", &e))?),
        };
        devices.push((disk.id_at(index), kind));
    }
    for (index, net) in config.nets.iter().enumerate() {
        let own = Mac::of(config.name.as_str(), index);
        let kind = match net {
            AnyNet::Own(net) => {
                let opened = slots::open_net(net).map_err(|e| wrong("--net", &e))?;
                NewKind::Net(NewNet { mac: Some(net.mac.unwrap_or(own)), ..opened })
            }
            AnyNet::Vhost(net) => {
                let opened = slots::open_vhost(net).map_err(|e| wrong("--net", &e))?;
                NewKind::Vhost(opened.or_mac(own))
            }
        };
        devices.push((net.id_at(index), kind));
    }
    for (index, fs) in config.file_systems.iter().enumerate() {
        let opened = slots::open_vhost(&fs.0).map_err(|e| wrong("--fs", &e))?;
        devices.push((fs.id_at(index), NewKind::Vhost(opened)));
    }
    if let Some(entropy) = &config.entropy {
        devices.push(("rng0".into(), NewKind::Entropy(entropy.limit)));
    }
    if !config.channels.is_empty() {
        let port = |(index, channel): (usize, &ChannelSpec)| {
            let end = if channel.connect {
                HostEnd::connect(&channel.path).map_err(|e| {
                    let why = format!(
                        "--channel: can't connect to {}: {e}; start who listens there first",
                        channel.path.display()
                    );
                    Failure::new(ExitStatus::Usage, why)
                })?
            } else {
                HostEnd::listen(&channel.path).map_err(|e| wrong("--channel", &e))?
            };
            Ok(PortConfig { id: channel.id_at(index), name: channel.name.clone(), end })
        };
        let ports = config.channels.iter().enumerate().map(port).collect::<Result<_, Failure>>()?;
        devices.push(("serial0".into(), NewKind::Ports(ports)));
    }
    if let Some(vsock) = &config.vsock {
        let socket = ListeningSocket::bind(&vsock.socket).map_err(|e| wrong("--vsock", &e))?;
        devices.push(("vsock0".into(), NewKind::Vsock(vsock.cid, socket)));
    }
    Ok(devices)
}
