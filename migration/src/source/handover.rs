//! The moment when the guest becomes the destination's, and finding out whether it has.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::memory::Memory;
use super::pusher::Job;
use super::wants::Wants;
use super::{Open, Source, Whose};
use crate::stream::{Features, Kind, Preamble, Receiver, Record, VERSIONS};
use crate::watch::{LineReceiver, within};
use crate::{After, MigrationError, Parameters};

/// How long a question may take, and how long after one that failed the next is asked.
const QUESTION: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(200);

/// What a destination says of its own accord.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Ready,
    Loaded,
    Runs,
    Complete,
    Refused(String),
}

impl Answer {
    pub(super) fn is_unexpected(&self) -> MigrationError {
        MigrationError::Unexpected { connection: 0, kind: self.kind(), when: "comes before its time" }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Ready => Kind::Ready,
            Self::Loaded => Kind::Loaded,
            Self::Runs => Kind::Runs,
            Self::Complete => Kind::Complete,
            Self::Refused(_) => Kind::Refused,
        }
    }
}

/// Hears what the destination says until it says no more. Nothing that it says takes more memory than there is for it: answers that nobody
/// waits for are refused, and what is missing is marked in `lacks`, until it is ready.
///
/// # Errors
/// Always: why it doesn't.
pub(super) fn listen(
    mut receiver: LineReceiver,
    says: &mpsc::SyncSender<Answer>,
    wants: &Wants,
    mut lacks: Option<Arc<Memory>>,
) -> Result<(), MigrationError> {
    let unexpected = |kind, when| Err(MigrationError::Unexpected { connection: 0, kind, when });
    loop {
        let answer = match receiver.receive().map_err(MigrationError::stream(0))? {
            Some(Record::Alive) => continue,
            Some(Record::Ready) => {
                lacks = None;
                Answer::Ready
            }
            Some(Record::Loaded) => Answer::Loaded,
            Some(Record::Runs) => Answer::Runs,
            Some(Record::Complete) => Answer::Complete,
            Some(Record::Refused(why)) => Answer::Refused(why.to_owned()),
            Some(Record::Wanted(runs)) => {
                wants.add(&runs)?;
                continue;
            }
            Some(Record::Missing(runs)) => {
                let Some(memory) = &lacks else { return unexpected(Kind::Missing, "comes when nobody asks") };
                runs.iter().try_for_each(|run| wants.check(*run))?;
                memory.resend(&runs);
                continue;
            }
            Some(record) => return unexpected(record.kind(), "is nothing that a destination says"),
            None => return Err(MigrationError::Lost { connection: 0, when: "before it had the guest" }),
        };
        match (says.try_send(answer.clone()), answer) {
            (_, Answer::Refused(why)) => return Err(MigrationError::Refused(why)),
            (Err(mpsc::TrySendError::Full(_)), answer) => return Err(answer.is_unexpected()),
            // Or nobody listens any more: it is over.
            _ => {}
        }
    }
}

impl<'s, 'v: 's> Source<'s, '_, 'v> {
    /// Waits until the destination says that, and nothing else; for so long.
    pub(super) fn expect(&self, expected: &Answer, limit: Duration) -> Result<(), MigrationError> {
        match self.answer(limit) {
            Ok(answer) if answer == *expected => Ok(()),
            Ok(Answer::Refused(why)) => Err(MigrationError::Refused(why)),
            Ok(other) => Err(other.is_unexpected()),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(MigrationError::NoAnswer { kind: expected.kind(), limit }),
            // The listener has said why.
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(MigrationError::Cancelled),
        }
    }

