//! The SoC going to sleep, and getting up.

use crate::{BusError, BusMemory};

/// The SoC's idle flag, one word of inbox for all lanes of a VM: 0 = ring me, 1 = I poll. The thread that serves IOREQs owns it.
///
/// Zeroed memory says that the SoC sleeps: a host that finds no SoC yet rings its doorbell.
#[derive(Debug)]
pub struct SocIdle<M> {
    flag: M,
}

impl<M: BusMemory> SocIdle<M> {
    /// The flag in `flag`, 8 bytes of inbox.
    pub fn new(flag: M) -> Self {
        Self { flag }
    }

    /// Says that this side is about to sleep. When it returns, look at every lane once more ([`crate::SocLane::has_work`]): either
    /// that look sees what a host stored, or the host sees the flag and rings. Then sleep, and call [`SocIdle::awake`] afterwards.
    ///
    /// # Errors
    /// The flag didn't read back: the bus no longer carries, or the host wrote where only the SoC may.
    pub fn about_to_sleep(&self) -> Result<(), BusError> {
        self.flag.store(0, 0);
        // In memory that both sides cache the fence keeps the looks that follow behind the flag. Across the bus the DMA read does:
        // it pushes the flag into host memory, and its completion pushes the host's earlier posted writes into card memory.
        self.flag.fence();
        match self.flag.load(0) {
            0 => Ok(()),
            _ => Err(BusError::Gone),
        }
    }

    /// Says that this side polls again.
    pub fn awake(&self) {
        self.flag.store(0, 1);
    }
}
