//! The one way in which a migration fails.

use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::MigrationError;
use crate::connection::Cut;

/// How long a farewell may take.
pub(crate) const FAREWELL: Duration = Duration::from_secs(1);

/// What all threads of a migration share about its failure: whoever finds one says it here, all connections are cut, and so everybody
/// else stops too, whatever it waits for.
#[derive(Default)]
pub(crate) struct Ending {
    over: AtomicBool,
    state: Mutex<State>,
    said: Condvar,
}

#[derive(Default)]
struct State {
    why: Option<MigrationError>,
    cuts: Vec<Cut>,
    /// What is done with the reason before the connections go.
    farewell: Option<Farewell>,
    /// Somebody is at it.
    says: bool,
}

type Farewell = Box<dyn FnOnce(&str) + Send>;

impl Ending {
    /// From here on a failure cuts that; now, if there was one.
    pub(crate) fn cuts(&self, cut: &Cut) {
        let mut state = lock(&self.state);
        if self.is_over() {
            cut();
        } else {
            state.cuts.push(Arc::clone(cut));
        }
    }

    /// Has `farewell` called with the reason before a failure cuts the connections.
    pub(crate) fn says(&self, farewell: impl FnOnce(&str) + Send + 'static) {
        lock(&self.state).farewell = Some(Box::new(farewell));
    }

    /// The migration has failed. The first reason stands, unless it is that a connection is gone and the other side had said why.
    pub(crate) fn fail(&self, error: MigrationError) {
        let mut state = lock(&self.state);
        let line = error.one_line();
        let explains = matches!(error, MigrationError::Refused(_));
        let is_stuck = matches!(error, MigrationError::Stalled { .. });
        if state.why.as_ref().is_none_or(|why| explains && why.is_loss()) {
            state.why = Some(error);
        }
        self.over.store(true, Ordering::Release);
        if let Some(farewell) = state.farewell.take() {
            // It may wait for the other side, and then somebody else has to be able to cut.
            state.says = true;
            drop(state);
            farewell(&line);
            state = lock(&self.state);
            state.says = false;
            self.said.notify_all();
        } else if state.says && !is_stuck {
            // Not in the middle of it: whoever says it cuts.
            return;
        }
        state.cuts.drain(..).for_each(|cut| cut());
    }

    /// Has a thread do something that the migration fails with, however that fails.
    pub(crate) fn guards(&self, act: impl FnOnce() -> Result<(), MigrationError>) {
        if let Err(error) = caught(act) {
            self.fail(error);
        }
    }

    /// Cuts the connections of a migration that is done or has failed.
    pub(crate) fn close(&self) {
        let says = |state: &mut State| state.says;
        let waited = self.said.wait_timeout_while(lock(&self.state), FAREWELL, says);
        waited.unwrap_or_else(PoisonError::into_inner).0.cuts.drain(..).for_each(|cut| cut());
    }

    /// Whether it has failed.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Nothing, as long as it hasn't failed.
    ///
    /// # Errors
    /// It has. Why is [`Self::reason`]'s: this error is nobody's reason.
    pub(crate) fn check(&self) -> Result<(), MigrationError> {
        if self.is_over() { Err(MigrationError::Cancelled) } else { Ok(()) }
    }

    /// Why it failed; `else_` if nobody said.
    pub(crate) fn reason(&self, else_: MigrationError) -> MigrationError {
        lock(&self.state).why.take().unwrap_or(else_)
    }
}

/// Does something whose panic is an error like any other: somebody waits for what this thread does, and would do so for ever. Where panics
/// abort, as in release builds, none comes so far: the process ends.
pub(crate) fn caught<T>(act: impl FnOnce() -> Result<T, MigrationError>) -> Result<T, MigrationError> {
    panic::catch_unwind(AssertUnwindSafe(act)).unwrap_or(Err(MigrationError::Panicked))
}

/// A lock that a panic elsewhere doesn't take away: the failure path needs it most then.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
