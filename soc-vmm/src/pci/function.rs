//! What a PCI function is to the fabric that it is plugged into.

use std::time::Instant;

use super::bar::{Signal, Space, Window};
use super::config::{ConfigSpace, command};
use super::root_port::RootPort;
use crate::bus::{Access, Answer, Deferred};
use crate::persist::Moves;

/// A function of a PCI device, whose state ([`Moves`]) has its configuration space in it. One thread calls it, the one that serves IOREQs; what its own threads have for it they leave where
/// [`PciFunction::poll`] finds it.
pub trait PciFunction: Moves + Send {
    /// Its configuration space.
    fn config(&self) -> &ConfigSpace;

    /// The same, to write.
    fn config_mut(&mut self) -> &mut ConfigSpace;

    /// The guest reads `len` bytes, 1–4, all within one aligned word of 4, from configuration `offset`.
    fn read_config(&mut self, offset: u16, len: u8) -> u32 {
        self.config().read(offset, len)
    }

    /// The guest writes the low `len` bytes, 1–4, all within one aligned word of 4, at configuration `offset`.
    fn write_config(&mut self, offset: u16, len: u8, value: u32) {
        self.config_mut().write(offset, len, value);
    }

    /// The windows that answer as the registers stand: those of the BARs, and what a chipset function has beside them.
    fn windows(&self) -> Vec<Window> {
        bar_windows(self.config())
    }

    /// Those addresses within its windows whose writes may be posted: nothing relies on their order (docs/wire.md). Base and length.
    fn posted(&self) -> Vec<Window> {
        Vec::new()
    }

    /// Those addresses within its windows whose writes KVM may turn into the event there.
    fn signals(&self) -> Vec<Signal> {
        Vec::new()
    }

    /// The guest reads `access.len` bytes at `offset` of the window `region`.
    fn read(&mut self, region: usize, offset: u64, access: &Access, reply: Deferred<'_>) -> Answer;

    /// The guest writes there.
    fn write(&mut self, region: usize, offset: u64, data: u64, access: &Access, reply: Deferred<'_>) -> Answer;

    /// The port that it is, if it is one with a slot.
    fn port(&mut self) -> Option<&mut RootPort> {
        None
    }

    /// See [`crate::bus::Device::poll`].
    fn poll(&mut self) {}

    /// See [`crate::bus::Device::deadline`].
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Machine reset, or the reset of the bus it sits on. Its configuration space too.
    fn reset(&mut self);
}

/// The windows of a function's BARs that its command register lets answer. An address of 0 is no address: it is what a BAR has
/// after reset.
pub fn bar_windows(config: &ConfigSpace) -> Vec<Window> {
    let enabled = config.command();
    let windows = config.bars().filter_map(|(region, bar, base)| {
        let io = bar.space == Space::Io;
        let answers = enabled & if io { command::IO } else { command::MEMORY } != 0;
        let limit = match bar.space {
            Space::Io => 0xffff,
            Space::Memory32 => u64::from(u32::MAX),
            Space::Memory64 => u64::MAX,
        };
        let window = Window { io, base, len: bar.size, region };
        (answers && base != 0 && window.is_within(0, limit)).then_some(window)
    });
    windows.collect()
}
