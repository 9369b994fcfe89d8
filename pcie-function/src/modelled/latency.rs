//! How long a crossing takes.

use std::time::Duration;

use super::link::Side;

/// How long each kind of crossing takes; all zero unless told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latencies {
    /// From a store of the host to the BAR until the SoC can load it. The host goes on at once.
    pub posted_write: Duration,
    /// A load of the host from the BAR, there and back: the host waits. A copy out is one load after another.
    pub read: Duration,
    /// From a store of the SoC until the host can load it. The SoC goes on at once; a flush waits until it has arrived.
    pub dma_write: Duration,
    /// A DMA read of any length, there and back: the SoC waits.
    pub dma_read: Duration,
    /// From a ring until the SoC's eventfd is readable.
    pub doorbell: Duration,
    /// From a raise until the host's eventfd is signalled.
    pub vector: Duration,
}

impl Latencies {
    /// What `side` writes.
    pub(super) fn write(&self, side: Side) -> Duration {
        match side {
            Side::Host => self.posted_write,
            Side::Soc => self.dma_write,
        }
    }

    /// What `side` reads.
    pub(super) fn read(&self, side: Side) -> Duration {
        match side {
            Side::Host => self.read,
            Side::Soc => self.dma_read,
        }
    }

    /// What `side` signals.
    pub(super) fn signal(&self, side: Side) -> Duration {
        match side {
            Side::Host => self.doorbell,
            Side::Soc => self.vector,
        }
    }
}
