//! The devices that kvm-unit-tests look for (QEMU's pc-testdev): a word of ports, interrupt lines, a window of plain memory.
//!
//! QEMU makes one device of them; nothing but the name joins the ports and the memory, so they are two here.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::wire::Wire;
use super::{Persist, Ranges, RestoreError, bytes, check, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::interrupt::{InterruptLine, LineSink};
use crate::persist::Hex;

const LINES: u64 = 24;
const MEMORY: u64 = 0x1_0000;

// Offsets of the ports.
const WORD: u64 = 0;
const FLUSH: u64 = 4;
const BYTES: u64 = 8;
const IRQ: u64 = 12;
const END: u64 = IRQ + LINES;

/// Ports 0xe0–0xe3, a word that keeps what is written; 0xe4, "flush the mapping of this guest page"; 0xe8–0xeb, the same word
/// byte by byte; 0x2000–0x2017, a write to which sets the level of the GSI of that number.
///
/// Flushing changes nothing that the guest can see, and guest memory is mapped and pinned for good here: it is done by doing
/// nothing.
#[derive(Debug)]
pub struct PcTestPorts {
    word: u32,
    lines: Vec<Wire>,
}

/// Saved state of [`PcTestPorts`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PcTestPortsState {
    /// The word at 0xe0.
    pub word: u32,
    /// The levels of GSI 0–23.
    pub lines: u32,
}

impl PcTestPorts {
    /// What it claims. A guest waits for the interrupt that a write to 0x2000 made: nothing is postable.
    pub const RANGES: Ranges = Ranges::ports(&[claim(0xe0, IRQ), claim(0x2000, LINES)]);

    /// The ports; `sink` takes the levels.
    pub fn new(sink: &Arc<dyn LineSink>) -> Self {
        let lines = (0..LINES as u32).map(|gsi| Wire::new(InterruptLine::new(gsi, sink.clone()))).collect();
        Self { word: 0, lines }
    }
}

/// The end of the claim that `offset` lies in.
fn end(offset: u64) -> u64 {
    if offset < IRQ { IRQ } else { END }
}

impl Device for PcTestPorts {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        Answer::Done(bytes::read(access, offset, end(offset), |at| match at {
            WORD..FLUSH | BYTES..IRQ => bytes::get(self.word.into(), at % 4),
            _ => 0xff,
        }))
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, _: Deferred<'_>) -> Answer {
        bytes::write(access, offset, end(offset), data, |at, byte| match at {
            WORD..FLUSH | BYTES..IRQ => self.word = bytes::put(self.word.into(), at % 4, byte) as u32,
            // Said even where it is no change: a second vCPU that lowers a line relies on it as the first one does.
            IRQ..END => self.lines[(at - IRQ) as usize].force(byte != 0),
            _ => {}
        });
        Answer::Done(0)
    }

    fn reset(&mut self) {
        self.word = 0;
        self.lines.iter_mut().for_each(|line| line.set(false));
    }
}

impl Persist for PcTestPorts {
    const NAME: &'static str = "pc-testdev";
    type State = PcTestPortsState;

    fn save(&self) -> PcTestPortsState {
        let lines = self.lines.iter().rev().fold(0, |lines, line| lines << 1 | u32::from(line.is_high()));
        PcTestPortsState { word: self.word, lines }
    }

    fn restore(&mut self, state: &PcTestPortsState) -> Result<(), RestoreError> {
        check(state.lines >> LINES == 0, "pc-testdev", "there are 24 lines")?;
        self.word = state.word;
        for (gsi, line) in self.lines.iter_mut().enumerate() {
            // Lines of other devices are theirs: only what this one holds high is said.
            match state.lines >> gsi & 1 {
                0 => line.set(false),
                _ => line.force(true),
            }
        }
        Ok(())
    }
}

/// 64 KiB at 0xff000000 that behave like memory, one exit an access.
pub struct PcTestMemory {
    memory: Box<[u8]>,
}

/// Saved state of [`PcTestMemory`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PcTestMemoryState {
    /// The memory, without the zeros at its end.
    pub memory: Hex,
}

impl PcTestMemory {
    /// What it claims. Reads follow writes: nothing is postable.
    pub const RANGES: Ranges = Ranges::memory(&[claim(0xff00_0000, MEMORY)]);

    /// The window, zeroed.
    pub fn new() -> Self {
        Self { memory: vec![0; MEMORY as usize].into() }
    }
}

impl Default for PcTestMemory {
    fn default() -> Self {
        Self::new()
    }
}

impl Device for PcTestMemory {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        Answer::Done(bytes::read(access, offset, MEMORY, |at| self.memory[at as usize]))
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, _: Deferred<'_>) -> Answer {
        bytes::write(access, offset, MEMORY, data, |at, byte| self.memory[at as usize] = byte);
        Answer::Done(0)
    }

    fn reset(&mut self) {
        self.memory.fill(0);
    }
}

impl Persist for PcTestMemory {
    const NAME: &'static str = "pc-testdev-memory";
    type State = PcTestMemoryState;

    fn save(&self) -> PcTestMemoryState {
        PcTestMemoryState { memory: Hex::trimmed(&self.memory) }
    }

    fn restore(&mut self, state: &PcTestMemoryState) -> Result<(), RestoreError> {
        let Hex(bytes) = &state.memory;
        check(bytes.len() <= self.memory.len(), "pc-testdev", "more than 64 KiB of memory")?;
        self.memory.fill(0);
        self.memory[..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}
