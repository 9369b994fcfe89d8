//! The handle of a migration that others hold: to choose, to watch, to stop it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::ending::{Ending, lock};
use crate::progress::Meter;
use crate::{MigrationError, Parameters, Progress};

/// Where a migration is: the words of QMP's `MigrationStatus`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The sides find each other.
    Setup,
    /// Memory moves, the guest runs.
    Active,
    /// The guest stands still, and somebody has to say [`Control::go_on`].
    PreSwitchover,
    /// The guest stands still, what is left of it moves.
    Device,
    /// The guest runs at the destination, and memory still moves.
    PostcopyActive,
    /// The same, but the connection is lost, and why, in one line.
    PostcopyPaused(String),
    /// The same, and there is a new one.
    PostcopyRecover,
    /// The guest runs at the destination.
    Completed,
    /// It failed, and why, in one line.
    Failed(String),
    /// Somebody wants it to end.
    Cancelling,
    /// It did.
    Cancelled,
}

impl Phase {
    /// QMP's word for it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::PostcopyActive => "postcopy-active",
            Self::PostcopyPaused(_) => "postcopy-paused",
            Self::PostcopyRecover => "postcopy-recover",
            Self::Completed => "completed",
            Self::Failed(_) => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether no other one follows.
    #[must_use]
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Completed | Self::Failed(_) | Self::Cancelled)
    }
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// QMP `MIGRATION`.
    Phase(Phase),
    /// QMP `MIGRATION_PASS`: the log was looked at for that many times.
    Pass(u64),
    /// Something comes of the last phase now that may be heard of by way of the other side: what was told has to be passed on when this
    /// returns.
    Settles,
    /// At the destination: somebody came who is no source, and was sent away; or nobody can be let in for a while. Why that is known.
    TurnedAway(String),
}

/// One migration's handle, on either side. Clones are the same one.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

struct Shared {
    parameters: Mutex<Parameters>,
    /// The bandwidth limits once more, for those who ask for it with each batch of pages.
    max_bandwidth: AtomicU64,
    max_post_copy_bandwidth: AtomicU64,
    /// The guest is to start at the destination as it is. Asked for with each batch of pages, too.
    post_copy: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    told: Box<dyn Fn(Event) + Send + Sync>,
    meter: Meter,
}

struct State {
    phase: Phase,
    began: Option<Instant>,
    ending: Option<Arc<Ending>>,
    cancelled: bool,
    /// Nobody can cancel it any more.
    committed: bool,
    went_on: bool,
    recovers: bool,
}

impl Control {
    /// Of a migration that is about to begin.
    #[must_use]
    pub fn new(parameters: Parameters) -> Self {
        Self::telling(parameters, |_| ())
    }

    /// The same, with somebody who is told what happens: in its order, before anything else that comes of it. That holds up the migration, and
    /// must not ask this handle.
    pub fn telling(parameters: Parameters, told: impl Fn(Event) + Send + Sync + 'static) -> Self {
        let max_bandwidth = AtomicU64::new(parameters.max_bandwidth);
        let max_post_copy_bandwidth = AtomicU64::new(parameters.max_post_copy_bandwidth);
        let state = State {
            phase: Phase::Setup,
            began: None,
            ending: None,
            cancelled: false,
            committed: false,
            went_on: false,
            recovers: false,
        };
        Self(Arc::new(Shared {
            parameters: Mutex::new(parameters),
            max_bandwidth,
            max_post_copy_bandwidth,
            post_copy: AtomicBool::new(false),
            state: Mutex::new(state),
            changed: Condvar::new(),
            told: Box::new(told),
            meter: Meter::default(),
        }))
    }

    /// How it is done.
    #[must_use]
    pub fn parameters(&self) -> Parameters {
        lock(&self.0.parameters).clone()
    }

    /// Has it done otherwise from here on.
    ///
    /// # Errors
    /// See [`Parameters::check`]; everything stays as it was.
    pub fn set_parameters(&self, parameters: Parameters) -> Result<(), MigrationError> {
        parameters.check()?;
        self.0.max_bandwidth.store(parameters.max_bandwidth, Ordering::Relaxed);
        self.0.max_post_copy_bandwidth.store(parameters.max_post_copy_bandwidth, Ordering::Relaxed);
        *lock(&self.0.parameters) = parameters;
        Ok(())
    }

    /// Ends it; whether that is still possible: the guest may be the destination's already. It has ended at [`Phase::Cancelled`]. At the
    /// destination this may take a second: the source is told.
    pub fn cancel(&self) -> bool {
        let mut state = lock(&self.0.state);
        if state.committed || state.phase.is_last() {
            return false;
        }
        if !state.cancelled {
            state.cancelled = true;
            self.0.enter(&mut state, Phase::Cancelling);
        }
        if let Some(ending) = state.ending.clone() {
            // Cutting may take its time: a farewell is said before.
            drop(state);
            ending.fail(MigrationError::Cancelled);
        }
        true
    }

    /// Ends [`Phase::PreSwitchover`]; whether it is in that phase.
    pub fn go_on(&self) -> bool {
        let mut state = lock(&self.0.state);
        let waits = state.phase == Phase::PreSwitchover;
        state.went_on |= waits;
        self.0.changed.notify_all();
        waits
    }

    /// At the source: has the guest run at the destination from the end of this round on, whatever is missing; whether that can be.
    pub fn start_post_copy(&self) -> bool {
        let may = self.parameters().post_copy && matches!(self.phase(), Phase::Setup | Phase::Active);
        self.0.post_copy.fetch_or(may, Ordering::Relaxed);
        may
    }

