//! What moves of Hyper-V: where the guest put the pages of its SynICs, which KVM tells user space only when the guest changes it.
//! Connections, and what waits in them, are their devices' state.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Hyperv, Pages};
use crate::persist::{Moves, StateError, States, check};

const NAME: &str = "hyperv";
const VERSION: u32 = 1;

/// Saved state of a [`Hyperv`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct HypervState {
    /// By vCPU: where the pages of messages and of event flags are, if they are on.
    pages: Vec<(Option<u64>, Option<u64>)>,
}

impl Moves for Arc<Hyperv> {
    fn halt(&mut self) {
        self.state().halted = true;
    }

    /// Sends what waits, wherever a slot is empty: the guest may have ended an interrupt of which nobody has told this side.
    fn go_on(&mut self) {
        let mut state = self.state();
        state.halted = false;
        state.deliver(&*self.memory, |_| true);
    }

    fn save_into(&self, at: &str, states: &mut States) {
        let pages = self.state().pages.iter().map(|pages| (pages.messages, pages.events)).collect();
        states.put(NAME, at, VERSION, &HypervState { pages });
    }

    fn load(&mut self, at: &str, states: &mut States) -> Result<(), StateError> {
        let HypervState { pages } = states.take(NAME, at, VERSION)?;
        let mut state = self.state();
        check(pages.len() == state.pages.len(), NAME, "another number of vCPUs")?;
        let aligned = |page: &Option<u64>| page.is_none_or(|page| page.is_multiple_of(4096));
        check(pages.iter().all(|(a, b)| aligned(a) && aligned(b)), NAME, "pages that are not aligned")?;
        state.pages = pages.into_iter().map(|(messages, events)| Pages { messages, events }).collect();
        state.halted = true;
        Ok(())
    }
}
