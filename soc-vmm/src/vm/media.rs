//! The files that a VM is made from, opened and examined before anything is touched: images to boot, disks, media, flash.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nix::fcntl::OFlag;

use super::hardware::{self, Opened};
use super::shape::Shape;
use crate::block::{self, BlockBackend, FileId};
use crate::boot::{BootPlan, BootSource};
use crate::cli::{AnyDisk, AnyNet, ChannelSpec, DebugconSpec, ExitStatus, Failure, Mac, RunConfig, SerialSpec};
use crate::control::{BALLOON_ID, CDROM_ID, ListeningSocket, VmHandle};
use crate::cpus::NewCpu;
use crate::flash::{Bank, VariableStore};
use crate::layout::MemoryLayout;
use crate::qemu::ChardevKind;
use crate::qemu::small::{FwCfgContent, FwCfgFile};
use crate::slots::{self, Named, NewDevice, NewDisk, NewKind, NewNet, Place, Planned, Reserved};
use crate::virtio::console::{HostEnd, PortConfig};

/// Most bytes of a file for the guest in fw_cfg.
const FW_CFG_MOST: u64 = 64 << 20;
/// What messages call the file of `--nvram`.
const VARIABLES: &str = "variable store";

/// What the machine's devices hold.
pub(super) struct Media {
    /// Firmware's flash; none: its firmware is ROM, or there is none.
    pub(super) flash: Option<Vec<Bank>>,
    /// Back ends that have names.
    pub(super) named: Named,
    /// What is there from the start: disks first, so that guests find them in that order.
    pub(super) devices: Vec<Planned>,
    /// CD-ROM drives.
    pub(super) cdroms: Vec<Cdrom>,
    /// Processors that are put in before the machine runs.
    pub(super) cpus: Vec<NewCpu>,
    /// More files of fw_cfg.
    pub(super) fw_cfg: Vec<(String, Vec<u8>)>,
    /// The files that disks may not write.
    pub(super) reserved: Arc<Reserved>,
}

/// A CD-ROM drive.
pub(super) struct Cdrom {
    /// Its name.
    pub(super) id: String,
    /// The controller's port that it is on.
    pub(super) port: usize,
    /// What is in it.
    pub(super) medium: Option<Arc<dyn BlockBackend>>,
    /// The medium's block node.
    pub(super) node: Option<String>,
}

/// The port of the drive of `--cdrom`, as QEMU's `-cdrom` has it.
const CDROM_PORT: usize = 2;

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
        let disk = |planned: &Planned| {
            let Planned::Device(NewDevice { kind: NewKind::Disk(disk), .. }) = planned else { return None };
            place(&disk.image).map(|n| if n == 0 { "disk image" } else { "disk's backing file" })
        };
        let node = || self.named.images().find_map(place).map(|_| "disk image");
        let cdrom =
            || self.cdroms.iter().filter_map(|drive| drive.medium.as_ref()).find_map(place).map(|_| "CD-ROM's image");
        let mut stores = self.flash.iter().flatten().filter_map(|bank| bank.store.as_ref());
        let nvram = || stores.any(|store| store.is(&metadata)).then_some(VARIABLES);
        self.devices.iter().find_map(disk).or_else(cdrom).or_else(node).or_else(nvram)
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
    let outputs = config.hardware.iter().flat_map(|hardware| &hardware.chardevs);
    for chardev in outputs {
        let logs = chardev.log.iter().map(|log| &log.path);
        let file = match &chardev.kind {
            ChardevKind::File { path, .. } => Some(path),
            _ => None,
        };
        paths.extend(file.into_iter().chain(logs).map(|path| written(path.clone(), "chardev's output")));
    }
    let elsewhere = Arc::new(AtomicBool::new(config.incoming.is_some()));
    Reserved { images, paths, elsewhere }
}

