//! Commands to the devices in slots.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::aside::aside;
use super::command::Command;
use super::cpus;
use super::types::{Empty, NewDeviceId, ObjectProperty};
use super::{ErrorClass, QmpError};
use crate::block::{BlockBackend, ImageSpec};
use crate::cli::{AnyDisk, AnyNet, DiskSpec, DiskTuning, Mac, VhostSpec, with_causes};
use crate::control::VmHandle;
use crate::net::{NetSource, TapSource};
use crate::slots::{self, DeviceKind, DiskNode, NewDevice, NewKind, NodeError, SlotError, SlotsHandle};

const DISK: &str = "virtio-blk-pci";
const NET: &str = "virtio-net-pci";

/// QMP `device_add`, of disks, network interfaces and processors.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct DeviceAdd {
    /// `virtio-blk-pci`, `virtio-net-pci`, or a processor's type.
    driver: String,
    /// Its name; none: one is made.
    id: Option<String>,
    /// The port; none: the first that is free.
    bus: Option<String>,
    /// Its place behind the port: 0 is the only one.
    addr: Option<String>,
    /// A disk's block node.
    drive: Option<String>,
    /// An interface's network.
    netdev: Option<String>,
    /// An interface's address; none: one is made.
    mac: Option<String>,
    /// A processor's socket.
    socket_id: Option<u32>,
    /// Its core in that.
    core_id: Option<u32>,
    /// Its thread of that.
    thread_id: Option<u32>,
}

impl Command for DeviceAdd {
    const NAME: &'static str = "device_add";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        if cpus::is_cpu(&self.driver) {
            let Self { driver, id, bus, addr, drive, netdev, mac, socket_id, core_id, thread_id } = self;
            if [bus, addr, drive, netdev, mac].iter().any(Option::is_some) {
                return Err(QmpError::generic(format!("{driver} takes 'id', 'socket-id', 'core-id' and 'thread-id'")));
            }
            cpus::add(&vm, id, [socket_id, core_id, thread_id]).await?;
            return Ok(Empty {});
        }
        let slots = slots_of(&vm)?;
        cpus::is_none(&vm, self.id.as_deref())?;
        aside(move || self.add(&slots)).await?;
        Ok(Empty {})
    }
}

impl DeviceAdd {
    fn add(self, slots: &SlotsHandle) -> Result<String, QmpError> {
        let Self { driver, id, bus, addr, drive, netdev, mac, socket_id, core_id, thread_id } = self;
        if [socket_id, core_id, thread_id].iter().any(Option::is_some) {
            return Err(QmpError::generic(format!(
                "{driver} is in no socket, core or thread: those are of processors"
            )));
        }
        if let Some(addr) = addr.filter(|addr| !matches!(&**addr, "0x0" | "0" | "00" | "00.0" | "0x0.0" | "0x0.0x0")) {
            return Err(QmpError::generic(format!("A port has slot 0 alone, not addr={addr}")));
        }
        let (kind, node) = match (&*driver, drive, netdev, mac) {
            (DISK, Some(drive), None, None) => (NewKind::Disk(image_of(slots, &drive)?, DiskTuning::default()), drive),
            (NET, None, Some(netdev), mac) => {
                let mac = mac.map(|mac| mac.parse::<Mac>()).transpose();
                let mac = mac.map_err(|e| QmpError::generic(e.to_string()))?;
                return Ok(slots.add_named_net(&netdev, mac, id, bus.as_deref())?);
            }
            (DISK, ..) => return Err(QmpError::generic(format!("{DISK} needs 'drive', and no 'netdev' or 'mac'"))),
            (NET, ..) => return Err(QmpError::generic(format!("{NET} needs 'netdev', and no 'drive'"))),
            _ => {
                let why = format!("'{driver}' can't be added to a VM: {DISK} and {NET} can");
                return Err(QmpError::generic(why));
            }
        };
        Ok(slots.add(NewDevice { id, kind, node: Some(node) }, bus.as_deref())?)
    }
}

