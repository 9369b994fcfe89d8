//! Guest memory: a sealed memfd, and this process's mapping of it for KVM.
//!
//! `unsafe`: mmap, madvise, mbind. The shim never looks into the memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

/// Memory of a guest, freed when KVM, this mapping and the device's are gone.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    file: File,
    base: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread, and this process never accesses the memory through it.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// `len` zero bytes: in pages of `huge` bytes where that is not 0 (2 MiB or 1 GiB), on NUMA node `node` alone where there is
    /// one. Huge pages are taken here, because one that is missing later would end the VM; small ones are taken as they are touched.
    pub(crate) fn new(len: usize, huge: u64, node: Option<u32>) -> Result<Self, (&'static str, Errno)> {
        let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        match huge {
            0 => {}
            0x20_0000 => flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
            0x4000_0000 => flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB,
            _ => return Err(("use huge pages of that size", Errno::EINVAL)),
        }
        let fd = memfd_create(c"outboard-ram", flags).map_err(|e| ("create the guest's memory", e))?;
        let size = i64::try_from(len).map_err(|_| ("size the guest's memory", Errno::EFBIG))?;
        nix::unistd::ftruncate(&fd, size).map_err(|e| ("size the guest's memory", e))?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(|e| ("seal the guest's memory", e))?;
        let pages = NonZeroUsize::new(len).ok_or(("map the guest's memory", Errno::EINVAL))?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // Normal pages are not reserved: what the host can give was checked before.
        let map = if huge == 0 { MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE } else { MapFlags::MAP_SHARED };
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let base = unsafe { mmap(None, pages, prot, map, &fd, 0) }.map_err(|e| ("map the guest's memory", e))?;
        let memory = Self { file: fd.into(), base, len };
        for advice in [MmapAdvise::MADV_DONTFORK, MmapAdvise::MADV_DONTDUMP] {
            // SAFETY: the range is the mapping just made; the advice changes no content.
            unsafe { madvise(memory.base, len, advice) }.map_err(|e| ("keep the guest's memory out of dumps", e))?;
        }
        if huge == 0 {
            // Where the host has huge pages for shared memory by advice; elsewhere it is refused, and nothing is lost.
            // SAFETY: as above.
            let _ = unsafe { madvise(memory.base, len, MmapAdvise::MADV_HUGEPAGE) };
        }
        if let Some(node) = node {
            memory.bind(node).map_err(|e| ("bind the guest's memory to the NUMA node", e))?;
        }
        if huge != 0 {
            memory.populate().map_err(|e| ("take the huge pages", e))?;
        }
        Ok(memory)
    }

    /// Allows no node but this one; nothing is allocated yet.
    fn bind(&self, node: u32) -> Result<(), Errno> {
        let mut mask = [0u64; 16];
        *mask.get_mut(node as usize / 64).ok_or(Errno::EINVAL)? = 1 << (node % 64);
        // SAFETY: the range is this mapping; the mask outlives the call and is as long as said (the kernel counts one bit less).
        let failed = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base.as_ptr(),
                self.len,
                libc::MPOL_BIND,
                mask.as_ptr(),
                mask.len() * 64 + 1,
                0,
            )
        };
        if failed == 0 { Ok(()) } else { Err(Errno::last()) }
    }

    /// Takes every page (madvise(2), `MADV_POPULATE_WRITE`: Linux 5.14).
    fn populate(&self) -> Result<(), Errno> {
        // SAFETY: the range is this mapping, to which nobody writes yet; pages are made present, contents stay.
        let done = unsafe { libc::madvise(self.base.as_ptr(), self.len, libc::MADV_POPULATE_WRITE) };
        Errno::result(done).map(drop)
    }

    /// Gives whole pages back to the host (madvise(2), `MADV_REMOVE`): they are zeros when they are next touched, here and wherever the
    /// memfd is mapped.
    pub(crate) fn discard(&self, offset: usize, len: usize) -> Result<(), Errno> {
        let within = offset.checked_add(len).is_some_and(|end| end <= self.len);
        if !within || len == 0 {
            return Err(Errno::EINVAL);
        }
        // SAFETY: the range is within this mapping, whose content nobody in this process refers to.
        unsafe { madvise(self.base.byte_add(offset), len, MmapAdvise::MADV_REMOVE) }
    }

    /// Takes this mapping's pages away, and so KVM's; the bytes stay, where they are next looked for (madvise(2), `MADV_DONTNEED`; Linux 5.18 for
    /// huge pages).
    pub(crate) fn unmap_pages(&self) -> Result<(), Errno> {
        // SAFETY: the range is this mapping, which is shared: its content is the memfd's. Nobody in this process refers to it.
        unsafe { madvise(self.base, self.len, MmapAdvise::MADV_DONTNEED) }
    }

    /// Bytes that are not taken from the host yet.
    pub(crate) fn untaken(&self) -> u64 {
        // Counted in units of 512 bytes (stat(2)); where it isn't told, all may be still to come.
        let taken = self.file.metadata().map_or(0, |metadata| metadata.blocks().saturating_mul(512));
        self.len().saturating_sub(taken)
    }

    /// The memfd, for the device's mapping.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where KVM finds the byte at `offset`.
    pub(crate) fn address(&self, offset: u64) -> u64 {
        self.base.as_ptr() as u64 + offset
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: base and len are those that mmap gave. KVM's slots of it are gone, or fault: they hold no reference of ours.
        let _ = unsafe { munmap(self.base, self.len) };
    }
}
