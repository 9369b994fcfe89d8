//! A log of the pages of guest memory that others write: a bit for each, in memory that they map.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pcie_function::FunctionError;
use pcie_function::local::sealed_memfd;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// Bytes of a page, and pages of a word.
const PAGE: u64 = 4096;
const OF_WORD: u64 = 64;

/// The log: bit n of its little-endian bytes is the page at guest-physical address 4096 n (VHOST_USER_SET_LOG_BASE).
#[derive(Debug)]
pub struct GuestLog {
    file: Arc<File>,
    bits: MmapRegion,
}

impl GuestLog {
    /// An empty one, of guest memory below `end`.
    ///
    /// # Errors
    /// The system has no more memory or descriptors.
    pub fn new(end: u64) -> Result<Self, FunctionError> {
        let len = end.div_ceil(PAGE * OF_WORD).max(1) * 8;
        let len = len.next_multiple_of(PAGE);
        // Nobody can cut it off: to look at it is no SIGBUS.
        let file: Arc<File> = Arc::new(sealed_memfd("guest-log", len)?.into());
        let bits = MmapRegion::from_file(FileOffset::from_arc(file.clone(), 0), len as usize);
        Ok(Self { file, bits: bits.map_err(|e| FunctionError::Unusable(format!("can't map a log of writes: {e}")))? })
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.bits.size() as u64
    }

    /// Takes the pages that were written in `len` bytes from `base` since the last call: their addresses.
    pub fn take(&self, base: u64, len: u64) -> impl Iterator<Item = u64> {
        let (first, end) = (base / PAGE, (base + len).div_ceil(PAGE).min(self.size() * 8));
        (first / OF_WORD..end.div_ceil(OF_WORD)).flat_map(move |word| {
            // Of the words at both ends some bits are not asked for.
            let (low, high) = (first.saturating_sub(word * OF_WORD), (end - word * OF_WORD).min(OF_WORD));
            let mut bits = self.take_word(word as usize, u64::MAX << low & u64::MAX >> (OF_WORD - high));
            std::iter::from_fn(move || {
                let bit = (bits != 0).then(|| u64::from(bits.trailing_zeros()))?;
                bits &= bits - 1;
                Some((word * OF_WORD + bit) * PAGE)
            })
        })
    }

    /// Takes those of the bits of `mask` that are set. A word in which none is, as most are, is only looked at.
    fn take_word(&self, word: usize, mask: u64) -> u64 {
        let Ok(bits) = self.bits.get_atomic_ref::<AtomicU64>(word * 8) else { return 0 };
        if u64::from_le(bits.load(Ordering::Relaxed)) & mask == 0 {
            return 0;
        }
        u64::from_le(bits.fetch_and(!mask.to_le(), Ordering::AcqRel)) & mask
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn each_page_is_told_once_and_to_who_asks_for_it() {
        let log = GuestLog::new(1 << 32).unwrap();
        assert_eq!(log.size(), 128 << 10);
        let set = |byte: u64, bits: u8| log.file.write_all_at(&[bits], byte).unwrap();
        // Pages 0, 9, 64, 127 and the last one.
        for (byte, bits) in [(0, 1), (1, 2), (8, 1), (15, 0x80), (log.size() - 1, 0x80)] {
            set(byte, bits);
        }
        let take =
            |first: u64, pages: u64| log.take(first * PAGE, pages * PAGE).map(|at| at / PAGE).collect::<Vec<_>>();
        assert_eq!((take(1, 8), take(10, 54)), (vec![], vec![]));
        assert_eq!(take(1, 64), [9, 64]);
        assert_eq!(take(0, 1 << 20), [0, 127, (1 << 20) - 1]);
        assert_eq!(take(0, 1 << 30), [0; 0]);
    }
}
