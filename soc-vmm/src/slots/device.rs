//! What can stand in a slot, and what it is made from.

use std::sync::Arc;

use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::SlotError;
use crate::block::BlockBackend;
use crate::cli::{BalloonSpec, DiskTuning, Mac};
use crate::control::ListeningSocket;
use crate::net::NetBackend;
use crate::pci::PciFunction;
use crate::virtio::balloon::{BalloonConfig, BalloonEvents, BalloonHandle, Pages};
use crate::virtio::block::{BlockConfig, DiskErrorListener, DiskHandle};
use crate::virtio::console::{ConsoleConfig, ConsoleHandle, PortConfig, PortEvents};
use crate::virtio::entropy::{EntropyConfig, RateLimit};
use crate::virtio::net::{NetConfig, NetCounters, NetLink};
use crate::virtio::vhost::{VhostDevice, VhostKind};
use crate::virtio::vsock::VsockConfig;
use crate::virtio::{self, Plumbing, RateLimits};

/// A device to put into its place.
pub struct NewDevice {
    /// The name that it is known by; none: one is made.
    pub id: Option<String>,
    /// What it is.
    pub kind: NewKind,
    /// The named back end that it uses, which can't be deleted as long as the device is there.
    pub node: Option<String>,
    /// Where it goes.
    pub place: Place,
}

/// Where a device goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The first slot that is free.
    Free,
    /// The slot of the port whose bus has that name.
    Bus(String),
    /// Slot × 8 + function on the root bus itself, before the machine is built.
    Root(u8),
}

/// Something to put into a machine that is being built, in order.
pub enum Planned {
    /// A device.
    Device(NewDevice),
    /// An interface of a network that has a name.
    Named {
        /// The network.
        network: String,
        /// Its address, if one is given.
        mac: Option<Mac>,
        /// The largest packet that the guest shall send.
        mtu: Option<u16>,
        /// Its name.
        id: Option<String>,
        /// Where it goes.
        place: Place,
    },
    /// The balloon, which needs the VM's memory.
    Balloon {
        /// Its name.
        id: Option<String>,
        /// Where it goes.
        place: Place,
    },
    /// A port of a device for ports.
    Port(NewPort),
}

impl Planned {
    /// Where it goes, if it is a device.
    pub fn place(&self) -> Option<&Place> {
        match self {
            Self::Device(NewDevice { place, .. }) | Self::Named { place, .. } | Self::Balloon { place, .. } => {
                Some(place)
            }
            Self::Port(_) => None,
        }
    }
}

/// A port to be.
pub struct NewPort {
    /// The device that it is one of; none: the first.
    pub device: Option<String>,
    /// Its number; none: the first that is free.
    pub number: Option<usize>,
    /// The port.
    pub port: PortConfig,
}

/// A disk to be.
pub struct NewDisk {
    /// Its image.
    pub image: Arc<dyn BlockBackend>,
    /// How it works.
    pub tuning: DiskTuning,
    /// Its serial number; none: its name.
    pub serial: Option<String>,
}

impl NewDisk {
    /// One whose serial number is its name.
    pub fn new(image: Arc<dyn BlockBackend>, tuning: DiskTuning) -> Self {
        Self { image, tuning, serial: None }
    }
}

/// What a new device is.
pub enum NewKind {
    /// A disk.
    Disk(NewDisk),
    /// A network interface.
    Net(NewNet),
    /// A source of entropy, with or without a limit.
    Entropy(Option<RateLimit>),
    /// Ports of byte streams.
    Ports(Vec<PortConfig>),
    /// Sockets between guest and SoC: the guest's CID, and where programs here connect.
    Vsock(u32, ListeningSocket),
    /// A balloon.
    Balloon(NewBalloon),
    /// A device of another process's.
    Vhost(NewVhost),
}

/// A device of another process's to be.
pub struct NewVhost {
    /// The device.
    pub device: VhostDevice,
    /// Its address, if it is a network interface; none: one is made from the VM's name.
    pub mac: Option<Mac>,
}

