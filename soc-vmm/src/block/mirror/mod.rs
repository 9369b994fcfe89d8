//! Copying a disk to another one while its guest writes it, until both are the same, and keeping them so (QMP `blockdev-mirror`).
//!
//! What the guest has written is marked in a [`map::Map`] when the write is over and before the guest knows that; a few threads copy what
//! is marked. So the copy has, whenever nothing is marked and nothing is being copied, every write that the guest knows of: that moment,
//! once somebody has asked for the end, is what the copy stays.

mod copying;
mod map;
mod pace;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use super::{BlockBackend, BlockError, Watched, Watcher};
use map::Map;
use pace::Pace;

/// Threads that copy: what one connection to far away keeps busy.
const COPIERS: usize = 4;

/// What of a disk is copied at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorSync {
    /// Everything.
    Full,
    /// What isn't its backing file's.
    Top,
}

/// How a disk is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MirrorSpec {
    /// What at first.
    pub sync: MirrorSync,
    /// Bytes that are copied together, a power of two.
    pub cluster: u64,
    /// Bytes a second; 0: no limit.
    pub speed: u64,
    /// The guest hears that a write is done when the copy has it.
    pub blocking: bool,
}

/// Why it doesn't begin.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// They would not be the same.
    #[error("the target has {target} bytes and the disk {disk}: make them the same")]
    Sizes {
        /// Bytes of the disk.
        disk: u64,
        /// Bytes of the target.
        target: u64,
    },
    /// The target can't be written.
    #[error("the target is read-only")]
    ReadOnly,
    /// One job copies it.
    #[error("a job copies the disk already: wait for its end, or cancel it")]
    Busy,
    /// There are no more threads.
    #[error("no thread is left for it (look at the limits of the VM's process)")]
    Thread(#[source] std::io::Error),
}

/// Which of both disks failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that is copied.
    Source,
    /// The copy.
    Target,
}

/// What happens to a copy, in order.
#[derive(Debug)]
pub enum MirrorEvent {
    /// Both are the same, for the first time.
    Ready,
    /// One failed.
    Failed(Side),
    /// Nothing more happens.
    Ended(Ending),
}

/// How it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The copy has what the disk had at one moment after the end was asked for.
    Complete,
    /// The copy has anything.
    Cancelled,
    /// The same, for a reason.
    Failed(String),
}

/// A copy that is being made.
pub struct Mirror {
    work: Arc<Work>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What is asked of it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wish {
    GoOn,
    /// As soon as both are the same.
    Finish,
    Stop(Ending),
}

/// What all its threads have.
struct Work {
    source: Arc<dyn BlockBackend>,
    target: Arc<dyn BlockBackend>,
    disk: Arc<dyn Watched>,
    spec: MirrorSpec,
    state: Mutex<State>,
    /// Something has changed.
    turn: Condvar,
}

struct State {
    map: Map,
    pace: Pace,
    wish: Wish,
    /// Writes wait for their copies.
    blocking: bool,
    /// The first sync is over.
    ready: bool,
    /// What exists is marked.
    surveyed: bool,
    /// No copier goes on.
    over: bool,
    /// The copy is complete, and the target isn't called any more.
    ended: bool,
    /// The disk that failed, if one did.
    failed: Option<Side>,
    /// Bytes that were copied.
    done: u64,
}

impl State {
    fn is_over(&self) -> bool {
        self.over || matches!(self.wish, Wish::Stop(_))
    }
}

impl Mirror {
    /// Copies a guest's disk; `tell` hears what happens, on a thread of its own.
    ///
    /// # Errors
    /// It can't be.
    pub fn start(
        disk: Arc<dyn Watched>,
        target: Arc<dyn BlockBackend>,
        spec: MirrorSpec,
        tell: impl Fn(MirrorEvent) + Send + 'static,
    ) -> Result<Self, MirrorError> {
        let source = disk.image();
        if source.size() != target.size() {
            return Err(MirrorError::Sizes { disk: source.size(), target: target.size() });
        }
        if target.is_read_only() {
            return Err(MirrorError::ReadOnly);
        }
        let state = State {
            map: Map::new(source.size(), spec.cluster),
            pace: Pace::new(spec.speed),
            wish: Wish::GoOn,
            blocking: spec.blocking,
            ready: false,
            surveyed: false,
            over: false,
            ended: false,
            failed: None,
            done: 0,
        };
        let (state, turn) = (Mutex::new(state), Condvar::new());
        let work = Arc::new(Work { source, target, disk, spec, state, turn });
        if !work.disk.watch(work.clone()) {
            return Err(MirrorError::Busy);
        }
        let own = work.clone();
        let thread = Builder::new().name("mirror".into()).spawn(move || {
            own.run(&tell);
        });
        let thread = thread.map_err(|e| {
            work.disk.unwatch();
            MirrorError::Thread(e)
        })?;
        Ok(Self { work, thread: Mutex::new(Some(thread)) })
    }

