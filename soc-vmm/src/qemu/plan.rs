//! From what a device, a block node or a network says to something that can be put into a machine: the same on the command line and in
//! QMP.

use std::sync::Arc;
use std::time::Duration;

use super::device::{Disk, Entropy, FileSystem, Net, Port, VhostDisk};
use super::{
    BlockAio, BlockDriver, Blockdev, Device, DeviceKind, FileRef, InlineFile, Limits, Netdev, NetdevKind, Switch, Wrong,
};
use crate::block::{Aio, BlockBackend, FileId, ImageFormat, ImageSpec};
use crate::chardev::{ChardevError, Chardevs};
use crate::cli::{DiskTuning, NetSpec, VhostRole, VhostSpec};
use crate::fds::{FdError, Fds};
use crate::nbd::NbdDisk;
use crate::net::{self, NetSource, TapSource};
use crate::slots::{
    self, DiskNode, NetNode, NewDevice, NewDisk, NewKind, NewPort, NodeError, NodeKind, OpenError, Place, Planned,
    ROOT_BUS, Reserved,
};
use crate::virtio::block::ErrorPolicy;
use crate::virtio::console::PortConfig;
use crate::virtio::entropy::RateLimit;
use crate::virtio::{Rate, RateLimits};

/// What devices are made from.
pub struct World<'a> {
    /// Descriptors that others opened.
    pub fds: &'a Fds,
    /// Character devices.
    pub chardevs: &'a Chardevs,
    /// Files that no disk may write.
    pub reserved: &'a Reserved,
    /// Back ends that have names.
    pub names: &'a dyn Names,
}

/// Where names of back ends lead.
pub trait Names {
    /// The block node of that name.
    ///
    /// # Errors
    /// There is none.
    fn disk_node(&self, name: &str) -> Result<DiskNode, NodeError>;

    /// The limits of that name.
    ///
    /// # Errors
    /// There are none.
    fn limits(&self, name: &str) -> Result<Limits, NodeError>;
}

impl Names for slots::Named {
    fn disk_node(&self, name: &str) -> Result<DiskNode, NodeError> {
        self.disk_node(name)
    }

    fn limits(&self, name: &str) -> Result<Limits, NodeError> {
        self.limits(name)
    }
}

impl Names for slots::SlotsHandle {
    fn disk_node(&self, name: &str) -> Result<DiskNode, NodeError> {
        self.disk_node(name)
    }

    fn limits(&self, name: &str) -> Result<Limits, NodeError> {
        self.limits(name)
    }
}

