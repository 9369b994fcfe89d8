//! Memory that another side can see: the trait both ends of a lane are generic over.

use core::fmt;

/// A window of memory shared across the bus: part of a BAR, or of a mailbox.
///
/// Offsets and lengths are in bytes from the window's start. Words are 8 bytes, 8-aligned, little-endian on the wire and given
/// here as values. No method reads, modifies and writes; none hands out a reference.
///
/// A window can be *remote* (a mailbox seen from the SoC): then every store is a DMA write or a posted write, and every load is a
/// DMA read. Loads of a window that is gone give all ones, as on PCIe; stores to it vanish; [`BusMemory::flush`] says so.
///
/// # Panics
/// Every method panics on an offset that is misaligned or past the window: offsets are the caller's own, never a peer's.
pub trait BusMemory {
    /// Bytes in the window.
    fn len(&self) -> usize;

    /// Whether the window has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Loads a word; no later access of this thread comes before it (acquire).
    fn load(&self, offset: usize) -> u64;

    /// Stores a word after everything that this thread stored before (release).
    fn store(&self, offset: usize, word: u64);

    /// Stores 1–8 words at ascending addresses within one 64-byte line, the last after all others and after everything stored
    /// before (release). One transfer where the window is remote.
    fn store_line(&self, offset: usize, words: &[u64]);

    /// Copies `data` into the window, 8-aligned, in no promised order, but before any later store. The rest of the last word
    /// becomes 0 where `data` ends within it.
    fn copy_in(&self, offset: usize, data: &[u8]);

    /// Copies out of the window, 8-aligned, in no promised order, but after any earlier load. The other side may write
    /// meanwhile: the copy can be torn, never undefined.
    fn copy_out(&self, offset: usize, data: &mut [u8]);

    /// Orders every earlier store to shared memory before every later load from it (a full barrier of this CPU).
    fn fence(&self);

    /// Returns when every earlier store has reached the other side: the done record of a DMA queue, or one load across the bus.
    ///
    /// # Errors
    /// The window's function is gone, or a transfer failed; this stays so until the function is opened anew.
    fn flush(&self) -> Result<(), BusError>;
}

/// Why the bus no longer carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusError {
    /// The function vanished: surprise removal, link down, a mapping that faults.
    Gone,
    /// A DMA transfer was refused or faulted.
    Dma,
    /// The function was reset: its generation is no longer ours.
    Stale,
}

impl fmt::Display for BusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gone => "the function is gone (removed, its link is down, or its host-kvm-shim has ended)",
            Self::Dma => "a DMA transfer failed",
            Self::Stale => "the function was reset",
        })
    }
}

impl core::error::Error for BusError {}

impl<T: BusMemory + ?Sized> BusMemory for &T {
    fn len(&self) -> usize {
        (**self).len()
    }
    fn load(&self, offset: usize) -> u64 {
        (**self).load(offset)
    }
    fn store(&self, offset: usize, word: u64) {
        (**self).store(offset, word);
    }
    fn store_line(&self, offset: usize, words: &[u64]) {
        (**self).store_line(offset, words);
    }
    fn copy_in(&self, offset: usize, data: &[u8]) {
        (**self).copy_in(offset, data);
    }
    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        (**self).copy_out(offset, data);
    }
    fn fence(&self) {
        (**self).fence();
    }
    fn flush(&self) -> Result<(), BusError> {
        (**self).flush()
    }
}
