//! The PCI fabric: functions on buses, configuration accesses to them, and the windows that they answer.
//!
//! It stands behind the machine's fixed devices on both buses: what none of those claims comes here with its full address.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::assign::{Apertures, NoRoom, fits_a_bridge};
use super::bar::{Signal, Window};
use super::config::ConfigSpace;
use super::function::PciFunction;
use super::host_bridge::{HostBridge, MemoryView};
use super::requester::Requester;
use super::root_port::{Asked, RootPort};
use super::window::Gate;
use crate::bus::{Access, Answer, Deferred, Device, Ticket};

/// Configuration address (PCI Local Bus 3.0 §3.2.2.3.2), 4 bytes.
const CONFIG_ADDRESS: u64 = 0xcf8;
/// Configuration data, 4 bytes.
const CONFIG_DATA: u64 = 0xcfc;
/// The configuration address's enable bit.
const CONFIG_ENABLE: u32 = 1 << 31;
/// Slot and function of the host bridge.
const HOST_BRIDGE: u8 = 0;

/// What the fabric asks of the machine around it.
pub trait Platform: Send + Sync {
    /// Shows the guest its memory so. `done` is answered once the guest sees it; none where nobody waits.
    fn show(&self, view: &MemoryView, done: Option<Ticket>);

    /// Makes writes to these addresses posted, and no others of the fabric's.
    fn post(&self, windows: &[Window]);

    /// Has writes to these addresses signal their events, where the host can, and no others of the fabric's. An address that is no
    /// longer among them signals none once the next [`Platform::show`] is done.
    fn signal(&self, signals: &[Signal]);
}

/// Hears of slots that were emptied.
pub trait SlotSink: Send {
    /// A port's slot is empty, and these were in it: reset, and out of the guest's reach. Called on the thread that serves IOREQs or on
    /// the one that asked, with the fabric locked: what takes time is done elsewhere.
    fn emptied(&self, port: NodeId, functions: Vec<Box<dyn PciFunction>>);
}

/// A function within the fabric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(usize);

pub(super) struct Node {
    pub(super) function: Box<dyn PciFunction>,
    /// The bridge behind which it sits; none: on the root bus.
    pub(super) parent: Option<usize>,
    /// Slot × 8 + function.
    pub(super) devfn: u8,
    requester: Requester,
}

/// A window that answers, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Route {
    window: Window,
    node: usize,
}

/// The fabric.
pub struct Fabric {
    prepared: Option<Apertures>,
    /// Everything has its place: [`Fabric::prepare`] has been called.
    placed: bool,
    pub(super) host: HostBridge,
    pub(super) nodes: Vec<Option<Node>>,
    /// The configuration address register.
    pub(super) latch: u32,
    /// Sorted by base: of memory, and of ports.
    memory: Vec<Route>,
    ports: Vec<Route>,
    posted: Vec<Window>,
    signals: Vec<Signal>,
    pub(super) view: MemoryView,
    pub(super) platform: Arc<dyn Platform>,
    slots: Option<Box<dyn SlotSink>>,
    /// The guest has looked at no configuration space since the machine was built or reset. That it uses the board's own ports says nothing.
    pub(super) untouched: bool,
    deadline: Option<Instant>,
}

/// Why a function can't be plugged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlugError {
    /// The place is taken.
    #[error("slot {:#x} function {} has a device already", devfn >> 3, devfn & 7)]
    Taken {
        /// Slot × 8 + function.
        devfn: u8,
    },
    /// Behind a bridge's link there is one device.
    #[error("slot {:#x} does not exist behind a PCI Express port: only slot 0 does", devfn >> 3)]
    NoSlot {
        /// Slot × 8 + function.
        devfn: u8,
    },
    /// It isn't a port with a slot.
    #[error("it is no PCI Express port")]
    NoPort,
    /// There is nothing to take out.
    #[error("its slot is empty")]
    Empty,
    /// Its windows don't fit behind a port.
    #[error("its registers need more address space than a PCI Express port has")]
    TooLarge,
    /// The guest has been asked to let it go, or is about to switch the slot's power.
    #[error("the guest is at it already: wait until the slot's power indicator no longer blinks")]
    Busy,
}

