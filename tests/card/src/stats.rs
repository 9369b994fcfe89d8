//! What a function has done since the card started.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use pcie_function::card::queue::status;

use crate::bus::Way;

/// Counts, as they go.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) doorbells: AtomicU64,
    pub(crate) doorbells_dropped: AtomicU64,
    pub(crate) notifications: AtomicU64,
    pub(crate) vectors: AtomicU64,
    pub(crate) vectors_lost: AtomicU64,
    pub(crate) resets: AtomicU64,
    descriptors: AtomicU64,
    to_host: AtomicU64,
    from_host: AtomicU64,
    faults: AtomicU64,
    refused: AtomicU64,
    stale: AtomicU64,
}

impl Counts {
    /// A descriptor was answered with this [`status`].
    pub(crate) fn ended(&self, status: u32) {
        add(&self.descriptors, 1);
        match status {
            status::OK => {}
            status::STALE => add(&self.stale, 1),
            status::HOST_FAULT | status::SOC_FAULT | status::ABORTED => add(&self.faults, 1),
            _ => add(&self.refused, 1),
        }
    }

    /// A copy moved this many bytes.
    pub(crate) fn moved(&self, way: Way, bytes: u32) {
        match way {
            Way::ToHost => add(&self.to_host, bytes.into()),
            Way::FromHost => add(&self.from_host, bytes.into()),
        }
    }

    /// A copy of all counts; the rest of [`Stats`] stays as given.
    pub(crate) fn fill(&self, stats: Stats) -> Stats {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Stats {
            doorbells: read(&self.doorbells),
            doorbells_dropped: read(&self.doorbells_dropped),
            notifications: read(&self.notifications),
            vectors: read(&self.vectors),
            vectors_lost: read(&self.vectors_lost),
            resets: read(&self.resets),
            descriptors: read(&self.descriptors),
            to_host_bytes: read(&self.to_host),
            from_host_bytes: read(&self.from_host),
            faults: read(&self.faults),
            refused: read(&self.refused),
            stale: read(&self.stale),
            ..stats
        }
    }
}

/// Counts one more, or several.
pub(crate) fn add(count: &AtomicU64, more: u64) {
    count.fetch_add(more, Ordering::Relaxed);
}

/// State and counts of a function. `Display` is a JSON object with these names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Number of the function.
    pub function: u32,
    /// Whether the host's link is up.
    pub link: bool,
    /// The generation in force.
    pub generation: u32,
    /// Bytes that the host has mapped for DMA now.
    pub host_mapped_bytes: u64,
    /// Mappings that these are in.
    pub host_mappings: u64,
    /// Bytes that the SoC has mapped for DMA now.
    pub soc_mapped_bytes: u64,
    /// Doorbells that the host rang.
    pub doorbells: u64,
    /// Of these, dropped on demand.
    pub doorbells_dropped: u64,
    /// Writes to notify pages.
    pub notifications: u64,
    /// Vectors raised in the host.
    pub vectors: u64,
    /// Vectors that nobody in the host listened to.
    pub vectors_lost: u64,
    /// Resets of the host function.
    pub resets: u64,
    /// Descriptors answered.
    pub descriptors: u64,
    /// Bytes moved to the host.
    pub to_host_bytes: u64,
    /// Bytes moved from the host.
    pub from_host_bytes: u64,
    /// Descriptors that faulted or were aborted.
    pub faults: u64,
    /// Descriptors refused: malformed, skipped, link down, not a bus master.
    pub refused: u64,
    /// Descriptors refused because of their generation.
    pub stale: u64,
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{\"function\":{},\"link\":{}", self.function, self.link)?;
        let counts = [
            ("generation", self.generation.into()),
            ("host_mapped_bytes", self.host_mapped_bytes),
            ("host_mappings", self.host_mappings),
            ("soc_mapped_bytes", self.soc_mapped_bytes),
            ("doorbells", self.doorbells),
            ("doorbells_dropped", self.doorbells_dropped),
            ("notifications", self.notifications),
            ("vectors", self.vectors),
            ("vectors_lost", self.vectors_lost),
            ("resets", self.resets),
            ("descriptors", self.descriptors),
            ("to_host_bytes", self.to_host_bytes),
            ("from_host_bytes", self.from_host_bytes),
            ("faults", self.faults),
            ("refused", self.refused),
            ("stale", self.stale),
        ];
        for (name, count) in counts {
            write!(f, ",\"{name}\":{count}")?;
        }
        f.write_str("}")
    }
}
