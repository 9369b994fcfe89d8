//! What is done to a VM's disks beside its guest (QMP "background jobs"): copies that are made, each with a name and a state that monitors
//! watch.

mod job;
mod status;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::broadcast::WeakSender;

use crate::block::{BlockBackend, MirrorError, MirrorSpec, Watched};
use crate::control::Event;

pub use job::{Job, JobReport, KIND};
pub use status::JobStatus;

/// Jobs of a VM at once, those that nobody has dismissed among them.
const JOBS: usize = 64;

/// What is to be copied where.
pub struct NewMirror {
    /// The job's name.
    pub id: String,
    /// The disk's name.
    pub disk: String,
    /// Its node.
    pub source: String,
    /// The disk.
    pub handle: Arc<dyn Watched>,
    /// The node of the copy.
    pub target: String,
    /// The copy.
    pub image: Arc<dyn BlockBackend>,
    /// How it is copied.
    pub spec: MirrorSpec,
    /// It is forgotten as soon as it is over.
    pub auto_dismiss: bool,
}

/// Why a job doesn't begin, or can't be told something.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// Another one has its name.
    #[error("Job ID '{0}' already in use")]
    Taken(String),
    /// There is none.
    #[error("Job '{0}' not found")]
    NotFound(String),
    /// It can't be told that now.
    #[error("Job '{id}' in state '{status}' cannot accept command verb '{verb}'")]
    Wrong {
        /// Its name.
        id: String,
        /// Where it is.
        status: JobStatus,
        /// What it was told.
        verb: &'static str,
    },
    /// There are too many.
    #[error("there are {JOBS} jobs: dismiss those that are over")]
    Full,
    /// It can't be done.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
}

/// The jobs of one VM.
pub struct Jobs {
    events: WeakSender<Event>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    all: Vec<Arc<Job>>,
    ended: bool,
}

impl Jobs {
    /// None yet; `events` are the monitors'.
    pub fn new(events: WeakSender<Event>) -> Self {
        Self { events, state: Mutex::default() }
    }

    /// Begins to copy a disk.
    ///
    /// # Errors
    /// See [`JobError`].
    pub fn mirror(&self, new: NewMirror) -> Result<(), JobError> {
        let mut state = self.state();
        state.all.retain(|job| job.status() != JobStatus::Null);
        if state.ended {
            return Err(JobError::Ended);
        }
        if state.all.iter().any(|job| job.id() == new.id) {
            return Err(JobError::Taken(new.id));
        }
        if state.all.len() == JOBS {
            return Err(JobError::Full);
        }
        state.all.push(Job::start(new, self.events.clone())?);
        Ok(())
    }

    /// All that were not dismissed.
    pub fn list(&self) -> Vec<JobReport> {
        let state = self.state();
        state.all.iter().filter(|job| job.status() != JobStatus::Null).map(|job| job.report()).collect()
    }

    /// The one of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, id: &str) -> Result<Arc<Job>, JobError> {
        let state = self.state();
        let found = state.all.iter().find(|job| job.id() == id && job.status() != JobStatus::Null);
        found.cloned().ok_or_else(|| JobError::NotFound(id.into()))
    }

    /// The job that reads or writes that node, if one does; only one that writes it, if that is what matters.
    pub fn of_node(&self, node: &str, written: bool) -> Option<String> {
        let state = self.state();
        state.all.iter().find(|job| job.uses(node, written)).map(|job| job.id().to_owned())
    }

    /// A disk was taken out: what copies it is over.
    pub fn disk_gone(&self, disk: &str) {
        for job in self.state().all.iter().filter(|job| job.disk() == disk) {
            job.fail(&format!("the disk '{disk}' was taken out of the VM"));
        }
    }

    /// The guest goes elsewhere, and with it what its disks hold: what isn't over fails.
    pub fn guest_leaves(&self) {
        self.state().all.iter().for_each(|job| job.fail("the guest leaves the VM"));
    }

    /// The VM ends: nothing is done any more, and no image is held.
    pub fn end(&self) {
        let all = {
            let mut state = self.state();
            state.ended = true;
            std::mem::take(&mut state.all)
        };
        all.iter().for_each(|job| job.fail("the VM ends"));
        all.iter().for_each(|job| job.join());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Jobs").field("all", &self.list()).finish_non_exhaustive()
    }
}
