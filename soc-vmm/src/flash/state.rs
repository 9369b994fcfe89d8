//! The chips' state on its way to another process. Their arrays are guest memory, and go with it; the file behind a store is written anew
//! there, once the guest is there.

use serde::{Deserialize, Serialize};

use super::chip::ChipState;
use super::device::Flash;
use crate::persist::{Moves, RestoreError, StateError, States, check};

const NAME: &str = "flash";
const VERSION: u32 = 1;

/// Saved state of a [`Flash`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FlashState {
    chips: Vec<ChipState>,
}

impl Flash {
    fn restore(&mut self, FlashState { chips }: &FlashState) -> Result<(), RestoreError> {
        check(
            chips.len() == self.chips.len(),
            NAME,
            "another number of chips: give both VMs a variable store, or none",
        )?;
        for (bank, (placed, state)) in self.chips.iter().zip(chips).enumerate() {
            let (there, here) = (state.len(), placed.chip.bytes().len());
            if there != here as u64 {
                let what = format!(
                    "chip {bank} has {there} bytes at the source and {here} here: give this VM firmware and a store of those sizes"
                );
                return Err(RestoreError::new(NAME, what));
            }
            check(state.is_sound(), NAME, "a chip can't be so")?;
        }
        for (bank, (placed, state)) in self.chips.iter_mut().zip(chips).enumerate() {
            let mut bytes = vec![0; placed.chip.bytes().len()];
            self.memory.fetch(bank, &mut bytes).map_err(|e| RestoreError::new(NAME, e.to_string()))?;
            if let Some(store) = &placed.store {
                store.replace(bytes.clone());
            }
            let was_shown = placed.chip.in_array_mode();
            placed.chip.restore(state, bytes);
            let is_shown = placed.chip.in_array_mode();
            if was_shown != is_shown {
                self.memory.show_array(bank, is_shown, None);
            }
        }
        Ok(())
    }
}

impl Moves for Flash {
    /// What was programmed goes to the arrays, though nobody sees them yet, and to the files, which are then free for the other side.
    fn halt(&mut self) {
        for (bank, placed) in self.chips.iter_mut().enumerate() {
            Self::settle(&*self.memory, bank, placed);
            placed.store.iter().for_each(|store| store.release(self.wake.clone()));
        }
    }

    fn is_halted(&mut self) -> bool {
        self.chips.iter().filter_map(|placed| placed.store.as_ref()).all(|store| store.is_released())
    }

    fn go_on(&mut self) {
        self.chips.iter().filter_map(|placed| placed.store.as_ref()).for_each(|store| store.hold());
    }

    fn save_into(&self, at: &str, states: &mut States) {
        let chips = self.chips.iter().map(|placed| placed.chip.save()).collect();
        states.put(NAME, at, VERSION, &FlashState { chips });
    }

    fn load(&mut self, at: &str, states: &mut States) -> Result<(), StateError> {
        let state = states.take(NAME, at, VERSION)?;
        Ok(self.restore(&state)?)
    }
}
