//! Commands to the devices in slots.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::aside::aside;
use super::cdrom::in_no_drive;
use super::command::Command;
use super::cpus;
use super::jobs::unwritten;
use super::tree::in_peripheral;
use super::types::{Empty, NewDeviceId};
use super::{ErrorClass, QmpError};
use crate::block::{BlockBackend, ImageSpec};
use crate::cli::{AnyDisk, AnyNet, DiskSpec, VhostSpec, with_causes};
use crate::control::VmHandle;
use crate::net::{NetSource, TapSource};
use crate::qemu::{Cpu, Device, DeviceKind, PlanError, World};
use crate::slots::{self, NewDevice, NewDisk, NewKind, NodeError, Place, SlotError, SlotsHandle};

pub(super) const DISK: &str = "virtio-blk-pci";
pub(super) const NET: &str = "virtio-net-pci";

/// QMP `device_add`, of what [`Device`] can be while the guest runs.
impl Command for Device {
    const NAME: &'static str = "device_add";
    const ALTERS: bool = true;
    const PLUGS: bool = true;
    // Numbers and truths are written as such, on the command line too.
    const FEATURES: &'static [&'static str] = &["json-cli", "json-cli-hotplug"];
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        if let DeviceKind::Cpu(Cpu { socket_id, core_id, thread_id, .. }) = self.kind {
            cpus::add(&vm, self.id, [socket_id, core_id, thread_id]).await?;
            return Ok(Empty {});
        }
        slots_of(&vm)?;
        cpus::is_none(&vm, self.id.as_deref())?;
        if let DeviceKind::Disk(disk) = &self.kind {
            in_no_drive(&vm, &disk.drive)?;
            unwritten(&vm, &disk.drive)?;
        }
        in_world(vm, move |slots, world| Ok(slots.put(self.plan(world)?)?)).await?;
        Ok(Empty {})
    }
}

/// Opens an image for the VM.
fn open(slots: &SlotsHandle, image: &ImageSpec) -> Result<Arc<dyn BlockBackend>, QmpError> {
    slots::open_disk(image, &*slots.reserved()?).map_err(|e| QmpError::generic(with_causes(&e)))
}

/// QMP `device_del`: the guest is asked; `DEVICE_DELETED` tells that it let go.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DeviceDel {
    /// The device, or its place in the tree of objects.
    id: String,
}

impl Command for DeviceDel {
    const NAME: &'static str = "device_del";
    const ALTERS: bool = true;
    const PLUGS: bool = true;
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let id = in_peripheral(&self.id).unwrap_or(&self.id);
        let slots = slots_of(&vm)?;
        match cpus::remove(&vm, id) {
            Some(outcome) => outcome?,
            None if slots.remove_port(id) => vm.port_deleted(id),
            None => slots.remove(id)?,
        }
        Ok(Empty {})
    }
}

/// `x-outboard-add-disk`, a command of ours: `soc-vmm add-disk`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AddDisk(Add);

/// `x-outboard-add-net`, a command of ours: `soc-vmm add-net`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AddNet(Add);

/// A device as the command line of `run` has it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Add {
    /// The option's value.
    pub spec: String,
    /// Where paths in it begin that don't begin at the root.
    pub directory: PathBuf,
}

impl Add {
    fn parse<T: FromStr<Err: std::fmt::Display>>(&self) -> Result<T, QmpError> {
        self.spec.parse().map_err(|e: T::Err| QmpError::generic(e.to_string()))
    }

    fn absolute(&self, path: &Path) -> PathBuf {
        self.directory.join(path)
    }

    async fn add_vhost(&self, vm: &VmHandle, mut spec: VhostSpec) -> Result<NewDeviceId, QmpError> {
        let slots = slots_of(vm)?;
        cpus::is_none(vm, spec.id.as_deref())?;
        spec.socket = self.absolute(&spec.socket);
        let id = aside(move || {
            let opened = slots::open_vhost(&spec).map_err(|e| QmpError::generic(with_causes(&e)))?;
            Ok(slots.add(NewDevice { id: spec.id, kind: NewKind::Vhost(opened), node: None, place: Place::Free })?)
        });
        Ok(NewDeviceId { id: id.await? })
    }
}

