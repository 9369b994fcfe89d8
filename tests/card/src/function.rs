//! One function: its registers on both sides, vectors, resets, link.

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pcie_function::card::{self, bar, event, id, register, soc_vector};
use pcie_function::{BusMemory, Window, local};

use crate::bus::{Bus, Side};
use crate::config::{ConfigSpace, Effect};
use crate::engine::Engine;
use crate::memory;
use crate::misbehaviour::{Doorbell, Misbehaviour};
use crate::stats::{Counts, Stats, add};

/// Bytes of card memory.
pub(crate) const MEMORY_SIZE: u64 = 16 << 20;
/// MSI-X vectors of a host function.
const VECTORS: u32 = card::HOST_VECTORS_MIN;
/// Notify pages of a vm function.
const NOTIFY_PAGES: u32 = 32;

/// Which of a function's two links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    Host,
    Soc,
}

/// What a function is and stays.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    /// Unique among cards.
    pub(crate) card: u64,
    /// Number on this card.
    pub(crate) number: u32,
    /// [`card::ROLE_VM`] or [`card::ROLE_HOST`].
    pub(crate) role: u32,
    /// MSI-X vectors of the host side.
    pub(crate) vectors: u32,
    /// Its notify pages.
    pub(crate) notify_pages: u32,
}

impl Identity {
    /// MSI-X vectors of one side.
    pub(crate) fn vectors(&self, link: Link) -> u32 {
        match link {
            Link::Host => self.vectors,
            Link::Soc => soc_vector::COUNT + self.notify_pages,
        }
    }

    /// Bytes of the BAR of notify pages on one side.
    pub(crate) fn notify_size(&self, link: Link) -> u64 {
        match link {
            Link::Host => u64::from(self.notify_pages) * bar::NOTIFY_PAGE,
            Link::Soc => 0,
        }
    }
}

/// A function, seen from both sides.
#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) identity: Identity,
    pub(crate) engine: Engine,
    pub(crate) counts: Counts,
    /// Card memory, and the file that both sides map.
    pub(crate) memory: Window,
    pub(crate) memory_file: File,
    bus: RwLock<Bus>,
    host_config: Mutex<ConfigSpace>,
    soc_config: Mutex<ConfigSpace>,
    host_vectors: Vectors,
    soc_vectors: Vectors,
    events: AtomicU32,
    misbehaviour: Mutex<Misbehaviour>,
}

impl Function {
    /// A function with no host and no SoC yet.
    pub(crate) fn new(card: u64, number: u32, role: u32) -> io::Result<Self> {
        let memory_file = local::sealed_memfd("card-memory", MEMORY_SIZE).map_err(io::Error::other)?.into();
        let memory = memory::map(&memory_file)?.window();
        let (host, soc) = if role == card::ROLE_VM { (id::HOST_VM, id::SOC_VM) } else { (id::HOST_HOST, id::SOC_HOST) };
        let notify_pages = if role == card::ROLE_VM { NOTIFY_PAGES } else { 0 };
        let identity = Identity { card, number, role, vectors: VECTORS, notify_pages };
        let config = |device, link| {
            let vectors = identity.vectors(link) as u16;
            Mutex::new(ConfigSpace::new(device, vectors, MEMORY_SIZE, identity.notify_size(link)))
        };
        Ok(Self {
            identity,
            engine: Engine::new(),
            counts: Counts::default(),
            memory,
            memory_file,
            bus: RwLock::new(Bus::new()),
            host_config: config(host, Link::Host),
            soc_config: config(soc, Link::Soc),
            host_vectors: Vectors::new(identity.vectors(Link::Host)),
            soc_vectors: Vectors::new(identity.vectors(Link::Soc)),
            events: AtomicU32::new(0),
            misbehaviour: Mutex::default(),
        })
    }

