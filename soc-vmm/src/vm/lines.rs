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
        let change = {
            let mut state = self.state();
            let (sequence, level) = state.gsis.entry(gsi).or_default();
            if *level == high {
                return;
            }
            (*sequence, *level) = (sequence.wrapping_add(1), high);
            let change = LineChange { gsi, high, sequence: *sequence };
            let waits =
                self.gathering.load(Ordering::Relaxed) && self.worker.get() == Some(&std::thread::current().id());
            if let Some(free) = state.gathered.iter_mut().find(|slot| waits && slot.is_none()) {
                *free = Some(change);
                self.any.store(true, Ordering::Relaxed);
                return;
            }
            change
        };
        self.send(vec![change.to_word()]);
    }
}
