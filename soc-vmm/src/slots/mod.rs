//! The slots of the machine's PCI Express ports, and the disks and network interfaces in them: there from the start, or put in and taken
//! out while the guest runs.
//!
//! A device is made, its image opened and its network connected, on the thread of who asks; only then it is plugged in, under the
//! fabric's lock. It leaves when the guest lets it go ([`crate::pci::Fabric::ask_out`]): the thread on which that happens hands it to
//! another one, since the end of a device waits for its back end, and whoever serves IOREQs doesn't.
//!
//! Monitors have a [`SlotsHandle`], which doesn't keep the machine. Locks, in the order in which they are taken: the back ends that have
//! names, the list of ports, the fabric.

mod backend;
mod device;
mod handle;
mod named;
mod port;
#[cfg(test)]
mod tests;
mod ways;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{Builder, JoinHandle};

use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

pub use backend::{OpenError, Reserved, open_disk, open_net, open_vhost, passed_net, user_net};
pub use device::{
    DeviceHandle, DeviceKind, DeviceListeners, NewBalloon, NewDevice, NewDisk, NewKind, NewNet, NewPort, NewVhost,
    Place, Planned,
};
pub use handle::{Hand, HandError};
pub use named::{DiskNode, Named, NetNode, NodeError, NodeInfo, NodeKind};
pub use port::DiskInfo;
pub use ways::{Way, Ways};

use self::port::{Port, Seat};
use crate::block::BlockError;
use crate::bus::Wake;
use crate::cli::Mac;
use crate::pci::{Fabric, NodeId, PciFunction, Pirqs, PlugError, Requester, RootPort, SlotSink};
use crate::virtio::balloon::BalloonError;
use crate::virtio::console::PortError;
use crate::virtio::{NotifyPages, Plumbing};

/// The bus that root ports are on.
pub const ROOT_BUS: &str = "pcie.0";
/// Most buses that a message names.
const MOST_BUSES: usize = 8;

/// Most characters of a device's or a back end's name.
pub(crate) const ID_MAX: usize = 64;

/// A device in a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Occupant {
    /// Its name.
    pub id: String,
    /// What it is.
    pub kind: DeviceKind,
    /// The bus that it is on.
    pub bus: String,
    /// The named back end that it stands on.
    pub node: Option<String>,
    /// A disk's serial number.
    serial: Option<String>,
}

impl Occupant {
    /// Whether it stands on that named back end: a network, or else a disk's.
    pub fn uses(&self, node: &str, net: bool) -> bool {
        self.node.as_deref() == Some(node) && self.kind.mac().is_some() == net
    }
}

