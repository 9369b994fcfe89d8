//! What the destination's threads know of each other.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::pages::Job;
use crate::connection::Cut;
use crate::ending::{Ending, lock};
use crate::session::Session;
use crate::stream::Preamble;
use crate::watch::Line;
use crate::{Connection, MigrationError};

/// How long somebody waits before looking for a failure.
const SLICE: Duration = Duration::from_millis(50);
/// Most who are being let in at a time; others wait outside, where the kernel keeps them.
const MOST_VISITORS: usize = 32;

/// Who can come in, and what they find.
pub(super) struct Hall<'v> {
    state: Mutex<State<'v>>,
    changed: Condvar,
}

struct State<'v> {
    first: First,
    /// How many are being let in.
    visitors: usize,
    /// What ends the wait for those of them who haven't said who they are.
    strangers: Vec<Cut>,
    /// What page connections need, and the main connection's preamble that theirs has to match.
    job: Option<Open<'v>>,
    /// The way back.
    line: Option<Arc<Line>>,
    /// Somebody who brings what a running guest lacks.
    recovery: Option<(Connection, Preamble)>,
    /// How many sets of connections there were.
    session: u64,
    /// When page connections were first let in.
    opened: Option<Instant>,
    /// Which connections came: a bit each.
    came: u16,
    /// How many have no more pages.
    done: u16,
    /// The source has asked what became of the guest, and knows.
    asked: bool,
    /// No more connections come.
    shut: bool,
}

/// A connection, and what was offered by it.
pub(super) type Offered = (Connection, Preamble);

/// The main connection of the migration.
enum First {
    Awaited,
    /// Or why there won't be one.
    Here(Result<Offered, MigrationError>),
    Taken,
}

/// Somebody who is being let in.
pub(super) struct Visit<'h, 'v>(&'h Hall<'v>);

impl Drop for Visit<'_, '_> {
    fn drop(&mut self) {
        self.0.lock().visitors -= 1;
        self.0.changed.notify_all();
    }
}

/// What page connections have to match, and need.
#[derive(Clone)]
pub(super) struct Open<'v> {
    pub(super) job: Arc<Job<'v>>,
    pub(super) main: Preamble,
    pub(super) session: Session,
    /// Which it is.
    pub(super) number: u64,
}