impl Fabric {
    /// A host bridge and nothing else. `prepared`: no firmware will set the machine up; windows go there.
    pub fn new(prepared: Option<Apertures>, platform: Arc<dyn Platform>) -> Self {
        let host = HostBridge::new(prepared.is_some());
        let view = host.view();
        Self {
            prepared,
            placed: false,
            host,
            nodes: Vec::new(),
            latch: 0,
            memory: Vec::new(),
            ports: Vec::new(),
            posted: Vec::new(),
            signals: Vec::new(),
            view,
            platform,
            slots: None,
            untouched: true,
            deadline: None,
        }
    }

    /// The host bridge.
    pub fn host(&self) -> &HostBridge {
        &self.host
    }

    /// Plugs a function in: on the root bus, or behind a bridge.
    ///
    /// # Errors
    /// There is no such place, or it is taken.
    pub fn plug(
        &mut self,
        parent: Option<NodeId>,
        devfn: u8,
        function: Box<dyn PciFunction>,
    ) -> Result<NodeId, PlugError> {
        let parent = parent.map(|NodeId(index)| index);
        let taken = self.nodes.iter().flatten().any(|node| node.parent == parent && node.devfn == devfn);
        if taken || parent.is_none() && devfn == HOST_BRIDGE {
            return Err(PlugError::Taken { devfn });
        }
        if parent.is_some() && devfn >= 8 {
            return Err(PlugError::NoSlot { devfn });
        }
        let index = self.nodes.iter().position(Option::is_none).unwrap_or(self.nodes.len());
        if index == self.nodes.len() {
            self.nodes.push(None);
        }
        self.nodes[index] = Some(Node { function, parent, devfn, requester: Requester::default() });
        let of_slot = |node: &Node| node.parent == parent && node.devfn >> 3 == devfn >> 3;
        if self.nodes.iter().flatten().any(|node| of_slot(node) && node.devfn & 7 != 0) {
            for node in self.nodes.iter_mut().flatten().filter(|node| of_slot(node)) {
                node.function.config_mut().set_multifunction();
            }
        }
        self.settle();
        Ok(NodeId(index))
    }

    /// Keeps `requester` at the ID of a function that is plugged in, whatever number the guest gives its bus.
    pub fn identify(&mut self, NodeId(index): NodeId, requester: Requester) {
        if let Some(node) = self.nodes.get_mut(index).and_then(Option::as_mut) {
            node.requester = requester;
        }
        self.settle();
    }

    /// Says who gets what is taken out of slots.
    pub fn give_to(&mut self, sink: Box<dyn SlotSink>) {
        self.slots = Some(sink);
    }

    /// Puts a function into the slot of a port. A guest that has looked at the fabric is told; for any other it is simply there.
    ///
    /// # Errors
    /// The slot is taken, or the function too large for it.
    pub fn insert(
        &mut self,
        port: NodeId,
        function: Box<dyn PciFunction>,
        requester: Requester,
    ) -> Result<(), PlugError> {
        self.port(port).ok_or(PlugError::NoPort)?;
        if !fits_a_bridge(function.config()) {
            return Err(PlugError::TooLarge);
        }
        let node = self.plug(Some(port), 0, function)?;
        self.identify(node, requester);
        let untouched = self.untouched;
        if let Some(port) = self.port(port) {
            if untouched { port.occupy() } else { port.insert() }
        }
        if untouched && self.placed {
            self.place();
        }
        Ok(())
    }

    /// Takes what is in the slot of a port out, as soon as the guest lets it go: at the latest when the machine is reset.
    ///
    /// # Errors
    /// The slot is empty, or the guest is at it already.
    pub fn ask_out(&mut self, port: NodeId) -> Result<(), PlugError> {
        let untouched = self.untouched;
        let slot = self.port(port).ok_or(PlugError::NoPort)?;
        if !slot.is_occupied() {
            return Err(PlugError::Empty);
        }
        match if untouched { Asked::Free } else { slot.ask() } {
            Asked::Pressed => {}
            Asked::Busy => return Err(PlugError::Busy),
            Asked::Free => {
                self.empty(port);
                self.settle();
            }
        }
        Ok(())
    }

    fn port(&mut self, id: NodeId) -> Option<&mut RootPort> {
        self.function(id)?.port()
    }

