//! The split virtqueue, device side (virtio 1.2 §2.7), over memory that is reached by copies alone.
//!
//! Every access is a transfer, so they are few: the available ring is read in runs, descriptors ahead, an indirect table whole, the used
//! ring written in runs. What the driver writes is copied once and then judged. What both sides rely on is in aligned words of 8, which no
//! transfer tears.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

use super::ahead::{Ahead, DESCRIPTOR, Waiting};
use super::{Chain, Lease, QueueError};

/// Descriptors of a chain at most, whether or not they are in an indirect table.
pub const MAX_CHAIN: usize = 1024;
/// Heads read at once from the available ring.
const RUN: usize = 64;
/// Bytes of an element of the used ring.
const USED: usize = 8;
const NO_TABLE: &str = "an indirect descriptor where there can be none";

/// Where a queue's three parts are, and its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingLayout {
    /// Entries: a power of 2.
    pub size: u16,
    /// Descriptor table, a multiple of 16.
    pub descriptors: u64,
    /// Available ring, a multiple of 2.
    pub available: u64,
    /// Used ring, a multiple of 4.
    pub used: u64,
}

/// How far a queue is. Between requests that is all there is to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingPosition {
    /// The entry of the available ring that is taken next.
    pub available: u16,
    /// The entry of the used ring that is filled next.
    pub used: u16,
}

/// What the driver negotiated that concerns rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_index: bool,
}

/// A split virtqueue.
#[derive(Debug)]
pub struct Ring {
    at: RingLayout,
    features: RingFeatures,
    lease: Arc<Lease>,
    next: RingPosition,
    /// The available index as last read.
    seen: u16,
    /// The used index as the driver sees it, and as it was when an interrupt was last considered.
    published: u16,
    signalled: u16,
    /// Elements that belong before `next.used` and are not yet in the used ring.
    pending: Vec<u8>,
    /// The used ring's first 8 bytes: flags, index, first identifier. All of them are the device's to write.
    first: [u8; 8],
    /// What the driver was told about kicks: the event index, or whether it may kick at all. None: nothing yet.
    told: Option<u16>,
    /// Heads read ahead: the run's first entry and its length.
    heads: [u8; 2 * RUN],
    run: (u16, u16),
    ahead: Ahead,
    /// The indirect table of the chain that is looked at.
    table: Vec<u8>,
}

impl Ring {
    /// A queue at `position`. Nothing is read before [`Ring::start`].
    ///
    /// # Errors
    /// The layout is none (§2.7).
    pub fn new(
        at: RingLayout,
        features: RingFeatures,
        position: RingPosition,
        lease: Arc<Lease>,
    ) -> Result<Self, QueueError> {
        let aligned = at.descriptors.is_multiple_of(16) && at.available.is_multiple_of(2) && at.used.is_multiple_of(4);
        let room = u64::MAX - 8 - u64::from(at.size) * DESCRIPTOR as u64;
        if !at.size.is_power_of_two() || !aligned || at.descriptors.max(at.available).max(at.used) > room {
            return Err(QueueError::Broken("a queue that is not where a queue can be"));
        }
        Ok(Self {
            at,
            features,
            lease,
            next: position,
            seen: position.available,
            published: position.used,
            signalled: position.used,
            pending: Vec::with_capacity(usize::from(at.size) * USED),
            first: [0; 8],
            told: None,
            heads: [0; 2 * RUN],
            run: (0, 0),
            ahead: Ahead::new(),
            table: Vec::new(),
        })
    }

    /// Reads what the driver left in the used ring, before the first use, or the first one after a halt.
    ///
    /// # Errors
    /// It is not in RAM.
    pub fn start(&mut self) -> Result<(), QueueError> {
        self.lease.read(self.at.used, &mut self.first)?;
        self.first[..2].fill(0);
        self.told = None;
        Ok(())
    }

    /// Where it is.
    pub fn layout(&self) -> RingLayout {
        self.at
    }

    /// How far it is; what was pushed and not published is not counted.
    pub fn position(&self) -> RingPosition {
        RingPosition { available: self.next.available, used: self.published }
    }

    /// Says that somebody else has served the queue: all before entry `next` is used, and nothing behind it was taken.
    pub fn move_to(&mut self, next: u16) {
        self.next = RingPosition { available: next, used: next };
        (self.seen, self.published, self.signalled, self.run) = (next, next, next, (0, 0));
    }

    /// Through what chains are read and written.
    pub fn lease(&self) -> &Arc<Lease> {
        &self.lease
    }

