//! The split virtqueue, driver side (virtio 1.2 §2.7), over memory that a back end writes too.
//!
//! It is trusted with nothing: each word is read once, and what it says is judged by what was made available.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

use super::region::Share;

/// Descriptors of a chain at most: see [`super::shadow`].
pub(super) const PARTS: usize = 4;

/// What the back end agreed to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Manners {
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_index: bool,
}

/// A buffer of a chain, by the back end's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) writable: bool,
}

/// A ring that was not used yet.
#[derive(Debug)]
pub(super) struct DriverRing {
    share: Share,
    manners: Manners,
    /// The available index: as it will be, and as the back end was shown it.
    available: u16,
    shown: u16,
    /// The used entry that comes next.
    used: u16,
    /// What the back end was told of calls.
    told: Option<u16>,
}

impl DriverRing {
    pub(super) fn new(share: Share, manners: Manners) -> Self {
        Self { share, manners, available: 0, shown: 0, used: 0, told: None }
    }

    pub(super) fn share(&self) -> &Share {
        &self.share
    }

    /// Makes a chain of these parts available: with one descriptor, the others in a table, or with one for each of `entries`. The back end
    /// sees it after [`DriverRing::show`].
    pub(super) fn offer(&mut self, entries: &[u16], parts: &[Part]) {
        let head = entries[0];
        if entries.len() < parts.len() {
            let table = self.share.at.tables + 16 * PARTS * usize::from(head);
            for (index, part) in parts.iter().enumerate() {
                let next = (index + 1 < parts.len()).then_some(index as u16 + 1);
                self.describe(table + 16 * index, part, next);
            }
            let address = self.share.base + table as u64;
            let table = Part { address, len: 16 * parts.len() as u32, writable: false };
            self.write_descriptor(16 * usize::from(head), &table, VRING_DESC_F_INDIRECT, 0);
        } else {
            for (index, (part, entry)) in parts.iter().zip(entries).enumerate() {
                self.describe(16 * usize::from(*entry), part, entries.get(index + 1).copied());
            }
        }
        let size = self.share.at.size;
        let at = self.share.at.available + 4 + 2 * usize::from(self.available & (size - 1));
        self.put(at, head);
        self.available = self.available.wrapping_add(1);
    }

    /// Shows the back end what was made available; whether it wants a kick for that.
    pub(super) fn show(&mut self) -> bool {
        if self.shown == self.available {
            return false;
        }
        // What the index leads to before the index.
        fence(Ordering::Release);
        self.put(self.share.at.available + 2, self.available);
        let shown = std::mem::replace(&mut self.shown, self.available);
        // The index before what the back end says of kicks, as it does it the other way round.
        fence(Ordering::SeqCst);
        let size = usize::from(self.share.at.size);
        if !self.manners.event_index {
            return u32::from(self.get(self.share.at.used)) & VRING_USED_F_NO_NOTIFY == 0;
        }
        let event = self.get(self.share.at.used + 4 + 8 * size);
        self.shown.wrapping_sub(event).wrapping_sub(1) < self.shown.wrapping_sub(shown)
    }

    /// How many used entries are there.
    pub(super) fn has_used(&self) -> u16 {
        let index = self.get(self.share.at.used + 2);
        // The index before the entries, and before what they are about.
        fence(Ordering::Acquire);
        index.wrapping_sub(self.used)
    }

    /// The next used entry, which is there: identifier, bytes.
    pub(super) fn take_used(&mut self) -> (u32, u32) {
        let size = self.share.at.size;
        let at = self.share.at.used + 4 + 8 * usize::from(self.used & (size - 1));
        self.used = self.used.wrapping_add(1);
        (self.share.window.load_u32(at), self.share.window.load_u32(at + 4))
    }

    /// Asks for a call with the next used entry; whether there is one already, for which none may come.
    pub(super) fn allow_calls(&mut self) -> bool {
        if self.manners.event_index {
            self.tell(4 + 2 * usize::from(self.share.at.size), self.used);
        } else {
            self.tell(0, 0);
        }
        fence(Ordering::SeqCst);
        self.has_used() > 0
    }

    /// Asks for silence while the used ring is looked at anyway.
    pub(super) fn hold_calls(&mut self) {
        // With the event index silence is the rule once the index that was waited for has passed.
        if !self.manners.event_index {
            self.tell(0, VRING_AVAIL_F_NO_INTERRUPT as u16);
        }
    }

    fn tell(&mut self, at: usize, value: u16) {
        if self.told.replace(value) != Some(value) {
            self.put(self.share.at.available + at, value);
        }
    }

    fn describe(&self, at: usize, part: &Part, next: Option<u16>) {
        let flags = if part.writable { VRING_DESC_F_WRITE } else { 0 };
        let more = if next.is_some() { VRING_DESC_F_NEXT } else { 0 };
        self.write_descriptor(at, part, flags | more, next.unwrap_or(0));
    }

    fn write_descriptor(&self, at: usize, part: &Part, flags: u32, next: u16) {
        let rest = u64::from(part.len) | u64::from(flags) << 32 | u64::from(next) << 48;
        let bytes = u128::from(part.address) | u128::from(rest) << 64;
        self.share.window.write_bytes(at, &bytes.to_le_bytes());
    }

    fn get(&self, at: usize) -> u16 {
        let mut bytes = [0; 2];
        self.share.window.read_bytes(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn put(&self, at: usize, value: u16) {
        self.share.window.write_bytes(at, &value.to_le_bytes());
    }
}
