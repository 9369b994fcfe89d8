//! Memory mapped into this process that another side writes too: a BAR, a mailbox.
//!
//! `unsafe`: mmap, and accesses through raw pointers. No reference into the memory is ever made but to atomics, since
//! the other side is another CPU or a device.
#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use ioreq_ring::{BusError, BusMemory};
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::fault::Guard;
use crate::{FunctionError, Windowed, string_copy};

/// Pages, which are 2 MiB of x86's.
const MOST_LOOKED_AT: usize = 512;

/// Where mapped memory is, seen from this CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Local memory: a fence is enough to see what the other side stored.
    Local,
    /// Across the bus (a BAR): a load pushes earlier stores out.
    Bus,
}

/// A shared mapping, unmapped when the last [`Window`] of it goes.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    reach: Reach,
    /// Of a device's memory, which can vanish.
    guard: Option<Guard>,
}

// SAFETY: the mapping is plain memory reached by atomics and `string_copy` only; nothing about it belongs to a thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; every access through `&Mapping` is atomic or tolerates tearing.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset`, shared, readable and writable. `len` is a multiple of 8.
    ///
    /// The file must keep its size: a sealed memfd. For a device's memory there is [`Mapping::device`].
    ///
    /// # Errors
    /// `len` is 0 or odd, or mmap failed.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, len: usize, reach: Reach) -> Result<Arc<Self>, FunctionError> {
        let size = NonZeroUsize::new(len).filter(|n| n.get() % 8 == 0);
        let size = size.ok_or_else(|| FunctionError::Unusable(format!("can't map {len} bytes: not whole words")))?;
        let offset = i64::try_from(offset)
            .map_err(|_| FunctionError::Unusable(format!("can't map at {offset:#x}: past any file's end")))?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address the kernel chooses replaces nothing.
        let base = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, fd, offset) }
            .map_err(|e| FunctionError::Os("map shared memory", e))?;
        Ok(Arc::new(Self { base: base.cast(), len, reach, guard: None }))
    }

    /// Maps `len` bytes of a device's memory, whole pages, from `offset` of its descriptor. Where the device vanishes, loads give all ones,
    /// stores are lost, and [`Window::is_lost`] says so.
    ///
    /// # Errors
    /// `len` is 0 or odd, mmap failed, or SIGBUS can't be handled.
    pub fn device(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Arc<Self>, FunctionError> {
        Self::guarded(fd, offset, len, Reach::Bus)
    }

    /// As [`Mapping::device`], of whatever memory can be taken away under a mapping, such as a file that others can truncate.
    ///
    /// # Errors
    /// As for [`Mapping::device`].
    pub fn guarded(fd: BorrowedFd<'_>, offset: u64, len: usize, reach: Reach) -> Result<Arc<Self>, FunctionError> {
        let mut mapping = Self::new(fd, offset, len, reach)?;
        let base = mapping.base.as_ptr() as usize;
        if let Some(only) = Arc::get_mut(&mut mapping) {
            only.guard = Some(Guard::new(base, len)?);
        }
        Ok(mapping)
    }

    /// The whole mapping as a window.
    pub fn window(self: &Arc<Self>) -> Window {
        Window { mapping: self.clone(), offset: 0, len: self.len }
    }

    /// Address of the first byte, for calls that pass the memory to the kernel.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes mapped.
    pub fn size(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First: the addresses may be another mapping's at once.
        self.guard = None;
        // SAFETY: base and len are those that mmap gave, and no window is left: each holds the Arc.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

/// Part of a mapping. Cheap to clone and to cut.
#[derive(Clone, Debug)]
pub struct Window {
    mapping: Arc<Mapping>,
    offset: usize,
    len: usize,
}

impl Windowed for Window {
    fn cut(&self, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (offset.is_multiple_of(8) && end <= self.len).then(|| Self {
            mapping: self.mapping.clone(),
            offset: self.offset + offset,
            len,
        })
    }
}

impl Window {
    /// Address of the window's first byte, for calls that pass the memory to the kernel.
    pub fn address(&self) -> u64 {
        self.mapping.base.as_ptr() as u64 + self.offset as u64
    }

    /// Has the system give the pages of a range now, and this process's page table too (madvise(2), `MADV_POPULATE_WRITE`: Linux 5.14).
    ///
    /// # Errors
    /// It hasn't that many.
    ///
    /// # Panics
    /// The range is not all within.
    pub(crate) fn take_pages(&self, offset: usize, len: usize) -> Result<(), Errno> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "{len} bytes at {offset}");
        let first = (self.address() + offset as u64) as *mut libc::c_void;
        // SAFETY: the range is of this mapping, which lives as long as this window; no byte of it changes.
        Errno::result(unsafe { libc::madvise(first, len, libc::MADV_POPULATE_WRITE) }).map(drop)
    }

    /// Whether the system has all pages of a range: to read one that it hasn't would take it. Whether this process's page table has them too, it
    /// doesn't say. No range of more than [`MOST_LOOKED_AT`] pages is looked at: it has not.
    ///
    /// # Panics
    /// The range is not all within.
    pub(crate) fn has_pages(&self, offset: usize, len: usize) -> bool {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "{len} bytes at {offset}");
        // SAFETY: it asks for a number.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let address = self.address() as usize + offset;
        let first = address / page * page;
        let mut there = [0u8; MOST_LOOKED_AT];
        let pages = (address + len).div_ceil(page) - first / page;
        // SAFETY: the pages are of this mapping, which lives as long as this window, and there is a byte for each.
        pages <= there.len()
            && unsafe { libc::mincore(first as *mut libc::c_void, pages * page, there.as_mut_ptr()) } == 0
            && there[..pages].iter().all(|page| page & 1 == 1)
    }

    /// Copies out from any byte, which [`BusMemory::copy_out`] can't. The other side may write meanwhile.
    ///
    /// # Panics
    /// The range is not all within.
    pub fn read_bytes(&self, offset: usize, data: &mut [u8]) {
        let (head, words, tail) = split(offset, self.len, data.len());
        for (at, size) in pieces(offset, head).chain(pieces(offset + head + words, tail)) {
            let to = &mut data[at - offset..][..size];
            match size {
                4 => to.copy_from_slice(&self.half(at).load(Ordering::Relaxed).to_ne_bytes()),
                2 => to.copy_from_slice(&self.quarter(at).load(Ordering::Relaxed).to_ne_bytes()),
                _ => to[0] = self.byte(at).load(Ordering::Relaxed),
            }
        }
        self.copy_out(offset + head, &mut data[head..head + words]);
    }

    /// Copies in at any byte, which [`BusMemory::copy_in`] can't: no byte outside the range is written.
    ///
    /// # Panics
    /// The range is not all within.
    pub fn write_bytes(&self, offset: usize, data: &[u8]) {
        let (head, words, tail) = split(offset, self.len, data.len());
        for (at, size) in pieces(offset, head) {
            self.write_piece(at, &data[at - offset..][..size]);
        }
        self.copy_in(offset + head, &data[head..head + words]);
        for (at, size) in pieces(offset + head + words, tail) {
            self.write_piece(at, &data[at - offset..][..size]);
        }
    }

    fn write_piece(&self, at: usize, bytes: &[u8]) {
        match *bytes {
            [a, b, c, d] => self.half(at).store(u32::from_ne_bytes([a, b, c, d]), Ordering::Relaxed),
            [a, b] => self.quarter(at).store(u16::from_ne_bytes([a, b]), Ordering::Relaxed),
            _ => self.byte(at).store(bytes[0], Ordering::Relaxed),
        }
    }

    fn quarter(&self, offset: usize) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2) && offset + 2 <= self.len, "half-word {offset:#x} outside its window");
        // SAFETY: as in `half`.
        unsafe { &*self.mapping.base.as_ptr().add(self.offset + offset).cast::<AtomicU16>() }
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < self.len, "byte {offset:#x} outside its window");
        // SAFETY: the assertion and `cut` keep the byte within the mapping, which lives as long as `self`; an atomic may be
        // shared with writers that this process doesn't know.
        unsafe { &*self.mapping.base.as_ptr().add(self.offset + offset).cast::<AtomicU8>() }
    }

    /// Whether a fence is enough to see the other side's stores.
    pub fn reach(&self) -> Reach {
        self.mapping.reach
    }

    /// Whether an access to the device behind the mapping has faulted: it is gone.
    pub fn is_lost(&self) -> bool {
        self.mapping.guard.as_ref().is_some_and(Guard::is_lost)
    }

    /// Loads a 4-byte register, as [`BusMemory::load`] does a word.
    ///
    /// # Panics
    /// It is not all within, or misaligned.
    pub fn load_u32(&self, offset: usize) -> u32 {
        u32::from_le(self.half(offset).load(Ordering::Acquire))
    }

    /// Stores a 4-byte register, as [`BusMemory::store`] does a word.
    ///
    /// # Panics
    /// It is not all within, or misaligned.
    pub fn store_u32(&self, offset: usize, value: u32) {
        self.half(offset).store(value.to_le(), Ordering::Release);
    }

    fn half(&self, offset: usize) -> &AtomicU32 {
        assert!(
            offset.is_multiple_of(4) && offset < self.len && self.len - offset >= 4,
            "register {offset:#x} outside its window"
        );
        // SAFETY: as for `word`.
        unsafe { &*self.mapping.base.as_ptr().add(self.offset + offset).cast::<AtomicU32>() }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(
            offset.is_multiple_of(8) && offset < self.len && self.len - offset >= 8,
            "word {offset:#x} outside its window"
        );
        // SAFETY: the assertion and `cut` keep the word within the mapping, which lives as long as `self`; mmap aligned it; an
        // atomic may be shared with writers that this process doesn't know.
        unsafe { &*self.mapping.base.as_ptr().add(self.offset + offset).cast::<AtomicU64>() }
    }

    /// Looked at once: a loop over them costs a quarter of one over [`Window::word`].
    fn words(&self, offset: usize, count: usize) -> &[AtomicU64] {
        if count == 0 {
            return &[];
        }
        let end = count.checked_mul(8).and_then(|len| offset.checked_add(len));
        assert!(
            offset.is_multiple_of(8) && end.is_some_and(|end| end <= self.len),
            "{count} words at {offset:#x} outside their window"
        );
        // SAFETY: as for `word`.
        unsafe { std::slice::from_raw_parts(self.mapping.base.as_ptr().add(self.offset + offset).cast(), count) }
    }
}

