//! Memslots: replaced as a whole set, with every vCPU out of the guest.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;

use api_channel::call::{Memslot, PAGE, SlotFlags};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use nix::errno::Errno;

use super::dirty::Log;
use super::ram::Ram;
use crate::error::Refusal;
use crate::kvm::set_memory_region;

/// A VM's memslots by KVM's slot number.
#[derive(Debug)]
pub(crate) struct Slots {
    slots: BTreeMap<u32, Memslot>,
    most: usize,
    logging: bool,
}

impl Slots {
    /// No slots, of the `most` that KVM has.
    pub(crate) fn new(most: usize) -> Self {
        Self { slots: BTreeMap::new(), most, logging: false }
    }

    /// Whether any slot was ever set.
    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether writes are logged.
    pub(crate) fn logging(&self) -> bool {
        self.logging
    }

    /// The writable slots that show part of an allocation, by number.
    pub(crate) fn of_ram(&self, ram: u32) -> impl Iterator<Item = (u32, &Memslot)> {
        self.slots
            .iter()
            .filter(move |(_, s)| s.ram == ram && s.flags & SlotFlags::READ_ONLY == 0)
            .map(|(&n, s)| (n, s))
    }

    /// Those whose writes are logged, by number.
    pub(crate) fn logged(&self) -> impl Iterator<Item = (u32, &Memslot)> {
        self.slots.iter().filter(|(_, slot)| self.logs(slot)).map(|(&n, slot)| (n, slot))
    }

    /// Whether one has part of these addresses.
    pub(crate) fn meets(&self, base: u64, len: u64) -> bool {
        self.slots.values().any(|slot| slot.base < base.saturating_add(len) && base < slot.base + slot.len)
    }

    /// Checks a new set against the allocations and itself.
    pub(crate) fn check(&self, wanted: &[Memslot], rams: &BTreeMap<u32, Ram>) -> Result<(), Refusal> {
        let bad = |slot: &Memslot, why: &str| {
            Err(Refusal::argument(format!("memslot at {:#x}+{:#x}: {why}", slot.base, slot.len)))
        };
        if wanted.len() > self.most {
            return Err(Refusal::argument(format!("{} memslots, KVM has {}", wanted.len(), self.most)));
        }
        let mut sorted: Vec<_> = wanted.iter().collect();
        sorted.sort_by_key(|slot| slot.base);
        let mut end = 0;
        for slot in sorted {
            let aligned = [slot.base, slot.len, slot.offset].iter().all(|n| n.is_multiple_of(PAGE));
            let Some(after) = slot.base.checked_add(slot.len).filter(|_| aligned && slot.len != 0) else {
                return bad(slot, "not whole pages");
            };
            if slot.base < end {
                return bad(slot, "it overlaps another");
            }
            end = after;
            if slot.flags & !SlotFlags::READ_ONLY != 0 {
                return bad(slot, "unknown flags");
            }
            let Some(ram) = rams.get(&slot.ram) else { return bad(slot, "its RAM does not exist") };
            if slot.offset.checked_add(slot.len).is_none_or(|last| last > ram.memory.len()) {
                return bad(slot, "it is not all within its RAM");
            }
        }
        Ok(())
    }

    /// Replaces the set, already checked. Every vCPU is out of the guest. Slots that stay are not touched; `log` keeps the dirty pages of those that go.
    pub(crate) fn replace(
        &mut self,
        vm: &VmFd,
        wanted: &[Memslot],
        rams: &BTreeMap<u32, Ram>,
        log: &mut Log,
    ) -> Result<(), Refusal> {
        let dying: Vec<u32> = self.slots.iter().filter(|(_, s)| !wanted.contains(s)).map(|(&n, _)| n).collect();
        for number in dying {
            let Some(slot) = self.slots.get(&number).copied() else { continue };
            if self.logs(&slot) {
                log.keep(vm, number, &slot)?;
            }
            set(vm, number, &slot, rams, Change::Delete).map_err(Refusal::nix("delete a memslot"))?;
            self.slots.remove(&number);
        }
        for slot in wanted {
            if self.slots.values().any(|s| s == slot) {
                continue;
            }
            let free = (0..).find(|n| !self.slots.contains_key(n)).unwrap_or(u32::MAX);
            let is_logged = self.logs(slot);
            set(vm, free, slot, rams, Change::Set { log: is_logged }).map_err(Refusal::nix("add a memslot"))?;
            self.slots.insert(free, *slot);
            if is_logged {
                log.begin(vm, free, slot)?;
            }
        }
        log.shows(self);
        Ok(())
    }

    /// Starts or stops logging the writes to every writable slot. Once started, every page counts as dirty.
    pub(crate) fn log(&mut self, vm: &VmFd, rams: &BTreeMap<u32, Ram>, on: bool) -> Result<(), Refusal> {
        for (&number, slot) in &self.slots {
            if slot.flags & SlotFlags::READ_ONLY == 0 {
                set(vm, number, slot, rams, Change::Set { log: on }).map_err(Refusal::nix("switch the dirty log"))?;
            }
        }
        self.logging = on;
        Ok(())
    }

    fn logs(&self, slot: &Memslot) -> bool {
        self.logging && slot.flags & SlotFlags::READ_ONLY == 0
    }
}

#[derive(Clone, Copy)]
enum Change {
    Set { log: bool },
    Delete,
}

/// `unsafe`: KVM is given an address.
#[allow(unsafe_code)]
fn set(vm: &impl AsRawFd, number: u32, slot: &Memslot, rams: &BTreeMap<u32, Ram>, change: Change) -> Result<(), Errno> {
    let ram = rams.get(&slot.ram).ok_or(Errno::EINVAL)?;
    let read_only = if slot.flags & SlotFlags::READ_ONLY != 0 { KVM_MEM_READONLY } else { 0 };
    let (memory_size, flags) = match change {
        Change::Set { log } => (slot.len, read_only | if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }),
        Change::Delete => (0, 0),
    };
    let region = kvm_userspace_memory_region {
        slot: number,
        flags,
        guest_phys_addr: slot.base,
        memory_size,
        userspace_addr: ram.memory.address(slot.offset),
    };
    // SAFETY: `check` held the slot within its RAM, whose mapping lives as long as the VM: no call frees a single allocation.
    unsafe { set_memory_region(vm, &region) }
}
