//! Base address registers, and the windows that they open.

use std::sync::Arc;

use nix::sys::eventfd::EventFd;

/// Which addresses a BAR claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere.
    Memory64,
}

/// A base address register (PCI Local Bus 3.0 §6.2.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Where its window can be.
    pub space: Space,
    /// Bytes: a power of two.
    pub size: u64,
    /// Reads have no side effect.
    pub prefetchable: bool,
}

impl Bar {
    /// The bits that a guest can't change.
    pub(super) fn flags(&self) -> u32 {
        let kind = match self.space {
            Space::Io => return 1,
            Space::Memory32 => 0,
            Space::Memory64 => 0b100,
        };
        kind | if self.prefetchable { 0b1000 } else { 0 }
    }
}

/// Addresses that a function answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Ports, or else memory.
    pub io: bool,
    /// First address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// The function's own name for it: the BAR's index, or a number of its own from 6 on.
    pub region: usize,
}

impl Window {
    /// Whether all of it lies in `[first, last]`.
    pub(super) fn is_within(&self, first: u64, last: u64) -> bool {
        self.base >= first && self.base.checked_add(self.len - 1).is_some_and(|end| end <= last)
    }
}

/// An address where a write says that it happened and no more, whatever is written: who has the event may finish it elsewhere.
#[derive(Clone, Debug)]
pub struct Signal {
    /// Where: its first address.
    pub window: Window,
    /// What a write does, other than [`super::PciFunction::write`].
    pub event: Arc<EventFd>,
    /// The function's notify page that does the same, if one does: where the window is whole pages, the guest may see it there.
    pub page: Option<u32>,
}

impl PartialEq for Signal {
    fn eq(&self, other: &Self) -> bool {
        (self.window, self.page) == (other.window, other.page) && Arc::ptr_eq(&self.event, &other.event)
    }
}
