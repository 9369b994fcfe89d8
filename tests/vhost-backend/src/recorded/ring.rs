//! A split virtqueue (virtio 1.2 §2.7) and its part of the record.
//!
//! The record has for each queue 16 bytes (features, version, entries, the head that was given back last, the used index) and for each head
//! 16: whether it is in flight, and when it was taken.

use std::io;
use std::sync::atomic::{Ordering, fence};

use super::Log;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, MmapRegion};

/// Bytes of a queue in the record, for so many entries.
pub(super) fn record_len(entries: usize) -> usize {
    (16 + 16 * entries).next_multiple_of(64)
}

const LAST: usize = 12;
const USED: usize = 14;
const IN_FLIGHT: usize = 0;
const COUNTER: usize = 8;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;

/// Where a queue is, and how far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    /// Where its used ring is logged, if it is.
    pub(super) log: Option<u64>,
    /// The entry that is taken next.
    pub(super) next: u16,
    counter: u64,
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffer {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) writable: bool,
}

/// A queue with its memory at hand.
pub(super) struct InUse<'a> {
    ring: &'a mut Ring,
    memory: &'a GuestMemoryMmap,
    log: &'a Log,
    record: &'a MmapRegion,
    /// Its part of the record.
    at: usize,
}

impl<'a> InUse<'a> {
    pub(super) fn new(
        ring: &'a mut Ring,
        memory: &'a GuestMemoryMmap,
        log: &'a Log,
        record: &'a MmapRegion,
        entries: usize,
        index: u32,
    ) -> Self {
        Self { ring, memory, log, record, at: index as usize * record_len(entries) }
    }

    /// What a predecessor has taken and not given back, the last first.
    pub(super) fn recover(&mut self) -> io::Result<Vec<u16>> {
        let used: u16 = self.load(self.ring.used + 2)?;
        if self.note::<u16>(self.at + USED)? != used {
            // It died between the used index and its note of that.
            let last: u16 = self.note(self.at + LAST)?;
            self.set_note(self.entry(last) + IN_FLIGHT, 0u8)?;
            self.set_note(self.at + USED, used)?;
        }
        let mut heads = Vec::new();
        for head in 0..self.ring.size {
            if self.note::<u8>(self.entry(head) + IN_FLIGHT)? != 0 {
                heads.push((self.note::<u64>(self.entry(head) + COUNTER)?, head));
            }
        }
        heads.sort_unstable();
        self.ring.counter = heads.last().map_or(0, |(counter, _)| counter + 1);
        self.ring.next = used.wrapping_add(heads.len() as u16);
        Ok(heads.into_iter().map(|(_, head)| head).collect())
    }

    /// Takes what is available.
    pub(super) fn take(&mut self) -> io::Result<Vec<u16>> {
        let end: u16 = self.load(self.ring.available + 2)?;
        fence(Ordering::Acquire);
        let mut heads = Vec::new();
        while self.ring.next != end {
            let at = self.ring.available + 4 + 2 * u64::from(self.ring.next % self.ring.size);
            let head: u16 = self.load(at)?;
            self.set_note(self.entry(head) + COUNTER, self.ring.counter)?;
            self.set_note(self.entry(head) + IN_FLIGHT, 1u8)?;
            self.ring.counter += 1;
            self.ring.next = self.ring.next.wrapping_add(1);
            heads.push(head);
        }
        Ok(heads)
    }

    /// The buffers of a chain, which has no tables: that isn't offered.
    pub(super) fn buffers(&self, head: u16) -> io::Result<Vec<Buffer>> {
        let (mut index, mut buffers) = (head, Vec::new());
        while buffers.len() < usize::from(self.ring.size) {
            let at = self.ring.descriptors + 16 * u64::from(index);
            let (addr, len) = (self.load(at)?, self.load(at + 8)?);
            let flags: u16 = self.load(at + 12)?;
            buffers.push(Buffer { addr, len, writable: flags & WRITE != 0 });
            if flags & NEXT == 0 {
                return Ok(buffers);
            }
            index = self.load(at + 14)?;
        }
        Err(io::Error::other("a chain without end"))
    }

    /// Gives a chain back.
    pub(super) fn give_back(&mut self, head: u16, written: u32) -> io::Result<()> {
        self.set_note(self.at + LAST, head)?;
        let index: u16 = self.load(self.ring.used + 2)?;
        let entry = self.ring.used + 4 + 8 * u64::from(index % self.ring.size);
        self.store(entry, u32::from(head))?;
        self.store(entry + 4, written)?;
        fence(Ordering::Release);
        self.store(self.ring.used + 2, index.wrapping_add(1))?;
        if let Some(log) = self.ring.log {
            self.log.mark(log, 4)?;
            self.log.mark(log + (entry - self.ring.used), 8)?;
        }
        self.set_note(self.entry(head) + IN_FLIGHT, 0u8)?;
        self.set_note(self.at + USED, index.wrapping_add(1))
    }

    /// Whether the driver wants to be called.
    pub(super) fn wants_call(&self) -> io::Result<bool> {
        fence(Ordering::SeqCst);
        Ok(self.load::<u16>(self.ring.available)? & NO_INTERRUPT == 0)
    }

    fn entry(&self, head: u16) -> usize {
        self.at + 16 + 16 * usize::from(head)
    }

    fn load<T: vm_memory::ByteValued + vm_memory::AtomicAccess>(&self, addr: u64) -> io::Result<T> {
        self.memory.load(GuestAddress(addr), Ordering::Relaxed).map_err(io::Error::other)
    }

    fn store<T: vm_memory::AtomicAccess>(&self, addr: u64, value: T) -> io::Result<()> {
        self.memory.store(value, GuestAddress(addr), Ordering::Relaxed).map_err(io::Error::other)
    }

    fn note<T: vm_memory::AtomicAccess>(&self, at: usize) -> io::Result<T> {
        vm_memory::VolatileMemory::as_volatile_slice(self.record).load(at, Ordering::SeqCst).map_err(io::Error::other)
    }

    fn set_note<T: vm_memory::AtomicAccess>(&self, at: usize, value: T) -> io::Result<()> {
        let record = vm_memory::VolatileMemory::as_volatile_slice(self.record);
        record.store(value, at, Ordering::SeqCst).map_err(io::Error::other)
    }
}
