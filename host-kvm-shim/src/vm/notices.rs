//! What vCPU threads tell the API thread, off the exit path.

use std::sync::{Mutex, PoisonError};

use ioreq_ring::LaneError;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// A mailbox of the API thread, with an eventfd that it polls.
#[derive(Debug)]
pub(crate) struct Notices {
    event: EventFd,
    broken: Mutex<Option<(u32, LaneError)>>,
}

impl Notices {
    pub(crate) fn new() -> Result<Self, Errno> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self { event: EventFd::from_flags(flags)?, broken: Mutex::default() })
    }

    /// Readable when something happened.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// A vCPU has come out of the guest, or finished its exit.
    pub(crate) fn moved(&self) {
        let _ = self.event.write(1);
    }

    /// The SoC broke the rules of a vCPU's lane.
    pub(crate) fn lane_broken(&self, vcpu: u32, error: LaneError) {
        *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = Some((vcpu, error));
        self.moved();
    }

    /// Takes the last broken lane, if there is one.
    pub(crate) fn take_broken(&self) -> Option<(u32, LaneError)> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