    /// Gives up the connection in [`Phase::PostcopyActive`], for a better one; whether it is in that phase. QMP `migrate-pause`.
    pub fn give_up_connection(&self) -> bool {
        let state = lock(&self.0.state);
        let ending = state.ending.clone().filter(|_| state.phase == Phase::PostcopyActive);
        drop(state);
        ending.map(|ending| ending.fail(MigrationError::GivenUpConnection)).is_some()
    }

    /// At the source: ends [`Phase::PostcopyPaused`] by new connections, which `prepare` is called before, once the destination has answered;
    /// whether it is in that phase, and nobody was before. QMP `migrate` with `resume`.
    pub fn recover(&self, prepare: impl FnOnce()) -> bool {
        let mut state = lock(&self.0.state);
        let waits = matches!(state.phase, Phase::PostcopyPaused(_)) && !state.recovers;
        if waits {
            prepare();
            state.recovers = true;
        }
        self.0.changed.notify_all();
        waits
    }

    /// Waits until the destination has answered a [`Self::recover`], or it has come to nothing, which its connections' limits see to.
    pub fn recovered(&self) {
        let state = lock(&self.0.state);
        let waits = |state: &mut State| state.recovers && matches!(state.phase, Phase::PostcopyPaused(_));
        drop(self.0.changed.wait_while(state, waits));
    }

    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        lock(&self.0.state).phase.clone()
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let state = lock(&self.0.state);
        self.0.meter.progress(state.phase.clone(), state.began)
    }

    pub(crate) fn meter(&self) -> &Meter {
        &self.0.meter
    }

    pub(crate) fn max_bandwidth(&self) -> u64 {
        self.0.max_bandwidth.load(Ordering::Relaxed)
    }

    pub(crate) fn wants_post_copy(&self) -> bool {
        self.0.post_copy.load(Ordering::Relaxed)
    }

    /// From here on that is what [`Self::give_up_connection`] ends; none: nothing.
    pub(crate) fn follow(&self, ending: Option<&Arc<Ending>>) {
        lock(&self.0.state).ending = ending.map(Arc::clone);
    }

    /// Waits in [`Phase::PostcopyPaused`]; why the connection is lost.
    pub(crate) fn wait_for_recovery(&self, why: &MigrationError) {
        let mut state = lock(&self.0.state);
        state.recovers = false;
        self.0.enter(&mut state, Phase::PostcopyPaused(why.one_line()));
        drop(self.0.changed.wait_while(state, |state| !state.recovers));
    }

    pub(crate) fn max_post_copy_bandwidth(&self) -> u64 {
        self.0.max_post_copy_bandwidth.load(Ordering::Relaxed)
    }

    /// A migration begins, which ends as `ending` says.
    pub(crate) fn begin(&self, ending: &Arc<Ending>) -> Result<(), MigrationError> {
        self.parameters().check()?;
        let mut state = lock(&self.0.state);
        if state.began.is_some() {
            return Err(MigrationError::Busy);
        }
        state.began = Some(Instant::now());
        if state.cancelled {
            ending.fail(MigrationError::Cancelled);
        } else {
            self.0.enter(&mut state, Phase::Setup);
        }
        state.ending = Some(Arc::clone(ending));
        Ok(())
    }

    /// The next phase, unless it was cancelled.
    pub(crate) fn enter(&self, phase: Phase) {
        let mut state = lock(&self.0.state);
        if !state.cancelled || phase.is_last() {
            self.0.enter(&mut state, phase);
        }
    }

    /// Has whoever was told pass it on.
    pub(crate) fn settle(&self) {
        (self.0.told)(Event::Settles);
    }

    /// The log was looked at once more.
    pub(crate) fn passed(&self) {
        // Among the phases.
        let _state = lock(&self.0.state);
        let count = self.0.meter.rounds.fetch_add(1, Ordering::Relaxed) + 1;
        (self.0.told)(Event::Pass(count));
    }

    /// Somebody who came was no source.
    pub(crate) fn turned_away(&self, why: &MigrationError) {
        (self.0.told)(Event::TurnedAway(why.one_line()));
    }

    /// From here on nobody cancels it.
    pub(crate) fn commit(&self) -> Result<(), MigrationError> {
        let mut state = lock(&self.0.state);
        if state.cancelled {
            return Err(MigrationError::Cancelled);
        }
        state.committed = true;
        Ok(())
    }

    /// Waits in [`Phase::PreSwitchover`].
    pub(crate) fn wait_for_go_on(&self, ending: &Ending) -> Result<(), MigrationError> {
        self.enter(Phase::PreSwitchover);
        let mut state = lock(&self.0.state);
        while !state.went_on {
            ending.check()?;
            let slice = Duration::from_millis(50);
            (state, _) = self.0.changed.wait_timeout(state, slice).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// It is over.
    pub(crate) fn finish(&self, error: Option<&MigrationError>) {
        self.0.meter.finish(lock(&self.0.state).began);
        self.enter(match error {
            None => Phase::Completed,
            Some(MigrationError::Cancelled) => Phase::Cancelled,
            Some(error) => Phase::Failed(error.one_line()),
        });
        lock(&self.0.state).ending = None;
    }
}

impl Shared {
    fn enter(&self, state: &mut State, phase: Phase) {
        state.phase = phase.clone();
        (self.told)(Event::Phase(phase));
        self.changed.notify_all();
    }
}
