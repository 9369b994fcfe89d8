//! The side that the guest leaves.

mod handover;
mod memory;
mod placed;
mod policy;
mod pusher;
mod rate;
mod rest;
mod turns;
mod wants;

use std::io;
use std::slice;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use self::handover::Answer;
use self::memory::{Look, Memory};
use self::placed::Placed;
use self::policy::{Policy, Situation, Step};
use self::pusher::{Job, Pusher};
use self::rate::Rate;
use self::turns::{Turn, Turns};
use self::wants::Wants;
use crate::bucket::Bucket;
use crate::connection::Place;
use crate::ending::{Ending, caught};
use crate::progress::{Meter, per_second};
use crate::session::{Session, spawned};
use crate::stream::{Features, PAGE, Preamble, Record, StreamError, VERSIONS};
use crate::watch::{Line, LineReceiver, within};
use crate::{After, Connection, Control, MigrationError, Parameters, Phase, SourceVm, State, Summary, VmError};

/// Most answers that nobody has waited for yet: each comes when this side does, but for a refusal.
const MOST_ANSWERS: usize = 4;
/// When the main connection ended that nobody wants at the destination.
const UNANSWERED: &str = "before it answered: another guest may be on its way there, or its log says why";

/// Opens the connection of that number; [`io::ErrorKind::Unsupported`]: it can't be opened (again).
pub type Open<'a> = dyn FnMut(u16) -> io::Result<Connection> + 'a;

/// Moves a guest to another server. Returns once it runs there, or once it goes on here; `control` is at its last phase then.
///
/// # Errors
/// The guest is here and goes on if it ran; but for [`MigrationError::Unknown`], [`MigrationError::StandsStill`] and
/// [`MigrationError::StaysPaused`].
pub fn send(vm: &dyn SourceVm, open: &mut Open<'_>, control: &Control) -> Result<Summary, MigrationError> {
    let ending = Arc::new(Ending::default());
    control.begin(&ending)?;
    let parameters = control.parameters();
    let outcome = thread::scope(|scope| {
        let session = match Source::session(scope, control, Arc::clone(&ending), &parameters) {
            Ok(session) => session,
            Err(error) => {
                ending.fail(error);
                return Err(Failed { stands: None, resume: None });
            }
        };
        let mut source = Source {
            vm,
            control,
            parameters,
            session,
            scope,
            offer: Preamble {
                versions: VERSIONS,
                connection: 0,
                connections: 1,
                id: [0; 16],
                features: Features::default(),
            },
            answers: None,
            wants: Arc::new(Wants::new(&[], 0)),
            turns: None,
            file: None,
            lies_in: None,
            logs: false,
            paused: None,
            whose: Whose::Ours,
        };
        let outcome = caught(|| source.run(open));
        source.end(outcome)
    });
    let outcome = outcome.map_err(|failed| failed.why(&ending));
    control.finish(outcome.as_ref().err());
    outcome.map(|(version, features)| Summary { progress: control.progress(), version, features })
}

/// A migration under way.
struct Source<'s, 'e, 'v> {
    vm: &'v dyn SourceVm,
    control: &'v Control,
    parameters: Parameters,
    session: Session,
    scope: &'s Scope<'s, 'e>,
    /// The main connection's preamble; once there is one, what was agreed on.
    offer: Preamble,
    /// What the destination says; none: it can't say anything.
    answers: Option<mpsc::Receiver<Answer>>,
    /// Pages that it waits for.
    wants: Arc<Wants>,
    /// What the connections' threads wait at.
    turns: Option<Arc<Job<'v>>>,
    /// Where pages go that have places of their own.
    file: Option<Arc<Placed>>,
    /// The file that the stream goes into, where it goes into one.
    lies_in: Option<Place>,
    logs: bool,
    /// Since when the guest stands still.
    paused: Option<Instant>,
    whose: Whose,
}

/// Whose the guest is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// This side's, which has told nobody to start it.
    Ours,
    /// The destination was told to start it.
    Theirs,
    /// The destination was told to, and said that it never will.
    OursAgain,
}

type Agreed = (u16, Features);

