//! The machine's buses: which device answers an address, and how it may answer.
//!
//! One thread serves every IOREQ of a VM, so a device is called by one thread at a time and needs no lock of its own for its
//! registers. A device that can't answer at once (a disk, a peer) *defers*: it keeps the [`Ticket`] and answers later, from any
//! thread, while the other vCPUs go on.

mod map;
mod reply;

pub use map::{Bus, Claim, MapError};
pub use reply::{Answer, Deferred, LateAnswer, RequestId, Ticket, Wake};

/// How an access reached its device.
#[derive(Clone, Debug)]
pub struct Access {
    /// vCPU (lane) that made the access.
    pub vcpu: u16,
    /// Host TSC at the exit, in TSC ticks. Guest-visible time derives from it, never from the SoC's clock.
    pub host_tsc: u64,
    /// Bytes: 1–8 for memory, 1, 2 or 4 for ports.
    pub len: u8,
}

/// A device behind a range of ports or of memory.
pub trait Device: Send {
    /// The guest reads `access.len` bytes at `offset` from the range's start. Only the low `8 × len` bits of the answer count.
    fn read(&mut self, access: &Access, offset: u64, reply: Deferred<'_>) -> Answer;

    /// The guest writes the low `8 × len` bits of `data` at `offset` from the range's start.
    fn write(&mut self, access: &Access, offset: u64, data: u64, reply: Deferred<'_>) -> Answer;
}