    /// Empties the slot of a port: what was in it does nothing more.
    fn empty(&mut self, NodeId(port): NodeId) {
        let untouched = self.untouched;
        let is_in_it = |node: &Option<Node>| node.as_ref().is_some_and(|node| node.parent == Some(port));
        let taken = self.nodes.iter_mut().filter(|node| is_in_it(node)).filter_map(Option::take);
        let mut functions: Vec<_> = taken.map(|node| node.function).collect();
        functions.iter_mut().for_each(|function| function.reset());
        if let Some(slot) = self.port(NodeId(port)) {
            if untouched { slot.clear() } else { slot.vacate() }
        }
        if let Some(sink) = &self.slots {
            sink.emptied(NodeId(port), functions);
        }
    }

    /// Leaves the machine as firmware would, if there will be none: once everything is plugged in.
    ///
    /// # Errors
    /// The functions' windows don't fit.
    pub fn prepare(&mut self) -> Result<(), NoRoom> {
        match self.prepared {
            Some(apertures) => self.assign(&apertures)?,
            None => self.settle(),
        }
        self.placed = true;
        Ok(())
    }

    /// The same of a machine that was prepared once, since when nothing came that needs more room.
    fn place(&mut self) {
        let placed = self.prepare();
        debug_assert_eq!(placed, Ok(()));
    }

    /// A function that is plugged in.
    pub fn function(&mut self, NodeId(index): NodeId) -> Option<&mut dyn PciFunction> {
        Some(&mut *self.nodes.get_mut(index)?.as_mut()?.function)
    }

