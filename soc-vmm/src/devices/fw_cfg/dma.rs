//! Transfers by DMA (QEMU docs/specs/fw_cfg.rst, "Guest-side DMA Interface").
//!
//! The guest's descriptor, 16 bytes, big-endian: control (4), length (4), address (8). The device writes the control word when it is
//! done: zero, or the error bit.

use super::{FwCfg, Origin};

/// Control bits. Bits 16–31 are the key to select.
mod control {
    pub(super) const ERROR: u32 = 1 << 0;
    pub(super) const READ: u32 = 1 << 1;
    pub(super) const SKIP: u32 = 1 << 2;
    pub(super) const SELECT: u32 = 1 << 3;
    pub(super) const WRITE: u32 = 1 << 4;
}

/// Bytes copied at a time.
const CHUNK: usize = 64 << 10;
/// Behind an item's end there are zeros; a guest that asks for more of them at once gets an error, so that no transfer takes long.
const ZEROS_MAX: usize = 1 << 20;

/// What a descriptor asks for could not be done.
struct Failed;

impl FwCfg {
    /// Does what the descriptor at guest-physical `at` asks for.
    pub(super) fn transfer(&mut self, at: u64) {
        let mut descriptor = [0; 16];
        // Without a descriptor there is nowhere to put an error.
        if self.memory.read(at, &mut descriptor).is_err() {
            return;
        }
        let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|n| descriptor[at + n]));
        let (command, len) = (word(0), word(4));
        let address = u64::from(word(8)) << 32 | u64::from(word(12));
        if command & control::SELECT != 0 {
            self.select((command >> 16) as u16);
        }
        let done = if command & control::READ != 0 {
            self.read_to(address, len as usize)
        } else if command & control::WRITE != 0 {
            self.write_from(address, len as usize)
        } else {
            if command & control::SKIP != 0 {
                self.skip(len as usize);
            }
            Ok(())
        };
        let result = if done.is_ok() { 0 } else { control::ERROR };
        // It was memory a moment ago; a guest that takes it away learns nothing.
        let _ = self.memory.write(at, &result.to_be_bytes());
    }

    /// Copies `len` bytes of the selected item to guest memory; zeros behind its end.
    fn read_to(&mut self, address: u64, len: usize) -> Result<(), Failed> {
        let of_item = len.min(self.rest().len());
        let zeros = len - of_item;
        if zeros > ZEROS_MAX || address.checked_add(len as u64).is_none() {
            return Err(Failed);
        }
        let mut to = address;
        for part in self.rest()[..of_item].chunks(CHUNK).chain(vec![0; zeros].chunks(CHUNK)) {
            self.memory.write(to, part).map_err(|_| Failed)?;
            to += part.len() as u64;
        }
        self.skip(of_item);
        Ok(())
    }

    /// Copies `len` bytes of guest memory to the selected item, which must be writable and have room for all of them.
    fn write_from(&mut self, address: u64, len: usize) -> Result<(), Failed> {
        let item = self.items.get_mut(&self.selected).ok_or(Failed)?;
        if !matches!(item.origin, Origin::Writable(_)) {
            return Err(Failed);
        }
        let room = item.bytes.get_mut(self.offset as usize..).and_then(|rest| rest.get_mut(..len)).ok_or(Failed)?;
        self.memory.read(address, room).map_err(|_| Failed)?;
        self.skip(len);
        Ok(())
    }

    /// Goes `len` bytes on, at most to the item's end.
    fn skip(&mut self, len: usize) {
        self.offset += self.rest().len().min(len) as u32;
    }
}
