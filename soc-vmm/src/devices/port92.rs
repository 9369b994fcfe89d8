//! System control port A (PS/2): fast A20 and fast reset.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Persist, Ranges, RestoreError, bytes, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::power::{PowerEvent, PowerSink};

const RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;

/// Port 0x92. KVM has no A20 gate, so the bit reads as set after power on; what the guest writes is only kept.
pub struct Port92 {
    state: Port92State,
    power: Arc<dyn PowerSink>,
}

/// Saved state of [`Port92`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port92State {
    /// The byte last written.
    pub value: u8,
}

impl Port92 {
    /// What it claims.
    pub const RANGES: Ranges = Ranges::ports(&[claim(0x92, 1)]);

    /// The port after power on; resets go to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        Self { state: Port92State { value: A20 }, power }
    }
}

impl Device for Port92 {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        Answer::Done(bytes::read(access, offset, 1, |_| self.state.value))
    }

    fn write(&mut self, _: &Access, _: u64, data: u64, _: Deferred<'_>) -> Answer {
        let old = std::mem::replace(&mut self.state.value, data as u8);
        if self.state.value & !old & RESET != 0 {
            self.power.power(PowerEvent::Reset);
        }
        Answer::Done(0)
    }

    fn reset(&mut self) {
        self.state.value = A20;
    }
}

impl Persist for Port92 {
    const NAME: &'static str = "port92";
    type State = Port92State;

    fn save(&self) -> Port92State {
        self.state
    }

    fn restore(&mut self, state: &Port92State) -> Result<(), RestoreError> {
        self.state = *state;
        Ok(())
    }
}
