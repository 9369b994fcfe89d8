//! Guest memory as a device has it: from DRIVER_OK until the guest takes it back.

use std::sync::{Arc, PoisonError, RwLock};

use super::QueueError;
use crate::memory::{Borrower, GuestMemory, MemoryError, RamFiles};

/// Guest memory, lent to a device. After [`Lease::revoke`] nothing of it is read or written through this lease: what the device
/// still does then reaches the guest no more.
pub struct Lease {
    memory: Arc<dyn GuestMemory>,
    /// Held to read while a transfer is under way, so that revoking waits for it, and for no more than it.
    open: RwLock<bool>,
}

impl Lease {
    /// Lends `memory`.
    pub fn new(memory: Arc<dyn GuestMemory>) -> Self {
        Self { memory, open: RwLock::new(true) }
    }

    /// Copies from guest-physical `addr`.
    ///
    /// # Errors
    /// Not all of it is RAM, the function is lost, or the lease is over.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), QueueError> {
        self.transfer(|memory| memory.read_now(addr, data))
    }

    /// Copies to guest-physical `addr`.
    ///
    /// # Errors
    /// As [`Lease::read`].
    pub fn write(&self, addr: u64, data: &[u8]) -> Result<(), QueueError> {
        self.transfer(|memory| memory.write_now(addr, data))
    }

    /// Reads 2 bytes that another side writes at any time, in one load: the aligned word of 8 around them is what a transfer never
    /// tears. `addr` is even.
    pub(super) fn read_u16(&self, addr: u64) -> Result<u16, QueueError> {
        let mut word = [0; 8];
        self.read(addr & !7, &mut word)?;
        let at = (addr & 6) as usize;
        Ok(u16::from_le_bytes([word[at], word[at + 1]]))
    }

    /// See [`GuestMemory::is_near`].
    pub(super) fn is_near(&self) -> bool {
        self.memory.is_near()
    }

    /// The files of the memory, lent to `borrower`; with them `act` is done, before the lease ends if at all.
    ///
    /// # Errors
    /// The lease is over.
    pub(super) fn lend(&self, borrower: &Arc<Borrower>, act: impl FnOnce()) -> Result<Option<RamFiles>, QueueError> {
        self.during(|| self.memory.files(borrower).inspect(|_| act()))
    }

    /// Does something that takes no time, before the lease ends if at all.
    ///
    /// # Errors
    /// The lease is over.
    pub fn during<T>(&self, act: impl FnOnce() -> T) -> Result<T, QueueError> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        if *open { Ok(act()) } else { Err(QueueError::Revoked) }
    }

    /// Ends the lease, after the transfer that is under way.
    pub fn revoke(&self) {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = false;
    }

    fn transfer(&self, mut copy: impl FnMut(&dyn GuestMemory) -> Result<(), MemoryError>) -> Result<(), QueueError> {
        loop {
            let moved = {
                let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
                if *open { copy(&*self.memory) } else { return Err(QueueError::Revoked) }
            };
            match moved {
                // Whoever revokes the lease waits for transfers, not for pages. One that never comes is for who ends the VM to tell.
                Err(late @ MemoryError::Late { .. }) => {
                    self.memory.wait_for(late).map_err(|_| QueueError::Revoked)?;
                }
                moved => return moved.map_err(QueueError::Memory),
            }
        }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("open", &self.open).finish_non_exhaustive()
    }
}