/// The image of a block node.
fn image_of(slots: &SlotsHandle, node: &str) -> Result<Arc<dyn BlockBackend>, QmpError> {
    match slots.disk_node(node)? {
        DiskNode::Image(image, _) => Ok(image),
        DiskNode::File(image) => open(slots, &image),
    }
}

/// Opens an image for the VM.
pub(super) fn open(slots: &SlotsHandle, image: &ImageSpec) -> Result<Arc<dyn BlockBackend>, QmpError> {
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
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let id = self.id.strip_prefix(PERIPHERAL).and_then(|rest| rest.strip_prefix('/')).unwrap_or(&self.id);
        match cpus::remove(&vm, id) {
            Some(outcome) => outcome?,
            None => slots_of(&vm)?.remove(id)?,
        }
        Ok(Empty {})
    }
}

/// Where devices are in QEMU's tree of objects.
pub const PERIPHERAL: &str = "/machine/peripheral";
/// What it calls the ports that they are behind.
pub const ROOT_PORT: &str = "pcie-root-port";

/// QMP `qom-list`, of the one place where the devices are that can be added and deleted.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QomList {
    /// `/machine/peripheral`.
    path: String,
}

impl Command for QomList {
    const NAME: &'static str = "qom-list";
    type Reply = Vec<ObjectProperty>;

    async fn run(self, vm: VmHandle) -> Result<Vec<ObjectProperty>, QmpError> {
        if self.path != PERIPHERAL {
            return Err(QmpError {
                class: ErrorClass::DeviceNotFound,
                desc: format!("There is nothing at '{}': only {PERIPHERAL} is there", self.path),
            });
        }
        let slots = slots_of(&vm)?;
        let child = |name, driver| ObjectProperty { name, kind: format!("child<{driver}>") };
        let ports = slots.ports().into_iter().map(|name| child(name, ROOT_PORT));
        let devices = slots.devices().into_iter().map(|device| {
            let driver = match device.kind {
                DeviceKind::Disk => DISK,
                DeviceKind::Net(_) => NET,
                DeviceKind::Entropy => "virtio-rng-pci",
                DeviceKind::Ports => "virtio-serial-pci",
                DeviceKind::Vsock => "vhost-vsock-pci",
                DeviceKind::Balloon => "virtio-balloon-pci",
                DeviceKind::VhostDisk => "vhost-user-blk-pci",
                DeviceKind::VhostNet(_) => NET,
                DeviceKind::VhostFs => "vhost-user-fs-pci",
            };
            child(device.id, driver)
        });
        let own = ObjectProperty { name: "type".into(), kind: "string".into() };
        let processors = cpus::added(&vm).map(|(name, driver)| child(name, driver));
        Ok(std::iter::once(own).chain(ports).chain(devices).chain(processors).collect())
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
            Ok(slots.add(NewDevice { id: spec.id, kind: NewKind::Vhost(opened), node: None }, None)?)
        });
        Ok(NewDeviceId { id: id.await? })
    }
}

impl Command for AddDisk {
    const NAME: &'static str = "x-outboard-add-disk";
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
            let kind = NewKind::Disk(open(&slots, &image)?, tuning);
            Ok(slots.add(NewDevice { id, kind, node: None }, None)?)
        });
        Ok(NewDeviceId { id: id.await? })
    }
}

impl Command for AddNet {
    const NAME: &'static str = "x-outboard-add-net";
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
            Ok(slots.add(NewDevice { id: net.id, kind: NewKind::Net(opened), node: None }, None)?)
        });
        Ok(NewDeviceId { id: id.await? })
    }
}

/// The VM's slots.
pub(super) fn slots_of(vm: &VmHandle) -> Result<SlotsHandle, QmpError> {
    vm.slots().cloned().ok_or_else(|| QmpError::generic("the VM is still being built"))
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

impl From<NodeError> for QmpError {
    fn from(e: NodeError) -> Self {
        Self::generic(with_causes(&e))
    }
}
