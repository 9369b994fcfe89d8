//! One job: a disk's copy, and what monitors hear of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::broadcast::WeakSender;
use tokio::sync::watch;
use tokio::time::timeout;

use super::{JobError, JobStatus, NewMirror};
use crate::block::{Ending, Mirror, MirrorError, MirrorEvent, Side};
use crate::control::{BlockJobFigures, Event, EventKind, IoAction, IoOperation};

/// What monitors call copying a disk.
pub const KIND: &str = "mirror";
/// What QEMU says of a job that was ended.
const CANCELLED: &str = "Operation canceled";
/// Most copies end within that.
const SOON: Duration = Duration::from_secs(1);

/// A job.
pub struct Job {
    id: String,
    disk: String,
    source: String,
    target: String,
    auto_dismiss: bool,
    events: WeakSender<Event>,
    /// Its work, until it is over and forgotten.
    mirror: Mutex<Option<Arc<Mirror>>>,
    /// Taken before the work's own lock, and held while monitors are told of a change.
    state: Mutex<State>,
    /// Monitors were told of its end.
    over: watch::Sender<bool>,
}

struct State {
    status: JobStatus,
    speed: u64,
    /// Why it failed, once it did.
    error: Option<String>,
    /// Bytes that are done, and all of them, once it is over.
    last: (u64, u64),
}

/// A job, as monitors see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobReport {
    /// Its name.
    pub id: String,
    /// Where it is.
    pub status: JobStatus,
    /// Bytes that are done.
    pub done: u64,
    /// All that are to be.
    pub total: u64,
    /// Bytes a second at most; 0: no limit.
    pub speed: u64,
    /// It is forgotten as soon as it is over.
    pub auto_dismiss: bool,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