    /// The bus, shared: while it is held no unmap is answered and no reset takes effect.
    pub(crate) fn bus(&self) -> RwLockReadGuard<'_, Bus> {
        self.bus.read().expect("no panic under the lock")
    }

    /// The bus, exclusively: no DMA is in flight.
    pub(crate) fn bus_mut(&self) -> RwLockWriteGuard<'_, Bus> {
        self.bus.write().expect("no panic under the lock")
    }

    /// What it does wrong now.
    pub(crate) fn misbehaviour(&self) -> Misbehaviour {
        *self.misbehaviour.lock().expect("no panic under the lock")
    }

    /// Changes what it does wrong.
    pub(crate) fn misbehave(&self, change: impl FnOnce(&mut Misbehaviour)) {
        change(&mut self.misbehaviour.lock().expect("no panic under the lock"));
    }

    /// The vectors of one side.
    pub(crate) fn vectors(&self, link: Link) -> &Vectors {
        match link {
            Link::Host => &self.host_vectors,
            Link::Soc => &self.soc_vectors,
        }
    }

    /// The configuration space of one side.
    pub(crate) fn config(&self, link: Link) -> MutexGuard<'_, ConfigSpace> {
        let config = match link {
            Link::Host => &self.host_config,
            Link::Soc => &self.soc_config,
        };
        config.lock().expect("no panic under the lock")
    }

    /// Writes configuration space, with what that sets off.
    pub(crate) fn write_config(&self, link: Link, offset: usize, data: &[u8]) {
        let mut config = self.config(link);
        let effect = config.write(offset, data);
        let master = config.is_master();
        {
            let mut bus = self.bus_mut();
            let side = side_mut(&mut bus, link);
            side.master = master;
        }
        drop(config);
        if effect == Effect::Reset {
            self.reset(link);
        }
    }

    /// Resets one side (docs/card.md §5).
    pub(crate) fn reset(&self, link: Link) {
        match link {
            Link::Host => {
                add(&self.counts.resets, 1);
                let mut config = self.config(Link::Host);
                self.bus_mut().next_generation();
                self.forget_host(&mut config);
                self.event(event::HOST_RESET);
            }
            Link::Soc => {
                self.engine.reset();
                self.events.store(0, Ordering::Release);
                let mut config = self.config(Link::Soc);
                config.reset();
                self.bus_mut().soc.master = false;
            }
        }
    }

    /// A client has come.
    pub(crate) fn connected(&self, link: Link) {
        if link == Link::Host {
            self.change_link(|bus| bus.connected = true);
        }
    }

    /// A client has gone, and with it everything that it mapped.
    pub(crate) fn disconnected(&self, link: Link) {
        self.vectors(link).clear();
        match link {
            Link::Host => {
                self.change_link(|bus| {
                    bus.connected = false;
                    bus.host.map.clear();
                });
            }
            Link::Soc => {
                self.reset(Link::Soc);
                self.bus_mut().soc.map.clear();
            }
        }
    }

    /// Takes the link down, or brings it back.
    pub(crate) fn set_link(&self, up: bool) {
        self.change_link(|bus| bus.up = up);
    }

    /// Pulls the host function out.
    pub(crate) fn remove(&self) {
        {
            let mut bus = self.bus_mut();
            bus.removed = true;
            bus.next_generation();
        }
        self.event(event::REMOVED);
        // A host that has mapped card memory goes on reading it: then let it be what a read of nothing gives.
        for offset in (0..self.memory.len()).step_by(ONES.len()) {
            self.memory.copy_in(offset, &ONES);
        }
    }

    /// The host rang this doorbell.
    pub(crate) fn doorbell(self: &Arc<Self>, bell: u32) {
        if bell >= soc_vector::DOORBELLS {
            return;
        }
        add(&self.counts.doorbells, 1);
        match self.misbehaviour().doorbell {
            Doorbell::Normal => self.raise_soc(bell),
            Doorbell::Drop => add(&self.counts.doorbells_dropped, 1),
            Doorbell::Double => {
                self.raise_soc(bell);
                self.raise_soc(bell);
            }
            Doorbell::Delay(time) => {
                let function = Arc::clone(self);
                std::thread::spawn(move || {
                    std::thread::sleep(time);
                    function.raise_soc(bell);
                });
            }
        }
    }

    /// Something was written at `offset` of the notify pages.
    pub(crate) fn notify(&self, offset: u64) {
        add(&self.counts.notifications, 1);
        self.raise_soc(soc_vector::COUNT + (offset / bar::NOTIFY_PAGE) as u32);
    }

    /// Sets an `EVENTS` bit and tells the SoC.
    pub(crate) fn event(&self, bit: u32) {
        self.events.fetch_or(bit, Ordering::AcqRel);
        self.raise_soc(soc_vector::EVENT);
    }

    /// Raises a vector of the SoC function.
    pub(crate) fn raise_soc(&self, vector: u32) {
        if self.bus().soc.master {
            self.soc_vectors.raise(vector);
        }
    }

    /// Raises a vector of the host function; lost where it can't arrive.
    pub(crate) fn raise_host(&self, bus: &Bus, vector: u32) {
        let carried = bus.link() && bus.host.master && !self.misbehaviour().vectors_lost;
        let arrived = carried && self.host_vectors.raise(vector);
        add(if arrived { &self.counts.vectors } else { &self.counts.vectors_lost }, 1);
    }

    /// Reads BAR 0: 4 or 8 aligned bytes in one look at the function's state; else zeros.
    pub(crate) fn read_register(&self, link: Link, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let len = data.len() as u64;
        if (len == 4 || len == 8) && offset.is_multiple_of(len) {
            let bus = self.bus();
            for (at, bytes) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
                bytes.copy_from_slice(&self.register(&bus, link, at).to_le_bytes());
            }
        }
    }

    /// Writes BAR 0: 4 or 8 aligned bytes, the lower half first; else nothing.
    pub(crate) fn write_register(self: &Arc<Self>, link: Link, offset: u64, data: &[u8]) {
        let len = data.len() as u64;
        if (len == 4 || len == 8) && offset.is_multiple_of(len) {
            for (at, bytes) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
                let value = u32::from_le_bytes(bytes.try_into().expect("a chunk of 4"));
                match link {
                    Link::Host => {
                        if at == register::DOORBELL {
                            self.doorbell(value);
                        }
                    }
                    Link::Soc => self.write_soc_register(at, value),
                }
            }
        }
    }

    /// State and counts.
    pub(crate) fn stats(&self) -> Stats {
        let bus = self.bus();
        let (host_mapped_bytes, host_mappings) = bus.host.map.size();
        self.counts.fill(Stats {
            function: self.identity.number,
            link: bus.link(),
            generation: bus.generation(),
            host_mapped_bytes,
            host_mappings: host_mappings as u64,
            soc_mapped_bytes: bus.soc.map.size().0,
            ..Stats::default()
        })
    }

    /// The 4 bytes of BAR 0 at an aligned `offset`.
    fn register(&self, bus: &Bus, link: Link, offset: u64) -> u32 {
        let identity = &self.identity;
        match offset {
            register::MAGIC => return card::MAGIC,
            register::VERSION => return card::VERSION,
            register::FUNCTION => return identity.number,
            register::ROLE => return identity.role,
            register::VECTORS => return identity.vectors,
            register::NOTIFY_PAGES => return identity.notify_pages,
            register::STATUS => return if bus.link() { card::STATUS_LINK } else { 0 },
            register::GENERATION => return bus.generation(),
            _ => {}
        }
        let wide = [(register::CARD_ID, identity.card), (register::MEMORY_SIZE, MEMORY_SIZE)];
        if let Some(half) = wide.iter().find_map(|&(at, value)| half(at, value, offset)) {
            return half;
        }
        if link == Link::Host {
            return 0;
        }
        match offset {
            register::EVENTS => return self.events.load(Ordering::Acquire),
            register::DMA_ENTRIES => return self.engine.registers().entries,
            register::DMA_CONTROL => return self.engine.status() & card::DMA_ENABLE,
            register::DMA_STATUS => return self.engine.status(),
            register::DMA_HEAD => return self.engine.head(),
            _ => {}
        }
        let rings = *self.engine.registers();
        let wide = [(register::DMA_SUBMISSION, rings.submission), (register::DMA_DONE, rings.done)];
        wide.iter().find_map(|&(at, value)| half(at, value, offset)).unwrap_or(0)
    }

    fn write_soc_register(&self, offset: u64, value: u32) {
        match offset {
            register::EVENTS => {
                self.events.fetch_and(!value, Ordering::AcqRel);
            }
            register::RAISE if value < self.identity.vectors => self.raise_host(&self.bus(), value),
            register::DMA_ENTRIES => self.engine.registers().entries = value,
            register::DMA_CONTROL if value & card::DMA_ENABLE != 0 => self.engine.start(self),
            register::DMA_CONTROL => self.engine.stop(),
            register::DMA_TAIL => self.engine.submit(self, value),
            _ => {
                let mut rings = self.engine.registers();
                set_half(register::DMA_SUBMISSION, &mut rings.submission, offset, value);
                set_half(register::DMA_DONE, &mut rings.done, offset, value);
            }
        }
    }

    /// Changes what the link depends on, with what follows from its loss or return.
    fn change_link(&self, change: impl FnOnce(&mut Bus)) {
        let mut config = self.config(Link::Host);
        let (before, after) = {
            let mut bus = self.bus_mut();
            let before = bus.link();
            change(&mut bus);
            if before && !bus.link() {
                bus.next_generation();
            }
            (before, bus.link())
        };
        match (before, after) {
            (true, false) => {
                self.forget_host(&mut config);
                self.event(event::LINK_LOST);
            }
            (false, true) => self.event(event::LINK_UP),
            _ => {}
        }
    }

    /// What a reset and a lost link do behind the new generation, when no DMA of the old one is in flight.
    fn forget_host(&self, config: &mut ConfigSpace) {
        config.reset();
        memory::store(&self.memory, 0, &[0; bar::HEADER_LINE]);
    }
}

