//! The machine's buses: which device answers an address, and how it may answer.
//!
//! One thread serves every IOREQ of a VM, so a device is called by one thread at a time and needs no lock of its own for its
//! registers. A device that can't answer at once (a disk, a peer) *defers*: it keeps the [`Ticket`] and answers later, from any
//! thread, while the other vCPUs go on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

mod map;
mod reply;

pub use map::{Bus, Claim, MapError};
pub use reply::{Answer, Deferred, LateAnswer, RequestId, Ticket, Wake};

use crate::persist::{Moves, StateError, States};

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
pub trait Device: Send + Moves {
    /// The guest reads `access.len` bytes at `offset` from the range's start. Only the low `8 × len` bits of the answer count.
    fn read(&mut self, access: &Access, offset: u64, reply: Deferred<'_>) -> Answer;

    /// The guest writes the low `8 × len` bits of `data` at `offset` from the range's start.
    fn write(&mut self, access: &Access, offset: u64, data: u64, reply: Deferred<'_>) -> Answer;

    /// Takes what other threads sent to the device (input, a button) and what its timers owe. Called on the thread that serves
    /// IOREQs, after a [`Wake`] and once [`Device::deadline`] has passed; a call too many costs nothing.
    fn poll(&mut self) {}

    /// When the device must be polled at the latest, without being woken. Cheap: the bus asks after each call.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Machine reset: back to the state after power on, but for what a battery keeps.
    fn reset(&mut self) {}
}

/// A device that its machine also holds by its own type, to save and restore it. The lock is contended only then.
impl<D: Device> Device for Arc<Mutex<D>> {
    fn read(&mut self, access: &Access, offset: u64, reply: Deferred<'_>) -> Answer {
        lock(self).read(access, offset, reply)
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, reply: Deferred<'_>) -> Answer {
        lock(self).write(access, offset, data, reply)
    }

    fn poll(&mut self) {
        lock(self).poll();
    }

    fn deadline(&self) -> Option<Instant> {
        lock(self).deadline()
    }

    fn reset(&mut self) {
        lock(self).reset();
    }
}

impl<D: Moves> Moves for Arc<Mutex<D>> {
    fn halt(&mut self) {
        lock(self).halt();
    }

    fn is_halted(&mut self) -> bool {
        lock(self).is_halted()
    }

    fn go_on(&mut self) {
        lock(self).go_on();
    }

    fn blocker(&self) -> Option<String> {
        lock(self).blocker()
    }

    fn save_into(&self, at: &str, states: &mut States) {
        lock(self).save_into(at, states);
    }

    fn load(&mut self, at: &str, states: &mut States) -> Result<(), StateError> {
        lock(self).load(at, states)
    }
}

fn lock<D>(device: &Mutex<D>) -> MutexGuard<'_, D> {
    // A panic inside a device ends the process; a poisoned lock is met only while that goes on.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
