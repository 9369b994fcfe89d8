//! The driver of the card's DMA queue (docs/card.md §4): rings and bounce buffers in memory of this process.
//!
//! Two kinds of work share the queue. *Posted* work (stores, vectors) is not waited for; each item is linked to the posted one before
//! it, so nothing overtakes a store that failed, and the first failure stays: the queue refuses what comes after. *Waited* work (copies)
//! fails for its caller alone: an address in it can be a guest's.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use zerocopy::{FromZeros, IntoBytes};

use super::queue::{Descriptor, Done, Operation, Transfer, flag, status};
use crate::{BusError, BusMemory, FunctionError, Iova, Mapping, Reach, Window, local};

/// Entries of each ring, and bounce buffers.
pub(super) const ENTRIES: u32 = 64;
/// Bytes of a bounce buffer: the most that one descriptor carries here.
const BOUNCE: usize = 64 << 10;
/// How long a descriptor may take before the card counts as gone.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most waited descriptors in one go: others get their turn in between.
const BATCH: usize = 16;

const DONE_RING: usize = ENTRIES as usize * size_of::<Descriptor>();
/// The rings end well before; what is mapped is whole pages of 64 KiB too.
const BUFFERS: usize = 0x1_0000;
/// Bytes of memory that the queue takes.
const SIZE: usize = BUFFERS + ENTRIES as usize * BOUNCE;

const _: () = assert!(DONE_RING + ENTRIES as usize * size_of::<Done>() <= BUFFERS);

/// Memory for a queue, and the file that it is of.
pub(super) fn memory() -> Result<(Window, OwnedFd), FunctionError> {
    let file = local::sealed_memfd("card-dma", SIZE as u64)?;
    let memory = Mapping::new(file.as_fd(), 0, SIZE, Reach::Local)?.window();
    Ok((memory, file))
}

/// Where the card sees the submission ring and the done ring of memory that it sees at `iova`.
pub(super) fn rings(iova: Iova) -> (Iova, Iova) {
    (iova, iova + DONE_RING as u64)
}

/// Tells the card, and looks after it.
pub(super) trait Bell {
    /// Writes `DMA_TAIL`.
    fn submit(&self, tail: u32) -> Result<(), BusError>;

    /// Whether the card is still there, as far as that is known without asking it.
    fn is_there(&self) -> bool;
}

/// A queue that runs.
#[derive(Debug)]
pub(super) struct Queue {
    memory: Window,
    /// Where the card sees the memory.
    iova: Iova,
    generation: u32,
    /// Sequence of the newest descriptor; the first is 1.
    submitted: u64,
    /// Sequence up to which done records have been read.
    reaped: u64,
    /// Sequence of the newest posted descriptor.
    posted: u64,
    /// What ended posting.
    fault: Option<BusError>,
}

impl Queue {
    /// A queue in `memory` of [`memory`], which the card sees at `iova`. Every descriptor will carry `generation`.
    pub(super) fn new(memory: Window, iova: Iova, generation: u32) -> Self {
        Self { memory, iova, generation, submitted: 0, reaped: 0, posted: 0, fault: None }
    }

    /// Has every descriptor carry `generation`, unless there were some already; whether it does.
    pub(super) fn begin_with(&mut self, generation: u32) -> bool {
        let unused = self.submitted == 0;
        if unused {
            self.generation = generation;
        }
        unused
    }

    /// Stores `data` in host memory, in order with everything posted. At most 64 bytes go as one line.
    pub(super) fn store(&mut self, bell: &impl Bell, host: Iova, data: &[u8]) {
        for (at, piece) in (0..).step_by(BOUNCE).zip(data.chunks(BOUNCE)) {
            let Some(slot) = self.posting(bell) else { return };
            self.memory.copy_in(slot.bounce(), piece);
            self.push(slot, Operation::ToHost(self.transfer(slot, host + at, piece.len())), true);
        }
        self.ring(bell);
    }

