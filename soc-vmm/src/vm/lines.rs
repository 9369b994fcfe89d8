//! Interrupt lines on their way to the host: with the completion that is being made, or through the channel.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ThreadId;

use api_channel::call::Call;
use ioreq_ring::LineChange;
use pcie_function::SocFunction;

use crate::interrupt::LineSink;
use crate::link::Channel;

/// The GSIs of a VM. Each level change has a number within its GSI, so that of two on different ways the older is dropped.
#[derive(Debug)]
pub(super) struct Lines<F: SocFunction> {
    state: Mutex<State>,
    /// The thread whose changes may wait for a completion: the worker. It alone writes the two flags below, so that an access that
    /// moves no line costs no lock.
    worker: OnceLock<ThreadId>,
    /// Whether the worker serves an access.
    gathering: AtomicBool,
    /// Whether any change waits.
    any: AtomicBool,
    channel: Channel<F>,
}

#[derive(Debug, Default)]
struct State {
    /// Sequence and level of every GSI that was ever set.
    gsis: HashMap<u16, (u32, bool)>,
    /// Changes that wait for the completion of the access that is being served.
    gathered: [Option<LineChange>; 2],
}

/// What becomes of a level that was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    /// The host has it, or will.
    Known,
    /// It goes with the completion of the access that is being served.
    Waits,
    /// It goes now.
    Goes(LineChange),
}

impl State {
    /// Sets a GSI's level; `waits` if an access is being served.
    ///
    /// A level that is no change goes with the completion all the same: the change itself may be in another vCPU's completion, and
    /// that vCPU may be later. Whichever comes first applies it, and neither vCPU goes on under the old level.
    fn set(&mut self, gsi: u16, high: bool, waits: bool) -> Set {
        let (sequence, level) = self.gsis.entry(gsi).or_default();
        let is_change = *level != high;
        if is_change {
            (*sequence, *level) = (sequence.wrapping_add(1), high);
        }
        let change = LineChange { gsi, high, sequence: *sequence };
        match self.gathered.iter_mut().find(|slot| waits && slot.is_none()) {
            Some(free) => {
                *free = Some(change);
                Set::Waits
            }
            None if is_change => Set::Goes(change),
            None => Set::Known,
        }
    }
}

impl<F: SocFunction> Lines<F> {
    /// All lines low.
    pub(super) fn new(channel: Channel<F>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            worker: OnceLock::new(),
            gathering: AtomicBool::new(false),
            any: AtomicBool::new(false),
            channel,
        })
    }

    /// Makes the calling thread the worker.
    pub(super) fn serve_here(&self) {
        // The first call stands: a VM has one worker.
        let _ = self.worker.set(std::thread::current().id());
    }

    /// From here to [`Lines::gathered`] the worker's changes wait for a completion.
    pub(super) fn gather(&self) {
        self.gathering.store(true, Ordering::Relaxed);
    }

    /// The changes that go with the completion.
    pub(super) fn gathered(&self) -> [Option<LineChange>; 2] {
        self.gathering.store(false, Ordering::Relaxed);
        if !self.any.load(Ordering::Relaxed) {
            return [None; 2];
        }
        let mut state = self.state();
        self.any.store(false, Ordering::Relaxed);
        std::mem::take(&mut state.gathered)
    }

    /// The access is not completed yet: its changes go through the channel.
    pub(super) fn send_gathered(&self) {
        let words: Vec<_> = self.gathered().into_iter().flatten().map(LineChange::to_word).collect();
        if !words.is_empty() {
            self.send(words);
        }
    }

    fn send(&self, words: Vec<u64>) {
        // Over: then nobody waits for the interrupt.
        let _ = self.channel.order(&Call::Lines(words));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: SocFunction> LineSink for Lines<F> {
    fn set_level(&self, gsi: u32, high: bool) {
        let Ok(gsi) = u16::try_from(gsi) else { return };
        let waits = self.gathering.load(Ordering::Relaxed) && self.worker.get() == Some(&std::thread::current().id());
        let mut state = self.state();
        let set = state.set(gsi, high, waits);
        if set == Set::Waits {
            self.any.store(true, Ordering::Relaxed);
        }
        drop(state);
        if let Set::Goes(change) = set {
            self.send(vec![change.to_word()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GSI: u16 = 14;

    fn change(high: bool, sequence: u32) -> LineChange {
        LineChange { gsi: GSI, high, sequence }
    }

    #[test]
    fn a_level_that_another_completion_carries_is_carried_again() {
        let mut state = State::default();
        assert_eq!(state.set(GSI, true, false), Set::Goes(change(true, 1)));
        for _ in 0..2 {
            assert_eq!(state.set(GSI, false, true), Set::Waits);
            assert_eq!(std::mem::take(&mut state.gathered), [Some(change(false, 2)), None]);
        }
        assert_eq!(state.set(GSI, false, false), Set::Known, "no completion to go with");
    }

    #[test]
    fn what_finds_no_place_in_the_completion_goes_at_once() {
        let mut state = State::default();
        for high in [true, false] {
            assert_eq!(state.set(GSI, high, true), Set::Waits);
        }
        assert_eq!(state.set(GSI, true, true), Set::Goes(change(true, 3)));
        assert_eq!(state.set(GSI, true, true), Set::Known);
    }
}
