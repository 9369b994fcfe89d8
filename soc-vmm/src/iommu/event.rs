//! The unit's own interrupts (VT-d specification §5.1.6): a message, a mask, and whether one is owed. They are not remapped.

use serde::{Deserialize, Serialize};

use crate::interrupt::{Message, MessageRoute};

/// Control: masked (bit 30, which is read only: one is owed).
const MASKED: u32 = 1 << 31;

/// Four registers: control, data, address, upper address.
pub(super) struct Event {
    state: EventState,
    route: Box<dyn MessageRoute>,
    routed: Option<Message>,
}

/// The registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct EventState {
    masked: bool,
    pending: bool,
    data: u32,
    address: u64,
}

impl EventState {
    const RESET: Self = Self { masked: true, pending: false, data: 0, address: 0 };
}

impl Event {
    pub(super) fn new(route: Box<dyn MessageRoute>) -> Self {
        Self { state: EventState::RESET, route, routed: None }
    }

    /// Register `index` of the four.
    pub(super) fn read(&self, index: u64) -> u32 {
        let EventState { masked, pending, data, address } = self.state;
        match index {
            0 => u32::from(masked) << 31 | u32::from(pending) << 30,
            1 => data,
            2 => address as u32,
            _ => (address >> 32) as u32,
        }
    }

    /// Writes register `index` of the four.
    pub(super) fn write(&mut self, index: u64, value: u32) {
        match index {
            0 => self.state.masked = value & MASKED != 0,
            1 => self.state.data = value,
            2 => self.state.address = self.state.address & !0xffff_ffff | u64::from(value & !3),
            _ => self.state.address = self.state.address & 0xffff_ffff | u64::from(value) << 32,
        }
        self.settle();
        if !self.state.masked && self.state.pending {
            self.state.pending = false;
            self.route.raise();
        }
    }

    /// Interrupts, now or when the mask is off.
    pub(super) fn fire(&mut self) {
        if self.state.masked {
            self.state.pending = true;
        } else {
            self.route.raise();
        }
    }

    /// The reason is gone: nothing is owed any more.
    pub(super) fn withdraw(&mut self) {
        self.state.pending = false;
    }

    pub(super) fn reset(&mut self) {
        self.restore(EventState::RESET);
    }

    pub(super) fn save(&self) -> EventState {
        self.state.clone()
    }

    pub(super) fn restore(&mut self, state: EventState) {
        self.state = state;
        self.settle();
    }

    /// A message that can't be sent takes no route of the host's.
    fn settle(&mut self) {
        let EventState { masked, address, data, .. } = self.state;
        let message = (!masked).then_some(Message { address, data });
        if self.routed != message {
            self.routed = message;
            self.route.set(message);
        }
    }
}
