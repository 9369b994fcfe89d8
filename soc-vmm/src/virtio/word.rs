//! What of a device's configuration the driver writes (virtio 1.2 §2.5): words of 32 bits, which is all that any device has.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::eventfd::EventFd;

use super::session::{eventfd, ring_bell};

/// A word that the driver writes, and 0 after each reset.
#[derive(Debug)]
pub(super) struct DriverWord {
    at: u64,
    value: AtomicU32,
    bell: EventFd,
}

impl DriverWord {
    /// The word at that offset of the configuration.
    pub(super) fn new(at: u64) -> nix::Result<Self> {
        Ok(Self { at, value: AtomicU32::new(0), bell: eventfd()? })
    }

    pub(super) fn get(&self) -> u32 {
        self.value.load(Ordering::Acquire)
    }

    pub(super) fn reset(&self) {
        self.set(0);
    }

    /// The driver's write at that offset: one of the whole word counts (§4.1.3.1), any other does nothing.
    pub(super) fn write(&self, offset: u64, len: u8, data: u64) {
        if (offset, len) == (self.at, 4) {
            self.set(data as u32);
        }
    }

    pub(super) fn set(&self, value: u32) {
        if self.value.swap(value, Ordering::AcqRel) != value {
            ring_bell(&self.bell);
        }
    }

    /// Puts what of the word is in the bytes at `offset` there.
    pub(super) fn show(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (self.at..).zip(self.get().to_le_bytes()) {
            let place = at.checked_sub(offset).and_then(|place| data.get_mut(place as usize));
            if let Some(place) = place {
                *place = byte;
            }
        }
    }
}

/// Readable when it was written.
impl AsFd for DriverWord {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
