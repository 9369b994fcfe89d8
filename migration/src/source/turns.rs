//! Rounds: all connections' threads at once, and nobody between them.

use std::sync::{Condvar, Mutex, PoisonError};

use crate::MigrationError;
use crate::ending::{Ending, caught, lock};

/// What is sent this time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Pages while the guest runs; without those that never rest, if they are put off.
    Round { puts_off: bool },
    /// All that is left, as fast as it goes, and that it was the last.
    Last,
    /// What may not come after the guest has started, and that it was the last for now.
    Mark,
    /// What the destination lacks, while the guest runs there; what it waits for first.
    Rest,
}

/// Hands out turns.
pub(super) struct Turns {
    queue: Mutex<Queue>,
    changed: Condvar,
    takers: usize,
}

struct Queue {
    number: u64,
    turn: Turn,
    busy: usize,
    /// Threads that may still send something.
    there: usize,
    over: bool,
}

impl Turns {
    /// For so many threads, each of which calls [`Self::take_each`] once, after [`Self::enter`] was called for it.
    pub(super) fn new(takers: usize) -> Self {
        let queue = Queue { number: 0, turn: Turn::Last, busy: 0, there: 0, over: false };
        Self { queue: Mutex::new(queue), changed: Condvar::new(), takers }
    }

    /// Has all of them take one, and waits for them.
    pub(super) fn run(&self, turn: Turn, ending: &Ending) -> Result<(), MigrationError> {
        ending.check()?;
        let mut queue = lock(&self.queue);
        (queue.turn, queue.busy, queue.number) = (turn, self.takers, queue.number + 1);
        self.changed.notify_all();
        let done = self.changed.wait_while(queue, |queue| queue.busy > 0 && !queue.over);
        drop(done.unwrap_or_else(PoisonError::into_inner));
        ending.check()
    }

    /// One more thread.
    pub(super) fn enter(&self) {
        lock(&self.queue).there += 1;
    }

    /// Takes each of them, until one fails or there will be none.
    pub(super) fn take_each(&self, ending: &Ending, take: impl FnMut(Turn) -> Result<(), MigrationError>) {
        self.take_all(ending, take);
        self.leave();
    }

    /// One less.
    pub(super) fn leave(&self) {
        lock(&self.queue).there -= 1;
        self.changed.notify_all();
    }

    fn take_all(&self, ending: &Ending, mut take: impl FnMut(Turn) -> Result<(), MigrationError>) {
        let mut taken = 0;
        while let Some((number, turn)) = self.next(taken) {
            let result = caught(|| take(turn));
            taken = number;
            let mut queue = lock(&self.queue);
            if let Err(error) = result {
                // Nobody waits for the turn of one that is gone.
                queue.over = true;
                drop(queue);
                ending.fail(error);
                self.changed.notify_all();
                return;
            }
            queue.busy -= 1;
            if queue.busy == 0 {
                self.changed.notify_all();
            }
        }
    }

    /// There will be none.
    pub(super) fn stop(&self) {
        lock(&self.queue).over = true;
        self.changed.notify_all();
    }

    /// There will be none, and no thread sends anything any more.
    pub(super) fn stop_all(&self) {
        self.stop();
        let waited = self.changed.wait_while(lock(&self.queue), |queue| queue.there > 0);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn next(&self, taken: u64) -> Option<(u64, Turn)> {
        let queue = lock(&self.queue);
        let waited = self.changed.wait_while(queue, |queue| queue.number == taken && !queue.over);
        let queue = waited.unwrap_or_else(PoisonError::into_inner);
        (!queue.over).then_some((queue.number, queue.turn))
    }
}