    /// The destination has everything: it is told to start the guest, and says that it did.
    pub(super) fn hand_over(&mut self, job: &Job<'_>, open: &mut Open<'_>) -> Result<(), MigrationError> {
        if self.answers.is_none() {
            return self.let_go(job);
        }
        self.expect(&Answer::Loaded, self.parameters.answer_limit)?;
        self.control.commit()?;
        // Even if it fails: it may have arrived.
        self.whose = Whose::Theirs;
        if self.say(&job.main, &[Record::Go]).is_err() {
            // What the destination had said before may still be heard.
            self.session.ending.close();
        }
        let fate = match self.answer(self.parameters.answer_limit) {
            Ok(Answer::Runs) => Ok(()),
            Ok(Answer::Refused(why)) => Err(MigrationError::Refused(why)),
            _ => {
                // Whoever is asked has nothing else to do.
                self.session.ending.close();
                ask(&self.offer, &self.parameters, open)
            }
        };
        if let Err(MigrationError::Refused(_)) = fate {
            self.whose = Whose::OursAgain;
        }
        fate?;
        self.stood_still();
        Ok(())
    }

    /// All of the guest is there.
    pub(super) fn part(&mut self, job: &Job<'_>) -> Result<(), MigrationError> {
        if self.answers.is_some() {
            // It would find out by itself, only later.
            _ = self.say(&job.main, &[Record::Gone]);
        }
        let paused = match self.parameters.after {
            After::Leaves => {
                self.vm.gone();
                return Ok(());
            }
            After::GoesOn => false,
            After::StandsStill => true,
        };
        self.logs = false;
        self.vm.stop_log();
        self.vm.stays(paused).map_err(|source| MigrationError::StandsStill { source })
    }

    /// Nobody answers: the guest is whose the stream is, once that is whole. Before its last record is, it is no guest.
    fn let_go(&mut self, job: &Job<'_>) -> Result<(), MigrationError> {
        self.control.commit()?;
        if let Some(file) = &self.lies_in {
            file.check().map_err(MigrationError::file("finishing"))?;
        }
        self.say(&job.main, &[Record::Go])?;
        if let Some(file) = &job.file {
            file.finish()?;
        }
        self.whose = Whose::Theirs;
        self.stood_still();
        Ok(())
    }

    fn stood_still(&self) {
        self.control.meter().downtime_was(self.paused.map_or(Duration::ZERO, |since| since.elapsed()));
    }

    /// What the destination says next.
    fn answer(&self, limit: Duration) -> Result<Answer, mpsc::RecvTimeoutError> {
        self.answers.as_ref().map_or(Err(mpsc::RecvTimeoutError::Disconnected), |answers| answers.recv_timeout(limit))
    }
}

/// Asks the destination by a new connection whether it runs the guest, until it says so or time is up.
fn ask(offer: &Preamble, parameters: &Parameters, open: &mut Open<'_>) -> Result<(), MigrationError> {
    let deadline = Instant::now() + parameters.fate_limit;
    let offer =
        Preamble { versions: VERSIONS, connection: 0, features: offer.features.or(Features::FATE), ..offer.clone() };
    loop {
        match question(&offer, deadline.saturating_duration_since(Instant::now()).min(QUESTION), open) {
            Ok(Some(Answer::Runs)) => return Ok(()),
            Ok(Some(Answer::Refused(why))) => return Err(MigrationError::Refused(why)),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => return Err(MigrationError::Unknown),
            Ok(_) | Err(_) if Instant::now() >= deadline => return Err(MigrationError::Unknown),
            Ok(_) | Err(_) => thread::sleep(PAUSE),
        }
    }
}

/// Asks once; none: whoever answered doesn't know.
fn question(offer: &Preamble, limit: Duration, open: &mut Open<'_>) -> io::Result<Option<Answer>> {
    let mut connection = open(0)?;
    let cut = connection.cut.clone();
    let answer = within(limit, &cut, || {
        offer.write_to(&mut connection.writer)?;
        let answer = Preamble::read_from(&mut connection.reader)?;
        Ok(match Receiver::new(&mut connection.reader).receive()? {
            _ if offer.accept(&answer).is_err() => None,
            Some(Record::Runs) => Some(Answer::Runs),
            Some(Record::Refused(why)) => Some(Answer::Refused(why.to_owned())),
            _ => None,
        })
    });
    Ok(answer.unwrap_or(None))
}
