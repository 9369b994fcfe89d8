//! What a command line of QEMU's names, opened before anything is touched: descriptors, character devices, back ends, devices.

use super::media::Cdrom;
use crate::cli::{ExitStatus, Failure, with_causes};
use crate::control::VmHandle;
use crate::cpuid::Place;
use crate::cpus::NewCpu;
use crate::qemu::{Blockdev, Device, DeviceKind, FileRef, Hardware, NetdevKind, PlanError, World, image};
use crate::slots::{DiskNode, Named, NodeKind, Planned, Reserved};
use crate::virtio::RateLimits;

/// What came of it.
pub(super) struct Opened {
    /// Back ends by name.
    pub(super) named: Named,
    /// Devices, in order.
    pub(super) devices: Vec<Planned>,
    /// CD-ROM drives.
    pub(super) cdroms: Vec<Cdrom>,
    /// Processors beyond those of `-smp`.
    pub(super) cpus: Vec<NewCpu>,
}

/// Opens all of it. Character devices are `vm`'s afterwards.
///
/// # Errors
/// Which option, and why.
pub(super) fn open(hardware: &Hardware, vm: &VmHandle, reserved: &Reserved) -> Result<Opened, Failure> {
    let (fds, chardevs) = (vm.fds(), vm.chardevs());
    for add in &hardware.add_fds {
        let added = fds.inherit(add.fd).and_then(|fd| fds.add_to_set(Some(add.set), fd, add.opaque.clone()));
        added.map_err(|e| wrong("-add-fd", &e))?;
    }
    for chardev in &hardware.chardevs {
        chardevs.add(chardev, fds).map_err(|e| wrong("-chardev", &e))?;
    }
    let named = Named::default().with_board(hardware.on_board.clone());
    let mut opened = Opened { named, devices: Vec::new(), cdroms: Vec::new(), cpus: Vec::new() };
    let named = &mut opened.named;
    for object in &hardware.objects {
        named.name_object(&object.id, object.kind.clone()).map_err(|e| wrong("-object", &e))?;
    }
    let flash = flash(hardware);
    for node in &hardware.blockdevs {
        let option = |e: &dyn std::error::Error| wrong(&format!("-blockdev {}", node.node_name), e);
        let (name, node) = if flash.contains(&node.node_name) {
            (node.node_name.clone(), of_flash(hardware, node))
        } else {
            let world = World { fds, chardevs, reserved, names: named };
            node.clone().open(&world).map_err(|e| option(&e))?
        };
        named.name_disk(&name, node).map_err(|e| option(&e))?;
    }
    // A passt is started when all other descriptors are taken, which it would inherit.
    let (users, others): (Vec<_>, Vec<_>) = hardware.netdevs.iter().partition(|it| it.kind == NetdevKind::User);
    for netdev in others.into_iter().chain(users) {
        let option = |e: &dyn std::error::Error| wrong(&format!("-netdev {}", netdev.id), e);
        let world = World { fds, chardevs, reserved, names: named };
        let (name, net) = netdev.clone().open(&world).map_err(|e| option(&e))?;
        named.name_net(&name, net).map_err(|e| option(&e))?;
    }
    let world = World { fds, chardevs, reserved, names: &opened.named };
    for device in &hardware.devices {
        let made = match &device.kind {
            DeviceKind::Cd(cd) => {
                drive(device, cd.drive.clone(), opened.cdroms.len(), &world).map(|it| opened.cdroms.push(it))
            }
            DeviceKind::Cpu(cpu) => {
                let place = match (cpu.socket_id, cpu.core_id, cpu.thread_id) {
                    (Some(socket), Some(core), Some(thread)) => Some(Place { socket, core, thread }),
                    _ => None,
                };
                opened.cpus.push(NewCpu { place, id: device.id.clone() });
                Ok(())
            }
            _ => device.clone().plan(&world).map(|planned| opened.devices.push(planned)),
        };
        made.map_err(|e| wrong(&format!("-device {}", device.driver), &e))?;
    }
    Ok(opened)
}

fn wrong(option: &str, e: &dyn std::error::Error) -> Failure {
    Failure::new(ExitStatus::Usage, format!("{option}: {}", with_causes(e)))
}

/// A CD-ROM drive.
fn drive(device: &Device, node: Option<String>, index: usize, world: &World<'_>) -> Result<Cdrom, PlanError> {
    let medium = match &node {
        None => None,
        Some(name) => {
            let node = world.names.disk_node(name)?;
            Some(image(&node, world)?)
        }
    };
    let port = device.bus.as_deref().and_then(crate::qemu::ahci_port).unwrap_or(index);
    Ok(Cdrom { id: device.id.clone().unwrap_or_else(|| format!("cdrom{index}")), port, medium, node })
}

/// The nodes that are flash, and those that they are over.
fn flash(hardware: &Hardware) -> Vec<String> {
    let under = |name: &String| {
        let node = hardware.blockdevs.iter().find(|node| node.node_name == *name)?;
        match &node.file {
            Some(FileRef::Node(under)) => Some(under.clone()),
            _ => None,
        }
    };
    hardware.flash.iter().cloned().chain(hardware.flash.iter().filter_map(under)).collect()
}

/// A node of flash: its file is opened by the flash.
fn of_flash(hardware: &Hardware, node: &Blockdev) -> DiskNode {
    let file = match &node.file {
        Some(FileRef::Inline(file)) => Some(file.filename.clone()),
        Some(FileRef::Node(under)) => {
            hardware.blockdevs.iter().find(|node| node.node_name == *under).and_then(|node| node.filename.clone())
        }
        None => node.filename.clone(),
    };
    DiskNode {
        kind: NodeKind::Flash,
        driver: node.driver.name(),
        file: file.unwrap_or_default(),
        read_only: node.read_only,
        direct: node.cache.direct,
        backing: None,
        aio: None,
        limits: RateLimits::default(),
    }
}
