//! The places of devices, and what is in them.

use super::{DeviceHandle, DeviceKind, Occupant};
use crate::pci::NodeId;
use crate::virtio::block::DiskHandle;

/// A place for a device: a port's slot, which may be empty, or one on the root bus itself.
pub(super) struct Port {
    /// The port; on the root bus the device.
    pub(super) node: NodeId,
    /// Slot × 8 + function on the root bus.
    pub(super) devfn: u8,
    /// Which of both.
    pub(super) seat: Seat,
    pub(super) occupant: Option<Occupant>,
    /// By what the device is reached from outside.
    pub(super) handle: Option<DeviceHandle>,
}

/// Where a device is.
pub(super) enum Seat {
    /// Behind a port, on the bus of that name.
    Behind(String),
    /// On the root bus itself, for as long as the machine is there.
    OnBoard,
}

/// A disk, as monitors see it.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// Its name.
    pub id: String,
    /// Its place in the tree of objects.
    pub path: String,
    /// Its block node, if it stands on one with a name.
    pub node: Option<String>,
    /// By what it is reached: its size, its counters.
    pub handle: DiskHandle,
}

impl Port {
    /// The name of the bus behind it, if it is a port.
    pub(super) fn bus(&self) -> Option<&str> {
        match &self.seat {
            Seat::Behind(name) => Some(name),
            Seat::OnBoard => None,
        }
    }

    /// Its disk, if it has one of ours.
    pub(super) fn disk(&self) -> Option<DiskInfo> {
        match (&self.occupant, &self.handle) {
            (Some(Occupant { id, kind: DeviceKind::Disk, node, .. }), Some(DeviceHandle::Disk(handle))) => {
                let path = format!("/machine/peripheral/{id}/virtio-backend");
                Some(DiskInfo { id: id.clone(), path, node: node.clone(), handle: handle.clone() })
            }
            _ => None,
        }
    }
}
