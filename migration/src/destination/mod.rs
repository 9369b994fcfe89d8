//! The side that the guest comes to.

mod door;
mod fate;
mod hall;
mod pages;
mod placed;
mod rest;
mod state;

use std::io;
use std::slice;
use std::sync::Arc;
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use self::door::Door;
use self::fate::Fate;
use self::hall::Hall;
use self::pages::{Job, Putter};
use self::placed::Placed;
use self::state::Collected;
use crate::ending::{Ending, FAREWELL, caught};
use crate::progress::Meter;
use crate::session::{Session, spawned};
use crate::stream::{Features, Mismatch, PAGE, Preamble, Record, StreamError, VERSIONS};
use crate::watch::{Line, LineReceiver};
use crate::{Connection, Control, DestinationVm, MigrationError, Parameters, Phase, State, Summary};

/// What this side can use of what a source offers.
const FEATURES: Features = Features::ZSTD;
/// Longest sentence for the source, in bytes.
const SENTENCE: usize = 1 << 10;

/// The next connection; none: there was none for that long. An error: no more will come. Called from a thread of the migration's.
pub type Accept<'a> = dyn FnMut(Duration) -> io::Result<Option<Connection>> + Send + 'a;

/// Receives a guest from another server, and starts it. `control` is at its last phase once it runs, or never will. Returns a little
/// later if the source may not know yet: it finds out here, by a connection that `accept` gives.
///
/// # Errors
/// The guest has not run here, and never will; but for [`MigrationError::Lacking`] and [`MigrationError::Unreadable`].
pub fn receive(vm: &dyn DestinationVm, accept: &mut Accept<'_>, control: &Control) -> Result<Summary, MigrationError> {
    let ending = Arc::new(Ending::default());
    control.begin(&ending)?;
    let parameters = control.parameters();
    let (hall, fate) = (Hall::new(), Arc::new(Fate::default()));
    let outcome = thread::scope(|scope| {
        let door = Door { scope, hall: &hall, fate: Arc::clone(&fate), control, parameters: parameters.clone() };
        let stands = move || {
            _ = caught(|| {
                door.stand(accept);
                Ok(())
            });
            door.hall.shut();
        };
        let limits = (parameters.stall_limit, parameters.connect_limit);
        let session = spawned(scope, stands)
            .and_then(|()| begin_session(scope, &hall, control, limits, Arc::clone(&ending)))
            .map_err(|error| {
                hall.shut();
                ending.fail(error);
                None
            })?;
        let mut destination =
            Destination { vm, control, parameters: &parameters, session, scope, hall: &hall, fate: &fate };
        let outcome = caught(|| destination.run()).map_err(|error| {
            // Where it fails, whoever failed first knows why: once all threads have said what they know.
            let stands = matches!(error, MigrationError::Lacking { .. } | MigrationError::Unreadable { .. });
            if stands {
                Some(error)
            } else {
                destination.session.ending.fail(error);
                None
            }
        });
        hall.shut();
        destination.session.end();
        outcome
    });
    match outcome {
        Ok((version, features)) => Ok(Summary { progress: control.progress(), version, features }),
        Err(stands) => {
            let error = stands.unwrap_or_else(|| ending.reason(MigrationError::Cancelled));
            control.finish(Some(&error));
            Err(error)
        }
    }
}

/// What watches over a set of connections; `limits` of silence, and of waiting for connections.
fn begin_session<'s, 'e>(
    scope: &'s Scope<'s, 'e>,
    hall: &'e Hall<'_>,
    control: &'e Control,
    limits: (Duration, Duration),
    ending: Arc<Ending>,
) -> Result<Session, MigrationError> {
    Session::begin(scope, ending, limits.0, move |ending| {
        control.meter().tick(Instant::now());
        if let Some(error) = hall.missing(limits.1) {
            ending.fail(error);
        }
    })
}

