//! A VM's way to another server, and from another one here: what monitors ask for, done by a thread of its own over the `migration`
//! crate's protocol.

mod again;
mod connect;
mod dirty_rate;
mod made;
mod reception;
mod secure;
mod settings;
mod uri;
mod writes;

use std::fmt;
use std::fs::File;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::Builder;
use std::time::{Duration, Instant};

use migration::{After, Control, DestinationVm, MigrationError, Parameters, Phase, Progress, SourceVm, receive, send};
use tokio::sync::{broadcast, watch};

use again::Next;
use connect::{Dialer, Door};
use dirty_rate::DirtyRates;
use made::Made;

use crate::cli::{Failure, with_causes};
use crate::control::{Event, EventKind, Heard, ListeningSocket};
use crate::virtio::complaint::Rarely;

pub use connect::{Way, WayError};
pub use dirty_rate::{DirtyRate, DirtyRateMode, DirtyRateStatus, Measurement};
pub use secure::Secure;
pub use settings::{Settings, Step, TlsSettings};
pub use uri::{FilePlace, Uri, UriError};
pub use writes::{AllWritten, VcpuWrites, WritingVcpus, Written};

/// How long a disk may take for the last of a guest that is kept in a file, where the VM is to end.
const LAST_BYTES: Duration = Duration::from_secs(30);
/// How long a monitor may keep the other side from hearing what this one has been told first.
const HEARD: Duration = Duration::from_secs(1);

/// A VM as a migration has it.
pub trait Movable: SourceVm + DestinationVm + WritingVcpus {
    /// The guest that was to come from elsewhere never will: the VM ends, and says why.
    fn failed(&self, why: String);

    /// Why the guest can't be moved, if it can't.
    fn blocker(&self) -> Option<String>;

    /// Why no guest can go on here before all of its pages are there, if none can.
    fn post_copy_blocker(&self) -> Option<String>;
}

/// A VM's migrations: one at a time.
pub struct Migration {
    events: broadcast::WeakSender<Event>,
    state: Mutex<State>,
    is_built: watch::Sender<bool>,
    dirty_rates: Arc<DirtyRates>,
}

#[derive(Default)]
struct State {
    vm: Option<Arc<dyn Movable>>,
    settings: Settings,
    /// The one that is under way, or the last one.
    job: Option<Job>,
    /// Where guests were waited for, and may be still.
    sockets: Vec<Weak<ListeningSocket>>,
    /// The VM ends: no other one begins.
    ends: bool,
}

#[derive(Clone)]
struct Job {
    control: Control,
    /// The guest leaves.
    leaves: bool,
    /// Or is kept in a file, which is done as it began.
    is_kept: bool,
    /// How it goes on once its connection broke.
    dialer: Next<Dialer>,
    door: Next<Door>,
    /// Where that is.
    place: Arc<Mutex<String>>,
    /// Hung up once its thread is done.
    over: Option<Arc<Mutex<Receiver<()>>>>,
}

