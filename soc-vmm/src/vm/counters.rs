//! What a VM's worker counts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use ioreq_ring::Kind;

/// A count that only grows. One thread counts, any may look: no locked instruction.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts `n` more.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts of one VM, since it was started.
#[derive(Debug, Default)]
pub struct Counters {
    /// Synchronous port accesses; a string counts once.
    pub pio: Counter,
    /// Synchronous memory accesses, by fragment.
    pub mmio: Counter,
    /// Every other synchronous request.
    pub other: Counter,
    /// Posted writes.
    pub posted: Counter,
    /// Accesses that nothing claims.
    pub unclaimed: Counter,
    /// Accesses that their device failed.
    pub failed: Counter,
    /// Vectors raised because a vCPU slept.
    pub vectors: Counter,
    /// Doorbells heard.
    pub doorbells: Counter,
    /// Times the worker slept.
    pub sleeps: Counter,
}

impl Counters {
    /// Every count by its name.
    pub fn by_name(&self) -> BTreeMap<String, u64> {
        let Self { pio, mmio, other, posted, unclaimed, failed, vectors, doorbells, sleeps } = self;
        let named = [
            ("exits.pio", pio),
            ("exits.mmio", mmio),
            ("exits.other", other),
            ("exits.posted", posted),
            ("exits.unclaimed", unclaimed),
            ("exits.failed", failed),
            ("vectors", vectors),
            ("doorbells", doorbells),
            ("sleeps", sleeps),
        ];
        named.into_iter().map(|(name, counter)| (name.to_owned(), counter.get())).collect()
    }

    pub(super) fn exit(&self, kind: Kind) {
        match kind {
            Kind::PIO => self.pio.add(1),
            Kind::MMIO => self.mmio.add(1),
            _ => self.other.add(1),
        }
    }
}