    /// Takes the next available chain; false: there is none.
    ///
    /// # Errors
    /// The driver broke the rules, memory can't be reached, or the lease is over. Then nothing more can be had from the queue.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if !self.has_available()? {
            return Ok(false);
        }
        let head = self.head()?;
        self.parse(head, chain)?;
        self.next.available = self.next.available.wrapping_add(1);
        Ok(true)
    }

    /// Takes a chain again that was taken before this process had the queue, and never pushed.
    ///
    /// # Errors
    /// As [`Ring::pop`].
    pub fn retake(&mut self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        self.parse(head, chain)
    }

    /// Makes the last `count` chains taken available again; none of them may have been pushed.
    pub fn put_back(&mut self, count: u16) {
        self.next.available = self.next.available.wrapping_sub(count);
    }

    /// Gives a chain back, with `written` bytes in it from its front. The driver sees it after [`Ring::publish`].
    ///
    /// # Errors
    /// As [`Ring::pop`].
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        // Only a driver that counts chains twice has so many under way.
        if self.pending.len() == usize::from(self.at.size) * USED {
            self.write_used()?;
        }
        self.pending.extend(u32::from(head).to_le_bytes());
        self.pending.extend(written.to_le_bytes());
        self.next.used = self.next.used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver what was pushed; whether it wants an interrupt for that (§2.7.7, §2.7.10).
    ///
    /// # Errors
    /// As [`Ring::pop`].
    pub fn publish(&mut self) -> Result<bool, QueueError> {
        if self.published == self.next.used {
            return Ok(false);
        }
        self.write_used()?;
        // The elements before the index.
        fence(Ordering::Release);
        self.write_first(self.flags(), self.next.used)?;
        self.published = self.next.used;
        // The index before what the driver says about interrupts, as the driver does it the other way round.
        fence(Ordering::SeqCst);
        let signalled = std::mem::replace(&mut self.signalled, self.published);
        if !self.features.event_index {
            let flags = self.lease.read_u16(self.at.available)?;
            return Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let event = self.lease.read_u16(self.at.available + 4 + 2 * u64::from(self.at.size))?;
        let news = self.published.wrapping_sub(signalled);
        Ok(self.published.wrapping_sub(event).wrapping_sub(1) < news)
    }

    /// Asks the driver to be quiet while the queue is looked at anyway.
    ///
    /// # Errors
    /// As [`Ring::pop`].
    pub fn hold_kicks(&mut self) -> Result<(), QueueError> {
        // With the event index silence is the rule once the index it waits for has passed.
        if self.features.event_index || self.told == Some(0) {
            return Ok(());
        }
        self.told = Some(0);
        self.write_first(VRING_USED_F_NO_NOTIFY as u16, self.published)
    }

    /// Asks for a kick with the next chain that the driver makes available; whether there is one already, for which no kick may come.
    ///
    /// # Errors
    /// As [`Ring::pop`].
    pub fn allow_kicks(&mut self) -> Result<bool, QueueError> {
        if self.features.event_index {
            if self.told != Some(self.seen) {
                self.told = Some(self.seen);
                // A driver that reads a torn one published its chain before this write was complete: seen below.
                let event = self.at.used + 4 + 8 * u64::from(self.at.size);
                self.lease.write(event, &self.seen.to_le_bytes())?;
            }
        } else if self.told != Some(1) {
            self.told = Some(1);
            self.write_first(0, self.published)?;
        }
        fence(Ordering::SeqCst);
        self.has_news()
    }

    /// Whether the driver made chains available since that was last looked at.
    ///
    /// # Errors
    /// As [`Ring::pop`].
    pub fn has_news(&mut self) -> Result<bool, QueueError> {
        let seen = self.seen;
        self.look()?;
        Ok(self.seen != seen)
    }

    /// Whether a chain is there to be taken.
    fn has_available(&mut self) -> Result<bool, QueueError> {
        if self.next.available == self.seen {
            self.look()?;
        }
        Ok(self.next.available != self.seen)
    }

    /// Reads the available index.
    fn look(&mut self) -> Result<(), QueueError> {
        let seen = self.lease.read_u16(self.at.available + 2)?;
        // A driver doesn't take chains back either.
        let (had, has) = (self.seen.wrapping_sub(self.next.available), seen.wrapping_sub(self.next.available));
        if has > self.at.size || has < had {
            return Err(QueueError::Broken("an available index that its queue can't have"));
        }
        self.seen = seen;
        // The index before the entries, and before what they lead to.
        fence(Ordering::Acquire);
        Ok(())
    }

    /// The next available head, which there is.
    fn head(&mut self) -> Result<u16, QueueError> {
        let mut ahead = self.next.available.wrapping_sub(self.run.0);
        if ahead >= self.run.1 {
            let at = self.next.available & (self.at.size - 1);
            let count = (self.seen.wrapping_sub(self.next.available)).min(self.at.size - at).min(RUN as u16);
            let heads = &mut self.heads[..2 * usize::from(count)];
            self.run = (self.next.available, 0);
            self.lease.read(self.at.available + 4 + 2 * u64::from(at), heads)?;
            self.run.1 = count;
            ahead = 0;
        }
        let at = 2 * usize::from(ahead);
        Ok(u16::from_le_bytes([self.heads[at], self.heads[at + 1]]))
    }

    fn parse(&mut self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        chain.clear(head);
        let (own, waiting) = (self.at.size, Waiting { next: self.next.available, end: self.seen });
        // What a chain without end would pass: the entries of its table, and of any chain.
        let (mut index, mut len, mut indirect) = (head, own, false);
        let (mut left, mut total) = (usize::from(len), MAX_CHAIN);
        loop {
            if index >= len {
                return Err(QueueError::Broken("a descriptor's index past the end of its table"));
            }
            let descriptor = if indirect {
                Descriptor::new(&self.table.as_chunks().0[usize::from(index)])
            } else {
                Descriptor::new(self.ahead.read(index, (self.at.descriptors, own), waiting, &self.lease)?)
            };
            if descriptor.flags & VRING_DESC_F_INDIRECT != 0 {
                if indirect {
                    return Err(QueueError::Broken(NO_TABLE));
                }
                len = self.read_table(&descriptor)?;
                (index, left, indirect) = (0, usize::from(len), true);
                continue;
            }
            if left == 0 || total == 0 {
                return Err(QueueError::Broken("a chain without end"));
            }
            (left, total) = (left - 1, total - 1);
            chain.add(descriptor.addr, descriptor.len, descriptor.flags & VRING_DESC_F_WRITE != 0)?;
            if descriptor.flags & VRING_DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    /// Reads the table that a descriptor leads to (§2.7.5.3); its length.
    fn read_table(&mut self, descriptor: &Descriptor) -> Result<u16, QueueError> {
        let len = descriptor.len as usize;
        if !self.features.indirect {
            return Err(QueueError::Broken(NO_TABLE));
        }
        if !len.is_multiple_of(DESCRIPTOR) || !(1..=MAX_CHAIN).contains(&(len / DESCRIPTOR)) {
            return Err(QueueError::Broken("an indirect table of a size that no table has"));
        }
        if descriptor.addr.checked_add(len as u64).is_none() {
            return Err(QueueError::Broken("an indirect table past the end of memory"));
        }
        self.table.resize(len.max(self.table.len()), 0);
        self.lease.read(descriptor.addr, &mut self.table[..len])?;
        Ok((len / DESCRIPTOR) as u16)
    }

    /// Writes the elements that wait, without the index.
    fn write_used(&mut self) -> Result<(), QueueError> {
        let size = usize::from(self.at.size);
        let count = self.pending.len() / USED;
        let start = usize::from(self.next.used.wrapping_sub(count as u16)) & (size - 1);
        let until_end = count.min(size - start);
        let (now, wrapped) = self.pending.split_at(until_end * USED);
        for (at, elements) in [(start, now), (0, wrapped)] {
            if !elements.is_empty() {
                self.lease.write(self.at.used + 4 + (at * USED) as u64, elements)?;
            }
            if at == 0
                && let Some(id) = elements.first_chunk::<4>()
            {
                self.first[4..].copy_from_slice(id);
            }
        }
        self.pending.clear();
        Ok(())
    }

    /// The used ring's flags as the driver was told them.
    fn flags(&self) -> u16 {
        u16::from_le_bytes([self.first[0], self.first[1]])
    }

    fn write_first(&mut self, flags: u16, index: u16) -> Result<(), QueueError> {
        self.first[..2].copy_from_slice(&flags.to_le_bytes());
        self.first[2..4].copy_from_slice(&index.to_le_bytes());
        // The first identifier with them makes an aligned word of 8, which is never seen in part. Drivers align rings to cache
        // lines or pages; one that does the least the specification asks for gets what the transport makes of 4 bytes.
        let len = if self.at.used.is_multiple_of(8) { 8 } else { 4 };
        self.lease.write(self.at.used, &self.first[..len])
    }
}

/// A descriptor (§2.7.5).
#[derive(Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u32,
    next: u16,
}

impl Descriptor {
    fn new(bytes: &[u8; DESCRIPTOR]) -> Self {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let (addr, rest) = (word(0), word(8));
        Self { addr, len: rest as u32, flags: u32::from((rest >> 32) as u16), next: (rest >> 48) as u16 }
    }
}