/// Why a device can't be put in or taken out.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// Its name isn't one.
    #[error("id={0}: an id is a letter, then letters, digits and any of '-', '.', '_', at most {ID_MAX} characters")]
    Malformed(String),
    /// Another device has its name.
    #[error("id={0} is a device of this VM already: give another id")]
    Taken(String),
    /// A network could not tell two interfaces apart.
    #[error("mac= is the address of '{0}' already: give another one, or leave it out")]
    Address(String),
    /// A guest could not tell two disks apart.
    #[error(
        "id={0}: another disk's serial number would be the same: ids of disks differ in their first {VIRTIO_BLK_ID_BYTES} characters"
    )]
    Serial(String),
    /// The back end is another device's.
    #[error("'{0}' is in use by '{1}': give each device a back end of its own")]
    InUse(String, String),
    /// Every port has a device.
    #[error("all {0} slots have a device: remove one first")]
    Full(usize),
    /// That port has one.
    #[error("the slot of {0} has a device: remove it first, or leave the bus out")]
    Occupied(String),
    /// There is no such port.
    #[error("there is no bus '{0}': buses are {1}")]
    NoBus(String, String),
    /// It is there from the start or not at all.
    #[error("{0} can't be added to a VM: give it at its start")]
    Late(&'static str),
    /// It stands on the root bus itself.
    #[error("'{0}' is on the root bus: what can be put in and taken out is behind root ports")]
    OnBoard(String),
    /// There is no such device for ports.
    #[error("there is no device for ports '{0}': give the VM a virtio-serial-pci first")]
    NoPorts(String),
    /// A port can't be added.
    #[error(transparent)]
    Port(#[from] PortError),
    /// There is no such device.
    #[error("there is no device '{0}' in a slot")]
    NotFound(String),
    /// It is something else.
    #[error("'{0}' is no disk")]
    NoDisk(String),
    /// Its size is its back end's to change.
    #[error("'{0}' is another process's disk: have that one make it larger, and the guest sees it")]
    NotOurs(String),
    /// It can't become as large as that.
    #[error("'{0}' keeps its size")]
    Resize(String, #[source] BlockError),
    /// It is on its way in or out.
    #[error(
        "the guest is at the slot of '{0}', which was just put in or is asked for already: try again in some seconds, or reset the VM"
    )]
    Busy(String),
    /// The process is at its limits.
    #[error("no thread or descriptor is left for a device (look at the limits of the VM's process)")]
    Thread(#[source] io::Error),
    /// It doesn't fit.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// No balloon can be as it shall be.
    #[error("--balloon")]
    Balloon(#[from] BalloonError),
    /// There is no machine any more.
    #[error("the VM has ended")]
    Ended,
}

/// Hears of devices.
pub trait SlotListener: Send + Sync {
    /// The device is gone: its thread has ended, and its files are closed unless a back end with a name holds them.
    fn deleted(&self, id: &str);
}

/// What the slots are made of.
pub struct SlotParts {
    /// What the ports are plugged into.
    pub fabric: Arc<Mutex<Fabric>>,
    /// What functions are connected by.
    pub ways: Ways,
    /// Where kicks may come from.
    pub notify: Arc<NotifyPages>,
    /// Wakes the thread that serves IOREQs.
    pub wake: Arc<dyn Wake>,
    /// Where their pins go.
    pub pirqs: Arc<Pirqs>,
    /// Hears of devices that are gone.
    pub listener: Arc<dyn SlotListener>,
    /// Who hears of what devices meet.
    pub device_listeners: DeviceListeners,
    /// The VM's name, from which addresses are made.
    pub machine: String,
    /// Names of other devices, which none in a slot may have.
    pub names: Vec<String>,
    /// Files that no disk may write.
    pub reserved: Arc<Reserved>,
    /// Back ends that have names from the start.
    pub named: Named,
}

/// A machine's slots; keeps them until [`Slots::end`].
pub struct Slots {
    shared: Arc<Shared>,
    reaper: JoinHandle<()>,
}

/// The way to a machine's slots for as long as it is there. Any thread may use it; cheap to clone.
#[derive(Clone)]
pub struct SlotsHandle(Weak<Shared>);

struct Shared {
    ways: Ways,
    notify: Arc<NotifyPages>,
    wake: Arc<dyn Wake>,
    pirqs: Arc<Pirqs>,
    listeners: DeviceListeners,
    machine: String,
    names: Vec<String>,
    reserved: Arc<Reserved>,
    ports: Arc<Mutex<Vec<Port>>>,
    named: Mutex<Named>,
    /// Nothing can be put on the root bus itself any more.
    closed: AtomicBool,
    /// The last of these to be dropped: [`Slots::end`] waits for its end, and by then images with names are closed.
    fabric: Arc<Mutex<Fabric>>,
}

impl Slots {
    /// None yet.
    ///
    /// # Errors
    /// No thread is left for them.
    pub fn new(parts: SlotParts) -> io::Result<Self> {
        let SlotParts { fabric, ways, notify, wake, pirqs, listener, device_listeners, .. } = parts;
        let SlotParts { machine, names, reserved, named, .. } = parts;
        let ports = Arc::<Mutex<Vec<Port>>>::default();
        let (emptied, receiver) = channel();
        let reaper = {
            let ports = ports.clone();
            Builder::new().name("slots".into()).spawn(move || reap(&receiver, &ports, &*listener))?
        };
        // It ends with the fabric.
        lock(&fabric).give_to(Box::new(Emptied(emptied)));
        let (listeners, named) = (device_listeners, Mutex::new(named));
        let shared = Shared {
            fabric,
            ways,
            notify,
            wake,
            pirqs,
            listeners,
            machine,
            names,
            reserved,
            ports,
            named,
            closed: AtomicBool::new(false),
        };
        Ok(Self { shared: Arc::new(shared), reaper })
    }

    /// Adds an empty port at `devfn` on the root bus, whose bus has that name and whose slot has that number.
    ///
    /// # Errors
    /// The place is taken.
    pub fn add_port(&self, name: &str, devfn: u8, number: u16) -> Result<(), PlugError> {
        let Shared { fabric, ways, pirqs, ports, .. } = &*self.shared;
        let way = ways.of_function();
        let mut port = RootPort::new(number, pirqs.wire(devfn >> 3), &*way.messages).named(name);
        ways.show_line(port.config_mut(), devfn >> 3);
        let mut fabric = lock(fabric);
        let node = fabric.plug(None, devfn, Box::new(port))?;
        fabric.identify(node, way.requester);
        drop(fabric);
        lock(ports).push(Port { node, devfn, seat: Seat::Behind(name.to_owned()), occupant: None, handle: None });
        Ok(())
    }

    /// The machine is built: from now on devices come behind ports alone.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
    }

    /// What functions are connected by.
    pub fn ways(&self) -> &Ways {
        &self.shared.ways
    }

    /// The way to them.
    pub fn handle(&self) -> SlotsHandle {
        SlotsHandle(Arc::downgrade(&self.shared))
    }

    /// Waits until what was taken out has ended too, once the machine is gone.
    pub fn end(self) {
        drop(self.shared);
        // A device that fails to end has said so itself.
        let _ = self.reaper.join();
    }
}

impl Shared {
    fn add(&self, new: NewDevice) -> Result<String, SlotError> {
        self.add_or_return(new).map_err(|(why, _)| why)
    }

    /// Adds it, or gives it back where it is refused; what can't be made is lost.
    fn add_or_return(&self, new: NewDevice) -> Result<String, (SlotError, Option<Box<NewDevice>>)> {
        let mut ports = lock(&self.ports);
        let (id, kind, seat) = match self.admit(&new, &ports) {
            Ok(admitted) => admitted,
            Err(why) => return Err((why, Some(Box::new(new)))),
        };
        let inserted = match seat {
            Found::Port(at) => self.insert(new, &id, kind, &mut ports[at]),
            Found::Board(devfn) => self.plug(new, &id, kind, devfn).map(|port| ports.push(port)),
        };
        match inserted {
            Ok(()) => Ok(id),
            Err(why) => Err((why, None)),
        }
    }

    /// Under which name and as what a device can be added, and where.
    fn admit(&self, new: &NewDevice, ports: &[Port]) -> Result<(String, DeviceKind, Found), SlotError> {
        let others: Vec<&Occupant> = ports.iter().filter_map(|port| port.occupant.as_ref()).collect();
        let kind = new.kind.kind(|| self.address(&others));
        let id = new.id.clone().unwrap_or_else(|| self.name(new.kind.prefix(), &others));
        if !is_name(&id) {
            return Err(SlotError::Malformed(id));
        }
        if self.is_taken(&id, &others) || ports.iter().any(|port| port.bus() == Some(&id)) {
            return Err(SlotError::Taken(id));
        }
        let serial = new.kind.serial(&id);
        if serial.is_some() && others.iter().any(|other| other.serial == serial) {
            return Err(SlotError::Serial(id));
        }
        // Disks and networks have names of their own.
        let is_net = kind.mac().is_some();
        let has_it = |other: &&&Occupant| new.node.as_deref().is_some_and(|node| other.uses(node, is_net));
        if let (Some(node), Some(other)) = (&new.node, others.iter().find(has_it)) {
            return Err(SlotError::InUse(node.clone(), other.id.clone()));
        }
        let has_address = |other: &&&Occupant| kind.mac().is_some() && other.kind.mac() == kind.mac();
        if let Some(other) = others.iter().find(has_address) {
            return Err(SlotError::Address(other.id.clone()));
        }
        let found = match &new.place {
            Place::Free => Found::Port(Self::free_port(ports, None)?),
            Place::Bus(name) => Found::Port(Self::free_port(ports, Some(name))?),
            Place::Root(_) if self.closed.load(Ordering::Acquire) => return Err(SlotError::OnBoard(id)),
            Place::Root(devfn) => Found::Board(*devfn),
        };
        Ok((id, kind, found))
    }

    fn insert(&self, new: NewDevice, id: &str, kind: DeviceKind, port: &mut Port) -> Result<(), SlotError> {
        let (occupant, made) = self.make(new, id, kind, port.devfn, port.bus().unwrap_or_default())?;
        let Made { function, handle, requester } = made;
        lock(&self.fabric).insert(port.node, function, requester)?;
        port.occupant = Some(occupant);
        port.handle = Some(handle);
        Ok(())
    }

    /// Plugs it into the root bus itself.
    fn plug(&self, new: NewDevice, id: &str, kind: DeviceKind, devfn: u8) -> Result<Port, SlotError> {
        let (occupant, made) = self.make(new, id, kind, devfn, ROOT_BUS)?;
        let Made { function, handle, requester } = made;
        let mut fabric = lock(&self.fabric);
        let node = fabric.plug(None, devfn, function)?;
        fabric.identify(node, requester);
        Ok(Port { node, devfn, seat: Seat::OnBoard, occupant: Some(occupant), handle: Some(handle) })
    }

    /// Makes the function of a device that is reached by the pins of `devfn`.
    fn make(
        &self,
        new: NewDevice,
        id: &str,
        kind: DeviceKind,
        devfn: u8,
        bus: &str,
    ) -> Result<(Occupant, Made), SlotError> {
        let way = self.ways.of_function();
        // Virtio's DMA goes past an IOMMU unless the driver agrees to VIRTIO_F_ACCESS_PLATFORM (virtio 1.2 §6.1), which isn't offered.
        let memory = self.ways.memory();
        let notify = if kind.is_kicked_often() { self.notify.clone() } else { Arc::default() };
        let line = self.pirqs.wire(devfn >> 3);
        let plumbing = Plumbing { memory, messages: &*way.messages, line, notify, wake: self.wake.clone() };
        let (bus, serial) = (bus.to_owned(), new.kind.serial(id));
        let (mut function, handle) = new.kind.make(id, new.node.as_deref(), kind, &self.listeners, plumbing)?;
        self.ways.show_line(function.config_mut(), devfn >> 3);
        let occupant = Occupant { id: id.to_owned(), kind, bus, node: new.node, serial };
        Ok((occupant, Made { function, handle, requester: way.requester }))
    }

    fn free_port(ports: &[Port], bus: Option<&str>) -> Result<usize, SlotError> {
        let buses = || ports.iter().filter_map(Port::bus);
        let Some(name) = bus else {
            return ports
                .iter()
                .position(|port| port.occupant.is_none())
                .ok_or_else(|| SlotError::Full(buses().count()));
        };
        let at = ports.iter().position(|port| port.bus() == Some(name));
        let at = at.ok_or_else(|| {
            let some: Vec<&str> = buses().take(MOST_BUSES).collect();
            let more = if buses().count() > MOST_BUSES { ", …" } else { "" };
            SlotError::NoBus(name.into(), format!("{}{more}", some.join(", ")))
        })?;
        match &ports[at].occupant {
            Some(_) => Err(SlotError::Occupied(name.into())),
            None => Ok(at),
        }
    }

    fn remove(&self, id: &str) -> Result<(), SlotError> {
        let ports = lock(&self.ports);
        let has_it = |port: &&Port| port.occupant.as_ref().is_some_and(|occupant| occupant.id == id);
        let port = ports.iter().find(has_it).ok_or_else(|| SlotError::NotFound(id.into()))?;
        if port.bus().is_none() {
            return Err(SlotError::OnBoard(id.into()));
        }
        match lock(&self.fabric).ask_out(port.node) {
            // Out of the slot, and about to be out of the list.
            Ok(()) | Err(PlugError::Empty) => Ok(()),
            Err(PlugError::Busy) => Err(SlotError::Busy(id.into())),
            Err(e) => Err(e.into()),
        }
    }

    fn occupants(&self) -> Vec<Occupant> {
        lock(&self.ports).iter().filter_map(|port| port.occupant.clone()).collect()
    }

    /// The device that uses a named back end: a network, or else a disk's.
    fn user_of(&self, node: &str, net: bool) -> Option<String> {
        self.occupants().into_iter().find(|occupant| occupant.uses(node, net)).map(|user| user.id)
    }

    fn is_taken(&self, id: &str, others: &[&Occupant]) -> bool {
        self.names.iter().any(|name| name == id) || others.iter().any(|other| other.id == id)
    }

    /// A name that no device has.
    fn name(&self, prefix: &str, others: &[&Occupant]) -> String {
        let mut names = (0..).map(|n| format!("{prefix}{n}"));
        names.find(|name| !self.is_taken(name, others)).unwrap_or_default()
    }

    /// An address that no interface has.
    fn address(&self, others: &[&Occupant]) -> Mac {
        let mut addresses = (0..=others.len()).map(|n| Mac::of(&self.machine, n));
        let is_free = |mac: &Mac| others.iter().all(|other| other.kind.mac() != Some(*mac));
        addresses.find(is_free).unwrap_or_else(|| Mac::of(&self.machine, 0))
    }
}

/// Where a device goes.
enum Found {
    /// The port of that index.
    Port(usize),
    /// Slot × 8 + function on the root bus itself.
    Board(u8),
}

/// A device that is not plugged in yet.
struct Made {
    function: Box<dyn PciFunction>,
    handle: DeviceHandle,
    requester: Requester,
}

/// What was taken out of a port's slot.
type Taken = (NodeId, Vec<Box<dyn PciFunction>>);

/// Passes on what was taken out.
struct Emptied(Sender<Taken>);

impl SlotSink for Emptied {
    fn emptied(&self, port: NodeId, functions: Vec<Box<dyn PciFunction>>) {
        // The other end goes after this one.
        let _ = self.0.send((port, functions));
    }
}

/// Ends what was taken out, and frees its slot.
fn reap(taken: &Receiver<Taken>, ports: &Mutex<Vec<Port>>, listener: &dyn SlotListener) {
    while let Ok((node, functions)) = taken.recv() {
        // Each waits for its thread.
        drop(functions);
        let emptied = |port: &mut Port| {
            port.handle = None;
            port.occupant.take()
        };
        let occupant = lock(ports).iter_mut().find(|port| port.node == node).and_then(emptied);
        if let Some(occupant) = occupant {
            listener.deleted(&occupant.id);
        }
    }
}

/// Whether it is a name as QEMU and libvirt know them.
pub(crate) fn is_name(s: &str) -> bool {
    let tail = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    s.len() <= ID_MAX && s.starts_with(|c: char| c.is_ascii_alphabetic()) && s.chars().all(tail)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Slots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slots").field("devices", &self.shared.occupants()).finish_non_exhaustive()
    }
}