    /// Every function but the host bridge: its id, its bridge, slot × 8 + function.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, Option<NodeId>, u8)> {
        let present = self.nodes.iter().enumerate().filter_map(|(index, node)| Some((index, node.as_ref()?)));
        present.map(|(index, node)| (NodeId(index), node.parent.map(NodeId), node.devfn))
    }

    /// The function that answers for `devfn` on `bus`, as the bridges are numbered; none of the host bridge.
    fn find(&self, bus: u8, devfn: u8) -> Option<usize> {
        let parent = if bus == 0 { None } else { Some(self.bridge_to(bus)?) };
        self.nodes.iter().position(|node| node.as_ref().is_some_and(|n| n.parent == parent && n.devfn == devfn))
    }

    /// The bridge whose secondary bus is `bus`, if every bridge above it forwards there.
    fn bridge_to(&self, bus: u8) -> Option<usize> {
        (0..self.nodes.len()).find(|&index| {
            let Some((_, secondary, _)) = self.numbers(index) else { return false };
            secondary == bus && bus != 0 && self.forwards(index, bus)
        })
    }

    fn forwards(&self, index: usize, bus: u8) -> bool {
        let Some(parent) = self.nodes[index].as_ref().and_then(|node| node.parent) else { return true };
        let reached = self.numbers(parent).is_some_and(|(_, secondary, last)| secondary < bus && bus <= last);
        reached && self.forwards(parent, bus)
    }

    /// Primary, secondary and subordinate bus of a bridge.
    fn numbers(&self, index: usize) -> Option<(u8, u8, u8)> {
        let config = self.nodes[index].as_ref()?.function.config();
        is_bridge(config).then(|| (config.read(0x18, 1) as u8, config.read(0x19, 1) as u8, config.read(0x1a, 1) as u8))
    }

    /// Reads configuration space: `len` bytes, 1–8; all ones where there is no function.
    fn read_config(&mut self, bus: u8, devfn: u8, offset: u16, len: u8) -> u64 {
        let found = self.find(bus, devfn);
        let is_host = bus == 0 && devfn == HOST_BRIDGE;
        chunks(offset, len).fold(0, |value, (at, count)| {
            let part = match found {
                _ if is_host => self.host.config().read(at, count),
                Some(index) => self.nodes[index].as_mut().map_or(u32::MAX, |node| node.function.read_config(at, count)),
                None => u32::MAX,
            };
            let part = u64::from(part) & ones(count);
            value | part << (8 * (at - offset))
        })
    }

    /// Writes configuration space.
    fn write_config(&mut self, bus: u8, devfn: u8, offset: u16, len: u8, value: u64, reply: Deferred<'_>) -> Answer {
        let found = self.find(bus, devfn);
        for (at, count) in chunks(offset, len) {
            let part = (value >> (8 * (at - offset))) as u32;
            if bus == 0 && devfn == HOST_BRIDGE {
                self.host.write_config(at, count, part);
            } else if let Some((index, node)) = found.and_then(|index| Some((index, self.nodes[index].as_mut()?))) {
                node.function.write_config(at, count, part);
                if node.function.port().is_some_and(RootPort::take_released) {
                    self.empty(NodeId(index));
                }
            }
        }
        let signals = self.signals.clone();
        self.settle();
        // What is where one was might not hear of a write before that one is gone.
        let gone = signals.iter().any(|signal| !self.signals.contains(signal));
        let view = self.host.view();
        if view == self.view && !gone {
            return Answer::Done(0);
        }
        self.view = view;
        self.platform.show(&view, Some(reply.ticket()));
        Answer::Deferred
    }

    /// Finds anew what answers where, as the functions' registers stand.
    pub(super) fn settle(&mut self) {
        self.place_requesters();
        let (mut memory, mut ports, mut posted) = (Vec::new(), Vec::new(), Vec::new());
        let mut signals = Vec::new();
        for (index, node) in self.nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            let gates = self.gates(node);
            let open = |window: &Window| gates.iter().all(|gate| gate.lets(window));
            for window in node.function.windows().into_iter().filter(open) {
                if window.io { &mut ports } else { &mut memory }.push(Route { window, node: index });
            }
            posted.extend(node.function.posted().into_iter().filter(open));
            signals.extend(node.function.signals().into_iter().filter(|signal| open(&signal.window)));
        }
        memory.sort_by_key(|route: &Route| route.window.base);
        ports.sort_by_key(|route: &Route| route.window.base);
        (self.memory, self.ports) = (memory, ports);
        if self.posted != posted {
            self.platform.post(&posted);
            self.posted = posted;
        }
        if self.signals != signals {
            self.platform.signal(&signals);
            self.signals = signals;
        }
        self.note_deadline();
    }

    /// Says by which IDs functions make requests, as buses are numbered.
    pub(super) fn place_requesters(&self) {
        for node in self.nodes.iter().flatten() {
            let bus = node.parent.and_then(|bridge| self.numbers(bridge)).map_or(0, |(_, secondary, _)| secondary);
            node.requester.place(bus, node.devfn);
        }
    }

    /// What the bridges above a function let through.
    fn gates(&self, node: &Node) -> Vec<Gate> {
        let mut gates = Vec::new();
        let mut parent = node.parent;
        while let Some(bridge) = parent.and_then(|index| self.nodes[index].as_ref()) {
            gates.push(Gate::of(bridge.function.config()));
            parent = bridge.parent;
        }
        gates
    }

    fn note_deadline(&mut self) {
        self.deadline = self.nodes.iter().flatten().filter_map(|node| node.function.deadline()).min();
    }

    /// The function behind an address, its region, and the offset in it.
    fn route(&mut self, io: bool, addr: u64) -> Option<(&mut Node, usize, u64)> {
        let routes = if io { &self.ports } else { &self.memory };
        let before = &routes[..routes.partition_point(|route| route.window.base <= addr)];
        // Windows that a guest laid over each other: the last that begins before the address and reaches it.
        let route = before.iter().rev().find(|route| addr - route.window.base < route.window.len)?;
        let (region, offset) = (route.window.region, addr - route.window.base);
        Some((self.nodes[route.node].as_mut()?, region, offset))
    }

    /// Bus, slot and function, and offset of an address in the configuration window.
    fn in_ecam(&self, addr: u64) -> Option<(u8, u8, u16)> {
        let (base, len) = self.host.ecam()?;
        let at = addr.checked_sub(base).filter(|at| *at < len)?;
        Some(((at >> 20) as u8, (at >> 12) as u8, at as u16 & 0xfff))
    }

    /// Bus, slot and function, and offset of an access to the data port.
    fn in_data_port(&self, addr: u64) -> Option<(u8, u8, u16)> {
        let at = addr.checked_sub(CONFIG_DATA).filter(|at| *at < 4 && self.latch & CONFIG_ENABLE != 0)?;
        // Hardware ignores the address's lowest two bits; QEMU doesn't, and kvm-unit-tests count on that.
        Some(((self.latch >> 16) as u8, (self.latch >> 8) as u8, (self.latch & 0xff) as u16 | at as u16))
    }

    fn read(&mut self, io: bool, access: &Access, addr: u64, reply: Deferred<'_>) -> Answer {
        if io && addr == CONFIG_ADDRESS && access.len == 4 {
            self.untouched = false;
            return Answer::Done(self.latch.into());
        }
        if let Some((bus, devfn, offset)) = if io { self.in_data_port(addr) } else { self.in_ecam(addr) } {
            self.untouched = false;
            return Answer::Done(self.read_config(bus, devfn, offset, access.len));
        }
        let Some((node, region, offset)) = self.route(io, addr) else { return Answer::Unclaimed };
        let answer = node.function.read(region, offset, access, reply);
        self.note_deadline();
        answer
    }

    fn write(&mut self, io: bool, access: &Access, addr: u64, data: u64, reply: Deferred<'_>) -> Answer {
        if io && addr == CONFIG_ADDRESS && access.len == 4 {
            (self.latch, self.untouched) = (data as u32 & !0x7f00_0000, false);
            return Answer::Done(0);
        }
        if let Some((bus, devfn, offset)) = if io { self.in_data_port(addr) } else { self.in_ecam(addr) } {
            self.untouched = false;
            return self.write_config(bus, devfn, offset, access.len, data, reply);
        }
        let Some((node, region, offset)) = self.route(io, addr) else { return Answer::Unclaimed };
        let answer = node.function.write(region, offset, data, access, reply);
        self.note_deadline();
        answer
    }

    fn poll(&mut self) {
        self.nodes.iter_mut().flatten().for_each(|node| node.function.poll());
        self.note_deadline();
    }

    /// Resets everything. The memory view goes back too, which nobody waits for: every vCPU is out of the guest.
    fn reset(&mut self) {
        self.host.reset();
        (self.latch, self.untouched) = (0, true);
        let asked = |(index, node): (usize, &mut Option<Node>)| {
            let asked = node.as_mut()?.function.port()?.is_asked();
            asked.then_some(NodeId(index))
        };
        let leaving: Vec<_> = self.nodes.iter_mut().enumerate().filter_map(asked).collect();
        leaving.into_iter().for_each(|port| self.empty(port));
        self.nodes.iter_mut().flatten().for_each(|node| node.function.reset());
        self.place();
        self.view = self.host.view();
        self.platform.show(&self.view, None);
    }
}