impl Job {
    /// Begins.
    pub(super) fn start(new: NewMirror, events: WeakSender<Event>) -> Result<Arc<Self>, MirrorError> {
        let NewMirror { id, disk, source, handle, target, image, spec, auto_dismiss } = new;
        let state = State { status: JobStatus::Created, speed: spec.speed, error: None, last: (0, 0) };
        let (state, mirror, over) = (Mutex::new(state), Mutex::default(), watch::Sender::new(false));
        let job = Arc::new(Self { id, disk, source, target, auto_dismiss, events, mirror, state, over });
        let weak = Arc::downgrade(&job);
        // What happens to it is told after its beginning.
        let mut state = job.state();
        let mirror = Mirror::start(handle, image, spec, move |event| hear(&weak, event))?;
        *lock(&job.mirror) = Some(Arc::new(mirror));
        job.tell(EventKind::JobStatusChange { id: job.id.clone(), status: JobStatus::Created });
        job.enter(&mut state, JobStatus::Running);
        drop(state);
        Ok(job)
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The disk that it copies.
    pub(super) fn disk(&self) -> &str {
        &self.disk
    }

    /// Where it is.
    pub fn status(&self) -> JobStatus {
        self.state().status
    }

    /// Whether it uses a node; only whether it writes it, if that is what matters.
    pub(super) fn uses(&self, node: &str, written: bool) -> bool {
        let over = matches!(self.status(), JobStatus::Concluded | JobStatus::Null);
        !over && (self.target == node || !written && self.source == node)
    }

    /// All that monitors see of it.
    pub fn report(&self) -> JobReport {
        let state = self.state();
        let (done, total) = self.progress(&state);
        let (id, auto_dismiss) = (self.id.clone(), self.auto_dismiss);
        JobReport {
            id,
            status: state.status,
            done,
            total,
            speed: state.speed,
            auto_dismiss,
            error: state.error.clone(),
        }
    }

    /// Ends it. A copy that is ready stays what the disk is at a moment soon after this, unless it is ended by `force`.
    ///
    /// # Errors
    /// It is over already.
    pub fn cancel(&self, force: bool) -> Result<(), JobError> {
        let status = self.active("cancel")?;
        match self.work() {
            Some(mirror) if status == JobStatus::Ready && !force => mirror.finish(),
            Some(mirror) => mirror.stop(Ending::Cancelled),
            None => {}
        }
        Ok(())
    }

    /// Waits a little until monitors were told that it is over. libvirt's migrations rely on that: what it hears of one job while it
    /// dismisses another one it forgets, and waits for it without end.
    pub async fn ends_soon(&self) {
        // An error says that it takes longer.
        let _ = timeout(SOON, self.over.subscribe().wait_for(|over| *over)).await;
    }

    /// Holds it to so many bytes a second; 0: no limit.
    ///
    /// # Errors
    /// It is over already.
    pub fn set_speed(&self, speed: u64) -> Result<(), JobError> {
        self.active("set-speed")?;
        self.state().speed = speed;
        self.work().iter().for_each(|mirror| mirror.set_speed(speed));
        Ok(())
    }

    /// Forgets it. Returns when it holds nothing any more.
    ///
    /// # Errors
    /// It isn't over.
    pub fn dismiss(&self) -> Result<(), JobError> {
        {
            let mut state = self.state();
            if state.status != JobStatus::Concluded {
                return Err(self.wrong(state.status, "dismiss"));
            }
            self.enter(&mut state, JobStatus::Null);
        }
        self.join();
        Ok(())
    }

    /// It fails, for a reason from outside.
    pub(super) fn fail(&self, why: &str) {
        self.work().iter().for_each(|mirror| mirror.stop(Ending::Failed(why.into())));
    }

    /// Waits until it holds nothing any more.
    pub(super) fn join(&self) {
        if let Some(mirror) = self.work() {
            mirror.join();
        }
        *lock(&self.mirror) = None;
    }

    fn work(&self) -> Option<Arc<Mirror>> {
        lock(&self.mirror).clone()
    }

    fn active(&self, verb: &'static str) -> Result<JobStatus, JobError> {
        let status = self.status();
        if status.is_active() { Ok(status) } else { Err(self.wrong(status, verb)) }
    }

    fn wrong(&self, status: JobStatus, verb: &'static str) -> JobError {
        JobError::Wrong { id: self.id.clone(), status, verb }
    }

    fn progress(&self, state: &State) -> (u64, u64) {
        if !state.status.is_active() {
            return state.last;
        }
        self.work().map_or(state.last, |mirror| mirror.progress())
    }

    fn figures(&self, state: &State) -> BlockJobFigures {
        let (offset, len) = self.progress(state);
        BlockJobFigures { kind: KIND, device: self.id.clone(), len, offset, speed: state.speed }
    }

    fn enter(&self, state: &mut State, next: JobStatus) {
        assert!(state.status.may_become(next), "a job that is {} can't become {next}", state.status);
        state.last = self.progress(state);
        state.status = next;
        self.tell(EventKind::JobStatusChange { id: self.id.clone(), status: next });
    }

    fn end(&self, state: &mut State, ending: Ending) {
        match ending {
            Ending::Complete => {
                self.enter(state, JobStatus::Waiting);
                self.enter(state, JobStatus::Pending);
                self.tell(EventKind::BlockJobCompleted { job: self.figures(state), error: None });
            }
            Ending::Cancelled => {
                state.error = Some(CANCELLED.into());
                self.enter(state, JobStatus::Aborting);
                self.tell(EventKind::BlockJobCancelled(self.figures(state)));
            }
            Ending::Failed(why) => {
                state.error = Some(why.clone());
                self.enter(state, JobStatus::Aborting);
                self.tell(EventKind::BlockJobCompleted { job: self.figures(state), error: Some(why) });
            }
        }
        self.enter(state, JobStatus::Concluded);
        if self.auto_dismiss {
            self.enter(state, JobStatus::Null);
            *lock(&self.mirror) = None;
        }
        self.over.send_replace(true);
    }

    fn tell(&self, kind: EventKind) {
        if let Some(events) = self.events.upgrade() {
            // An error says that no monitor listens.
            let _ = events.send(Event::now(kind));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// What happens to the work.
fn hear(job: &Weak<Job>, event: MirrorEvent) {
    let Some(job) = job.upgrade() else { return };
    let mut state = job.state();
    match event {
        MirrorEvent::Ready => {
            job.enter(&mut state, JobStatus::Ready);
            job.tell(EventKind::BlockJobReady(job.figures(&state)));
        }
        MirrorEvent::Failed(side) => {
            let operation = if side == Side::Source { IoOperation::Read } else { IoOperation::Write };
            job.tell(EventKind::BlockJobError { device: job.id.clone(), operation, action: IoAction::Report });
        }
        MirrorEvent::Ended(ending) => job.end(&mut state, ending),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
