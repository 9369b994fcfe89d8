//! What crossed, by kind.

use std::sync::atomic::{AtomicU64, Ordering};

use super::link::Side;

/// Crossings since the start, by kind. Shared by both ends where one process holds both.
#[derive(Debug, Default)]
pub struct Crossings {
    posted: AtomicU64,
    posted_bytes: AtomicU64,
    reads: AtomicU64,
    dma_writes: AtomicU64,
    dma_write_bytes: AtomicU64,
    dma_reads: AtomicU64,
    dma_read_bytes: AtomicU64,
    doorbells: AtomicU64,
    vectors: AtomicU64,
}

/// [`Crossings`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Stores of the host to the BAR, in TLPs.
    pub posted: u64,
    /// Their bytes.
    pub posted_bytes: u64,
    /// Non-posted reads: loads of the host from the BAR.
    pub reads: u64,
    /// DMA writes of the SoC.
    pub dma_writes: u64,
    /// Their bytes.
    pub dma_write_bytes: u64,
    /// DMA reads of the SoC.
    pub dma_reads: u64,
    /// Their bytes.
    pub dma_read_bytes: u64,
    /// Doorbells that the host rang.
    pub doorbells: u64,
    /// Vectors that the SoC raised.
    pub vectors: u64,
}

impl Crossings {
    /// The counts now.
    pub fn counts(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            posted: get(&self.posted),
            posted_bytes: get(&self.posted_bytes),
            reads: get(&self.reads),
            dma_writes: get(&self.dma_writes),
            dma_write_bytes: get(&self.dma_write_bytes),
            dma_reads: get(&self.dma_reads),
            dma_read_bytes: get(&self.dma_read_bytes),
            doorbells: get(&self.doorbells),
            vectors: get(&self.vectors),
        }
    }

    /// A write across the bus: so many TLPs from the host, one transfer from the SoC.
    pub(super) fn wrote(&self, from: Side, tlps: u64, len: usize) {
        let (writes, bytes) = match from {
            Side::Host => (&self.posted, &self.posted_bytes),
            Side::Soc => (&self.dma_writes, &self.dma_write_bytes),
        };
        add(writes, if from == Side::Host { tlps } else { 1 });
        add(bytes, len as u64);
    }

    /// A read across the bus: so many loads by the host, one transfer to the SoC.
    pub(super) fn read(&self, from: Side, loads: u64, len: usize) {
        match from {
            Side::Host => add(&self.reads, loads),
            Side::Soc => {
                add(&self.dma_reads, 1);
                add(&self.dma_read_bytes, len as u64);
            }
        }
    }

    /// A doorbell or a vector, by who sends it.
    pub(super) fn signalled(&self, from: Side) {
        match from {
            Side::Host => add(&self.doorbells, 1),
            Side::Soc => add(&self.vectors, 1),
        }
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