impl BusMemory for Window {
    fn len(&self) -> usize {
        self.len
    }

    fn load(&self, offset: usize) -> u64 {
        u64::from_le(self.word(offset).load(Ordering::Acquire))
    }

    fn store(&self, offset: usize, word: u64) {
        self.word(offset).store(word.to_le(), Ordering::Release);
    }

    fn store_line(&self, offset: usize, words: &[u64]) {
        assert!(offset % 64 + words.len() * 8 <= 64, "a line crosses 64 bytes at {offset:#x}");
        let Some((last, rest)) = words.split_last() else { return };
        for (i, word) in rest.iter().enumerate() {
            self.word(offset + i * 8).store(word.to_le(), Ordering::Relaxed);
        }
        self.store(offset + rest.len() * 8, *last);
    }

    fn copy_in(&self, offset: usize, data: &[u8]) {
        let (words, tail) = data.as_chunks::<8>();
        let to = self.words(offset, words.len());
        // The order of string instructions is promised of memory; a device is given words.
        if self.mapping.reach == Reach::Bus || !string_copy::copy_in(to, words) {
            for (to, word) in to.iter().zip(words) {
                to.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
            }
        }
        if !tail.is_empty() {
            let mut last = [0; 8];
            last[..tail.len()].copy_from_slice(tail);
            self.word(offset + words.len() * 8).store(u64::from_ne_bytes(last), Ordering::Relaxed);
        }
    }

    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        let (words, tail) = data.as_chunks_mut::<8>();
        let whole = words.len() * 8;
        let from = self.words(offset, words.len());
        if self.mapping.reach == Reach::Bus || !string_copy::copy_out(words, from) {
            for (word, from) in words.iter_mut().zip(from) {
                *word = from.load(Ordering::Relaxed).to_ne_bytes();
            }
        }
        if !tail.is_empty() {
            let last = self.word(offset + whole).load(Ordering::Relaxed).to_ne_bytes();
            tail.copy_from_slice(&last[..tail.len()]);
        }
    }

    fn fence(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
        // Device memory is outside the inner shareable domain that `dmb ish` orders.
        #[cfg(target_arch = "aarch64")]
        // SAFETY: a barrier has no operands and touches no memory of this program.
        unsafe {
            std::arch::asm!("dsb sy", options(nostack, preserves_flags));
        }
    }

    fn flush(&self) -> Result<(), BusError> {
        self.fence();
        let ones = || self.load(0) == u64::MAX && self.load(self.len - 8) == u64::MAX;
        if self.mapping.reach == Reach::Bus && (ones() || self.is_lost()) {
            return Err(BusError::Gone);
        }
        Ok(())
    }
}

