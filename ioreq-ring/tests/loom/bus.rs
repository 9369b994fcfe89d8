//! Shared memory as loom sees it, in two kinds of world.
//!
//! *Cached*: both sides are CPUs on one memory (`local`). Loads acquire, stores release, a fence is a fence; a store may be seen
//! late, and a load may pass an earlier store unless a fence stands between.
//!
//! *Bus*: the sides are apart. A store to the far side is posted: it arrives in order, at any later time. What makes it arrive:
//! a flush, a read across the bus by its sender, and a read across the bus by its receiver, whose completion comes behind it
//! (unless the card doesn't push, [`World::Unpushed`]). A fence orders this CPU's accesses and makes nothing arrive.
//!
//! "At any later time" is loom's own: a load may return any value that isn't yet overwritten by something that happened before.
//! Arrivals are the edges of happened-before, made with read-modify-writes, of which loom always shows the newest.

use std::cell::Cell;
use std::sync::Arc;

use ioreq_ring::{BusError, BusMemory};
use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum World {
    /// One memory, cached by both sides.
    Cached,
    /// A bus; a read's completion pushes what was posted before it in the same direction.
    Bus,
    /// A bus where the host's posted writes may come after the completion of a DMA read.
    Unpushed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Host,
    Soc,
}

/// A step of the protocol that a model leaves out, to show that it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Omit {
    Nothing,
    /// Stores of this word to this offset vanish.
    Store(usize, u64),
    /// Loads of this offset don't cross the bus; they give what the protocol hopes for.
    Load(usize, u64),
    Fence,
    Flush,
    /// A line's last word, with the sequence, is stored first.
    SequenceLast,
    /// Every second load of this offset gives what the one before it gave.
    SecondLook(usize),
    /// Stores to this offset store so much more.
    Exact(usize, u64),
    /// Every fourth word reads as 0: what a ring is without time stamps.
    TimeStamps,
}

/// What one side has posted: what it has sent, and what has arrived.
#[derive(Debug)]
struct Direction {
    sent: AtomicUsize,
    arrived: AtomicUsize,
}

impl Direction {
    fn new() -> Self {
        Self { sent: AtomicUsize::new(0), arrived: AtomicUsize::new(0) }
    }
}

/// The two directions of a bus.
#[derive(Debug)]
pub(crate) struct Bus {
    world: World,
    to_card: Direction,
    to_host: Direction,
}

impl Bus {
    pub(crate) fn new(world: World) -> Arc<Self> {
        Arc::new(Self { world, to_card: Direction::new(), to_host: Direction::new() })
    }

    /// Memory of `len` bytes that `near` is next to.
    pub(crate) fn memory(self: &Arc<Self>, near: Side, len: usize) -> Arc<Memory> {
        Arc::new(Memory { bus: self.clone(), near, words: (0..len / 8).map(|_| AtomicU64::new(0)).collect() })
    }
}

#[derive(Debug)]
pub(crate) struct Memory {
    bus: Arc<Bus>,
    near: Side,
    words: Vec<AtomicU64>,
}

impl Memory {
    /// The memory as `side` sees it.
    pub(crate) fn view(self: &Arc<Self>, side: Side) -> View {
        View { memory: self.clone(), side, omit: Omit::Nothing, seen: Cell::new(None) }
    }
}

/// Memory as one side sees it, without one step.
#[derive(Debug)]
pub(crate) struct View {
    memory: Arc<Memory>,
    side: Side,
    omit: Omit,
    seen: Cell<Option<u64>>,
}

impl View {
    pub(crate) fn without(mut self, omit: Omit) -> Self {
        self.omit = omit;
        self
    }

    /// What this side sends, and what the other does.
    fn directions(&self) -> (&Direction, &Direction) {
        let bus = &self.memory.bus;
        match self.side {
            Side::Host => (&bus.to_card, &bus.to_host),
            Side::Soc => (&bus.to_host, &bus.to_card),
        }
    }

    fn is_far(&self) -> bool {
        self.memory.near != self.side
    }

    fn world(&self) -> World {
        self.memory.bus.world
    }

    /// Makes everything that this side has posted arrive.
    fn arrive(&self) {
        self.directions().0.arrived.fetch_add(1, Ordering::Release);
    }
}

impl BusMemory for View {
    fn len(&self) -> usize {
        self.memory.words.len() * 8
    }

    fn load(&self, offset: usize) -> u64 {
        match self.omit {
            Omit::Load(at, word) if at == offset => return word,
            Omit::SecondLook(at) if at == offset => {
                if let Some(word) = self.seen.take() {
                    return word;
                }
            }
            Omit::TimeStamps if offset % 32 == 16 => return 0,
            _ => {}
        }
        if self.world() != World::Cached {
            let (_, theirs) = self.directions();
            if self.is_far() {
                self.arrive();
                if self.side == Side::Soc && self.world() == World::Bus {
                    theirs.sent.fetch_add(0, Ordering::Acquire);
                }
            } else {
                theirs.arrived.fetch_add(0, Ordering::Acquire);
            }
        }
        let word = self.memory.words[offset / 8].load(Ordering::Acquire);
        if self.omit == Omit::SecondLook(offset) {
            self.seen.set(Some(word));
        }
        word
    }

    fn store(&self, offset: usize, word: u64) {
        let word = match self.omit {
            Omit::Store(at, lost) if at == offset && lost == word => return,
            Omit::Exact(at, more) if at == offset => word + more,
            _ => word,
        };
        self.memory.words[offset / 8].store(word, Ordering::Release);
        if self.is_far() && self.world() != World::Cached {
            self.directions().0.sent.fetch_add(1, Ordering::Release);
        }
    }

    fn store_line(&self, offset: usize, words: &[u64]) {
        let (last, rest) = words.split_last().expect("a line has words");
        let at_last = offset + rest.len() * 8;
        if self.omit == Omit::SequenceLast {
            self.store(at_last, *last);
        }
        for (i, word) in rest.iter().enumerate() {
            self.memory.words[offset / 8 + i].store(*word, Ordering::Relaxed);
        }
        if self.omit != Omit::SequenceLast {
            self.store(at_last, *last);
        }
    }

    fn copy_in(&self, offset: usize, data: &[u8]) {
        for (i, word) in data.as_chunks::<8>().0.iter().enumerate() {
            self.memory.words[offset / 8 + i].store(u64::from_le_bytes(*word), Ordering::Relaxed);
        }
    }

    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        for (i, word) in data.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = self.load(offset + i * 8).to_le_bytes();
        }
    }

    fn fence(&self) {
        if self.omit != Omit::Fence && self.world() == World::Cached {
            fence(Ordering::SeqCst);
        }
    }

    fn flush(&self) -> Result<(), BusError> {
        match (self.omit, self.world()) {
            (Omit::Flush, _) => {}
            (_, World::Cached) => fence(Ordering::SeqCst),
            (_, World::Bus | World::Unpushed) => self.arrive(),
        }
        Ok(())
    }
}
