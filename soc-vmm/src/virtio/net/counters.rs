//! What an interface counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Frames of an interface.
#[derive(Debug, Default)]
pub struct NetCounters {
    sent: AtomicU64,
    unsent: AtomicU64,
    received: AtomicU64,
    unreceived: AtomicU64,
    unwanted: AtomicU64,
}

impl NetCounters {
    /// Frames of the guest that its network took.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Frames of the guest that were dropped: the peer was slow or gone, or they were none.
    pub fn unsent(&self) -> u64 {
        self.unsent.load(Ordering::Relaxed)
    }

    /// Frames that the guest was given.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Frames for the guest that were dropped: it had no buffer for them, or no link.
    pub fn unreceived(&self) -> u64 {
        self.unreceived.load(Ordering::Relaxed)
    }

    /// Frames that the guest's driver didn't want.
    pub fn unwanted(&self) -> u64 {
        self.unwanted.load(Ordering::Relaxed)
    }

    pub(super) fn count_sent(&self, sent: bool) {
        Self::add(if sent { &self.sent } else { &self.unsent });
    }

    pub(super) fn count_received(&self, received: bool) {
        Self::add(if received { &self.received } else { &self.unreceived });
    }

    pub(super) fn count_unwanted(&self) {
        Self::add(&self.unwanted);
    }

    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
