//! Guest memory of tests: bytes on the heap, with the RAM of a layout and a ROM.

use std::sync::Mutex;

use super::{BootError, BootPlan, Rom};
use crate::layout::MemoryLayout;
use crate::memory::{GuestMemory, MemoryError};

pub(super) struct TestMemory {
    ranges: Vec<(u64, u64)>,
    state: Mutex<State>,
}

struct State {
    ranges: Vec<Vec<u8>>,
    writes: Vec<usize>,
}

impl TestMemory {
    /// Memory with `ram` bytes of RAM, filled with a pattern that tells what was never written.
    pub(super) fn new(ram: u64) -> Self {
        Self::with_rom(ram, None)
    }

    /// The same with a ROM.
    pub(super) fn with_rom(ram: u64, rom: Option<Rom>) -> Self {
        let layout = MemoryLayout::new(ram).unwrap();
        let mut ranges: Vec<_> = layout.ram_ranges().map(|range| (range.start, range.len)).collect();
        ranges.extend(rom.map(|rom| (rom.start, rom.len)));
        let bytes = ranges.iter().map(|(_, len)| vec![0xa5; usize::try_from(*len).unwrap()]).collect();
        Self { ranges, state: Mutex::new(State { ranges: bytes, writes: Vec::new() }) }
    }

    /// `len` bytes at `addr`.
    pub(super) fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(addr, &mut bytes).unwrap();
        bytes
    }

    /// The sizes of all writes so far.
    pub(super) fn writes(&self) -> Vec<usize> {
        self.state.lock().unwrap().writes.clone()
    }

    /// Loads all of a plan.
    pub(super) fn load(&self, plan: &BootPlan) -> Result<(), BootError> {
        let mut loading = plan.load();
        while loading.step(self)? {}
        Ok(())
    }

    fn find(&self, addr: u64, len: usize) -> Result<(usize, usize), MemoryError> {
        let len = len as u64;
        self.ranges
            .iter()
            .position(|(start, size)| addr >= *start && addr - start <= *size && len <= size - (addr - start))
            .map(|index| (index, usize::try_from(addr - self.ranges[index].0).unwrap()))
            .ok_or(MemoryError::NotRam { addr, len })
    }
}

impl GuestMemory for TestMemory {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let (range, at) = self.find(addr, data.len())?;
        data.copy_from_slice(&self.state.lock().unwrap().ranges[range][at..at + data.len()]);
        Ok(())
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        let (range, at) = self.find(addr, data.len())?;
        let mut state = self.state.lock().unwrap();
        state.ranges[range][at..at + data.len()].copy_from_slice(data);
        state.writes.push(data.len());
        Ok(())
    }
}