    /// Bytes that were copied, and those together with what is still to be.
    pub fn progress(&self) -> (u64, u64) {
        let state = self.work.state();
        // Until it is known what there is, everything may have to be.
        let left = if state.surveyed { state.map.lacking() } else { self.work.source.size().max(1) };
        (state.done, state.done + left)
    }

    /// Bytes a second; 0: no limit.
    pub fn set_speed(&self, speed: u64) {
        self.work.state().pace = Pace::new(speed);
        self.work.turn.notify_all();
    }

    /// Ends as soon as both are the same. A guest that writes on waits for what it writes from now on, so that they will be. Nothing to do
    /// where it ends already.
    pub fn finish(&self) {
        let mut state = self.work.state();
        if state.wish == Wish::GoOn {
            (state.wish, state.blocking) = (Wish::Finish, true);
        }
        self.work.turn.notify_all();
    }

    /// Ends now, and why. Calls to the target that wait for somebody fail.
    pub fn stop(&self, ending: Ending) {
        let mut state = self.work.state();
        if !matches!(state.wish, Wish::Stop(_)) && !state.ended {
            state.wish = Wish::Stop(ending);
            self.work.target.interrupt();
        }
        self.work.turn.notify_all();
    }

    /// Waits for its end.
    pub fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // It doesn't panic.
            let _ = thread.join();
        }
    }
}

impl Work {
    /// The life of a copy.
    fn run(&self, tell: &impl Fn(MirrorEvent)) {
        let ending = std::thread::scope(|scope| {
            let mut copiers = 0;
            for _ in 0..COPIERS {
                // Fewer do as well, as long as there is one.
                copiers +=
                    usize::from(Builder::new().name("mirror-copy".into()).spawn_scoped(scope, || self.copy()).is_ok());
            }
            if copiers == 0 {
                self.fail("no thread is left for it");
            }
            self.survey();
            let ending = self.wait(tell);
            self.turn.notify_all();
            ending
        });
        // A guest that waits for a copy waits no longer.
        self.disk.unwatch();
        let failed = self.state().failed;
        failed.into_iter().for_each(|side| tell(MirrorEvent::Failed(side)));
        let ending = if ending == Ending::Complete { self.flush(tell) } else { ending };
        tell(MirrorEvent::Ended(ending));
    }

    /// Has the copy reach its disk, unless somebody stops it meanwhile: a target may wait for somebody far away.
    fn flush(&self, tell: &impl Fn(MirrorEvent)) -> Ending {
        let flushed = self.target.flush();
        let wish = {
            let mut state = self.state();
            state.ended = true;
            state.wish.clone()
        };
        match (wish, flushed) {
            (Wish::Stop(ending), _) => ending,
            (_, Ok(())) => Ending::Complete,
            (_, Err(e)) => {
                tell(MirrorEvent::Failed(Side::Target));
                Ending::Failed(crate::cli::with_causes(&e))
            }
        }
    }

    /// Waits for the end, and says when both are the same.
    fn wait(&self, tell: &impl Fn(MirrorEvent)) -> Ending {
        let mut state = self.state();
        loop {
            let same = state.surveyed && state.map.is_clean();
            let ending = match &state.wish {
                Wish::Stop(ending) => Some(ending.clone()),
                Wish::Finish if same => Some(Ending::Complete),
                _ => None,
            };
            if let Some(ending) = ending {
                // At this moment: what is written after it must not be copied in part.
                state.over = true;
                return ending;
            }
            if same && !state.ready {
                state.ready = true;
                drop(state);
                tell(MirrorEvent::Ready);
                state = self.state();
                continue;
            }
            state = self.turn.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn fail(&self, why: impl Into<String>) {
        let mut state = self.state();
        if !matches!(state.wish, Wish::Stop(_)) {
            state.wish = Wish::Stop(Ending::Failed(why.into()));
        }
        self.turn.notify_all();
    }

    /// One of both failed: that is the end, unless somebody ends it and has it fail.
    fn failed(&self, side: Side, error: &BlockError) {
        {
            let mut state = self.state();
            if state.is_over() {
                return;
            }
            state.failed = Some(side);
        }
        self.fail(crate::cli::with_causes(error));
    }

    fn is_stopping(&self) -> bool {
        self.state().is_over()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watcher for Work {
    fn changed(&self, offset: u64, len: u64) -> Option<u64> {
        let mut state = self.state();
        if state.is_over() {
            return None;
        }
        let ticket = if state.blocking {
            state.map.mark_and_wait(offset, len)
        } else {
            state.map.mark(offset, len);
            None
        };
        self.turn.notify_all();
        ticket
    }

    fn is_settled(&self, ticket: u64) -> bool {
        let state = self.state();
        state.is_over() || state.map.is_settled(ticket)
    }
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mirror").field("progress", &self.progress()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