/// Opens all that `config` names.
///
/// # Errors
/// A file is missing, unreadable, wrong or damaged: which option, which file.
pub(super) fn open(config: &RunConfig, layout: &MemoryLayout, vm: &VmHandle) -> Result<(BootPlan, Media), Failure> {
    let wrong = |option: &str, e: &dyn std::error::Error| Failure::of(ExitStatus::Usage, option, e);
    let (plan, flash) = match &config.boot {
        BootSource::Firmware { code, nvram: Some(nvram) } => {
            let opened = match config.incoming {
                None => VariableStore::open(nvram),
                Some(_) => VariableStore::open_for_arrival(nvram),
            };
            let (store, variables) = opened.map_err(|e| wrong("--nvram", &e))?;
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
            let plan = if config.machine.acpi {
                BootPlan::new(source, layout, &Shape::new(config, layout).acpi(None))
            } else {
                BootPlan::without_acpi(source, layout)
            };
            (plan.map_err(|e| wrong("", &e))?, None)
        }
    };
    let reserved = reserved(config, &plan);
    let fw_cfg = config.machine.fw_cfg.iter().map(fw_cfg_file).collect::<Result<_, _>>()?;
    let media = match &config.hardware {
        Some(hardware) => {
            let Opened { named, devices, cdroms, cpus } = hardware::open(hardware, vm, &reserved)?;
            Media { flash, named, devices, cdroms, cpus, fw_cfg, reserved: Arc::new(reserved) }
        }
        None => {
            let devices = devices(config, &reserved)?;
            let cdrom = config.cdrom.as_ref().map(|cdrom| block::open(&cdrom.image)).transpose();
            let medium = cdrom.map_err(|e| wrong("--cdrom", &e))?;
            let drive = |medium| Cdrom { id: CDROM_ID.into(), port: CDROM_PORT, medium: Some(medium), node: None };
            let cdroms = medium.into_iter().map(drive).collect();
            let (named, cpus) = (Named::default(), Vec::new());
            Media { flash, named, devices, cdroms, cpus, fw_cfg, reserved: Arc::new(reserved) }
        }
    };
    Ok((plan, media))
}

/// A file of fw_cfg with its content.
fn fw_cfg_file(file: &FwCfgFile) -> Result<(String, Vec<u8>), Failure> {
    let bytes = match &file.content {
        FwCfgContent::Text(text) => text.clone().into_bytes(),
        FwCfgContent::File(path) => read(path)
            .map_err(|e| Failure::new(ExitStatus::Usage, format!("-fw_cfg: can't read {}: {e}", path.display())))?,
    };
    Ok((file.name.clone(), bytes))
}

/// What is in a regular file of at most [`FW_CFG_MOST`] bytes: it is held in memory.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Without O_NONBLOCK, open(2) of a FIFO waits for its writer.
    let file = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file: copy what it gives into one"));
    }
    let mut bytes = Vec::new();
    file.take(FW_CFG_MOST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FW_CFG_MOST {
        return Err(io::Error::other(format!("it has more than {} MiB: pass it on a disk", FW_CFG_MOST >> 20)));
    }
    Ok(bytes)
}

/// What stands in slots from the start.
fn devices(config: &RunConfig, reserved: &Reserved) -> Result<Vec<Planned>, Failure> {
    let wrong = |option: &str, e: &dyn std::error::Error| Failure::of(ExitStatus::Usage, option, e);
    let mut devices: Vec<(String, NewKind)> = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let kind = match disk {
            AnyDisk::Image(disk) => {
                let image = slots::open_disk(&disk.image, reserved).map_err(|e| wrong("--disk", &e))?;
                NewKind::Disk(NewDisk::new(image, disk.tuning))
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
    let place = || Place::Free;
    let device = |(id, kind)| Planned::Device(NewDevice { id: Some(id), kind, node: None, place: place() });
    let balloon = config.balloon.map(|_| Planned::Balloon { id: Some(BALLOON_ID.into()), place: place() });
    Ok(devices.into_iter().map(device).chain(balloon).collect())
}
