//! One chip: the Intel command set (JEDEC command set 0x0001), with what QEMU's `pflash_cfi01` leaves out or does otherwise, since firmware
//! was made for that one: a byte that is programmed takes its new value whether or not it was erased, 0x50 and 0x00 return to read-array
//! mode, and the identification is zeros.
//!
//! An access is one bus cycle, however wide: of a command the low byte counts, of data every byte.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::SECTOR;
use super::query::{self, BUFFER};
use crate::persist::Hex;

// Commands. What is not here means: read the array.
const PROGRAM: u8 = 0x40;
const PROGRAM_OLD: u8 = 0x10;
const ERASE: u8 = 0x20;
const CLEAR_STATUS: u8 = 0x50;
const LOCK: u8 = 0x60;
const READ_STATUS: u8 = 0x70;
const READ_ID: u8 = 0x90;
const QUERY: u8 = 0x98;
const BUFFERED: u8 = 0xe8;
/// The second cycle of what is not to happen by mistake.
const CONFIRM: u8 = 0xd0;
const SET_LOCK: u8 = 0x01;

/// Status register.
mod status {
    pub(super) const READY: u8 = 1 << 7;
    pub(super) const ERASE_FAILED: u8 = 1 << 5;
    pub(super) const PROGRAM_FAILED: u8 = 1 << 4;
    pub(super) const ALL: u8 = READY | ERASE_FAILED | PROGRAM_FAILED;
}

/// What a read gives, and what the next write means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Mode {
    #[default]
    Array,
    /// Reads give the status; the next write is this cycle of a command.
    Status(Cycle),
    Id,
    Query,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Cycle {
    Command,
    /// Data of a program command.
    Data,
    EraseConfirm,
    LockConfirm,
    /// One less than the bytes to come.
    Count,
    /// Data of a buffered write: so many cycles left.
    Buffer(usize),
    BufferConfirm,
}

/// A chip.
pub(super) struct Chip {
    bytes: Vec<u8>,
    read_only: bool,
    mode: Mode,
    status: u8,
    /// Data of a buffered write: offset and bytes of each cycle.
    buffer: Vec<(usize, [u8; 8], usize)>,
    /// What was changed since it was last asked for.
    changed: Option<Range<usize>>,
}

/// Saved state of a [`Chip`]; its bytes are in its array's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ChipState {
    /// Bytes.
    len: u64,
    mode: Mode,
    status: u8,
    /// Data of a buffered write: offset and bytes of each cycle.
    buffer: Vec<(u64, Hex)>,
}

impl ChipState {
    /// Bytes of its chip.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Whether a chip can be so.
    pub(super) fn is_sound(&self) -> bool {
        let cycles = match self.mode {
            Mode::Status(Cycle::Buffer(left)) if left >= 1 => self.buffer.len().checked_add(left),
            Mode::Status(Cycle::BufferConfirm) => Some(self.buffer.len()),
            Mode::Status(Cycle::Buffer(_)) => None,
            _ => self.buffer.is_empty().then_some(0),
        };
        let fits = |(at, Hex(bytes)): &(u64, Hex)| *at < self.len && (1..=8).contains(&bytes.len());
        cycles.is_some_and(|cycles| cycles <= BUFFER) && self.buffer.iter().all(fits) && self.status & !status::ALL == 0
    }
}

