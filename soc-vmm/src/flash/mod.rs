//! Firmware's flash: two chips below 4 GiB that speak CFI's Intel command set, as QEMU's `pflash_cfi01` has them for a PC.
//!
//! | from | what |
//! | --- | --- |
//! | 4 GiB − code − variables | the variable store, which the guest erases and programs |
//! | 4 GiB − code | the code, read-only |
//!
//! In read-array mode the guest reads a chip as read-only memory, without exits; a write exits. In any other mode, which such a write
//! turns on, reads must exit too: the chip answers with its status or its description. [`FlashMemory`] is what shows the array and hides
//! it. What was programmed reaches the array and the store's file ([`VariableStore`]) when the chip returns to read-array mode.

mod chip;
mod device;
mod query;
mod state;
mod store;
#[cfg(test)]
mod tests;

use crate::bus::Ticket;
use crate::layout::{FIRMWARE_MAX, FOUR_GIB};
use crate::memory::MemoryError;

pub use device::{Bank, Flash};
pub use store::{StoreError, VariableStore};

/// Bytes of a sector, the unit of erasing; chips are whole sectors.
pub const SECTOR: u64 = 0x1000;

/// The memory in which the guest reads the chips' arrays. Banks are numbered as [`Flash::new`] got them; calls take
/// effect in their order.
pub trait FlashMemory: Send + Sync {
    /// Shows the guest a bank's array as read-only memory, or takes it away, so that its reads exit. `done` is answered once it is so;
    /// none where nobody waits.
    fn show_array(&self, bank: usize, on: bool, done: Option<Ticket>);

    /// Puts `bytes` at `offset` of a bank's array. The guest does not see the array meanwhile.
    fn program(&self, bank: usize, offset: u64, bytes: &[u8]);

    /// Fills `bytes` from the beginning of a bank's array, whether or not the guest sees it.
    ///
    /// # Errors
    /// It is out of reach.
    fn fetch(&self, bank: usize, bytes: &mut [u8]) -> Result<(), MemoryError>;
}

/// Where chips of so many bytes begin: the variable store, the code.
///
/// # Errors
/// They are no whole sectors, or don't fit below 4 GiB.
pub fn place(variables: u64, code: u64) -> Result<(u64, u64), FlashError> {
    for (what, len) in [("variable store", variables), ("firmware", code)] {
        if len == 0 || !len.is_multiple_of(SECTOR) {
            return Err(FlashError::Size { what, len });
        }
    }
    let len = variables.saturating_add(code);
    if len > FIRMWARE_MAX {
        return Err(FlashError::TooLarge { len });
    }
    Ok((FOUR_GIB - len, FOUR_GIB - code))
}

/// Why there can't be such chips.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlashError {
    /// Not whole sectors.
    #[error("the {what} has {len} bytes, which is no whole number of 4 KiB sectors: it is damaged, or no flash image")]
    Size {
        /// Whose.
        what: &'static str,
        /// Bytes.
        len: u64,
    },
    /// No room.
    #[error(
        "firmware and variable store together have {len} bytes and would not fit below 4 GiB: at most {} do",
        FIRMWARE_MAX
    )]
    TooLarge {
        /// Bytes.
        len: u64,
    },
}
