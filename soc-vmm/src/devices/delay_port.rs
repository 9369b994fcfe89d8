//! Port 0x80: the POST code display, and what Linux writes to for a short delay (`outb_p`).

use super::{Ranges, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::persist::{Moves, StateError, States};

/// Takes every write and does nothing; reads give all ones. It exists to be posted: thousands of such writes in a boot need no
/// vCPU to wait.
#[derive(Clone, Copy, Debug, Default)]
pub struct DelayPort;

impl DelayPort {
    /// What it claims; all of it is postable.
    pub const RANGES: Ranges = Ranges::posted(&[claim(0x80, 1)]);
}

impl Moves for DelayPort {
    fn save_into(&self, _: &str, _: &mut States) {}

    fn load(&mut self, _: &str, _: &mut States) -> Result<(), StateError> {
        Ok(())
    }
}

impl Device for DelayPort {
    fn read(&mut self, _: &Access, _: u64, _: Deferred<'_>) -> Answer {
        Answer::Done(u64::MAX)
    }

    fn write(&mut self, _: &Access, _: u64, _: u64, _: Deferred<'_>) -> Answer {
        Answer::Done(0)
    }
}
