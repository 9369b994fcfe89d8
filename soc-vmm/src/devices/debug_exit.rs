//! The exit port of kvm-unit-tests (QEMU's isa-debug-exit, `iobase=0xf4,iosize=4`).

use std::sync::Arc;

use super::{Ranges, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::persist::{Moves, StateError, States};
use crate::power::{PowerEvent, PowerSink};

/// Ports 0xf4–0xf7: a write of V, 1, 2 or 4 bytes wide, ends soc-vmm with the low eight bits of `(V << 1) | 1`. Reads give 0.
pub struct DebugExit {
    power: Arc<dyn PowerSink>,
}

impl DebugExit {
    /// What it claims.
    pub const RANGES: Ranges = Ranges::ports(&[claim(0xf4, 4)]);

    /// A port that reports to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        Self { power }
    }
}

impl Moves for DebugExit {
    fn save_into(&self, _: &str, _: &mut States) {}

    fn load(&mut self, _: &str, _: &mut States) -> Result<(), StateError> {
        Ok(())
    }
}

impl Device for DebugExit {
    fn read(&mut self, _: &Access, _: u64, _: Deferred<'_>) -> Answer {
        Answer::Done(0)
    }

    fn write(&mut self, _: &Access, _: u64, data: u64, _: Deferred<'_>) -> Answer {
        self.power.power(PowerEvent::DebugExit(data as u8));
        Answer::Done(0)
    }
}
