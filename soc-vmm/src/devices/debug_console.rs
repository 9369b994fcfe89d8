//! The debug console of SeaBIOS and OVMF (QEMU's isa-debugcon): a port that takes bytes and says that it is there.

use super::pipe::OutputQueue;
use super::{Ranges, bytes, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::persist::{Moves, StateError, States};

/// What a read gives, by which firmware knows that somebody listens.
const PRESENT: u8 = 0xe9;

/// Port 0x402. It has no register that could say "wait": what its queue has no room for is lost, and counted.
#[derive(Debug)]
pub struct DebugConsole {
    output: OutputQueue,
    lost: u64,
}

impl DebugConsole {
    /// What it claims; all of it is postable.
    pub const RANGES: Ranges = Ranges::posted(&[claim(0x402, 1)]);

    /// A console that writes to `output`.
    pub fn new(output: OutputQueue) -> Self {
        Self { output, lost: 0 }
    }

    /// Bytes lost so far.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

impl Moves for DebugConsole {
    fn save_into(&self, _: &str, _: &mut States) {}

    fn load(&mut self, _: &str, _: &mut States) -> Result<(), StateError> {
        Ok(())
    }
}

impl Device for DebugConsole {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        Answer::Done(bytes::read(access, offset, 1, |_| PRESENT))
    }

    fn write(&mut self, _: &Access, _: u64, data: u64, _: Deferred<'_>) -> Answer {
        // The port is one byte wide: a wider write's other bytes belong to its neighbours.
        if !self.output.push(data as u8) {
            self.lost = self.lost.saturating_add(1);
        }
        Answer::Done(0)
    }
}