impl NewVhost {
    /// Gives it an address if it has none.
    pub fn or_mac(self, mac: Mac) -> Self {
        Self { mac: self.mac.or(Some(mac)), ..self }
    }
}

/// A balloon to be.
pub struct NewBalloon {
    /// How it was asked for.
    pub spec: BalloonSpec,
    /// The guest's memory.
    pub pages: Box<dyn Pages>,
    /// Bytes of it.
    pub memory: u64,
}

/// A network interface to be.
pub struct NewNet {
    /// Its network: a back end for each pair of its queues.
    pub backends: Vec<Box<dyn NetBackend>>,
    /// Its address; none: one is made from the VM's name.
    pub mac: Option<Mac>,
    /// The largest packet that the guest shall send; none: its own choice.
    pub mtu: Option<u16>,
    /// What it may send and receive.
    pub limits: RateLimits,
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A virtio-blk device.
    Disk,
    /// A virtio-net device with that address.
    Net(Mac),
    /// A virtio-rng device.
    Entropy,
    /// A virtio-console device.
    Ports,
    /// A virtio-vsock device.
    Vsock,
    /// A virtio-balloon device.
    Balloon,
    /// A virtio-blk device of another process's.
    VhostDisk,
    /// A virtio-net device of another process's, with that address.
    VhostNet(Mac),
    /// A virtio-fs device.
    VhostFs,
}

impl DeviceKind {
    /// The address of a network interface.
    pub fn mac(&self) -> Option<Mac> {
        match self {
            Self::Net(mac) | Self::VhostNet(mac) => Some(*mac),
            _ => None,
        }
    }

    /// Whether kicks without exits are worth pages of the function, which has few.
    pub(super) fn is_kicked_often(&self) -> bool {
        match self {
            Self::Disk | Self::Net(_) | Self::Vsock | Self::VhostDisk | Self::VhostNet(_) | Self::VhostFs => true,
            Self::Entropy | Self::Ports | Self::Balloon => false,
        }
    }
}

/// By what a device in a slot is reached from outside.
#[derive(Clone, Debug)]
pub enum DeviceHandle {
    /// A disk.
    Disk(DiskHandle),
    /// A network interface: its cable, and what it counts.
    Net(Arc<NetLink>, Arc<NetCounters>),
    /// A network interface of another process's: its cable.
    VhostNet(Arc<NetLink>),
    /// Ports.
    Ports(Arc<ConsoleHandle>),
    /// A balloon.
    Balloon(Arc<BalloonHandle>),
    /// There is nothing to do to it.
    Other,
}

/// Who hears of what devices meet.
#[derive(Clone)]
pub struct DeviceListeners {
    /// Of disks whose image fails.
    pub disks: Arc<dyn DiskErrorListener>,
    /// Of programs in the guest that open ports.
    pub ports: Arc<dyn PortEvents>,
    /// Of balloons.
    pub balloons: Arc<dyn BalloonEvents>,
}