impl<'s, 'v: 's> Source<'s, '_, 'v> {
    fn run(&mut self, open: &mut Open<'_>) -> Result<Agreed, MigrationError> {
        let main = self.connect(open)?;
        self.describe(&main)?;
        let memory = Arc::new(Memory::new(self.vm));
        let job = self.connect_the_others(main, memory, open)?;
        self.start_log()?;
        self.copy(&job)?;
        self.sync(&job)?;
        self.pause()?;
        let is_all = self.send_last_pages(&job)?;
        self.send_state(&job)?;
        self.hand_over(&job, open)?;
        let job = if is_all { job } else { self.send_rest(job, open) };
        self.part(&job)?;
        Ok((*self.offer.versions.start(), self.offer.features))
    }

    fn session(
        scope: &'s Scope<'s, '_>,
        control: &'v Control,
        ending: Arc<Ending>,
        parameters: &Parameters,
    ) -> Result<Session, MigrationError> {
        Session::begin(scope, ending, parameters.stall_limit, |_| control.meter().tick(Instant::now()))
    }

    /// What follows the last phase, or the one that failed: the only way out.
    fn end(self, outcome: Result<Agreed, MigrationError>) -> Result<Agreed, Failed> {
        let outcome = match outcome {
            Ok(agreed) => Ok(agreed),
            Err(error) => Err(self.undo(error)),
        };
        if let Some(job) = &self.turns {
            job.turns.stop();
        }
        self.session.end();
        outcome
    }

    /// The guest goes on here, unless it is the destination's.
    fn undo(&self, error: MigrationError) -> Failed {
        let mut failed = Failed { stands: None, resume: None };
        let in_doubt = matches!(error, MigrationError::Unknown);
        if self.whose == Whose::Ours {
            self.session.ending.fail(error);
        } else {
            // It says what became of the guest, which is more than why the connection was lost.
            failed.stands = Some(error);
            self.session.ending.close();
        }
        if self.control.progress().throttle > 0 {
            // Whoever can't slow it any less says so in the log of its own side: the guest is whole.
            _ = self.vm.throttle(0);
        }
        if self.control.progress().write_limit > 0 {
            _ = self.vm.limit_writes(0);
        }
        if self.logs {
            self.vm.stop_log();
        }
        if self.paused.is_some() && self.whose != Whose::Theirs {
            failed.resume = self.vm.resume().err();
        }
        if in_doubt {
            self.vm.in_doubt();
        }
        failed
    }

    /// The main connection.
    fn connect(&mut self, open: &mut Open<'_>) -> Result<Arc<Line>, MigrationError> {
        getrandom::fill(&mut self.offer.id)
            .map_err(|e| MigrationError::vm("drawing the migration's id")(e.to_string().into()))?;
        let mut connection = open(0).map_err(|source| MigrationError::Open { connection: 0, source })?;
        let mut place = connection.place.take();
        if !self.parameters.mapped {
            self.lies_in = place.take();
        } else if place.is_none() {
            return Err(MigrationError::NoPlace);
        }
        if connection.answers {
            if self.parameters.after != After::Leaves {
                return Err(MigrationError::Twins);
            }
            self.offer.connections = self.parameters.connections;
            if self.parameters.post_copy {
                self.offer.features = Features::POST_COPY;
            }
        } else {
            // Nobody chooses, so there is no choice.
            self.offer.versions = *VERSIONS.end()..=*VERSIONS.end();
            self.offer.features = Features::ONE_WAY;
        }
        if place.is_some() {
            self.offer.features = self.offer.features.or(Features::MAPPED);
        }
        if self.parameters.zstd.is_some() {
            self.offer.features = self.offer.features.or(Features::ZSTD);
        }
        let main = self.connect_main(connection, None)?;
        if self.parameters.post_copy && !self.offer.features.has(Features::POST_COPY) {
            return Err(MigrationError::NoPostCopy);
        }
        if let Some(place) = place {
            self.file = Some(Arc::new(Placed::begin(place, &self.vm.regions())?));
        }
        Ok(main)
    }

    /// Makes a connection the main one. What the destination says is missing there is added to `lacks`; none: it may not say so.
    fn connect_main(
        &mut self,
        connection: Connection,
        lacks: Option<&Arc<Memory>>,
    ) -> Result<Arc<Line>, MigrationError> {
        let (line, receiver, answer) = self.greet(connection, &self.offer)?;
        self.offer = answer;
        self.wants = Arc::new(Wants::new(&self.vm.regions(), self.offer.connections));
        if let Some(receiver) = receiver {
            let (says, answers) = mpsc::sync_channel(MOST_ANSWERS);
            let (ending, wants) = (Arc::clone(&self.session.ending), Arc::clone(&self.wants));
            let lacks = lacks.cloned();
            spawned(self.scope, move || ending.guards(|| handover::listen(receiver, &says, &wants, lacks)))?;
            self.answers = Some(answers);
        }
        Ok(line)
    }

