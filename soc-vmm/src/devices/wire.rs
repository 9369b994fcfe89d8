//! A device's end of an interrupt line: remembers the level, so that only changes leave the device.

use crate::interrupt::InterruptLine;

#[derive(Debug)]
pub(super) struct Wire {
    line: InterruptLine,
    high: bool,
}

impl Wire {
    pub(super) fn new(line: InterruptLine) -> Self {
        Self { line, high: false }
    }

    pub(super) fn set(&mut self, high: bool) {
        if self.high != high {
            self.force(high);
        }
    }

    /// Sends the level even where it is no change: a restored irqchip need not know it.
    pub(super) fn force(&mut self, high: bool) {
        self.high = high;
        self.line.set(high);
    }

    pub(super) fn is_high(&self) -> bool {
        self.high
    }
}