/// Why it can't be.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// It says something that can't be meant here.
    #[error(transparent)]
    Wrong(#[from] Wrong),
    /// A descriptor can't be had.
    #[error(transparent)]
    Fd(#[from] FdError),
    /// A character device can't be used.
    #[error(transparent)]
    Chardev(#[from] ChardevError),
    /// A name leads nowhere.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A back end can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl From<net::OpenError> for PlanError {
    fn from(e: net::OpenError) -> Self {
        Self::Open(e.into())
    }
}

impl Device {
    /// The place that it asks for, if it is a PCI function: behind a port, or on the root bus itself.
    fn place(&self) -> Result<Place, Wrong> {
        match (self.bus.as_deref(), self.address) {
            (None, _) => Ok(Place::Free),
            (Some(ROOT_BUS), Some(address)) => Ok(Place::Root(address.devfn())),
            (Some(ROOT_BUS), None) => Err(Wrong::new("the root bus needs 'addr'")),
            (Some(_), Some(address)) if address.devfn() != 0 => Err(Wrong::new("a port has slot 0 alone").at("addr")),
            (Some(bus), _) => Ok(Place::Bus(bus.to_owned())),
        }
    }

    /// What it is to be.
    ///
    /// # Errors
    /// What it stands on is not there, or can't be opened.
    pub fn plan(self, world: &World<'_>) -> Result<Planned, PlanError> {
        let place = self.place()?;
        let user = self.id.clone().unwrap_or_else(|| self.driver.clone());
        let Self { driver, id, bus, kind, .. } = self;
        let device = |kind, node| Planned::Device(NewDevice { id: id.clone(), kind, node, place: place.clone() });
        Ok(match kind {
            DeviceKind::Disk(disk) => {
                let node = world.names.disk_node(&disk.drive)?;
                let new =
                    NewDisk { image: image(&node, world)?, tuning: tuning(&disk, &node), serial: disk.serial.clone() };
                device(NewKind::Disk(new), Some(disk.drive))
            }
            DeviceKind::Net(net) => {
                let mac = net.address()?;
                let Net { netdev, host_mtu, .. } = net;
                Planned::Named { network: netdev, mac, mtu: host_mtu, id, place }
            }
            DeviceKind::Entropy(Entropy { max_bytes, period, .. }) => {
                // QEMU's period, where only bytes are given.
                let period = Duration::from_millis(period.unwrap_or(1 << 16).into());
                device(NewKind::Entropy(max_bytes.map(|bytes| RateLimit { bytes, period })), None)
            }
            DeviceKind::Balloon(_) => Planned::Balloon { id, place },
            DeviceKind::Ports => device(NewKind::Ports(Vec::new()), None),
            DeviceKind::Port(Port { chardev, name, nr }) => {
                let end = world.chardevs.take_end(&chardev, &user)?;
                let device = bus.and_then(|bus| bus.strip_suffix(".0").map(str::to_owned));
                Planned::Port(NewPort { device, number: nr.map(usize::from), port: PortConfig { id: user, name, end } })
            }
            DeviceKind::VhostDisk(VhostDisk { chardev, num_queues }) => {
                let role = VhostRole::Disk;
                device(NewKind::Vhost(vhost(world, &chardev, &user, role, num_queues)?), None)
            }
            DeviceKind::FileSystem(FileSystem { chardev, tag, num_request_queues }) => {
                let role = VhostRole::Fs(tag);
                device(NewKind::Vhost(vhost(world, &chardev, &user, role, num_request_queues)?), None)
            }
            _ => {
                let why = "it is there from the start or not at all: a VM can be given disks, interfaces, rng, ports";
                return Err(Wrong::new(why).at(driver).into());
            }
        })
    }
}

fn vhost(
    world: &World<'_>,
    chardev: &str,
    user: &str,
    role: VhostRole,
    queues: Option<u16>,
) -> Result<slots::NewVhost, PlanError> {
    let socket = world.chardevs.take_peer(chardev, user)?;
    Ok(slots::open_vhost(&VhostSpec { socket, role, queues: queues.unwrap_or(1), id: None })?)
}

fn tuning(disk: &Disk, node: &DiskNode) -> DiskTuning {
    let default = ErrorPolicy::default();
    DiskTuning {
        queues: disk.num_queues.unwrap_or(1),
        write_cache: disk.write_cache != Switch::Off,
        aio: node.aio.unwrap_or_default(),
        limits: node.limits,
        on_error: ErrorPolicy {
            read: disk.rerror.on_error().unwrap_or(default.read),
            write: disk.werror.on_error().unwrap_or(default.write),
        },
    }
}

/// The image of a block node, which a device reads and writes.
///
/// # Errors
/// It can't be opened, or is the machine's own.
pub fn image(node: &DiskNode, world: &World<'_>) -> Result<Arc<dyn BlockBackend>, PlanError> {
    match &node.kind {
        NodeKind::Image(image, _) => Ok(image.clone()),
        NodeKind::File(spec) => Ok(slots::open_disk(spec, world.reserved)?),
        NodeKind::Flash => Err(NodeError::Flash(node.file.display().to_string()).into()),
    }
}

impl Blockdev {
    /// Opens it: its name, and what it is.
    ///
    /// # Errors
    /// What it stands on is not there, or can't be opened.
    pub fn open(self, world: &World<'_>) -> Result<(String, DiskNode), PlanError> {
        let aio = self.aio.map(|aio| match aio {
            BlockAio::Threads => Aio::Threads,
            BlockAio::Native | BlockAio::IoUring => Aio::IoUring,
        });
        let driver = self.driver.name();
        let (read_only, direct) = (self.read_only, self.cache.direct);
        let format = match self.driver {
            BlockDriver::File | BlockDriver::HostDevice => {
                let path = self.filename.ok_or_else(|| Wrong::new("it needs 'filename'"))?;
                if let Err(e) = std::fs::metadata(&path) {
                    return Err(Wrong::new(format!("can't open {}: {e}", path.display())).at("filename").into());
                }
                // It is opened by who reads it: only then its locks are known. Used as it is, it is raw; its name is not asked.
                let spec = ImageSpec {
                    path: path.clone(),
                    format: Some(ImageFormat::Raw),
                    read_only,
                    direct,
                    unclaimed: false,
                };
                let kind = NodeKind::File(spec);
                let limits = RateLimits::default();
                let node = DiskNode { kind, driver, file: path, read_only, direct, backing: None, aio, limits };
                return Ok((self.node_name, node));
            }
            BlockDriver::Throttle => {
                let (Some(FileRef::Node(under)), Some(group)) = (self.file, self.throttle_group) else {
                    return Err(Wrong::new("'throttle' needs 'file' and 'throttle-group'").into());
                };
                let below = world.names.disk_node(&under)?;
                let kind = NodeKind::Image(image(&below, world)?, Some(under));
                let limits = rates(world.names.limits(&group)?);
                return Ok((self.node_name, DiskNode { kind, driver, limits, ..below }));
            }
            BlockDriver::Nbd => {
                let server = self.server.ok_or_else(|| Wrong::new("it needs 'server'"))?;
                let export = self.export.unwrap_or_default();
                let disk = NbdDisk::connect(&server.address()?, &export, read_only).map_err(OpenError::from)?;
                let file = disk.name().into();
                let (kind, limits) = (NodeKind::Image(Arc::new(disk), None), RateLimits::default());
                let node = DiskNode { kind, driver, file, read_only, direct, backing: None, aio, limits };
                return Ok((self.node_name, node));
            }
            BlockDriver::Raw => ImageFormat::Raw,
            BlockDriver::Qcow2 => ImageFormat::Qcow2,
        };
        // What a file's node says holds for an image in it.
        let (file, under, over) = match self.file {
            Some(FileRef::Node(name)) => {
                let node = world.names.disk_node(&name)?;
                if node.driver == BlockDriver::Nbd.name() && format == ImageFormat::Raw {
                    // Its bytes are the disk's already.
                    let kind = NodeKind::Image(image(&node, world)?, Some(name));
                    let read_only = read_only || node.read_only;
                    return Ok((self.node_name, DiskNode { kind, driver, read_only, ..node }));
                }
                if !matches!(node.kind, NodeKind::File(_)) {
                    return Err(Wrong::new(format!("'{name}' is no file's node")).at("file").into());
                }
                (node.file.clone(), Some(node), Some(name))
            }
            Some(FileRef::Inline(InlineFile { filename, .. })) => (filename, None, None),
            None => return Err(Wrong::new(format!("'{driver}' needs 'file'")).into()),
        };
        let read_only = read_only || under.as_ref().is_some_and(|node| node.read_only);
        let direct = direct || under.as_ref().is_some_and(|node| node.direct);
        let spec = ImageSpec { path: file.clone(), format: Some(format), read_only, direct, unclaimed: false };
        let image = slots::open_disk(&spec, world.reserved)?;
        let backing = self.backing.map(|backing| check_backing(&*image, backing, world)).transpose()?.flatten();
        let aio = aio.or(under.and_then(|node| node.aio));
        let (kind, limits) = (NodeKind::Image(image, over), RateLimits::default());
        let node = DiskNode { kind, driver, file, read_only, direct, backing, aio, limits };
        Ok((self.node_name, node))
    }
}

/// The node of an image's backing file, if that is the file that the image names; none: it names none. Who says what a disk stands on
/// trusts no image to say it.
fn check_backing(
    image: &dyn BlockBackend,
    backing: Option<String>,
    world: &World<'_>,
) -> Result<Option<String>, PlanError> {
    let wrong = |why: String| Err(Wrong::new(why).at("backing").into());
    let named = image.files().get(1);
    match (backing, named) {
        (None, None) => Ok(None),
        (None, Some(_)) => {
            wrong("the image names a backing file, and shall have none: name its node, or leave it out".into())
        }
        (Some(name), None) => wrong(format!("the image names no backing file, and '{name}' shall be it: write null")),
        (Some(name), Some(file)) => {
            let node = world.names.disk_node(&name)?;
            let own = std::fs::metadata(&node.file).map(|file| FileId::of(&file));
            if own.is_ok_and(|own| own == *file) {
                return Ok(Some(name));
            }
            wrong(format!("the image names another backing file than that of '{name}', {}", node.file.display()))
        }
    }
}

/// Limits as disks have them: what may come at once is a tenth of a second's, unless it is said.
fn rates(limits: Limits) -> RateLimits {
    let rate = |per_second: u64, most: u64| match (per_second, most) {
        (0, _) => None,
        (per_second, 0) => Some(Rate::new(per_second)),
        (per_second, burst) => Some(Rate { per_second, burst }),
    };
    RateLimits {
        operations: rate(limits.iops_total, limits.iops_total_max),
        bytes: rate(limits.bps_total, limits.bps_total_max),
    }
}

impl Netdev {
    /// Opens it: its name, and what it is. May take long: its peer may be slow.
    ///
    /// # Errors
    /// A descriptor can't be had, or its peer can't be reached.
    pub fn open(self, world: &World<'_>) -> Result<(String, NetNode), PlanError> {
        for unused in self.unused_descriptors() {
            drop(world.fds.take(&unused)?);
        }
        let (descriptors, id) = (self.descriptors(), self.id.clone());
        let source = match self.kind {
            NetdevKind::Tap if !descriptors.is_empty() => {
                let fds = descriptors.iter().map(|fd| world.fds.take(fd)).collect::<Result<Vec<_>, _>>()?;
                return Ok((id, NetNode::Own(slots::passed_net(fds)?)));
            }
            NetdevKind::Tap => {
                let name = self.ifname.unwrap_or_default();
                // The notation of --net knows what a name is.
                let text = format!("tap={},queues={}", name.replace(',', ",,"), self.queues.unwrap_or(1));
                let spec = text.parse::<NetSpec>().map_err(|e| Wrong::new(e.to_string()).at("ifname"))?;
                match spec.source {
                    NetSource::Tap(TapSource::Inherited(_)) => {
                        return Err(Wrong::new("a descriptor is given as 'fd'").at("ifname").into());
                    }
                    source => source,
                }
            }
            NetdevKind::User => return Ok((id, NetNode::Own(slots::user_net()?))),
            NetdevKind::Stream => {
                let path = self.addr.map(|addr| addr.path).unwrap_or_default();
                let seconds = self.reconnect.filter(|seconds| *seconds > 0);
                NetSource::Stream { path, reconnect: seconds.map(|seconds| Duration::from_secs(seconds.into())) }
            }
            NetdevKind::VhostUser => {
                let chardev = self.chardev.unwrap_or_default();
                let vhost = vhost(world, &chardev, &id, VhostRole::Net(None), self.queues)?;
                return Ok((id, NetNode::Vhost(vhost)));
            }
        };
        let spec = NetSpec { source, mtu: None, limits: RateLimits::default(), mac: None, id: None };
        Ok((id, NetNode::Own(slots::open_net(&spec)?)))
    }
}
