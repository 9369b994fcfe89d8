//! Guest memory as the SoC reaches it: by DMA, copied, never borrowed.

#[cfg(test)]
pub(crate) mod test_ram;

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
    /// The function's DMA failed.
    #[error("DMA to guest-physical {addr:#x}+{len:#x} failed: the function is lost")]
    Lost {
        /// First address asked for.
        addr: u64,
        /// Bytes asked for.
        len: u64,
    },
}
