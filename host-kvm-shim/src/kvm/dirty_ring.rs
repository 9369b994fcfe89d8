//! The ring in which KVM tells which pages a vCPU wrote (KVM api.rst §8.29): the memory that both sides share, and nothing that is done
//! with it.
//!
//! `unsafe`: KVM writes the ring while the vCPU runs; so no reference into it is ever made, and flags are atomics.
#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::VcpuFd;
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// An entry's flags: KVM filled it, nobody has read it.
const DIRTY: u32 = 1;
/// It was read, and waits for KVM to log its page's next write (`KVM_RESET_DIRTY_RINGS`).
const READ: u32 = 2;

/// A vCPU's ring. Entries are numbered on and on; one that is a whole ring later lies in the same place.
#[derive(Debug)]
pub(crate) struct DirtyRing {
    base: NonNull<kvm_dirty_gfn>,
    /// A power of two.
    entries: u32,
}

// SAFETY: the mapping belongs to no thread. It isn't Sync: who reads entries has it for himself, and KVM is the other side.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// The ring of a vCPU whose VM has rings of so many entries, a power of two.
    pub(crate) fn map(vcpu: &VcpuFd, entries: u32) -> Result<Self, Errno> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        // SAFETY: the descriptor is open as long as `vcpu` is borrowed.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let base = unsafe { mmap(None, bytes(entries)?, prot, MapFlags::MAP_SHARED, vcpu, offset) }?;
        Ok(Self { base: base.cast(), entries })
    }

    /// How many entries it has.
    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    /// The slot and the page in it of an entry that KVM filled and nobody has read.
    pub(crate) fn dirty(&self, at: u32) -> Option<(u32, u64)> {
        // Acquire: what KVM wrote before the flag is seen behind it.
        if self.flags(at).load(Ordering::Acquire) & (DIRTY | READ) != DIRTY {
            return None;
        }
        let entry = self.entry(at);
        // SAFETY: within the mapping; KVM doesn't write an entry again before it was given back, and if it does all the same (a ring
        // that is overrun), any value is a number.
        unsafe { Some(((&raw const (*entry).slot).read_volatile(), (&raw const (*entry).offset).read_volatile())) }
    }

    /// Whether an entry is KVM's to fill.
    pub(crate) fn is_free(&self, at: u32) -> bool {
        self.flags(at).load(Ordering::Acquire) & (DIRTY | READ) == 0
    }

    /// An entry was read.
    pub(crate) fn give_back(&self, at: u32) {
        // Release: it was read before KVM fills it again.
        self.flags(at).store(READ, Ordering::Release);
    }

    fn entry(&self, at: u32) -> *mut kvm_dirty_gfn {
        let index = at & (self.entries - 1);
        // SAFETY: the index is below the number of entries that are mapped.
        unsafe { self.base.as_ptr().add(index as usize) }
    }

    fn flags(&self, at: u32) -> &AtomicU32 {
        // SAFETY: within the mapping, which lives as long as `self`, and aligned; KVM and this process access it as an atomic word.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.entry(at)).flags) }
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        // SAFETY: base and length are those that mmap gave; nobody owns the ring any more.
        let _ = bytes(self.entries).map(|len| unsafe { munmap(self.base.cast(), len.get()) });
    }
}

fn bytes(entries: u32) -> Result<NonZeroUsize, Errno> {
    NonZeroUsize::new(entries as usize * size_of::<kvm_dirty_gfn>()).ok_or(Errno::EINVAL)
}

/// What KVM does with a ring, for tests of those who read it (virt/kvm/dirty_ring.c, of Linux 6.1).
#[cfg(test)]
pub(crate) mod model {
    use super::*;

    /// A ring that KVM doesn't know of.
    pub(crate) fn ring(entries: u32) -> DirtyRing {
        let (prot, map) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping replaces nothing.
        let base = unsafe { nix::sys::mman::mmap_anonymous(None, bytes(entries).unwrap(), prot, map) }.unwrap();
        DirtyRing { base: base.cast(), entries }
    }

    /// KVM's end of it.
    #[derive(Debug, Default)]
    pub(crate) struct Kernel {
        pub(crate) dirty_index: u32,
        pub(crate) reset_index: u32,
    }

    impl Kernel {
        /// A page was written.
        pub(crate) fn push(&mut self, ring: &DirtyRing, slot: u32, offset: u64) {
            let entry = ring.entry(self.dirty_index);
            // SAFETY: within the mapping.
            unsafe {
                (&raw mut (*entry).slot).write(slot);
                (&raw mut (*entry).offset).write(offset);
            }
            ring.flags(self.dirty_index).store(DIRTY, Ordering::Release);
            self.dirty_index = self.dirty_index.wrapping_add(1);
        }

        /// `KVM_RESET_DIRTY_RINGS`: the pages whose next write is logged from here on.
        pub(crate) fn reset(&mut self, ring: &DirtyRing) -> Vec<u64> {
            let mut reset = Vec::new();
            while ring.flags(self.reset_index).load(Ordering::Acquire) & READ != 0 {
                // SAFETY: within the mapping.
                reset.push(unsafe { (&raw const (*ring.entry(self.reset_index)).offset).read() });
                ring.flags(self.reset_index).store(0, Ordering::Release);
                self.reset_index = self.reset_index.wrapping_add(1);
            }
            reset
        }

        /// Whether the vCPU leaves the guest instead of going on.
        pub(crate) fn is_full(&self, ring: &DirtyRing) -> bool {
            self.dirty_index.wrapping_sub(self.reset_index) >= ring.entries - RESERVED
        }
    }

    /// Entries that are kept for what one entry into the guest may write.
    pub(crate) const RESERVED: u32 = 64;
}
