//! The PCI function that tests and courses use to try DMA and interrupts (QEMU's `edu`, docs/specs/edu): 1234:11e8, one BAR of 1 MiB.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0x00 | 4 | identification, read only: version 1.0 |
//! | 0x04 | 4 | gives back the complement of what was written |
//! | 0x08 | 4 | the factorial of what was written, modulo 2³² |
//! | 0x20 | 4 | status: 0x80, interrupt when a factorial is there |
//! | 0x24 | 4 | reasons of interrupts, read only |
//! | 0x60 | 4 | raises an interrupt for these reasons |
//! | 0x64 | 4 | acknowledges these reasons |
//! | 0x80, 0x88, 0x90 | 4 or 8 | DMA: source, destination, bytes |
//! | 0x98 | 4 or 8 | DMA: 1 start, 2 from the function to memory, 4 interrupt when done |
//!
//! The function's end of a transfer lies in its buffer, 4096 bytes at 0x40000; the other has 28 address bits. Everything is done when
//! the write that asks for it is: a guest that polls finds it so at once.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::wire::Wire;
use super::{Persist, RestoreError, check};
use crate::bus::{Access, Answer, Deferred};
use crate::interrupt::{InterruptLine, MessageSink};
use crate::memory::GuestMemory;
use crate::pci::{Bar, ConfigSpace, ConfigState, Identity, Msi, PciFunction, Space, command};
use crate::persist::Hex;

// Registers.
const IDENTIFICATION: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const STATUS: u64 = 0x20;
const REASONS: u64 = 0x24;
const RAISE: u64 = 0x60;
const ACKNOWLEDGE: u64 = 0x64;
const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;

const IDENTIFICATION_VALUE: u32 = 0x0100_00ed;
/// Status: interrupt when a factorial is there.
const STATUS_INTERRUPT: u32 = 0x80;
/// Reasons that the function gives itself.
const REASON_FACTORIAL: u32 = 0x001;
const REASON_DMA: u32 = 0x100;

// DMA commands.
const START: u64 = 1;
const TO_MEMORY: u64 = 2;
const INTERRUPT: u64 = 4;

/// Where the buffer is for DMA, and its bytes.
const BUFFER: u64 = 0x4_0000;
const BUFFER_LEN: usize = 4096;
/// Addresses that DMA reaches.
const ADDRESS_MASK: u64 = (1 << 28) - 1;

/// The function.
pub struct Edu {
    config: ConfigSpace,
    msi: Msi,
    wire: Wire,
    memory: Arc<dyn GuestMemory>,
    registers: Registers,
    buffer: Box<[u8; BUFFER_LEN]>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    liveness: u32,
    factorial: u32,
    status: u32,
    reasons: u32,
    source: u64,
    destination: u64,
    count: u64,
    command: u64,
}

/// All that a guest can tell of the function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EduState {
    config: ConfigState,
    registers: Registers,
    buffer: Hex,
}

impl Edu {
    /// A function whose DMA reaches `memory`.
    pub fn new(memory: Arc<dyn GuestMemory>, messages: &dyn MessageSink, line: InterruptLine) -> Self {
        let identity =
            Identity { vendor: 0x1234, device: 0x11e8, revision: 0x10, class: 0x00_ff00, subsystem: (0x1af4, 0x1100) };
        let mut config = ConfigSpace::endpoint(&identity).with_pin();
        config.add_bar(0, Bar { space: Space::Memory32, size: 1 << 20, prefetchable: false });
        let msi = Msi::new(&mut config, messages);
        let (wire, registers) = (Wire::new(line), Registers::default());
        Self { config, msi, wire, memory, registers, buffer: Box::new([0; BUFFER_LEN]) }
    }

    fn register(&self, offset: u64) -> Option<u64> {
        let registers = &self.registers;
        Some(match offset {
            IDENTIFICATION => IDENTIFICATION_VALUE.into(),
            LIVENESS => (!registers.liveness).into(),
            FACTORIAL => registers.factorial.into(),
            STATUS => registers.status.into(),
            REASONS => registers.reasons.into(),
            SOURCE => registers.source,
            DESTINATION => registers.destination,
            COUNT => registers.count,
            COMMAND => registers.command,
            _ => return None,
        })
    }

