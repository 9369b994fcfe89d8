//! The memory that a back end sees: a file of soc-vmm's own with each queue's ring and bounce buffers, and nothing else.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use pcie_function::local::sealed_memfd;
use pcie_function::{FunctionError, Mapping, Reach, Window, Windowed};

use super::pool::PAGE;
use super::ring::PARTS;

/// Addresses of the first byte, for one start and the next: not 0, which some take for none, and another one than before, since DPDK takes
/// memory of the same address and size for the same memory.
pub const BASES: [u64; 2] = [1 << 32, 1 << 33];
/// The whole is a multiple of this: a large page, by which some back ends register memory for DMA.
const GRAIN: usize = 2 << 20;
/// Bytes of a buffer that needs no page.
pub(super) const SMALL: usize = 64;

/// Where the parts of a queue are, from the beginning of its share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Entries of the ring.
    pub(super) size: u16,
    pub(super) available: usize,
    /// The used ring.
    pub used: usize,
    /// A table of [`PARTS`] descriptors for each entry.
    pub(super) tables: usize,
    /// [`PARTS`] buffers of [`SMALL`] bytes for each entry.
    pub(super) small: usize,
    pub(super) pages: usize,
    len: usize,
}

impl Layout {
    /// For a ring of `size` entries with so many pages of bounce buffers.
    pub(super) fn new(size: u16, pages: usize) -> Self {
        let entries = usize::from(size);
        let available = 16 * entries;
        let used = (available + 6 + 2 * entries).next_multiple_of(64);
        let tables = (used + 6 + 8 * entries).next_multiple_of(PAGE);
        let small = tables + 16 * PARTS * entries;
        let first = (small + SMALL * PARTS * entries).next_multiple_of(PAGE);
        Self { size, available, used, tables, small, pages: first, len: first + pages * PAGE }
    }
}

/// One connection's memory. A later one has another: a back end that was left behind, and still writes, writes to nobody.
#[derive(Debug)]
pub struct Region {
    file: OwnedFd,
    size: usize,
    base: u64,
    shares: Vec<Share>,
}

/// A queue's share of it.
#[derive(Clone, Debug)]
pub struct Share {
    /// All of it.
    pub window: Window,
    /// Address of its first byte, for the back end.
    pub(super) base: u64,
    /// Where its parts are.
    pub at: Layout,
}

impl Region {
    /// Memory for so many queues, all zeros, one of [`BASES`] its address.
    ///
    /// # Errors
    /// The system has no more memory or descriptors.
    pub fn new(queues: &[Layout], first: u64) -> Result<Self, FunctionError> {
        let used: usize = queues.iter().map(|layout| layout.len).sum();
        let size = used.next_multiple_of(GRAIN);
        let file = sealed_memfd("vhost-user", size as u64)?;
        let all = Mapping::new(file.as_fd(), 0, size, Reach::Local)?.window();
        let mut start = 0;
        let share = |at: &Layout| {
            let window = all.cut(start, at.len)?;
            let base = first + start as u64;
            start += at.len;
            Some(Share { window, base, at: *at })
        };
        let shares = queues.iter().filter_map(share).collect();
        Ok(Self { file, size, base: first, shares })
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn size(&self) -> u64 {
        self.size as u64
    }

    pub(super) fn base(&self) -> u64 {
        self.base
    }

    /// The share of queue `queue`.
    ///
    /// # Panics
    /// It has none.
    pub fn share(&self, queue: usize) -> Share {
        self.shares[queue].clone()
    }
}
