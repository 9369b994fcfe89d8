//! The dirty log: which pages of an allocation the guest wrote. By KVM's bitmaps; or by its rings, for VMs that ask for them, which also
//! tell which vCPU did.

mod bitmaps;
mod harvest;
mod limit;
mod reader;
mod rings;

use std::sync::Arc;

use api_channel::call::{DirtyFetch, DirtyRun, Memslot, PAGE};
use api_channel::codec::Malformed;
use kvm_ioctls::VmFd;

pub(crate) use rings::Rings;

use super::slots::Slots;
use crate::error::Refusal;
use harvest::Harvest;

/// How a VM's log is kept.
#[derive(Debug)]
pub(super) enum Log {
    /// By bitmaps; and the dirty pages of slots that are gone.
    Bitmaps(Harvest),
    /// By rings.
    Rings(Arc<Rings>),
}

/// Pages of an allocation that somebody looks at.
#[derive(Clone, Copy, Debug)]
struct Window {
    ram: u32,
    first: u64,
    /// Behind the last one.
    end: u64,
    /// What is told is forgotten.
    clear: bool,
}

/// Most pages that one fetch looks at: 1 GiB.
const MOST_PAGES: u64 = 1 << 18;

/// What a fetch found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// The runs, ascending.
    pub(crate) runs: Vec<DirtyRun>,
    /// The first page that was not looked at.
    pub(crate) next: u64,
}

impl Log {
    /// By rings where there are any.
    pub(super) fn new(rings: Option<&Arc<Rings>>) -> Self {
        rings.map_or_else(|| Self::Bitmaps(Harvest::default()), |rings| Self::Rings(rings.clone()))
    }

    /// Keeps the dirty pages of a slot that goes. Every vCPU is out of the guest.
    pub(super) fn keep(&mut self, vm: &VmFd, number: u32, slot: &Memslot) -> Result<(), Refusal> {
        match self {
            Self::Bitmaps(harvest) => bitmaps::keep(vm, harvest, number, slot),
            Self::Rings(rings) => rings.gather(),
        }
    }

    /// A slot has come whose writes are logged.
    pub(super) fn begin(&self, vm: &VmFd, number: u32, slot: &Memslot) -> Result<(), Refusal> {
        match self {
            Self::Bitmaps(_) => bitmaps::begin(vm, number, slot),
            Self::Rings(_) => Ok(()),
        }
    }

    /// What is logged are writes to these slots. Every vCPU is out of the guest.
    pub(super) fn shows(&self, slots: &Slots) {
        if let Self::Rings(rings) = self {
            rings.shows(slots);
        }
    }

    /// The log begins, every page of these slots dirty, or has ended. Every vCPU is out of the guest.
    pub(super) fn switched(&mut self, slots: &Slots) -> Result<(), Refusal> {
        match self {
            Self::Bitmaps(harvest) => {
                harvest.clear();
                Ok(())
            }
            Self::Rings(rings) => rings.switched(slots),
        }
    }

    /// Reads what vCPUs have written, before it is fetched; whether KVM has lost some of that, so that the log has to be switched off and
    /// on.
    pub(super) fn read(&self) -> Result<bool, Refusal> {
        match self {
            // It is read as it is fetched.
            Self::Bitmaps(_) => Ok(false),
            Self::Rings(rings) => {
                rings.gather()?;
                Ok(rings.has_lost())
            }
        }
    }

    /// Fetches dirty pages of an allocation of `pages` pages, as they were last read; with `clear`, their next write is logged again
    /// before this returns.
    pub(super) fn fetch(
        &mut self,
        vm: &VmFd,
        slots: &Slots,
        pages: u64,
        wanted: &DirtyFetch,
    ) -> Result<Found, Refusal> {
        let window = Window::new(pages, wanted)?;
        match self {
            Self::Bitmaps(harvest) => bitmaps::fetch(vm, slots, harvest, &window),
            Self::Rings(rings) => Ok(rings.fetch(&window)),
        }
    }
}

impl Window {
    fn new(ram_pages: u64, wanted: &DirtyFetch) -> Result<Self, Refusal> {
        let DirtyFetch { ram, flags, first, pages } = *wanted;
        if flags & !(DirtyFetch::CLEAR | DirtyFetch::AS_READ) != 0 {
            return Err(Malformed.into());
        }
        if first > ram_pages {
            return Err(Refusal::argument(format!("page {first} of RAM {ram}, which has {ram_pages}")));
        }
        let end = first.saturating_add(pages.min(MOST_PAGES)).min(ram_pages);
        Ok(Self { ram, first, end, clear: flags & DirtyFetch::CLEAR != 0 })
    }

    /// A bit for each of its pages.
    fn bits(&self) -> Vec<u64> {
        vec![0; (self.end - self.first).div_ceil(64) as usize]
    }

    /// Sets that of a page of the allocation, if it is one of them.
    fn mark(&self, bits: &mut [u64], page: u64) {
        if (self.first..self.end).contains(&page) {
            let bit = page - self.first;
            bits[(bit / 64) as usize] |= 1 << (bit % 64);
        }
    }
}

/// The pages of its allocation that a slot shows.
fn pages(slot: &Memslot) -> std::ops::Range<u64> {
    slot.offset / PAGE..(slot.offset + slot.len) / PAGE
}
