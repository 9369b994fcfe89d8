//! Post-copy: the guest runs here, and what it lacks comes, what it waits for first. A connection that is lost is waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::pages::{Job, Putter};
use super::{Destination, Main, Took};
use crate::ending::{Ending, caught};
use crate::progress::Meter;
use crate::session::spawned;
use crate::stream::{Features, MOST_RUNS, Preamble, Record, Run, VERSIONS};
use crate::watch::Line;
use crate::{Connection, MigrationError, Phase};

/// How long nobody notices that nothing is waited for any more.
const SLICE: Duration = Duration::from_millis(50);

impl<'s, 'e, 'v: 's> Destination<'s, 'e, 'v>
where
    'e: 's,
{
    /// Begins to ask for what the guest waits for, once it runs. Before: who can't, can still say so.
    ///
    /// # Errors
    /// [`MigrationError::NoThread`].
    pub(super) fn ask(&self, job: &Arc<Job<'v>>) -> Result<Asks, MigrationError> {
        let asks = Asks(Arc::default());
        let (asked, over, hall) = (Arc::clone(job), Arc::clone(&asks.0), self.hall);
        spawned(self.scope, move || {
            // Without it the pages come too, only later.
            _ = caught(|| {
                ask(&asked, &over, || hall.line());
                Ok(())
            });
        })?;
        Ok(asks)
    }

    /// Takes what is missing, over as many sets of connections as that takes, while somebody asks for some of it.
    ///
    /// # Errors
    /// It will not come: the guest that runs here is lost.
    pub(super) fn take_rest(
        &mut self,
        job: &Arc<Job<'v>>,
        main: &mut Main,
        _asks: &Asks,
    ) -> Result<(), MigrationError> {
        self.control.enter(Phase::PostcopyActive);
        self.control.settle();
        // Connections say once more that they have no more pages.
        self.hall.begin_again();
        if let Some(line) = &main.line {
            // If it doesn't arrive, the source asks.
            _ = line.send(&[Record::Runs]);
        }
        let mut taken = caught(|| self.take_session(job, main));
        loop {
            let is_complete = job.is_complete().is_ok();
            let limit = match taken {
                Ok(()) => return Ok(()),
                // The source may not know that. If it doesn't come back, it is its own loss.
                Err(error) if is_complete => {
                    _ = self.give_up(error);
                    Some(self.parameters.fate_limit)
                }
                Err(error) => {
                    let why = self.give_up(error);
                    self.control.enter(Phase::PostcopyPaused(why.one_line()));
                    None
                }
            };
            let Some((connection, offer)) = self.hall.wait_for_recovery(limit) else {
                return if is_complete { Ok(()) } else { Err(MigrationError::Lacking { pages: job.missing() }) };
            };
            if !is_complete {
                self.control.enter(Phase::PostcopyRecover);
                // libvirt looks here as soon as the source has said so.
                self.control.settle();
            }
            taken = caught(|| {
                *main = self.recover(job, connection, &offer, main.agreed.features.or(Features::RECOVERY))?;
                if !is_complete {
                    self.control.enter(Phase::PostcopyActive);
                }
                self.take_session(job, main)
            });
        }
    }

    /// Pages by these connections, until the last that is missing, and the source knows.
    fn take_session(&self, job: &Arc<Job<'v>>, main: &mut Main) -> Result<(), MigrationError> {
        let mut putter = Putter::new(Arc::clone(job), 0, main.agreed.features.has(Features::ZSTD))?;
        main.until(self.control.meter(), "comes among the pages", |record| match record {
            Record::LastPage => Ok(Took::Last(())),
            record => Ok(if putter.put(record)? { Took::It } else { Took::Not }),
        })?;
        self.hall.done(None);
        self.hall.wait_for_pages(job.connections, &self.session.ending)?;
        job.is_complete()?;
        if !self.control.phase().is_last() {
            self.complete();
        }
        self.tell(main, &Record::Complete)
    }

    /// New connections for the same guest, by features that both know.
    fn recover(
        &mut self,
        job: &Arc<Job<'v>>,
        mut connection: Connection,
        offer: &Preamble,
        known: Features,
    ) -> Result<Main, MigrationError> {
        let ending = Arc::new(Ending::default());
        self.control.follow(Some(&ending));
        self.session = self.begin_session(ending)?;
        self.session.ending.cuts(&connection.cut);
        let agreed = offer.answer(&VERSIONS, known)?;
        agreed.write_to(&mut connection.writer).map_err(MigrationError::stream(0))?;
        let receiver = self.session.watchman.receiver(0, connection.reader, true);
        let line = self.session.watchman.line(0, connection.writer, true);
        self.hall.open(job, &agreed, &self.session, Some(&line));
        for runs in job.list_missing().chunks(MOST_RUNS) {
            line.send(&[Record::Missing(runs.to_vec())])?;
        }
        line.send(&[Record::Ready])?;
        Ok(Main { receiver, line: Some(line), agreed, placed: None, counted: 0 })
    }

    /// These connections are of no use any more; why, as whoever found it first says.
    fn give_up(&self, error: MigrationError) -> MigrationError {
        self.session.ending.fail(error);
        self.session.end();
        self.session.ending.reason(MigrationError::GivenUpConnection)
    }
}

/// Somebody who asks, as long as this is there.
pub(super) struct Asks(Arc<AtomicBool>);

impl Drop for Asks {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Asks for the pages that the guest waits for, by whichever line there is, until it is over.
fn ask(job: &Job<'_>, over: &AtomicBool, line: impl Fn() -> Option<Arc<Line>>) {
    let mut waits: Vec<Run> = Vec::new();
    let mut asked: Option<Arc<Line>> = None;
    while !over.load(Ordering::Relaxed) {
        let mut wanted = job.vm.wanted(SLICE);
        waits.retain(|run| job.lacks(*run));
        wanted.retain(|run| job.lacks(*run));
        waits.extend(&wanted);
        let Some(line) = line() else { continue };
        if !asked.as_ref().is_some_and(|asked| Arc::ptr_eq(asked, &line)) {
            // A new one: what was asked for by the one before may be lost.
            wanted.clone_from(&waits);
            asked = Some(Arc::clone(&line));
        }
        for runs in wanted.chunks(MOST_RUNS) {
            Meter::add(&job.meter().postcopy_requests, runs.len() as u64);
            // Whoever reads from this connection finds that it is lost.
            _ = line.send(&[Record::Wanted(runs.to_vec())]);
        }
    }
}