impl std::fmt::Debug for Fabric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fabric").field("host", &self.host).field("memory", &self.memory).finish_non_exhaustive()
    }
}

/// Whether a configuration space is a bridge's.
pub(super) fn is_bridge(config: &ConfigSpace) -> bool {
    config.read(super::config::header::TYPE, 1) & 0x7f == 1
}

/// The parts of an access that don't cross a word of 4: offset and bytes.
fn chunks(offset: u16, len: u8) -> impl Iterator<Item = (u16, u8)> {
    let end = offset + u16::from(len);
    let mut at = offset;
    std::iter::from_fn(move || {
        let next = (at & !3) + 4;
        let chunk = (at < end).then(|| (at, (next.min(end) - at) as u8));
        at = next;
        chunk
    })
}

fn ones(bytes: u8) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(bytes))
}

/// The fabric as the port bus or the memory bus has it.
#[derive(Clone, Debug)]
pub struct FabricSide {
    fabric: Arc<Mutex<Fabric>>,
    pub(super) io: bool,
}

impl FabricSide {
    /// The two sides of `fabric`: ports, memory.
    pub fn both(fabric: &Arc<Mutex<Fabric>>) -> [Self; 2] {
        [true, false].map(|io| Self { fabric: fabric.clone(), io })
    }

    pub(super) fn fabric(&self) -> MutexGuard<'_, Fabric> {
        self.fabric.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for FabricSide {
    fn read(&mut self, access: &Access, offset: u64, reply: Deferred<'_>) -> Answer {
        self.fabric().read(self.io, access, offset, reply)
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, reply: Deferred<'_>) -> Answer {
        self.fabric().write(self.io, access, offset, data, reply)
    }

    fn poll(&mut self) {
        self.fabric().poll();
    }

    fn deadline(&self) -> Option<Instant> {
        self.fabric().deadline
    }

    fn reset(&mut self) {
        // Once for both sides.
        if !self.io {
            self.fabric().reset();
        }
    }
}