/// Why a migration doesn't begin, or can't be told something.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The machine is still being built.
    #[error("the VM is still being built")]
    NotBuilt,
    /// It has one already.
    #[error(
        "There's a migration process in progress: wait for it, or end it (soc-vmm cancel-migration, QMP migrate_cancel)"
    )]
    Busy,
    /// There is none that could be told that.
    #[error("there is no migration that waits for that")]
    None,
    /// The other side can't be reached.
    #[error(transparent)]
    Way(#[from] WayError),
    /// The settings make no sense.
    #[error(transparent)]
    Settings(#[from] MigrationError),
    /// What isn't there was asked for.
    #[error("{0}")]
    Refused(String),
    /// Pages that are asked for have no other way.
    #[error("post-copy takes a way with two directions: tcp:, tls:, unix:, or fd: with a socket")]
    OneWay,
    /// There are no more threads.
    #[error("no thread is left for a migration")]
    Thread(#[source] std::io::Error),
}

/// What went wrong, in a line. A file has no connections.
fn told(error: &MigrationError, is_file: bool) -> String {
    let line = error.one_line();
    match line.strip_prefix("connection 0: ").filter(|_| is_file) {
        Some(rest) => rest.to_owned(),
        None => line,
    }
}

/// A migration that begins.
struct Begun {
    vm: Arc<dyn Movable>,
    job: Job,
    /// The last one before.
    before: Option<Job>,
}

impl Migration {
    /// None yet; `events` are the monitors'.
    pub fn new(events: broadcast::WeakSender<Event>) -> Self {
        Self { events, state: Mutex::default(), is_built: watch::Sender::new(false), dirty_rates: Arc::default() }
    }

    /// The machine is built.
    pub fn fill(&self, vm: Arc<dyn Movable>) {
        self.state().vm = Some(vm);
        self.is_built.send_replace(true);
    }

    /// Waits until the machine is built: a monitor answers before that.
    pub async fn built(&self) {
        // An error would be the sender's end, which is here.
        let _ = self.is_built.subscribe().wait_for(|&is_built| is_built).await;
    }

    /// How the next one is done.
    pub fn settings(&self) -> Settings {
        self.state().settings.clone()
    }

    /// Changes how the next one is done, and the one that is under way as far as that is possible.
    ///
    /// # Errors
    /// It makes no sense: nothing is changed.
    pub fn change(&self, change: impl FnOnce(&mut Settings) -> Result<(), MigrateError>) -> Result<(), MigrateError> {
        let mut state = self.state();
        let mut settings = state.settings.clone();
        change(&mut settings)?;
        let parameters = settings.parameters();
        parameters.check()?;
        // Of no use yet, but they will be.
        let others = Parameters {
            connections: settings.channels,
            zstd: Some(settings.zstd_level),
            mapped: false,
            ..parameters.clone()
        };
        others.check()?;
        if let Some(job) = state.job.as_ref().filter(|job| !job.is_kept) {
            // What is read at the start alone stays as it was.
            job.control.set_parameters(parameters)?;
        }
        state.settings = settings;
        Ok(())
    }

    /// How far the last one is; none: there was none.
    pub fn progress(&self) -> Option<Progress> {
        self.state().job.as_ref().map(|job| job.control.progress())
    }

    /// How far the one is that is under way, or the last one if it came to nothing.
    pub fn without_success(&self) -> Option<Progress> {
        self.progress().filter(|progress| progress.phase != Phase::Completed)
    }

    /// Where a guest is waited for, if one is, or was.
    pub fn door(&self) -> Option<String> {
        let job = self.state().job.clone().filter(|job| !job.leaves)?;
        Some(place(&job).clone())
    }

    /// Why the guest can't be moved, if it can't; of one that is just being moved nobody is asked. Waits for the VM.
    pub fn blocker(&self) -> Option<String> {
        let vm = {
            let state = self.state();
            state.vm.clone().filter(|_| !state.is_under_way())
        };
        vm.and_then(|vm| vm.blocker())
    }

    /// Whether one is under way.
    pub fn is_under_way(&self) -> bool {
        self.state().is_under_way()
    }

    /// Whether the guest is just leaving.
    pub fn leaves(&self) -> bool {
        let state = self.state();
        state.is_under_way() && state.job.as_ref().is_some_and(|job| job.leaves)
    }

    /// Has the guest leave by that way; returns when it has begun. A file that is made for it, and has no whole guest, is removed.
    ///
    /// # Errors
    /// See [`MigrateError`].
    pub fn leave(&self, way: Way) -> Result<(), MigrateError> {
        let settings = self.settings();
        if settings.rest.post_copy {
            goes_both_ways(&way)?;
        }
        let is_file = way.is_file();
        let parameters = if is_file { settings.into_file() } else { settings.parameters() };
        let Begun { vm, job, before } = self.begin(true, parameters)?;
        let (way, made) = way.make().inspect_err(|_| self.state().job = before)?;
        let mut dial = again::dialing(Dialer::new(way, settings.answers()), job.dialer.clone());
        let written = made.clone();
        let leaves = move || {
            let sent = send(&*vm, &mut dial, &job.control);
            match &sent {
                Ok(_) => tracing::info!("the guest has left"),
                Err(MigrationError::Cancelled) => tracing::info!("the migration was cancelled"),
                Err(error) => tracing::warn!("the migration failed: {}", told(error, is_file)),
            }
            if let Err(error) = sent {
                written.iter().for_each(|file| file.remove_after(&error));
            }
        };
        let spawned = if is_file { self.spawn_writer(leaves) } else { self.spawn(leaves) };
        spawned.inspect_err(|_| made.iter().for_each(Made::remove))
    }

    /// Has the guest be kept in a file that isn't there yet, and what becomes of it then; returns when it has begun. A file that has no
    /// whole guest is removed.
    ///
    /// # Errors
    /// See [`MigrateError`].
    pub fn save(&self, file: &Path, after: After) -> Result<(), MigrateError> {
        let Begun { vm, job, before } = self.begin_as(true, true, self.settings().keeping(after))?;
        let (way, made) = Way::new_file(file.to_owned()).inspect_err(|_| self.state().job = before)?;
        let (mut dialer, written) = (Dialer::new(way, false), made.clone());
        let spawned =
            self.spawn_writer(move || match send(&*vm, &mut |connection| dialer.dial(connection), &job.control) {
                Ok(_) => tracing::info!(file = %written.path().display(), "the guest is kept"),
                Err(error) => {
                    let file = written.path().display();
                    tracing::warn!(%file, "the guest was not kept as wanted: {}", told(&error, true));
                    written.remove_after(&error);
                }
            });
        spawned.inspect_err(|_| made.remove())
    }

    /// Waits for the guest at that door, which is open when this returns.
    ///
    /// # Errors
    /// See [`MigrateError`].
    pub fn come(&self, way: Way) -> Result<(), MigrateError> {
        self.come_from(way.place(), way)
    }

    /// Has the guest come out of the file that `fetch` brings, which takes its time; the VM ends if there is none. `from` says whose guest it is.
    pub fn come_by(&self, from: &str, fetch: impl FnOnce() -> Result<File, Failure>) {
        let come = |file: File| self.come_from(from.to_owned(), Way::Fd(file.into())).map_err(|e| with_causes(&e));
        let came = fetch().map_err(|failure| failure.to_string()).and_then(come);
        let vm = self.state().vm.clone();
        if let (Err(why), Some(vm)) = (came, vm) {
            vm.failed(why);
        }
    }

    fn come_from(&self, from: String, way: Way) -> Result<(), MigrateError> {
        let parameters = Parameters { pages_first: way.reads_first(), ..self.settings().parameters() };
        let Begun { vm, job, before } = self.begin(false, parameters)?;
        let (is_two_way, is_file) = (way.is_two_way(), way.is_file());
        place(&job).clone_from(&from);
        let door = self.opened(way).inspect_err(|_| self.state().job = before)?;
        let (asked, can_post_copy) = (Arc::clone(&vm), OnceLock::new());
        let may_go_on = move || is_two_way && *can_post_copy.get_or_init(|| asked.post_copy_blocker().is_none());
        let mut accept = again::standing(door, job.door.clone(), may_go_on);
        self.spawn(move || {
            if let Err(error) = receive(&*vm, &mut accept, &job.control) {
                vm.failed(format!("{from}: {}", told(&error, is_file)));
            }
        })
    }

    /// Ends the one that is under way; nothing where there is none, or where it is too late.
    pub fn cancel(&self) {
        let job = self.state().job.clone();
        if let Some(job) = job.filter(|job| job.leaves) {
            job.control.cancel();
        }
    }

    /// Lets the one go on that waits before the guest changes sides.
    ///
    /// # Errors
    /// None waits.
    pub fn go_on(&self) -> Result<(), MigrateError> {
        let job = self.state().job.clone();
        if job.is_some_and(|job| job.control.go_on()) { Ok(()) } else { Err(MigrateError::None) }
    }

    /// Has the guest that leaves run at its destination from the end of this round on.
    ///
    /// # Errors
    /// None leaves, or not so.
    pub fn start_post_copy(&self) -> Result<(), MigrateError> {
        let refused = |why: &str| Err(MigrateError::Refused(why.into()));
        let job = self.state().job.clone().filter(|job| job.leaves && !job.control.phase().is_last());
        match job {
            None => refused("Postcopy must be started after migration has been started"),
            Some(job) if !job.control.parameters().post_copy => {
                refused("Enable postcopy with migrate_set_capability before the start of migration")
            }
            Some(job) if !job.control.start_post_copy() => {
                refused("It is too late for postcopy: the guest stands still, or is at the destination")
            }
            Some(_) => Ok(()),
        }
    }

    /// Gives up the connection of a guest that runs at the destination.
    ///
    /// # Errors
    /// There is no such one.
    pub fn pause(&self) -> Result<(), MigrateError> {
        let job = self.state().job.clone();
        if job.is_some_and(|job| job.control.give_up_connection()) {
            return Ok(());
        }
        let why = "migrate-pause is currently only supported during postcopy-active";
        Err(MigrateError::Refused(why.into()))
    }

    /// At the source: goes on by that way, with a migration whose connection broke. Returns once the destination has answered or the way has
    /// come to nothing: whoever drives both sides then looks at the other one.
    ///
    /// # Errors
    /// There is none.
    pub fn resume(&self, way: Way) -> Result<(), MigrateError> {
        let (job, answers) = (self.paused(true), self.settings().answers());
        let none = || {
            MigrateError::Refused(
                "Cannot resume if there is no paused migration: migrate without resume begins one".into(),
            )
        };
        goes_both_ways(&way)?;
        let Job { control, dialer, .. } = job.ok_or_else(none)?;
        if !control.recover(|| dialer.put(Dialer::new(way, answers))) {
            return Err(none());
        }
        control.recovered();
        Ok(())
    }

    /// At the destination: waits at that door, for the same.
    ///
    /// # Errors
    /// There is none, or the door can't be opened.
    pub fn recover(&self, way: Way) -> Result<(), MigrateError> {
        let why = "Migrate recover can only be run when postcopy is paused.";
        let job = self.paused(false).ok_or_else(|| MigrateError::Refused(why.into()))?;
        goes_both_ways(&way)?;
        let mut place = place(&job);
        if way.place() != *place || matches!(way, Way::Fd(_)) {
            let new = way.place();
            job.door.put(self.opened(way)?);
            *place = new;
        }
        Ok(())
    }

    /// The VM ends, with its guest gone: from here on none is moved.
    pub fn refuse_more(&self) {
        self.state().ends = true;
    }

    /// The VM ends: a guest that is on its way here stays where it is, one that is on its way into a file is either all there or leaves
    /// none, and nothing is left of the doors that one was waited for at. Orders to the VM have to fail from here on.
    pub fn end(&self) {
        let (sockets, job) = {
            let mut state = self.state();
            state.ends = true;
            (std::mem::take(&mut state.sockets), state.job.clone())
        };
        if let Some(job) = job {
            // The other side hears of that, and not of memory that is gone.
            job.control.cancel();
            if let Some(over) = job.over {
                // An error is what is waited for.
                _ = over.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(LAST_BYTES);
            }
        }
        sockets.iter().filter_map(Weak::upgrade).for_each(|socket| socket.remove());
    }

    /// Whether a guest can go on here before all of its pages are there. Waits for the VM.
    ///
    /// # Errors
    /// None can, and why.
    pub fn check_post_copy(&self) -> Result<(), MigrateError> {
        let vm = self.state().vm.clone().ok_or(MigrateError::NotBuilt)?;
        vm.post_copy_blocker().map_or(Ok(()), |why| Err(MigrateError::Refused(why)))
    }

    /// Begins to measure how fast the guest writes its memory. Waits for the VM.
    ///
    /// # Errors
    /// It can't be measured now, or not so, and why.
    pub fn measure_dirty_rate(&self, measurement: Measurement) -> Result<(), MigrateError> {
        if measurement.mode == DirtyRateMode::DirtyRing {
            self.check_rings()?;
        }
        let (vm, under) = {
            let state = self.state();
            let vm = state.vm.clone().ok_or(MigrateError::NotBuilt)?;
            let refused = |why: &str| Err(MigrateError::Refused(why.into()));
            if let Some(job) = state.job.as_ref().filter(|_| state.is_under_way()) {
                if !job.leaves {
                    return refused(
                        "the guest is still on its way here: measure its dirty rate when all of it has come",
                    );
                }
                if measurement.mode == DirtyRateMode::DirtyBitmap {
                    return refused(
                        "the guest is just being moved, which needs the dirty log: use mode=page-sampling, or dirty-ring where there are rings",
                    );
                }
            }
            // Under the lock: a migration that begins finds it.
            (vm, self.dirty_rates.begin(measurement)?)
        };
        let events = self.events.clone();
        under.start(vm, move || events.upgrade().is_none())
    }

    /// The last measurement.
    pub fn dirty_rate(&self) -> DirtyRate {
        self.dirty_rates.last()
    }

    /// The one whose connection broke.
    fn paused(&self, leaves: bool) -> Option<Job> {
        let job = self.state().job.clone();
        job.filter(|job| job.leaves == leaves && matches!(job.control.phase(), Phase::PostcopyPaused(_)))
    }

    fn opened(&self, way: Way) -> Result<Door, WayError> {
        let door = Door::open(way)?;
        let mut state = self.state();
        state.sockets.retain(|socket| socket.strong_count() > 0);
        state.sockets.extend(door.socket().map(Arc::downgrade));
        drop(state);
        Ok(door)
    }

    fn begin(&self, leaves: bool, parameters: Parameters) -> Result<Begun, MigrateError> {
        self.begin_as(leaves, false, parameters)
    }

    fn begin_as(&self, leaves: bool, is_kept: bool, parameters: Parameters) -> Result<Begun, MigrateError> {
        let mut state = self.state();
        let vm = state.vm.clone().ok_or(MigrateError::NotBuilt)?;
        if state.ends {
            return Err(MigrateError::Refused(
                "the VM is about to end: its guest has left, or somebody wants it to".into(),
            ));
        }
        if let Some(job) = state.job.as_ref().filter(|_| state.is_under_way()) {
            let comes = leaves && !job.leaves;
            return Err(match (comes, job.leaves) {
                (true, _) => MigrateError::Refused("the guest is not here yet".into()),
                (false, false) => MigrateError::Refused("The incoming migration has already been started".into()),
                (false, true) => MigrateError::Busy,
            });
        }
        let control = self.control(parameters);
        let (dialer, door) = (Next::default(), Next::default());
        let job = Job { control, leaves, is_kept, dialer, door, place: Arc::default(), over: None };
        let before = state.job.replace(job.clone());
        drop(state);
        self.dirty_rates.give_way();
        Ok(Begun { vm, job, before })
    }

    /// A handle that tells monitors what happens.
    fn control(&self, parameters: Parameters) -> Control {
        let (monitors, complaints) = (self.events.clone(), Mutex::new(Rarely::default()));
        let last = Mutex::new(None::<Heard>);
        Control::telling(parameters, move |event| {
            let last = || last.lock().unwrap_or_else(PoisonError::into_inner);
            let kind = match event {
                // Told with the command that begins it.
                migration::Event::Phase(Phase::Setup) => return,
                migration::Event::Phase(phase) => {
                    if let Phase::PostcopyPaused(why) = &phase {
                        tracing::warn!("the guest's last pages have no connection any more: {why}");
                    }
                    EventKind::Migration { status: Step::of(&phase) }
                }
                migration::Event::Settles => {
                    // Who tells something meanwhile doesn't wait for that, too.
                    let heard = last().take();
                    return heard.iter().for_each(|heard| heard.wait(HEARD));
                }
                migration::Event::TurnedAway(why) => {
                    let mut complaints = complaints.lock().unwrap_or_else(PoisonError::into_inner);
                    return complaints.say(Instant::now(), format_args!("at the door for a guest's source: {why}"));
                }
                migration::Event::Pass(pass) => EventKind::MigrationPass { pass: pass as i64 },
            };
            *last() = tell(&monitors, kind);
        })
    }

    /// Has a thread write a file. Whoever ends the VM waits for it.
    fn spawn_writer(&self, work: impl FnOnce() + Send + 'static) -> Result<(), MigrateError> {
        let (works, over) = mpsc::channel();
        if let Some(job) = &mut self.state().job {
            job.over = Some(Arc::new(Mutex::new(over)));
        }
        self.spawn(move || {
            work();
            drop(works);
        })
    }

    /// Has a thread do it.
    fn spawn(&self, work: impl FnOnce() + Send + 'static) -> Result<(), MigrateError> {
        // Before who asked for it is answered: libvirt looks whether it was told.
        _ = tell(&self.events, EventKind::Migration { status: Step::Setup });
        Builder::new().name("migration".into()).spawn(work).map(drop).map_err(|error| {
            if let Some(job) = self.state().job.take() {
                job.control.cancel();
            }
            MigrateError::Thread(error)
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a guest's source is waited for.
fn place(job: &Job) -> MutexGuard<'_, String> {
    job.place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether pages can be asked for by it.
fn goes_both_ways(way: &Way) -> Result<(), MigrateError> {
    if way.is_two_way() { Ok(()) } else { Err(MigrateError::OneWay) }
}

fn tell(monitors: &broadcast::WeakSender<Event>, kind: EventKind) -> Option<Heard> {
    let monitors = monitors.upgrade()?;
    let (event, heard) = Event::now_heard(kind);
    // An error says that no monitor listens.
    _ = monitors.send(event);
    Some(heard)
}

impl State {
    fn is_under_way(&self) -> bool {
        self.job.as_ref().is_some_and(|job| !job.control.phase().is_last())
    }
}

impl fmt::Debug for Migration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = self.state().job.as_ref().map(|job| job.control.phase());
        f.debug_struct("Migration").field("phase", &phase).finish_non_exhaustive()
    }
}

/// Why one failed, or waits for a new connection; none: it doesn't.
pub fn failure(phase: &Phase) -> Option<&str> {
    match phase {
        Phase::Failed(why) | Phase::PostcopyPaused(why) => Some(why),
        _ => None,
    }
}
