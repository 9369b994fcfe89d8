//! The reset control register of PCI chipsets (ICH9 datasheet §13.7.5 RST_CNT), also the FADT's reset register.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Persist, Ranges, RestoreError, bytes, check, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::power::{PowerEvent, PowerSink};

/// Its port, for the FADT's RESET_REG (one byte wide).
pub const RESET_PORT: u16 = 0xcf9;
/// What the FADT's RESET_VALUE says.
pub const RESET_VALUE: u8 = 0x0f;

const RESET_CPU: u8 = 1 << 2;
/// Hard reset, full reset: kept, without effect of their own.
const KIND: u8 = 0x0a;

/// Port 0xcf9. It lies within PCI's configuration address register 0xcf8, which only dword accesses at 0xcf8 reach.
pub struct ResetControl {
    state: ResetControlState,
    power: Arc<dyn PowerSink>,
}

/// Saved state of [`ResetControl`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetControlState {
    /// The kind of reset last chosen (bits 1 and 3).
    pub kind: u8,
}

impl ResetControl {
    /// What it claims.
    pub const RANGES: Ranges = Ranges::ports(&[claim(RESET_PORT as u64, 1)]);

    /// The register after power on; resets go to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        Self { state: ResetControlState::default(), power }
    }
}

impl Device for ResetControl {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        Answer::Done(bytes::read(access, offset, 1, |_| self.state.kind))
    }

    fn write(&mut self, _: &Access, _: u64, data: u64, _: Deferred<'_>) -> Answer {
        self.state.kind = data as u8 & KIND;
        if data as u8 & RESET_CPU != 0 {
            self.power.power(PowerEvent::Reset);
        }
        Answer::Done(0)
    }

    fn reset(&mut self) {
        self.state = ResetControlState::default();
    }
}

impl Persist for ResetControl {
    const NAME: &'static str = "reset-control";
    type State = ResetControlState;

    fn save(&self) -> ResetControlState {
        self.state
    }

    fn restore(&mut self, state: &ResetControlState) -> Result<(), RestoreError> {
        check(state.kind & !KIND == 0, "reset control", "reserved bits are set")?;
        self.state = *state;
        Ok(())
    }
}