/// A migration under way.
struct Destination<'s, 'e, 'v> {
    vm: &'v dyn DestinationVm,
    control: &'e Control,
    parameters: &'e Parameters,
    session: Session,
    scope: &'s Scope<'s, 'e>,
    hall: &'e Hall<'v>,
    fate: &'e Arc<Fate>,
}

/// The main connection.
struct Main {
    receiver: LineReceiver,
    /// The way back, if there is one.
    line: Option<Arc<Line>>,
    /// What was agreed on.
    agreed: Preamble,
    /// Where pages are, if that is a file in which they have places.
    placed: Option<Placed>,
    /// Bytes that were counted.
    counted: u64,
}

type Agreed = (u16, Features);

impl<'s, 'e, 'v: 's> Destination<'s, 'e, 'v>
where
    'e: 's,
{
    fn run(&mut self) -> Result<Agreed, MigrationError> {
        let mut main = self.greet()?;
        let job = self.prepare(&mut main)?;
        self.take_pages(&job, &mut main)?;
        let state = self.take_state(&job, &mut main)?;
        if let Some(placed) = &main.placed {
            self.read_first(&job, placed, !self.parameters.pages_first && self.vm.can_post_copy())?;
        }
        self.load(&job, state)?;
        let asks = if main.placed.is_none() && job.has_late() { Some(self.ask(&job)?) } else { None };
        self.wait_for_go(&mut main)?;
        self.start(&job)?;
        match (&main.placed, asks) {
            (_, Some(asks)) => self.take_rest(&job, &mut main, &asks)?,
            (Some(placed), None) if job.has_late() => self.bring_rest(&job, placed)?,
            _ => self.say_so(&mut main),
        }
        Ok((*main.agreed.versions.start(), main.agreed.features))
    }

    /// The main connection: the first that isn't a question about a guest that this side has never heard of.
    fn greet(&self) -> Result<Main, MigrationError> {
        let (connection, offer) = self.hall.first(&self.session.ending)?;
        self.session.ending.cuts(&connection.cut);
        self.agree(connection, &offer)
    }

    fn agree(&self, mut connection: Connection, offer: &Preamble) -> Result<Main, MigrationError> {
        let malformed = |why| Err(MigrationError::stream(0)(StreamError::Malformed { sequence: 0, why }));
        let is_one_way = offer.features.has(Features::ONE_WAY);
        if offer.connection != 0 {
            return malformed("the first connection is not the main one");
        }
        if is_one_way && offer.connections != 1 {
            return malformed("a one-way stream has but one connection");
        }
        if offer.features.has(Features::MAPPED) && !is_one_way {
            return malformed("pages have places in a file alone");
        }
        if !is_one_way && !connection.answers {
            return Err(MigrationError::NoWayBack);
        }
        // Of a file nobody asks before all of it was looked at.
        let post_copy = if !is_one_way && self.vm.can_post_copy() { Features::POST_COPY } else { Features::default() };
        let agreed = offer.answer(&VERSIONS, FEATURES.or(Features::ONE_WAY).or(Features::MAPPED).or(post_copy));
        if !is_one_way {
            let answer = agreed.clone().unwrap_or_else(|_| offer.refusal(&VERSIONS));
            answer.write_to(&mut connection.writer).map_err(MigrationError::stream(0))?;
        }
        let agreed = agreed?;
        if is_one_way && agreed.features != offer.features {
            return Err(Mismatch::Features(offer.features.0 & !agreed.features.0).into());
        }
        let is_mapped = agreed.features.has(Features::MAPPED);
        let placed = if is_mapped { Some(Placed::open(&mut connection)?) } else { None };
        let receiver = self.session.watchman.receiver(0, connection.reader, !is_one_way);
        let line = (!is_one_way).then(|| self.session.watchman.line(0, connection.writer, true));
        let (fate, says) = (Arc::clone(self.fate), line.clone());
        self.session.ending.says(move |why| {
            // Only if it is true, whatever comes: the source acts on it.
            if let (Some(false), Some(line)) = (fate.runs(FAREWELL), says) {
                let why = if *why == MigrationError::Cancelled.one_line() { ENDED } else { why };
                refuse(&line, why);
            }
        });
        Ok(Main { receiver, line, agreed, placed, counted: 0 })
    }

    /// Makes the machine that is described.
    fn prepare(&self, main: &mut Main) -> Result<Arc<Job<'v>>, MigrationError> {
        let description = main.until(self.control.meter(), "comes before the description", |record| match record {
            Record::Description(bytes) => Ok(Took::Last(bytes.to_vec())),
            _ => Ok(Took::Not),
        })?;
        let regions = self.vm.prepare(&description).map_err(MigrationError::vm("preparing the machine"))?;
        let job = Arc::new(Job::new(self.vm, self.control.clone(), main.agreed.connections, &regions));
        Meter::set(&self.control.meter().total, job.pages() * PAGE);
        self.hall.open(&job, &main.agreed, &self.session, main.line.as_ref());
        self.control.meter().setup_took(self.control.progress().total_time);
        self.control.enter(Phase::Active);
        if let Some(line) = &main.line {
            line.send(&[Record::Ready])?;
        }
        Ok(job)
    }

    /// The pages of the main connection.
    fn take_pages(&self, job: &Arc<Job<'v>>, main: &mut Main) -> Result<(), MigrationError> {
        let mut putter = Putter::new(Arc::clone(job), 0, main.agreed.features.has(Features::ZSTD))?;
        let meter = self.control.meter();
        let is_placed = main.placed.is_some();
        main.until(meter, "comes among the pages", |record| match record {
            Record::RoundEnds(pages) => {
                Meter::add(&meter.rounds, 1);
                Meter::set(&meter.remaining, pages.saturating_mul(PAGE));
                Ok(Took::It)
            }
            Record::LastPage => Ok(Took::Last(())),
            _ if is_placed => Ok(Took::Not),
            record => Ok(if putter.put(record)? { Took::It } else { Took::Not }),
        })?;
        // The source makes its connections before it sends anything by one of them.
        self.hall.are_all_there()?;
        self.hall.done(None);
        Ok(())
    }

    fn take_state(&self, job: &Job<'v>, main: &mut Main) -> Result<State, MigrationError> {
        let post_copy = main.agreed.features.has(Features::POST_COPY);
        let mut collected = Collected::default();
        let mut placed = main.placed.take();
        main.until(self.control.meter(), "comes among the state", |record| match record {
            Record::StateEnds => Ok(Took::Last(())),
            Record::Missing(runs) if post_copy => {
                // What came of them by other connections came before.
                self.hall.wait_for_pages(job.connections, &self.session.ending)?;
                job.put_off(runs)?;
                Ok(Took::It)
            }
            Record::Placed { run, at, sums } if let Some(placed) = &mut placed => {
                placed.add(job, *run, *at, sums)?;
                Ok(Took::It)
            }
            record => Ok(if collected.add(record)? { Took::It } else { Took::Not }),
        })?;
        main.placed = placed;
        Ok(collected.state())
    }

    fn load(&self, job: &Job<'v>, state: State) -> Result<(), MigrationError> {
        self.hall.wait_for_pages(job.connections, &self.session.ending)?;
        job.may_start()?;
        self.vm.load(state).map_err(MigrationError::vm("loading the guest's state"))
    }

    /// Everything is there; but the guest is the source's until it says that it isn't.
    fn wait_for_go(&self, main: &mut Main) -> Result<(), MigrationError> {
        let said = main.line.as_ref().map_or(Ok(0), |line| line.send(&[Record::Loaded]));
        let went = said.and_then(|_| {
            main.until(self.control.meter(), "comes after the state", |record| match record {
                Record::Go => Ok(Took::Last(())),
                _ => Ok(Took::Not),
            })
        });
        let Err(error) = went else { return Ok(()) };
        if main.line.is_some() && (error.is_loss() || self.session.ending.is_over()) {
            // It may have said so, and wants to know whether that arrived.
            self.hall.wait_for_question(self.parameters.fate_limit, || self.control.phase() == Phase::Cancelling);
            return Err(MigrationError::GivenUp);
        }
        Err(error)
    }

    /// The guest is this side's.
    fn start(&self, job: &Job<'v>) -> Result<(), MigrationError> {
        if !self.fate.begin() {
            return Err(MigrationError::GivenUp);
        }
        let is_late = job.has_late();
        if is_late {
            job.starts();
        }
        let started = match self.control.commit() {
            Ok(()) => caught(|| self.vm.start().map_err(MigrationError::vm("starting the guest"))),
            Err(cancelled) => Err(cancelled),
        };
        self.fate.started(started.is_ok());
        if started.is_err() && self.session.ending.is_over() {
            // The connection went meanwhile, and the source has said that the guest is ours: it wants to know that it isn't.
            self.hall.wait_for_question(self.parameters.fate_limit, || false);
        }
        started?;
        if !is_late {
            self.complete();
        }
        Ok(())
    }

    /// Everything is here.
    fn complete(&self) {
        Meter::set(&self.control.meter().remaining, 0);
        self.control.finish(None);
    }

    /// The source is told, and may ask if that doesn't arrive. Whatever happens, the guest runs.
    fn say_so(&self, main: &mut Main) {
        if main.line.is_some() && self.tell(main, &Record::Runs).is_err() {
            self.hall.wait_for_question(self.parameters.fate_limit, || false);
        }
    }

    /// Tells the source something that it has to know, and hears that it does.
    fn tell(&self, main: &mut Main, record: &Record<'_>) -> Result<(), MigrationError> {
        let said = main.line.as_ref().map_or(Ok(0), |line| line.send(slice::from_ref(record)));
        said.and_then(|_| {
            main.until(self.control.meter(), "comes after the guest has started", |record| match record {
                Record::Gone => Ok(Took::Last(())),
                _ => Ok(Took::Not),
            })
        })
    }

    fn begin_session(&self, ending: Arc<Ending>) -> Result<Session, MigrationError> {
        let limits = (self.parameters.stall_limit, self.parameters.connect_limit);
        begin_session(self.scope, self.hall, self.control, limits, ending)
    }
}

