//! What a bridge lets through to the bus behind it (PCI Express Base §7.5.1.3).

use super::bar::Window;
use super::config::{ConfigSpace, command};

/// First and last address of each of a bridge's windows; a closed one begins behind its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gate {
    io: (u64, u64),
    memory: (u64, u64),
    prefetchable: (u64, u64),
}

/// No address at all.
const CLOSED: (u64, u64) = (1, 0);

impl Gate {
    /// As a bridge's registers stand.
    pub(super) fn of(config: &ConfigSpace) -> Self {
        let enabled = config.command();
        let byte = |at| u64::from(config.read(at, 1));
        let half = |at| u64::from(config.read(at, 2));
        let word = |at| u64::from(config.read(at, 4));
        let io = (half(0x30) << 16 | (byte(0x1c) & 0xf0) << 8, half(0x32) << 16 | (byte(0x1d) & 0xf0) << 8 | 0xfff);
        let memory = ((half(0x20) & 0xfff0) << 16, (half(0x22) & 0xfff0) << 16 | 0xf_ffff);
        let prefetchable =
            (word(0x28) << 32 | (half(0x24) & 0xfff0) << 16, word(0x2c) << 32 | (half(0x26) & 0xfff0) << 16 | 0xf_ffff);
        let open = |bit, window| if enabled & bit != 0 { window } else { CLOSED };
        Self {
            io: open(command::IO, io),
            memory: open(command::MEMORY, memory),
            prefetchable: open(command::MEMORY, prefetchable),
        }
    }

    pub(super) fn lets(&self, window: &Window) -> bool {
        let within = |(first, last)| window.is_within(first, last);
        if window.io { within(self.io) } else { within(self.memory) || within(self.prefetchable) }
    }
}
