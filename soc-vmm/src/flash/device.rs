//! The chips on the memory bus.

use std::sync::Arc;

use super::chip::Chip;
use super::{FlashMemory, VariableStore};
use crate::bus::{Access, Answer, Claim, Deferred, Device, Wake};

/// A chip to be.
#[derive(Debug)]
pub struct Bank {
    /// First guest-physical address.
    pub base: u64,
    /// Its contents, whole sectors.
    pub bytes: Vec<u8>,
    /// Nothing can be programmed.
    pub read_only: bool,
    /// Where its contents are kept.
    pub store: Option<VariableStore>,
}

/// The chips, as one device: its offsets run through their claims.
pub struct Flash {
    pub(super) chips: Vec<Placed>,
    pub(super) memory: Arc<dyn FlashMemory>,
    pub(super) wake: Arc<dyn Wake>,
}

pub(super) struct Placed {
    pub(super) chip: Chip,
    claim: Claim,
    /// The claim's first offset.
    at: u64,
    pub(super) store: Option<VariableStore>,
}

impl Flash {
    /// The chips after power on; their arrays go to `memory` when they are first shown, at [`Flash::fill`]. `wake` brings the
    /// thread that serves IOREQs to look whether they are halted.
    pub fn new(banks: Vec<Bank>, memory: Arc<dyn FlashMemory>, wake: Arc<dyn Wake>) -> Self {
        let mut at = 0;
        let place = |Bank { base, bytes, read_only, store }| {
            let claim = Claim { base, len: bytes.len() as u64 };
            let placed = Placed { chip: Chip::new(bytes, read_only), claim, at, store };
            at += claim.len;
            placed
        };
        Self { chips: banks.into_iter().map(place).collect(), memory, wake }
    }

    /// What the device claims of the memory bus.
    pub fn claims(&self) -> Vec<Claim> {
        self.chips.iter().map(|placed| placed.claim).collect()
    }

    /// Puts every array into its memory, before the guest starts: whoever made the memory knows that it is shown.
    pub fn fill(&self) {
        for (bank, placed) in self.chips.iter().enumerate() {
            self.memory.program(bank, 0, placed.chip.bytes());
        }
    }

    /// The chip behind `offset`, its number, and the offset in it.
    fn find(&mut self, offset: u64) -> Option<(usize, &mut Placed, u64)> {
        let found = self
            .chips
            .iter_mut()
            .enumerate()
            .find(|(_, placed)| (placed.at..placed.at + placed.claim.len).contains(&offset));
        found.map(|(bank, placed)| {
            let at = offset - placed.at;
            (bank, placed, at)
        })
    }

    /// What was programmed goes to the array and to the store.
    pub(super) fn settle(memory: &dyn FlashMemory, bank: usize, placed: &mut Placed) {
        let Some(changed) = placed.chip.take_changed() else { return };
        let (start, bytes) = (changed.start, &placed.chip.bytes()[changed]);
        memory.program(bank, start as u64, bytes);
        if let Some(store) = &placed.store {
            store.save(start, bytes);
        }
    }
}

impl Device for Flash {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        let Some((_, placed, at)) = self.find(offset) else { return Answer::Unclaimed };
        let end = placed.claim.len;
        let mut value = [0xff; 8];
        for (byte, at) in value.iter_mut().zip(at..end).take(access.len.into()) {
            *byte = placed.chip.read(at);
        }
        Answer::Done(u64::from_le_bytes(value))
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, reply: Deferred<'_>) -> Answer {
        let memory = self.memory.clone();
        let Some((bank, placed, at)) = self.find(offset) else { return Answer::Unclaimed };
        let was_shown = placed.chip.in_array_mode();
        placed.chip.write(at, &data.to_le_bytes()[..access.len.clamp(1, 8).into()]);
        let is_shown = placed.chip.in_array_mode();
        if was_shown == is_shown {
            return Answer::Done(0);
        }
        if is_shown {
            Self::settle(&*memory, bank, placed);
        }
        memory.show_array(bank, is_shown, Some(reply.ticket()));
        Answer::Deferred
    }

    /// Back to read-array mode; every vCPU is out of the guest. The arrays stay as they are.
    fn reset(&mut self) {
        let memory = self.memory.clone();
        for (bank, placed) in self.chips.iter_mut().enumerate() {
            let was_shown = placed.chip.in_array_mode();
            placed.chip.reset();
            Self::settle(&*memory, bank, placed);
            if !was_shown {
                memory.show_array(bank, true, None);
            }
        }
    }
}

impl Drop for Flash {
    /// A guest that ends amid a write has programmed what it has; the stores end with the chips, and wait for their files.
    fn drop(&mut self) {
        for placed in &mut self.chips {
            if let (Some(changed), Some(store)) = (placed.chip.take_changed(), &placed.store) {
                store.save(changed.start, &placed.chip.bytes()[changed]);
            }
        }
    }
}

impl std::fmt::Debug for Flash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flash").field("claims", &self.claims()).finish_non_exhaustive()
    }
}
