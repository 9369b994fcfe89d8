//! Guest memory as the SoC reaches it: by DMA, copied, never borrowed.

mod files;
mod log;
#[cfg(test)]
pub(crate) mod test_ram;

use std::sync::Arc;

pub use files::{Borrower, Lender, RamFile, RamFiles};
pub use log::GuestLog;

/// Guest-physical memory. What lies in no RAM slot, or in a read-only one for writes, is an error; nothing is written then.
pub trait GuestMemory: Send + Sync {
    /// Copies `data.len()` bytes from guest-physical `addr`.
    ///
    /// # Errors
    /// Part of the range is not RAM, or the DMA failed.
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError>;

    /// Copies `data` to guest-physical `addr`.
    ///
    /// # Errors
    /// Part of the range is not writable RAM, or the DMA failed.
    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError>;

    /// As [`GuestMemory::read`], but [`MemoryError::Late`] where that would wait for a page that is still on its way here: for who holds a lock.
    ///
    /// # Errors
    /// As there.
    fn read_now(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.read(addr, data)
    }

    /// As [`GuestMemory::write`], likewise.
    ///
    /// # Errors
    /// As there.
    fn write_now(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.write(addr, data)
    }

    /// Waits for a page that was [`MemoryError::Late`].
    ///
    /// # Errors
    /// It never comes.
    fn wait_for(&self, late: MemoryError) -> Result<(), MemoryError> {
        Err(late)
    }

    /// Whether it may be looked at again and again: that costs no bus its time.
    fn is_near(&self) -> bool {
        false
    }

    /// The files that it is, for a process of this machine that maps them, lent to `borrower`; none: it is behind a function that moves bytes.
    /// They stay the same as long as the VM lives, and have all RAM; what of it the chipset hides at a time is in them too.
    fn files(&self, borrower: &Arc<Borrower>) -> Option<RamFiles> {
        let _ = borrower;
        None
    }
}

/// Why guest memory was not reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// Not (all) RAM.
    #[error("guest-physical {addr:#x}+{len:#x} is not all RAM")]
    NotRam {
        /// First address asked for.
        addr: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// A page is still on its way here (post-copy).
    #[error("page {page:#x} of RAM {ram} has not come")]
    Late {
        /// The allocation.
        ram: u32,
        /// The page in it.
        page: u64,
    },
    /// The function's DMA failed.
    #[error("DMA to guest-physical {addr:#x}+{len:#x} failed: the function is lost")]
    Lost {
        /// First address asked for.
        addr: u64,
        /// Bytes asked for.
        len: u64,
    },
}
