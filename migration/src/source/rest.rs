//! Post-copy: the guest runs at the destination, and what it lacks is sent, what it waits for first. A connection that is lost is
//! waited for: there is no way back.

use std::sync::Arc;
use std::time::Duration;

use super::handover::Answer;
use super::pusher::Job;
use super::turns::Turn;
use super::{Open, Source};
use crate::ending::Ending;
use crate::progress::Meter;
use crate::stream::{Features, MOST_RUNS, PAGE, Preamble, Record, VERSIONS};
use crate::{MigrationError, Phase};

impl<'s, 'v: 's> Source<'s, '_, 'v> {
    /// Says which pages come later; whether there are any. What was sent of them before is old, so each connection says first that it has no
    /// more of that.
    pub(super) fn put_off_rest(&self, job: &Job<'_>) -> Result<bool, MigrationError> {
        job.turns.run(Turn::Mark, &self.session.ending)?;
        let rest = job.memory.pending();
        for runs in rest.chunks(MOST_RUNS) {
            self.say(&job.main, &[Record::Missing(runs.to_vec())])?;
        }
        Ok(!rest.is_empty())
    }

    /// Sends what is missing, over as many sets of connections as that takes; the job of the last one.
    pub(super) fn send_rest(&mut self, mut job: Arc<Job<'v>>, open: &mut Open<'_>) -> Arc<Job<'v>> {
        self.control.meter().runs_there();
        self.control.enter(Phase::PostcopyActive);
        loop {
            let Err(error) = self.push_rest(&job) else { return job };
            let mut why = self.give_up(error);
            job = loop {
                self.control.wait_for_recovery(&why);
                match self.reconnect(&job, open) {
                    Ok(job) => break job,
                    Err(error) => why = self.give_up(error),
                }
            };
            self.control.enter(Phase::PostcopyActive);
        }
    }

    fn push_rest(&self, job: &Job<'_>) -> Result<(), MigrationError> {
        job.turns.run(Turn::Rest, &self.session.ending)?;
        self.expect(&Answer::Complete, Duration::MAX)
    }

    /// These connections are of no use any more; why, as whoever found it first says.
    fn give_up(&self, error: MigrationError) -> MigrationError {
        self.session.ending.fail(error);
        self.session.end();
        if let Some(job) = &self.turns {
            // Their bookkeeping is about connections that are gone.
            job.turns.stop_all();
        }
        self.session.ending.reason(MigrationError::GivenUpConnection)
    }

    /// New connections for the same guest. The destination says what it lacks: what a connection took may have been lost on its way.
    fn reconnect(&mut self, before: &Job<'v>, open: &mut Open<'_>) -> Result<Arc<Job<'v>>, MigrationError> {
        let ending = Arc::new(Ending::default());
        self.control.follow(Some(&ending));
        self.session = Self::session(self.scope, self.control, ending, &self.parameters)?;
        self.offer = Preamble {
            versions: VERSIONS,
            connection: 0,
            features: self.offer.features.or(Features::RECOVERY),
            ..self.offer.clone()
        };
        before.memory.settle();
        let connection = open(0).map_err(|source| MigrationError::Open { connection: 0, source })?;
        let main = self.connect_main(connection, Some(&before.memory))?;
        // The destination says so before it answers: whoever drives both looks there once the source has said it.
        self.control.enter(Phase::PostcopyRecover);
        self.expect(&Answer::Ready, self.parameters.connect_limit)?;
        Meter::set(&self.control.meter().remaining, before.memory.count_pending() * PAGE);
        self.connect_the_others(main, Arc::clone(&before.memory), open)
    }
}
