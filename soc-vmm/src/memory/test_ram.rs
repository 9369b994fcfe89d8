//! Guest memory of tests: bytes from 0 on.

use std::ops::Range;
use std::sync::Mutex;

use super::{GuestMemory, MemoryError};

/// So many bytes from 0 on.
pub(crate) struct Ram(pub(crate) Mutex<Vec<u8>>);

impl Ram {
    /// `len` zeros.
    pub(crate) fn new(len: usize) -> Self {
        Self(Mutex::new(vec![0; len]))
    }

    fn part(ram: &[u8], addr: u64, len: usize) -> Result<Range<usize>, MemoryError> {
        let end = addr.checked_add(len as u64).filter(|end| *end <= ram.len() as u64);
        end.map(|end| addr as usize..end as usize).ok_or(MemoryError::NotRam { addr, len: len as u64 })
    }
}

impl GuestMemory for Ram {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let ram = self.0.lock().unwrap();
        data.copy_from_slice(&ram[Self::part(&ram, addr, data.len())?]);
        Ok(())
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        let mut ram = self.0.lock().unwrap();
        let part = Self::part(&ram, addr, data.len())?;
        ram[part].copy_from_slice(data);
        Ok(())
    }
}
