//! Notify pages of the function that the guest sees: each is a memslot over the card's own memory, so that a write there goes from the
//! guest's CPU to the card, without an exit. They are no RAM: KVM logs no writes to them, and nothing maps them for the device.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;

use api_channel::call::{NotifyPage, PAGE};
use kvm_bindings::kvm_userspace_memory_region;
use nix::errno::Errno;
use pcie_function::{BusMemory, Window};

use crate::error::Refusal;
use crate::kvm::set_memory_region;

/// A function's notify pages, and where the guest sees them.
#[derive(Debug)]
pub(crate) struct NotifyPages {
    /// Kept mapped for as long as KVM may have a slot of it.
    memory: Option<Window>,
    /// KVM's slot of page 0; each page has one.
    first: u32,
    /// Page and guest-physical address.
    shown: BTreeMap<u32, u64>,
}

impl NotifyPages {
    /// Those of `memory`, in the last of the `slots` memslots that KVM has. Where it has too few, there are none.
    pub(crate) fn new(memory: Option<Window>, slots: usize) -> Self {
        let room = |pages: &Window| slots / 2 >= pages.len() / PAGE as usize;
        let mut pages = Self { memory: memory.filter(room), first: 0, shown: BTreeMap::new() };
        pages.first = (slots - pages.count()) as u32;
        pages
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.memory.as_ref().map_or(0, |memory| memory.len() / PAGE as usize)
    }

    /// Whether the guest sees one within these addresses.
    pub(crate) fn meets(&self, base: u64, len: u64) -> bool {
        self.shown.values().any(|&page| page < base.saturating_add(len) && base < page + PAGE)
    }

    /// Checks a new set against itself; `taken` says whether there is something else within a range.
    pub(crate) fn check(&self, wanted: &[NotifyPage], taken: impl Fn(u64, u64) -> bool) -> Result<(), Refusal> {
        if !wanted.is_empty() && self.memory.is_none() {
            return Err(Refusal::unavailable("this function has no notify pages that a guest could see"));
        }
        let count = self.count();
        for (before, &NotifyPage { base, page, .. }) in wanted.iter().enumerate() {
            let bad = |why: &str| Err(Refusal::argument(format!("notify page {page} at {base:#x}: {why}")));
            if page as usize >= count {
                return bad(&format!("the function has {count}"));
            }
            if !base.is_multiple_of(PAGE) || base.checked_add(PAGE).is_none() {
                return bad("that is no page");
            }
            if wanted[..before].iter().any(|other| other.page == page || other.base == base) {
                return bad("the page, or its place, is named twice");
            }
            if taken(base, PAGE) {
                return bad("a memslot is there");
            }
        }
        Ok(())
    }

    /// Whether this set, already checked, is what the guest sees.
    pub(crate) fn is(&self, wanted: &[NotifyPage]) -> bool {
        wanted.len() == self.shown.len() && wanted.iter().all(|page| self.shown.get(&page.page) == Some(&page.base))
    }

    /// Replaces the set, already checked. Every vCPU is out of the guest. Pages that stay where they are are not touched.
    pub(crate) fn replace(&mut self, vm: &impl AsRawFd, wanted: &[NotifyPage]) -> Result<(), Refusal> {
        let stays = |page: u32, base: u64| wanted.iter().any(|w| (w.page, w.base) == (page, base));
        let gone: Vec<(u32, u64)> =
            self.shown.iter().map(|(&page, &base)| (page, base)).filter(|&(page, base)| !stays(page, base)).collect();
        for (page, base) in gone {
            self.set(vm, page, base, 0).map_err(Refusal::nix("take a notify page away"))?;
            self.shown.remove(&page);
        }
        for &NotifyPage { base, page, .. } in wanted {
            if !self.shown.contains_key(&page) {
                self.set(vm, page, base, PAGE).map_err(Refusal::nix("show a notify page"))?;
                self.shown.insert(page, base);
            }
        }
        Ok(())
    }

    /// `unsafe`: KVM is given an address.
    #[allow(unsafe_code)]
    fn set(&self, vm: &impl AsRawFd, page: u32, base: u64, len: u64) -> Result<(), Errno> {
        let memory = self.memory.as_ref().ok_or(Errno::EINVAL)?;
        let region = kvm_userspace_memory_region {
            slot: self.first + page,
            flags: 0,
            guest_phys_addr: base,
            memory_size: len,
            userspace_addr: memory.address() + u64::from(page) * PAGE,
        };
        // SAFETY: `check` held the page within the mapping, which lives as long as `self`, and so as the VM.
        unsafe { set_memory_region(vm, &region) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(count: u64, slots: usize) -> NotifyPages {
        let file = pcie_function::local::sealed_memfd("pages", count * PAGE).unwrap();
        let mapping = pcie_function::Mapping::new(
            std::os::fd::AsFd::as_fd(&file),
            0,
            (count * PAGE) as usize,
            pcie_function::Reach::Local,
        );
        NotifyPages::new(Some(mapping.unwrap().window()), slots)
    }

    fn at(page: u32, base: u64) -> NotifyPage {
        NotifyPage { base, page, reserved: 0 }
    }

    #[test]
    fn a_set_names_pages_that_there_are_and_places_that_are_free() {
        let ram = |base: u64, len: u64| base < 0x10_0000 && base + len > 0;
        let pages = pages(4, 100);
        for good in [vec![], vec![at(0, 0x10_0000)], vec![at(3, 0x10_0000), at(0, 0x10_1000), at(1, 1 << 51)]] {
            assert_eq!(pages.check(&good, ram), Ok(()), "{good:?}");
        }
        for bad in [
            vec![at(4, 0x10_0000)],
            vec![at(u32::MAX, 0x10_0000)],
            vec![at(0, 0x10_0001)],
            vec![at(0, !4095)],
            vec![at(0, 0x10_0000), at(0, 0x10_1000)],
            vec![at(0, 0x10_0000), at(1, 0x10_0000)],
            vec![at(0, 0x10_0000), at(1, 0xf_f000)],
        ] {
            assert_eq!(pages.check(&bad, ram).unwrap_err().status, api_channel::Status::ARGUMENT, "{bad:?}");
        }
    }

    #[test]
    fn without_pages_or_without_slots_for_them_there_is_only_the_empty_set() {
        for none in [NotifyPages::new(None, 32), pages(32, 63)] {
            assert_eq!(none.count(), 0);
            assert_eq!(none.check(&[], |_, _| false), Ok(()));
            let refused = none.check(&[at(0, 0x10_0000)], |_, _| false).unwrap_err();
            assert_eq!(refused.status, api_channel::Status::UNAVAILABLE);
        }
        assert_eq!((pages(32, 64).count(), pages(32, 64).first), (32, 32));
    }
}