/// The naturally aligned pieces of 4, 2 and 1 bytes that fewer than 8 bytes are made of: a reader of such a value never sees half of it.
fn pieces(offset: usize, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = offset;
    let end = offset + len;
    std::iter::from_fn(move || {
        let size = [4, 2, 1].into_iter().find(|size| at.is_multiple_of(*size) && at + size <= end)?;
        at += size;
        Some((at - size, size))
    })
}

/// Cuts `len` bytes at `offset` into what is before a word, whole words, and what is behind them.
fn split(offset: usize, size: usize, len: usize) -> (usize, usize, usize) {
    assert!(offset <= size && len <= size - offset, "{len} bytes at {offset:#x} outside their window");
    let head = (offset.next_multiple_of(8) - offset).min(len);
    let words = (len - head) / 8 * 8;
    (head, words, len - head - words)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn edges_are_whole_values_where_they_are_aligned() {
        let cut = |offset, len| pieces(offset, len).collect::<Vec<_>>();
        assert_eq!(cut(1, 7), [(1, 1), (2, 2), (4, 4)]);
        assert_eq!(cut(8, 7), [(8, 4), (12, 2), (14, 1)]);
        assert_eq!(
            (cut(2, 2), cut(4, 4), cut(3, 3), cut(0, 0)),
            (vec![(2, 2)], vec![(4, 4)], vec![(3, 1), (4, 2)], vec![])
        );
    }

    #[test]
    fn bytes_are_copied_wherever_they_begin_and_end() {
        let fd = crate::local::sealed_memfd("test", 64).unwrap();
        let window = Mapping::new(fd.as_fd(), 0, 64, Reach::Local).unwrap().window();
        for offset in 0..=64 {
            for len in 0..=64 - offset {
                let mut all = [0xaa; 64];
                window.copy_in(0, &all);
                let data: Vec<u8> = (1..=len as u8).collect();
                window.write_bytes(offset, &data);
                all[offset..offset + len].copy_from_slice(&data);
                let (mut read, mut whole) = (vec![0xee; len], [0xee; 64]);
                window.read_bytes(offset, &mut read);
                window.copy_out(0, &mut whole);
                assert_eq!((read, whole), (data, all), "{len} bytes at {offset}");
            }
        }
    }

    #[test]
    fn words_and_bytes_are_the_same_memory_and_a_window_ends_where_it_ends() {
        let fd = crate::local::sealed_memfd("test", 4096).unwrap();
        let all = Mapping::new(fd.as_fd(), 0, 4096, Reach::Local).unwrap().window();
        let cut = all.cut(64, 128).unwrap();
        cut.store_line(0, &[1, 2, 3]);
        let mut bytes = [0; 20];
        all.copy_out(64, &mut bytes);
        assert_eq!(bytes[..8], 1u64.to_le_bytes());
        assert_eq!(bytes[16..20], 3u64.to_le_bytes()[..4]);
        cut.copy_in(8, &[0xff; 11]);
        assert_eq!(all.load(72), u64::MAX);
        assert_eq!(all.load(80), 0xff_ffff);
        assert!(all.cut(4096 - 64, 65).is_none() && cut.cut(usize::MAX, 2).is_none() && all.cut(4, 8).is_none());
        assert!(std::panic::catch_unwind(|| cut.load(128)).is_err());
    }
}
