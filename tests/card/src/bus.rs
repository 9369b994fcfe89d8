//! Both links of a function as its DMA engine sees them: what is mapped, who may master, which generation it is.
//!
//! A [`Bus`] stands behind one lock. The engine moves each chunk with the lock shared; an unmap, a reset, a lost link take it
//! exclusively, so they are answered when no DMA under the old rules is in flight.

use pcie_function::card::queue::status;

use crate::iommu::{Direction, IovaMap};

/// One side of a function.
#[derive(Debug, Default)]
pub(crate) struct Side {
    /// What DMA reaches.
    pub(crate) map: IovaMap,
    /// Bus Master Enable.
    pub(crate) master: bool,
}

/// The state that decides whether a byte moves.
#[derive(Debug)]
pub(crate) struct Bus {
    /// The host server's side.
    pub(crate) host: Side,
    /// The SoC's side.
    pub(crate) soc: Side,
    /// Whether a host is there.
    pub(crate) connected: bool,
    /// Whether the link was not taken down by order.
    pub(crate) up: bool,
    /// Whether the host function was pulled out.
    pub(crate) removed: bool,
    generation: u32,
}

/// Why, and after how many bytes of this chunk, a copy ends early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// One of [`status`].
    pub(crate) status: u32,
    /// Bytes of the chunk that were moved.
    pub(crate) moved: usize,
    /// First IOVA that faulted, else 0.
    pub(crate) fault: u64,
}

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ToHost,
    FromHost,
}

impl Bus {
    /// Nobody is there; generation 1.
    pub(crate) fn new() -> Self {
        Self { host: Side::default(), soc: Side::default(), connected: false, up: true, removed: false, generation: 1 }
    }

    /// Whether the host's link is up and its function there.
    pub(crate) fn link(&self) -> bool {
        self.connected && self.up && !self.removed
    }

    /// Resets of the host function and losses of its link so far, plus one.
    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    /// A reset, or a lost link.
    pub(crate) fn next_generation(&mut self) {
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        self.host.master = false;
    }

    /// Whether work of `generation` may touch the host now; else its [`status`].
    pub(crate) fn admit(&self, generation: u32) -> Result<(), u32> {
        if generation != self.generation {
            Err(status::STALE)
        } else if !self.link() {
            Err(status::LINK_DOWN)
        } else if !self.host.master {
            Err(status::NOT_MASTER)
        } else {
            Ok(())
        }
    }

    /// Moves one chunk, through `buffer` and of its length; what can be moved is, also before a fault.
    pub(crate) fn copy(&self, way: Way, host: u64, soc: u64, buffer: &mut [u8]) -> Result<(), Refusal> {
        let host = End { side: &self.host, iova: host, status: status::HOST_FAULT };
        let soc = End { side: &self.soc, iova: soc, status: status::SOC_FAULT };
        let (from, to) = match way {
            Way::ToHost => (soc, host),
            Way::FromHost => (host, soc),
        };
        let readable = from.reach(buffer.len(), Direction::Read);
        let writable = to.reach(buffer.len(), Direction::Write);
        let moved = readable.min(writable);
        let data = &mut buffer[..moved];
        from.side.map.read(from.iova, data);
        to.side.map.write(to.iova, data);
        if moved == buffer.len() {
            return Ok(());
        }
        let at_fault = if readable <= writable { from } else { to };
        Err(Refusal { status: at_fault.status, moved, fault: at_fault.iova + moved as u64 })
    }

    /// Reads a descriptor from SoC memory; `None` where it faults.
    pub(crate) fn read_soc<const N: usize>(&self, iova: u64) -> Option<[u8; N]> {
        let mut data = [0; N];
        self.ring(iova, N, Direction::Read)?.map.read(iova, &mut data);
        Some(data)
    }

    /// Writes a done record to SoC memory; `None` where it faults.
    pub(crate) fn write_soc(&self, iova: u64, data: &[u8]) -> Option<()> {
        self.ring(iova, data.len(), Direction::Write)?.map.write(iova, data);
        Some(())
    }

    fn ring(&self, iova: u64, len: usize, direction: Direction) -> Option<&Side> {
        let reached = End { side: &self.soc, iova, status: status::SOC_FAULT }.reach(len, direction);
        (reached == len).then_some(&self.soc)
    }
}

/// One end of a copy.
#[derive(Clone, Copy)]
struct End<'a> {
    side: &'a Side,
    iova: u64,
    status: u32,
}

impl End<'_> {
    fn reach(&self, len: usize, direction: Direction) -> usize {
        if self.side.master { self.side.map.reach(self.iova, len, direction) } else { 0 }
    }
}