    fn set_register(&mut self, offset: u64, value: u64) {
        let registers = &mut self.registers;
        match offset {
            LIVENESS => registers.liveness = value as u32,
            FACTORIAL => {
                registers.factorial = factorial(value as u32);
                if registers.status & STATUS_INTERRUPT != 0 {
                    self.raise(REASON_FACTORIAL);
                }
            }
            STATUS => registers.status = value as u32 & STATUS_INTERRUPT,
            RAISE => self.raise(value as u32),
            ACKNOWLEDGE => {
                registers.reasons &= !(value as u32);
                self.settle();
            }
            SOURCE => registers.source = value,
            DESTINATION => registers.destination = value,
            COUNT => registers.count = value,
            COMMAND => {
                registers.command = value & !START;
                if value & START != 0 {
                    // What can't be reached is not moved; the function has no way to say so.
                    let _ = self.transfer();
                    if value & INTERRUPT != 0 {
                        self.raise(REASON_DMA);
                    }
                }
            }
            _ => {}
        }
    }

    /// Moves what the registers say; none: it is not in the buffer, or not in memory.
    fn transfer(&mut self) -> Option<()> {
        let Registers { source, destination, count, command, .. } = self.registers;
        if self.config.command() & command::BUS_MASTER == 0 {
            return None;
        }
        let to_memory = command & TO_MEMORY != 0;
        let (own, other) = if to_memory { (source, destination) } else { (destination, source) };
        let first = usize::try_from(own.checked_sub(BUFFER)?).ok()?;
        let piece = self.buffer.get_mut(first..first.checked_add(usize::try_from(count).ok()?)?)?;
        let other = other & ADDRESS_MASK;
        if to_memory { self.memory.write(other, piece) } else { self.memory.read(other, piece) }.ok()
    }

    fn raise(&mut self, reasons: u32) {
        self.registers.reasons |= reasons;
        if self.registers.reasons != 0 && self.msi.enabled() && self.config.command() & command::BUS_MASTER != 0 {
            self.msi.raise();
        }
        self.settle();
    }

    /// Sets the pin as the registers stand.
    fn settle(&mut self) {
        let high = self.config.show_interrupt(self.registers.reasons != 0 && !self.msi.enabled());
        self.wire.set(high);
    }
}

/// Modulo 2³², which divides the factorial of 34 and all that follow.
fn factorial(n: u32) -> u32 {
    if n >= 34 { 0 } else { (2..=n).fold(1, u32::wrapping_mul) }
}

/// Registers below [`SOURCE`] have 4 bytes, the others take 4 or 8.
fn is_legal(offset: u64, len: u8) -> bool {
    len == 4 || len == 8 && offset >= SOURCE
}

impl PciFunction for Edu {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn write_config(&mut self, offset: u16, len: u8, value: u32) {
        self.config.write(offset, len, value);
        self.msi.configure(&self.config);
        self.settle();
    }

    fn read(&mut self, _: usize, offset: u64, access: &Access, _: Deferred<'_>) -> Answer {
        let value = is_legal(offset, access.len).then(|| self.register(offset)).flatten();
        Answer::Done(value.unwrap_or(u64::MAX))
    }

    fn write(&mut self, _: usize, offset: u64, data: u64, access: &Access, _: Deferred<'_>) -> Answer {
        if is_legal(offset, access.len) {
            let data = if access.len == 4 { data & u64::from(u32::MAX) } else { data };
            self.set_register(offset, data);
        }
        Answer::Done(0)
    }

    fn reset(&mut self) {
        self.config.reset();
        self.msi.configure(&self.config);
        self.registers = Registers::default();
        self.buffer.fill(0);
        self.settle();
    }
}

impl Persist for Edu {
    const NAME: &'static str = "edu";
    type State = EduState;

    fn save(&self) -> EduState {
        let (config, registers) = (self.config.save(), self.registers.clone());
        EduState { config, registers, buffer: Hex::trimmed(&*self.buffer) }
    }

    fn restore(&mut self, state: &EduState) -> Result<(), RestoreError> {
        const NAME: &str = "edu";
        let Registers { status, command, .. } = state.registers;
        let buffer = state.buffer.padded();
        check(buffer.is_some(), NAME, "more than 4 KiB of buffer")?;
        check(status & !STATUS_INTERRUPT == 0 && command & START == 0, NAME, "work that is under way")?;
        check(self.config.restore(&state.config), NAME, "no configuration space")?;
        self.registers = state.registers.clone();
        *self.buffer = buffer.unwrap_or([0; BUFFER_LEN]);
        self.msi.configure(&self.config);
        let high = self.config.show_interrupt(self.registers.reasons != 0 && !self.msi.enabled());
        self.wire.force(high);
        Ok(())
    }
}

impl std::fmt::Debug for Edu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Edu").field("registers", &self.registers).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