impl Command for AddDisk {
    const NAME: &'static str = "x-outboard-add-disk";
    const ALTERS: bool = true;
    const PLUGS: bool = true;
    type Reply = NewDeviceId;

    async fn run(self, vm: VmHandle) -> Result<NewDeviceId, QmpError> {
        let slots = slots_of(&vm)?;
        let DiskSpec { mut image, id, tuning } = match self.0.parse()? {
            AnyDisk::Image(disk) => disk,
            AnyDisk::Vhost(disk) => return self.0.add_vhost(&vm, disk).await,
        };
        cpus::is_none(&vm, id.as_deref())?;
        image.path = self.0.absolute(&image.path);
        let id = aside(move || {
            let kind = NewKind::Disk(NewDisk::new(open(&slots, &image)?, tuning));
            Ok(slots.add(NewDevice { id, kind, node: None, place: Place::Free })?)
        });
        Ok(NewDeviceId { id: id.await? })
    }
}

impl Command for AddNet {
    const NAME: &'static str = "x-outboard-add-net";
    const ALTERS: bool = true;
    const PLUGS: bool = true;
    type Reply = NewDeviceId;

    async fn run(self, vm: VmHandle) -> Result<NewDeviceId, QmpError> {
        let slots = slots_of(&vm)?;
        let mut net = match self.0.parse()? {
            AnyNet::Own(net) => net,
            AnyNet::Vhost(net) => return self.0.add_vhost(&vm, net).await,
        };
        cpus::is_none(&vm, net.id.as_deref())?;
        match &mut net.source {
            NetSource::Stream { path, .. } => *path = self.0.absolute(path),
            NetSource::Tap(TapSource::Named { .. }) => {}
            // Any number could be meant: those that the VM's own files have, too.
            NetSource::Tap(TapSource::Inherited(_)) => {
                return Err(QmpError::generic("tap=fd: passes what run was started with; name the interface"));
            }
        }
        let id = aside(move || {
            let opened = slots::open_net(&net).map_err(|e| QmpError::generic(with_causes(&e)))?;
            Ok(slots.add(NewDevice { id: net.id, kind: NewKind::Net(opened), node: None, place: Place::Free })?)
        });
        Ok(NewDeviceId { id: id.await? })
    }
}

/// Does what devices and their back ends are made by, with all that they are made from, where it may take long.
pub(super) async fn in_world<T: Send + 'static>(
    vm: VmHandle,
    work: impl FnOnce(&SlotsHandle, &World<'_>) -> Result<T, QmpError> + Send + 'static,
) -> Result<T, QmpError> {
    let slots = slots_of(&vm)?;
    let work = move || {
        let reserved = slots.reserved()?;
        work(&slots, &World { fds: vm.fds(), chardevs: vm.chardevs(), reserved: &reserved, names: &slots })
    };
    aside(work).await
}

/// Why nothing can be asked of a machine.
pub(super) const NO_MACHINE: &str = "there is no machine, or it is still being built";

/// The VM's slots.
pub(super) fn slots_of(vm: &VmHandle) -> Result<SlotsHandle, QmpError> {
    vm.slots().cloned().ok_or_else(|| QmpError::generic(NO_MACHINE))
}

impl From<SlotError> for QmpError {
    fn from(e: SlotError) -> Self {
        let class = match e {
            SlotError::NotFound(_) => ErrorClass::DeviceNotFound,
            _ => ErrorClass::GenericError,
        };
        Self { class, desc: with_causes(&e) }
    }
}

impl From<PlanError> for QmpError {
    fn from(e: PlanError) -> Self {
        Self::generic(with_causes(&e))
    }
}

impl From<NodeError> for QmpError {
    fn from(e: NodeError) -> Self {
        Self::generic(with_causes(&e))
    }
}