/// What became of a record.
enum Took<T> {
    /// It was expected.
    It,
    /// And it was what all this was for.
    Last(T),
    /// It has no business here.
    Not,
}

impl Main {
    /// Takes records until the last of their sort.
    fn until<T>(
        &mut self,
        meter: &Meter,
        when: &'static str,
        mut take: impl FnMut(&Record<'_>) -> Result<Took<T>, MigrationError>,
    ) -> Result<T, MigrationError> {
        loop {
            let took = match self.receiver.receive().map_err(MigrationError::stream(0))? {
                None => return Err(MigrationError::Lost { connection: 0, when: "before the guest was all here" }),
                Some(Record::Alive) => Took::It,
                Some(record) => match take(&record)? {
                    Took::Not => return Err(MigrationError::Unexpected { connection: 0, kind: record.kind(), when }),
                    took => took,
                },
            };
            Meter::add(&meter.transferred, self.receiver.received() - self.counted);
            self.counted = self.receiver.received();
            if let Took::Last(last) = took {
                return Ok(last);
            }
        }
    }
}

/// What a source hears where nobody there was asked.
const ENDED: &str = "the VM that waited there was told to end, or to take no guest";

/// Tells the source why.
fn refuse(line: &Line, why: &str) {
    // Whoever says something else is done soon, or waits for a source that doesn't listen.
    let deadline = Instant::now() + FAREWELL;
    let mut sender = loop {
        match line.sender.try_lock() {
            Ok(sender) => break sender,
            Err(_) if Instant::now() >= deadline => return,
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    };
    let end = why.floor_char_boundary(SENTENCE);
    // It may be lost: then it finds out by itself that this side is gone.
    _ = sender.send(&Record::Refused(&why[..end])).and_then(|()| sender.flush());
}