impl<'v> Hall<'v> {
    pub(super) fn new() -> Self {
        let state = State {
            first: First::Awaited,
            visitors: 0,
            strangers: Vec::new(),
            job: None,
            line: None,
            recovery: None,
            session: 0,
            opened: None,
            came: 0,
            done: 0,
            asked: false,
            shut: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// One more may come, once there is room; none: nobody may any more.
    pub(super) fn admits(&self) -> Option<Visit<'_, 'v>> {
        let is_full = |state: &mut State<'v>| state.visitors >= MOST_VISITORS && !state.shut;
        let waited = self.changed.wait_while(self.lock(), is_full);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.shut {
            return None;
        }
        state.visitors += 1;
        drop(state);
        Some(Visit(self))
    }

    /// Waits for something that a connection may never say; cut once nobody wants to hear it.
    pub(super) fn as_stranger<T>(&self, cut: &Cut, act: impl FnOnce() -> T) -> T {
        let mut state = self.lock();
        state.strangers.push(Arc::clone(cut));
        if state.shut {
            cut();
        }
        drop(state);
        let result = act();
        self.lock().strangers.retain(|one| !Arc::ptr_eq(one, cut));
        result
    }

    /// The main connection, or why there won't be one; given back if nobody waits for it.
    pub(super) fn brings(&self, first: Result<Offered, MigrationError>) -> Option<Result<Offered, MigrationError>> {
        let mut state = self.lock();
        if !matches!(state.first, First::Awaited) {
            return Some(first);
        }
        state.first = First::Here(first);
        drop(state);
        self.changed.notify_all();
        None
    }

    /// Whether somebody waits for that.
    pub(super) fn awaits_first(&self) -> bool {
        let state = self.lock();
        matches!(state.first, First::Awaited) && !state.shut
    }

    /// Waits for the main connection.
    pub(super) fn first(&self, ending: &Ending) -> Result<Offered, MigrationError> {
        let mut state = self.lock();
        loop {
            ending.check()?;
            match std::mem::replace(&mut state.first, First::Taken) {
                First::Here(first) => return first,
                _ if state.shut => return Err(MigrationError::Lost { connection: 0, when: "before it began" }),
                awaited => state.first = awaited,
            }
            (state, _) = self.changed.wait_timeout(state, SLICE).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until nobody is being let in any more.
    pub(super) fn wait_for_visitors(&self) {
        let waits = |state: &mut State<'v>| state.visitors > 0 && !state.shut;
        drop(self.changed.wait_while(self.lock(), waits));
    }

    /// Page connections may come.
    pub(super) fn open(&self, job: &Arc<Job<'v>>, main: &Preamble, session: &Session, line: Option<&Arc<Line>>) {
        let mut state = self.lock();
        state.session += 1;
        let number = state.session;
        state.job = Some(Open { job: Arc::clone(job), main: main.clone(), session: session.clone(), number });
        state.line = line.cloned();
        (state.opened, state.came, state.done) = (Some(Instant::now()), 1, 0);
    }

    /// What connections have to match, and need.
    pub(super) fn job(&self) -> Option<Open<'v>> {
        self.lock().job.clone()
    }

    /// The way back to the source.
    pub(super) fn line(&self) -> Option<Arc<Line>> {
        self.lock().line.clone()
    }

    /// Somebody brings what the guest lacks.
    pub(super) fn recovers(&self, connection: Connection, offer: Preamble) {
        self.lock().recovery = Some((connection, offer));
        self.changed.notify_all();
    }

    /// Waits for that, for `limit` if there is one; none: nobody came, or can.
    pub(super) fn wait_for_recovery(&self, limit: Option<Duration>) -> Option<(Connection, Preamble)> {
        let state = self.lock();
        let waits = |state: &mut State<'v>| state.recovery.is_none() && !state.shut;
        let mut state = match limit {
            Some(limit) => {
                self.changed.wait_timeout_while(state, limit, waits).unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.changed.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner),
        };
        state.recovery.take()
    }

    /// All connections have pages again.
    pub(super) fn begin_again(&self) {
        self.lock().done = 0;
    }

    /// That connection is there; whether it is the first of its number.
    pub(super) fn came(&self, number: u16) -> bool {
        let mut state = self.lock();
        let is_first = state.came & 1 << number == 0;
        state.came |= 1 << number;
        is_first
    }

    /// Nothing, if all connections came; a source sends no page before they have.
    pub(super) fn are_all_there(&self) -> Result<(), MigrationError> {
        self.missing(Duration::ZERO).map_or(Ok(()), Err)
    }

    /// What is wrong, if some were not there `limit` after they might have come.
    pub(super) fn missing(&self, limit: Duration) -> Option<MigrationError> {
        let state = self.lock();
        let announced = state.job.as_ref()?.main.connections;
        let came = state.came.count_ones() as u16;
        let waited = state.opened?.elapsed();
        (came < announced && waited > limit).then_some(MigrationError::Connections { came, announced, limit: waited })
    }

    /// One connection has no more pages, the main one or one of set `number`.
    pub(super) fn done(&self, number: Option<u64>) {
        let mut state = self.lock();
        state.done += u16::from(number.is_none_or(|number| number == state.session));
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until none has.
    pub(super) fn wait_for_pages(&self, connections: u16, ending: &Ending) -> Result<(), MigrationError> {
        let mut state = self.lock();
        while state.done < connections {
            ending.check()?;
            (state, _) = self.changed.wait_timeout(state, SLICE).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// Somebody asked and was told.
    pub(super) fn was_asked(&self) {
        self.lock().asked = true;
        self.changed.notify_all();
    }

    /// Waits until somebody has asked, nobody can any more, nobody has for `limit`, or `gives_up`.
    pub(super) fn wait_for_question(&self, limit: Duration, gives_up: impl Fn() -> bool) {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while !state.asked && !state.shut && Instant::now() < deadline && !gives_up() {
            (state, _) = self.changed.wait_timeout(state, SLICE).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No more connections come, or are wanted.
    pub(super) fn shut(&self) {
        let mut state = self.lock();
        state.shut = true;
        let strangers = std::mem::take(&mut state.strangers);
        drop(state);
        self.changed.notify_all();
        strangers.iter().for_each(|cut| cut());
    }

    /// Waits for that, for `time`.
    pub(super) fn wait_until_shut(&self, time: Duration) {
        drop(self.changed.wait_timeout_while(self.lock(), time, |state| !state.shut));
    }

    fn lock(&self) -> MutexGuard<'_, State<'v>> {
        lock(&self.state)
    }
}