    /// No page moves before the destination has said that it can run the machine; that may take its time, the guest runs.
    fn describe(&self, main: &Line) -> Result<(), MigrationError> {
        let description = self.vm.description().map_err(MigrationError::vm("to say what the machine is"))?;
        self.say(main, &[Record::Description(&description)])?;
        if self.answers.is_some() { self.expect(&Answer::Ready, Duration::MAX) } else { Ok(()) }
    }

    /// All connections, and a thread for each.
    fn connect_the_others(
        &mut self,
        main: Arc<Line>,
        memory: Arc<Memory>,
        open: &mut Open<'_>,
    ) -> Result<Arc<Job<'v>>, MigrationError> {
        let connections = self.offer.connections;
        let job = Arc::new(Job {
            vm: self.vm,
            memory,
            main: Arc::clone(&main),
            wants: Arc::clone(&self.wants),
            file: self.file.clone(),
            turns: Turns::new(connections.into()),
            bucket: Bucket::new(),
            rates: (0..connections).map(|_| Rate::default()).collect(),
            control: self.control.clone(),
            ending: Arc::clone(&self.session.ending),
            zstd: self.parameters.zstd.filter(|_| self.offer.features.has(Features::ZSTD)),
        });
        self.turns = Some(Arc::clone(&job));
        let mut lines = vec![main];
        for number in 1..connections {
            let connection = open(number).map_err(|source| MigrationError::Open { connection: number, source })?;
            lines.push(self.greet(connection, &Preamble { connection: number, ..self.offer.clone() })?.0);
        }
        for line in lines {
            let pusher = Pusher::new(Arc::clone(&job), line)?;
            spawned(self.scope, || pusher.run()).inspect_err(|_| job.turns.leave())?;
        }
        Ok(job)
    }

    /// Before the first page is read: a write is either in what is read, or in the log.
    fn start_log(&mut self) -> Result<(), MigrationError> {
        self.session.ending.check()?;
        self.vm.start_log().map_err(MigrationError::vm("logging writes to guest memory"))?;
        self.logs = true;
        self.control.meter().setup_took(self.control.progress().total_time);
        self.control.enter(Phase::Active);
        Ok(())
    }

    /// Rounds, while the guest runs and there is more than its stop may take.
    fn copy(&self, job: &Job<'_>) -> Result<(), MigrationError> {
        let mut policy = Policy::default();
        let mut left = job.memory.pages();
        Meter::set(&self.control.meter().total, left * PAGE);
        Meter::set(&self.control.meter().remaining, left * PAGE);
        let mut puts_off = false;
        let mut looked = Instant::now();
        let mut rounds = 0;
        while self.parameters.most_rounds.is_none_or(|most| rounds < most) {
            rounds += 1;
            let began = Instant::now();
            job.turns.run(Turn::Round { puts_off }, &self.session.ending)?;
            let sent = (left - self.control.meter().remaining.load(Ordering::Relaxed) / PAGE) * PAGE;
            let took = began.elapsed();
            let look = self.look(job, looked.elapsed())?;
            looked = Instant::now();
            left = look.pending;
            if self.control.wants_post_copy() {
                return Ok(());
            }
            // Zeros alone measure no network, but they are all that is known then.
            let bandwidth = match job.bandwidth() {
                0 => per_second(sent, took),
                measured => measured,
            };
            let (pending, dirtied) = (look.pending * PAGE, look.dirtied * PAGE);
            match policy.next(&Situation { pending, sent, dirtied, bandwidth }, &self.control.parameters()) {
                Step::Pause => return Ok(()),
                Step::Throttle(percent) => self.throttle(percent)?,
                Step::Limit(bytes) => self.limit_writes(bytes)?,
                Step::Round => {}
            }
            puts_off = policy::puts_off(look.pending, look.hot);
        }
        Ok(())
    }

    /// What is on the disk while the guest runs is not waited for while it stands still.
    fn sync(&self, job: &Job<'_>) -> Result<(), MigrationError> {
        match &job.file {
            Some(file) if self.parameters.most_rounds != Some(0) => file.sync(),
            _ => Ok(()),
        }
    }

    fn pause(&mut self) -> Result<(), MigrationError> {
        // It counts as paused from the first try: half a pause is resumed too.
        self.paused = Some(Instant::now());
        self.vm.pause().map_err(MigrationError::vm("pausing the guest"))?;
        self.control.meter().stopped();
        if self.control.parameters().pause_before_switchover {
            self.control.wait_for_go_on(&self.session.ending)?;
        }
        self.session.ending.check()?;
        self.control.enter(Phase::Device);
        Ok(())
    }

    /// Whether these were all.
    fn send_last_pages(&self, job: &Job<'_>) -> Result<bool, MigrationError> {
        let look = self.look(job, Duration::ZERO)?;
        if self.control.wants_post_copy() && look.pending > 0 {
            return Ok(!self.put_off_rest(job)?);
        }
        job.turns.run(Turn::Last, &self.session.ending)?;
        Ok(true)
    }

    fn send_state(&self, job: &Job<'_>) -> Result<(), MigrationError> {
        if let Some(file) = &job.file {
            file.tell(|record| self.say(&job.main, slice::from_ref(record)))?;
        }
        let State { devices, guest } = self.vm.state().map_err(MigrationError::vm("saving the guest's state"))?;
        for device in &devices {
            self.say(
                &job.main,
                &[Record::Device { name: &device.name, version: device.version, state: &device.state }],
            )?;
        }
        for (vcpu, records) in &guest {
            self.say(&job.main, &[Record::Guest { vcpu: *vcpu, records }])?;
        }
        self.say(&job.main, &[Record::StateEnds])
    }

    /// Exchanges preambles; what was agreed on.
    fn greet(
        &self,
        mut connection: Connection,
        offer: &Preamble,
    ) -> Result<(Arc<Line>, Option<LineReceiver>, Preamble), MigrationError> {
        let number = offer.connection;
        self.session.ending.cuts(&connection.cut);
        let is_one_way = offer.features.has(Features::ONE_WAY);
        let answer = within(self.parameters.connect_limit, &connection.cut, || {
            offer.write_to(&mut connection.writer)?;
            if is_one_way {
                return Ok(offer.clone());
            }
            Preamble::read_from(&mut connection.reader)
        });
        let answer = answer.map_err(|error| match error {
            StreamError::Truncated if number == 0 => MigrationError::Lost { connection: 0, when: UNANSWERED },
            error => MigrationError::stream(number)(error),
        })?;
        if !is_one_way {
            offer.accept(&answer)?;
        }
        let line = self.session.watchman.line(number, connection.writer, !is_one_way);
        // The others say nothing.
        let receiver = (number == 0 && !is_one_way).then(|| self.session.watchman.receiver(0, connection.reader, true));
        Ok((line, receiver, answer))
    }

    fn throttle(&self, percent: u8) -> Result<(), MigrationError> {
        Meter::set(&self.control.meter().throttle, percent.into());
        self.vm.throttle(percent).map_err(MigrationError::vm("slowing the guest"))
    }

    fn limit_writes(&self, bytes: u64) -> Result<(), MigrationError> {
        Meter::set(&self.control.meter().write_limit, bytes);
        self.vm.limit_writes(bytes).map_err(MigrationError::vm("limiting what vCPUs write"))
    }

    /// Looks at the log, `time` after it was looked at before.
    fn look(&self, job: &Job<'_>, time: Duration) -> Result<Look, MigrationError> {
        let look = job.memory.look(self.vm)?;
        let meter = self.control.meter();
        Meter::set(&meter.remaining, look.pending * PAGE);
        Meter::set(&meter.bandwidth, job.bandwidth());
        if !time.is_zero() {
            Meter::set(&meter.dirty_rate, per_second(look.dirtied, time));
        }
        self.control.passed();
        self.say(&job.main, &[Record::RoundEnds(look.pending)])?;
        Ok(look)
    }

    fn say(&self, main: &Line, records: &[Record<'_>]) -> Result<(), MigrationError> {
        Meter::add(&self.control.meter().transferred, main.send(records)?);
        Ok(())
    }
}

/// Why there is no guest at the destination, before all threads have said what they know.
struct Failed {
    /// The reason, if nobody else has a better one.
    stands: Option<MigrationError>,
    /// Why the guest can't go on here.
    resume: Option<VmError>,
}

impl Failed {
    fn why(self, ending: &Ending) -> MigrationError {
        let error = self.stands.unwrap_or_else(|| ending.reason(MigrationError::Cancelled));
        match self.resume {
            Some(resume) => MigrationError::StaysPaused { resume: resume.to_string(), source: Box::new(error) },
            None => error,
        }
    }
}