    /// Raises a host vector, in order with everything posted.
    pub(super) fn raise(&mut self, bell: &impl Bell, vector: u32) {
        if let Some(slot) = self.posting(bell) {
            self.push(slot, Operation::RaiseVector(vector), true);
            self.ring(bell);
        }
    }

    /// What ended posting, as far as is known without waiting.
    pub(super) fn fault(&self) -> Option<BusError> {
        self.fault
    }

    /// Waits for all that was posted.
    ///
    /// # Errors
    /// Something posted failed, now or before.
    pub(super) fn flush(&mut self, bell: &impl Bell) -> Result<(), BusError> {
        while self.reaped < self.posted {
            let (sequence, done) = self.reap(bell)?;
            self.note(sequence, &done);
        }
        self.fault.map_or(Ok(()), Err)
    }

    /// Copies the start of `data` from host memory, as much as goes at once; how much that was.
    ///
    /// # Errors
    /// A transfer faulted, or the queue is dead.
    pub(super) fn read(&mut self, bell: &impl Bell, host: Iova, data: &mut [u8]) -> Result<usize, BusError> {
        let slots = self.waited(bell, host, data.len(), |_, transfer| Operation::FromHost(transfer))?;
        let mut moved = 0;
        for (slot, piece) in slots.iter().zip(data.chunks_mut(BOUNCE)) {
            self.memory.copy_out(slot.bounce(), piece);
            moved += piece.len();
        }
        Ok(moved)
    }

    /// Copies the start of `data` to host memory, as much as goes at once; how much that was.
    ///
    /// # Errors
    /// A transfer faulted, or the queue is dead.
    pub(super) fn write(&mut self, bell: &impl Bell, host: Iova, data: &[u8]) -> Result<usize, BusError> {
        let memory = self.memory.clone();
        let mut pieces = data.chunks(BOUNCE);
        let mut moved = 0;
        self.waited(bell, host, data.len(), |slot, transfer| {
            let piece = pieces.next().expect("as many slots as pieces");
            memory.copy_in(slot.bounce(), piece);
            moved += piece.len();
            Operation::ToHost(transfer)
        })?;
        Ok(moved)
    }

    /// Submits up to [`BATCH`] descriptors for `len` bytes at `host` and waits for all of them.
    fn waited(
        &mut self,
        bell: &impl Bell,
        host: Iova,
        len: usize,
        mut operation: impl FnMut(Slot, Transfer) -> Operation,
    ) -> Result<Vec<Slot>, BusError> {
        let mut slots = Vec::with_capacity(len.div_ceil(BOUNCE).min(BATCH));
        for at in (0..len).step_by(BOUNCE).take(BATCH) {
            let slot = self.free(bell)?;
            let transfer = self.transfer(slot, host.wrapping_add(at as u64), (len - at).min(BOUNCE));
            let operation = operation(slot, transfer);
            self.push(slot, operation, false);
            slots.push(slot);
        }
        self.ring(bell);
        let Some((first, last)) = slots.first().zip(slots.last()) else { return Ok(slots) };
        let mut result = Ok(());
        while self.reaped < last.0 {
            let (sequence, done) = self.reap(bell)?;
            if sequence < first.0 {
                self.note(sequence, &done);
            } else {
                result = result.and(outcome(&done));
            }
        }
        result.map(|()| slots)
    }

    /// A free slot for something posted, once what was posted before is linked to it or known to have arrived; `None` after a failure.
    fn posting(&mut self, bell: &impl Bell) -> Option<Slot> {
        if self.posted < self.submitted && self.flush(bell).is_err() {
            return None;
        }
        let slot = self.free(bell).ok()?;
        self.fault.is_none().then_some(slot)
    }

    /// The next slot; waits for the oldest descriptor where the ring is full.
    fn free(&mut self, bell: &impl Bell) -> Result<Slot, BusError> {
        while self.submitted - self.reaped == u64::from(ENTRIES) {
            self.ring(bell);
            let (sequence, done) = self.reap(bell)?;
            self.note(sequence, &done);
        }
        Ok(Slot(self.submitted + 1))
    }