impl Chip {
    /// A chip after power on; `bytes` are whole sectors.
    pub(super) fn new(bytes: Vec<u8>, read_only: bool) -> Self {
        Self { bytes, read_only, mode: Mode::Array, status: status::READY, buffer: Vec::new(), changed: None }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether reads give the array.
    pub(super) fn in_array_mode(&self) -> bool {
        self.mode == Mode::Array
    }

    /// What was changed since the last call.
    pub(super) fn take_changed(&mut self) -> Option<Range<usize>> {
        self.changed.take()
    }

    /// Takes its state.
    pub(super) fn save(&self) -> ChipState {
        let is_filling = matches!(self.mode, Mode::Status(Cycle::Buffer(_) | Cycle::BufferConfirm));
        let cycles = self.buffer.iter().filter(|_| is_filling);
        let buffer = cycles.map(|(at, bytes, len)| (*at as u64, Hex(bytes[..*len].to_vec()))).collect();
        ChipState { len: self.bytes.len() as u64, mode: self.mode, status: self.status, buffer }
    }

    /// Takes over a state that is sound, and the array's bytes.
    pub(super) fn restore(&mut self, state: &ChipState, bytes: Vec<u8>) {
        let cycle = |(at, Hex(data)): &(u64, Hex)| {
            let mut bytes = [0; 8];
            bytes[..data.len()].copy_from_slice(data);
            (*at as usize, bytes, data.len())
        };
        self.buffer = state.buffer.iter().map(cycle).collect();
        (self.bytes, self.mode, self.status, self.changed) = (bytes, state.mode, state.status, None);
    }

    pub(super) fn reset(&mut self) {
        (self.mode, self.status) = (Mode::Array, status::READY);
        self.buffer.clear();
    }

    /// The byte that a read at `offset` gives.
    pub(super) fn read(&self, offset: u64) -> u8 {
        match self.mode {
            Mode::Array => usize::try_from(offset).ok().and_then(|at| self.bytes.get(at)).copied().unwrap_or(0xff),
            Mode::Status(_) => self.status,
            Mode::Id => 0,
            Mode::Query => query::byte(self.bytes.len(), offset),
        }
    }

    /// A write cycle: `data`, 1 to 8 bytes, at `offset`, which is in the chip.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let at = offset as usize;
        let command = data.first().copied().unwrap_or(0xff);
        let Mode::Status(cycle) = self.mode else { return self.command(command) };
        self.mode = match cycle {
            Cycle::Command => return self.command(command),
            Cycle::Data => {
                self.program(at, data);
                Mode::Status(Cycle::Command)
            }
            Cycle::EraseConfirm if command == CONFIRM => {
                self.erase(at);
                Mode::Status(Cycle::Command)
            }
            Cycle::LockConfirm if matches!(command, CONFIRM | SET_LOCK) => {
                self.status |= status::READY;
                Mode::Status(Cycle::Command)
            }
            Cycle::Count if usize::from(command) < BUFFER => Mode::Status(Cycle::Buffer(usize::from(command) + 1)),
            Cycle::Buffer(left) => {
                let mut bytes = [0; 8];
                let len = data.len().min(bytes.len());
                bytes[..len].copy_from_slice(&data[..len]);
                self.buffer.push((at, bytes, len));
                Mode::Status(if left > 1 { Cycle::Buffer(left - 1) } else { Cycle::BufferConfirm })
            }
            Cycle::BufferConfirm if command == CONFIRM => {
                for (at, bytes, len) in std::mem::take(&mut self.buffer) {
                    self.program(at, &bytes[..len]);
                }
                Mode::Status(Cycle::Command)
            }
            // Not confirmed.
            Cycle::EraseConfirm | Cycle::LockConfirm | Cycle::Count | Cycle::BufferConfirm => Mode::Array,
        };
    }

    fn command(&mut self, command: u8) {
        self.mode = match command {
            PROGRAM | PROGRAM_OLD => Mode::Status(Cycle::Data),
            ERASE => Mode::Status(Cycle::EraseConfirm),
            LOCK => Mode::Status(Cycle::LockConfirm),
            READ_STATUS => Mode::Status(Cycle::Command),
            READ_ID => Mode::Id,
            QUERY => Mode::Query,
            BUFFERED => {
                self.buffer.clear();
                self.status |= status::READY;
                Mode::Status(Cycle::Count)
            }
            CLEAR_STATUS => {
                self.status = 0;
                Mode::Array
            }
            _ => Mode::Array,
        };
    }

    fn program(&mut self, at: usize, data: &[u8]) {
        self.status |= status::READY;
        if self.read_only {
            self.status |= status::PROGRAM_FAILED;
            return;
        }
        // What lies behind the chip's end is another one's.
        let len = data.len().min(self.bytes.len().saturating_sub(at));
        if len > 0 {
            self.bytes[at..at + len].copy_from_slice(&data[..len]);
            self.change(at..at + len);
        }
    }

    fn erase(&mut self, at: usize) {
        self.status |= status::READY;
        if self.read_only {
            self.status |= status::ERASE_FAILED;
            return;
        }
        let start = at & !(SECTOR as usize - 1);
        let sector = start..(start + SECTOR as usize).min(self.bytes.len());
        self.bytes[sector.clone()].fill(0xff);
        self.change(sector);
    }

    fn change(&mut self, range: Range<usize>) {
        let old = self.changed.take().unwrap_or(range.clone());
        self.changed = Some(old.start.min(range.start)..old.end.max(range.end));
    }
}
