//! What monitors ask of slots.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::port::{DiskInfo, Port};
use super::{
    DeviceHandle, DeviceKind, NewDevice, NewPort, NodeError, Occupant, Planned, Reserved, Shared, SlotError,
    SlotsHandle, lock,
};
use crate::block::BlockError;
use crate::cli::with_causes;
use crate::virtio::console::PortStatus;

impl SlotsHandle {
    /// Puts a device into its place; the device's name.
    ///
    /// # Errors
    /// Nothing has changed.
    pub fn add(&self, device: NewDevice) -> Result<String, SlotError> {
        self.shared()?.add(device)
    }

    /// Puts in what was planned; its name, if it has one.
    ///
    /// # Errors
    /// Nothing has changed.
    pub fn put(&self, planned: Planned) -> Result<String, NodeError> {
        match planned {
            Planned::Device(device) => Ok(self.add(device)?),
            Planned::Named { network, mac, mtu, id, place } => self.add_named_net(&network, mac, mtu, id, place),
            Planned::Port(port) => {
                let id = port.port.id.clone();
                self.add_serial_port(port)?;
                Ok(id)
            }
            Planned::Balloon { .. } => Err(SlotError::Late("virtio-balloon-pci").into()),
        }
    }

    /// Gives a device for ports one more; none named: the first that there is.
    ///
    /// # Errors
    /// There is none, or it has no room.
    pub fn add_serial_port(&self, new: NewPort) -> Result<(), SlotError> {
        let shared = self.shared()?;
        let NewPort { device, number, port } = new;
        let ports = lock(&shared.ports);
        let found = ports.iter().find_map(|place| match (&place.occupant, &place.handle) {
            (Some(occupant), Some(DeviceHandle::Ports(handle)))
                if device.as_ref().is_none_or(|id| *id == occupant.id) =>
            {
                Some(handle.clone())
            }
            _ => None,
        });
        drop(ports);
        let console = found.ok_or_else(|| SlotError::NoPorts(device.unwrap_or_default()))?;
        Ok(console.add_at(port, number)?)
    }

    /// Removes a port of a device for ports, if it is one.
    pub fn remove_port(&self, id: &str) -> bool {
        let Some(shared) = self.0.upgrade() else { return false };
        let ports = lock(&shared.ports);
        let consoles = ports.iter().filter_map(|place| match &place.handle {
            Some(DeviceHandle::Ports(handle)) => Some(handle),
            _ => None,
        });
        let mut removed = consoles.map(|console| console.remove(id).is_ok());
        removed.any(|removed| removed)
    }

    /// The ports of all devices for ports.
    pub fn serial_ports(&self) -> Vec<PortStatus> {
        let Some(shared) = self.0.upgrade() else { return Vec::new() };
        let of = |place: &Port| match &place.handle {
            Some(DeviceHandle::Ports(handle)) => handle.ports(),
            _ => Vec::new(),
        };
        lock(&shared.ports).iter().flat_map(of).collect()
    }

    /// The disks that are there, each with what it stands on.
    pub fn disks(&self) -> Vec<DiskInfo> {
        let Some(shared) = self.0.upgrade() else { return Vec::new() };
        lock(&shared.ports).iter().filter_map(Port::disk).collect()
    }

    /// Asks for a device to be taken out: when the guest lets it go, or is reset. For a guest that hasn't looked yet it is just gone.
    ///
    /// # Errors
    /// There is none, or the guest is at it.
    pub fn remove(&self, id: &str) -> Result<(), SlotError> {
        self.shared()?.remove(id)
    }

    /// The devices that are there; one on its way out is.
    pub fn devices(&self) -> Vec<Occupant> {
        let shared = self.0.upgrade();
        shared.iter().flat_map(|shared| shared.occupants()).collect()
    }

    /// By what the device of that name is reached.
    ///
    /// # Errors
    /// There is none.
    pub fn device(&self, id: &str) -> Result<DeviceHandle, SlotError> {
        let shared = self.shared()?;
        let ports = lock(&shared.ports);
        let has_it = |port: &&Port| port.occupant.as_ref().is_some_and(|occupant| occupant.id == id);
        let handle = ports.iter().find(has_it).and_then(|port| port.handle.clone());
        handle.ok_or_else(|| SlotError::NotFound(id.into()))
    }

    /// Makes a disk larger. The machine does not end meanwhile, so that what the image's driver holds is written.
    ///
    /// # Errors
    /// It is as large as it was.
    pub fn resize(&self, id: &str, size: u64) -> Result<(), SlotError> {
        let _kept = self.shared()?;
        match self.device(id)? {
            DeviceHandle::Disk(disk) => disk.resize(size).map_err(|e| SlotError::Resize(id.into(), e)),
            DeviceHandle::Other if self.devices().iter().any(|it| it.id == id && it.kind == DeviceKind::VhostDisk) => {
                Err(SlotError::NotOurs(id.into()))
            }
            _ => Err(SlotError::NoDisk(id.into())),
        }
    }

    /// The VM goes on after it was stopped: disks make the requests again that failed.
    pub fn retry(&self) {
        let Some(shared) = self.0.upgrade() else { return };
        for port in lock(&shared.ports).iter() {
            if let Some(DeviceHandle::Disk(disk)) = &port.handle {
                disk.retry();
            }
        }
    }

    /// The names of the ports.
    pub fn ports(&self) -> Vec<String> {
        let Some(shared) = self.0.upgrade() else { return Vec::new() };
        lock(&shared.ports).iter().filter_map(|port| port.bus().map(str::to_owned)).collect()
    }

    /// Gives the disks' images to another process, or takes them over from it: see [`BlockBackend`](crate::block::BlockBackend). The devices
    /// are halted. What was done to some is taken back where it fails.
    ///
    /// # Errors
    /// Which disk, and why.
    pub fn hand_disks(&self, hand: Hand) -> Result<(), HandError> {
        let disks = self.disks();
        let give = |disk: &DiskInfo, hand| match hand {
            Hand::Over => disk.handle.release(),
            Hand::Back => disk.handle.claim(),
        };
        for (index, disk) in disks.iter().enumerate() {
            if let Err(source) = give(disk, hand) {
                let back = if hand == Hand::Over { Hand::Back } else { Hand::Over };
                for earlier in &disks[..index] {
                    if let Err(e) = give(earlier, back) {
                        tracing::error!(disk = earlier.id, "its image is not as it was: {}", with_causes(&e));
                    }
                }
                return Err(HandError { disk: disk.id.clone(), source });
            }
        }
        if let Ok(reserved) = self.reserved() {
            reserved.elsewhere.store(hand == Hand::Over, Ordering::Release);
        }
        Ok(())
    }

    /// Files that no disk may write.
    ///
    /// # Errors
    /// The VM has ended.
    pub fn reserved(&self) -> Result<Arc<Reserved>, SlotError> {
        Ok(self.shared()?.reserved.clone())
    }

    pub(super) fn shared(&self) -> Result<Arc<Shared>, SlotError> {
        self.0.upgrade().ok_or(SlotError::Ended)
    }
}

impl std::fmt::Debug for SlotsHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SlotsHandle").field("devices", &self.devices()).finish_non_exhaustive()
    }
}

/// Which way images go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hand {
    /// To another process.
    Over,
    /// Here.
    Back,
}

/// A disk whose image stays where it is.
#[derive(Debug, thiserror::Error)]
#[error("disk {disk}")]
pub struct HandError {
    /// Its name.
    pub disk: String,
    /// Why.
    #[source]
    pub source: BlockError,
}