    /// `len` bytes between host memory and the slot's bounce buffer.
    fn transfer(&self, slot: Slot, host: Iova, len: usize) -> Transfer {
        Transfer { host, soc: self.iova + slot.bounce() as u64, length: len as u32 }
    }

    fn push(&mut self, slot: Slot, operation: Operation, posted: bool) {
        let linked = posted && self.posted == self.submitted && self.posted != 0;
        let flags = if linked { flag::LINKED } else { 0 };
        let descriptor = Descriptor::new(operation, flags, self.generation, slot.0);
        self.memory.copy_in(slot.index() * size_of::<Descriptor>(), descriptor.as_bytes());
        self.submitted = slot.0;
        if posted {
            self.posted = slot.0;
        }
    }

    /// Submits what was pushed; a card that can't be told is gone.
    fn ring(&mut self, bell: &impl Bell) {
        fence(Ordering::Release);
        if let Err(error) = bell.submit(self.submitted as u32) {
            self.fault.get_or_insert(error);
        }
    }

    /// Waits for the oldest descriptor that has not been looked at.
    fn reap(&mut self, bell: &impl Bell) -> Result<(u64, Done), BusError> {
        let sequence = self.reaped + 1;
        let at = DONE_RING + Slot(sequence).index() * size_of::<Done>();
        let mut wait = Wait::new();
        // The sequence is the record's last word, and stored last.
        while self.memory.load(at + size_of::<Done>() - 8) != sequence {
            if self.fault == Some(BusError::Gone) || !wait.more() || (wait.is_long() && !bell.is_there()) {
                self.fault = Some(BusError::Gone);
                return Err(BusError::Gone);
            }
        }
        let mut done = Done::new_zeroed();
        self.memory.copy_out(at, done.as_mut_bytes());
        self.reaped = sequence;
        Ok((sequence, done))
    }

    /// Takes note of how something posted ended.
    fn note(&mut self, sequence: u64, done: &Done) {
        // The first failure tells why; what was linked behind it was merely skipped. Waited work never ends here: it is
        // reaped by who waits.
        debug_assert!(sequence <= self.posted);
        if let Err(error) = outcome(done) {
            self.fault.get_or_insert(error);
        }
    }
}

/// A descriptor's place, named by its sequence.
#[derive(Clone, Copy, Debug)]
struct Slot(u64);

impl Slot {
    fn index(self) -> usize {
        (self.0 - 1) as usize % ENTRIES as usize
    }

    /// Offset of its bounce buffer.
    fn bounce(self) -> usize {
        BUFFERS + self.index() * BOUNCE
    }
}

/// What a done record says to a driver.
fn outcome(done: &Done) -> Result<(), BusError> {
    match done.status() {
        status::OK if done.is_well_formed() => Ok(()),
        status::STALE => Err(BusError::Stale),
        status::LINK_DOWN => Err(BusError::Gone),
        _ => Err(BusError::Dma),
    }
}

/// Waits for memory to change: spins, yields, then sleeps, until patience ends.
struct Wait {
    turns: u32,
    since: Option<Instant>,
}

impl Wait {
    const SPINS: u32 = 100;
    const YIELDS: u32 = 1000;

    fn new() -> Self {
        Self { turns: 0, since: None }
    }

    /// Waits a little; false when it has been too long.
    fn more(&mut self) -> bool {
        self.turns = self.turns.saturating_add(1);
        match self.turns {
            0..Self::SPINS => std::hint::spin_loop(),
            Self::SPINS..Self::YIELDS => std::thread::yield_now(),
            _ => {
                std::thread::sleep(Duration::from_micros(100));
                return self.since.get_or_insert_with(Instant::now).elapsed() < PATIENCE;
            }
        }
        true
    }

    /// Whether it sleeps by now.
    fn is_long(&self) -> bool {
        self.turns >= Self::YIELDS
    }
}
