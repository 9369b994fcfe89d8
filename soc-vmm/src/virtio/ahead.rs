//! A queue's own descriptors, read ahead: drivers mostly take neighbours, upwards or downwards, so that one transfer brings those of
//! several chains.

use super::{Lease, QueueError};

/// Bytes of a descriptor (virtio 1.2 §2.7.5).
pub(super) const DESCRIPTOR: usize = 16;
/// Descriptors read at once: at first, and where one reading follows another over and over.
const LEAST: u16 = 8;
const MOST: u16 = 64;

/// Which descriptors are at hand.
#[derive(Debug)]
pub(super) struct Ahead {
    first: u16,
    count: u16,
    /// The available index as it was before they were read: of chains from there on they may say what was there before.
    until: u16,
    bytes: Vec<u8>,
}

/// A queue's chains that wait: the one that is looked at, and where they end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) next: u16,
    pub(super) end: u16,
}

impl Ahead {
    pub(super) fn new() -> Self {
        Self { first: 0, count: 0, until: 0, bytes: vec![0; usize::from(MOST) * DESCRIPTOR] }
    }

    /// One of the `size` descriptors at `table`, of the chain that is looked at.
    pub(super) fn read(
        &mut self,
        index: u16,
        (table, size): (u64, u16),
        waiting: Waiting,
        lease: &Lease,
    ) -> Result<&[u8; DESCRIPTOR], QueueError> {
        let is_fresh = (1..=size).contains(&self.until.wrapping_sub(waiting.next));
        let is_here = (self.first..self.first + self.count).contains(&index);
        if !(is_fresh && is_here) {
            let (above, below) = (index == self.first + self.count, index + 1 == self.first);
            let is_alone = waiting.end.wrapping_sub(waiting.next) == 1;
            let many = if (above || below) && !is_alone { (2 * self.count).clamp(LEAST, MOST) } else { LEAST };
            let first = if below { (index + 1).saturating_sub(many) } else { index };
            let count = many.min(size - first);
            // Nothing is at hand where it can't be read.
            (self.first, self.count, self.until) = (first, 0, waiting.end);
            let bytes = &mut self.bytes[..usize::from(count) * DESCRIPTOR];
            lease.read(table + u64::from(first) * DESCRIPTOR as u64, bytes)?;
            self.count = count;
        }
        let (descriptors, _) = self.bytes.as_chunks();
        Ok(&descriptors[usize::from(index - self.first)])
    }
}