static ONES: [u8; 4096] = [0xff; 4096];

pub(crate) fn side_mut(bus: &mut Bus, link: Link) -> &mut Side {
    match link {
        Link::Host => &mut bus.host,
        Link::Soc => &mut bus.soc,
    }
}

/// The half at `offset` of an 8-byte register.
fn half(register: u64, value: u64, offset: u64) -> Option<u32> {
    match offset.checked_sub(register)? {
        0 => Some(value as u32),
        4 => Some((value >> 32) as u32),
        _ => None,
    }
}

fn set_half(register: u64, value: &mut u64, offset: u64, half: u32) {
    match offset.checked_sub(register) {
        Some(0) => *value = *value & !0xffff_ffff | u64::from(half),
        Some(4) => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}

/// MSI-X vectors of one side: eventfds of its client.
#[derive(Debug)]
pub(crate) struct Vectors(Mutex<Vec<Option<File>>>);

impl Vectors {
    fn new(count: u32) -> Self {
        Self(Mutex::new((0..count).map(|_| None).collect()))
    }

    /// Hands `count` vectors from `start` on their eventfds; those without one are taken away.
    ///
    /// # Errors
    /// There are no such vectors, or more eventfds than vectors.
    pub(crate) fn assign(&self, start: u32, count: u32, eventfds: Vec<File>) -> io::Result<()> {
        let mut vectors = self.lock();
        let range = start as usize..start.saturating_add(count) as usize;
        let slots = vectors.get_mut(range).filter(|slots| eventfds.len() <= slots.len());
        let slots = slots.ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut eventfds = eventfds.into_iter();
        slots.fill_with(|| eventfds.next());
        Ok(())
    }

    /// Takes all away.
    pub(crate) fn clear(&self) {
        self.lock().fill_with(|| None);
    }

    /// Whether somebody was told.
    pub(crate) fn raise(&self, vector: u32) -> bool {
        let vectors = self.lock();
        let eventfd = vectors.get(vector as usize).and_then(Option::as_ref);
        eventfd.is_some_and(|mut eventfd| eventfd.write_all(&1u64.to_ne_bytes()).is_ok())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<File>>> {
        self.0.lock().expect("no panic under the lock")
    }
}