impl NewKind {
    /// What names of such devices begin with.
    pub(super) fn prefix(&self) -> &'static str {
        match self {
            Self::Disk(_) => "disk",
            Self::Net(_) => "net",
            Self::Entropy(_) => "rng",
            Self::Ports(_) => "serial",
            Self::Vsock(..) => "vsock",
            Self::Balloon(_) => "balloon",
            Self::Vhost(vhost) => match vhost.device.kind() {
                VhostKind::Block => "disk",
                VhostKind::Net => "net",
                VhostKind::Fs { .. } => "fs",
            },
        }
    }

    /// A disk's serial number, as the guest will see it, if it is one of ours that is known by `id`.
    pub(super) fn serial(&self, id: &str) -> Option<String> {
        let Self::Disk(NewDisk { serial, .. }) = self else { return None };
        Some(serial.as_deref().unwrap_or(id).chars().take(VIRTIO_BLK_ID_BYTES as usize).collect())
    }

    /// What it will be; `address` gives an address to an interface that has none.
    pub(super) fn kind(&self, address: impl FnOnce() -> Mac) -> DeviceKind {
        match self {
            Self::Disk(_) => DeviceKind::Disk,
            Self::Net(net) => DeviceKind::Net(net.mac.unwrap_or_else(address)),
            Self::Entropy(_) => DeviceKind::Entropy,
            Self::Ports(_) => DeviceKind::Ports,
            Self::Vsock(..) => DeviceKind::Vsock,
            Self::Balloon(_) => DeviceKind::Balloon,
            Self::Vhost(vhost) => match vhost.device.kind() {
                VhostKind::Block => DeviceKind::VhostDisk,
                VhostKind::Net => DeviceKind::VhostNet(vhost.mac.unwrap_or_else(address)),
                VhostKind::Fs { .. } => DeviceKind::VhostFs,
            },
        }
    }

    /// Makes the device, which is known by `id`, stands on a back end named `node`, and has the address `mac` if it needs one.
    pub(super) fn make(
        self,
        id: &str,
        node: Option<&str>,
        kind: DeviceKind,
        listeners: &DeviceListeners,
        plumbing: Plumbing<'_>,
    ) -> Result<(Box<dyn PciFunction>, DeviceHandle), SlotError> {
        match (self, kind) {
            (Self::Disk(NewDisk { image, tuning, serial }), _) => {
                let DiskTuning { queues, write_cache, aio, limits, on_error } = tuning;
                let config = BlockConfig {
                    node: node.map(str::to_owned),
                    queues,
                    write_cache,
                    aio,
                    limits,
                    on_error,
                    listener: Some(listeners.disks.clone()),
                    ..BlockConfig::new(id, image, serial.as_deref().unwrap_or(id))
                };
                let (function, handle) = virtio::block::new_with_handle(config, plumbing).map_err(SlotError::Thread)?;
                Ok((function, DeviceHandle::Disk(handle)))
            }
            (Self::Net(net), DeviceKind::Net(mac)) => {
                let NewNet { backends, mtu, limits, mac: _ } = net;
                let config = NetConfig::new(id.into(), backends, mac.0).map_err(|e| SlotError::Thread(e.into()))?;
                let config = NetConfig { mtu, limits, ..config };
                let handle = DeviceHandle::Net(config.link.clone(), config.counters.clone());
                Ok((virtio::net::new(config, plumbing).map_err(SlotError::Thread)?, handle))
            }
            (Self::Net(_), _) => unreachable!("an interface has an address"),
            (Self::Entropy(limit), _) => {
                let config = EntropyConfig { name: id.into(), limit };
                Ok((virtio::entropy::new(config, plumbing).map_err(SlotError::Thread)?, DeviceHandle::Other))
            }
            (Self::Ports(ports), _) => {
                let handle = Arc::new(ConsoleHandle::new().map_err(SlotError::Thread)?);
                let events = listeners.ports.clone();
                let config = ConsoleConfig { name: id.into(), ports, handle: handle.clone(), events };
                let function = virtio::console::new(config, plumbing).map_err(SlotError::Thread)?;
                Ok((function, DeviceHandle::Ports(handle)))
            }
            (Self::Vsock(cid, socket), _) => {
                let config = VsockConfig { name: id.into(), cid, socket };
                Ok((virtio::vsock::new(config, plumbing).map_err(SlotError::Thread)?, DeviceHandle::Other))
            }
            (Self::Vhost(vhost), kind) => {
                let mac = kind.mac().map_or([0; 6], |mac| mac.0);
                let link = vhost.device.link();
                let function = vhost.device.plug(id, mac, plumbing).map_err(SlotError::Thread)?;
                Ok((function, link.map_or(DeviceHandle::Other, DeviceHandle::VhostNet)))
            }
            (Self::Balloon(balloon), _) => {
                let NewBalloon { spec: BalloonSpec { deflate_on_oom, reporting }, pages, memory } = balloon;
                let handle = Arc::new(BalloonHandle::new(memory).map_err(SlotError::Thread)?);
                let events = listeners.balloons.clone();
                let handle_of = handle.clone();
                let name = id.into();
                let config = BalloonConfig { name, deflate_on_oom, reporting, pages, handle: handle_of, events };
                Ok((virtio::balloon::new(config, plumbing)?, DeviceHandle::Balloon(handle)))
            }
        }
    }
}
