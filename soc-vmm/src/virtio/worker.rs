//! The thread on which a device works: one session after the other.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::complaint::Complaints;
use super::linger::Linger;
use super::session::{Engine, Queue, Session, Wait};
use super::{Control, Interrupts, QueueError};
use crate::bus::Wake;

/// A device's thread. Dropped, it ends and is waited for: end its session first.
#[derive(Debug)]
pub(super) struct Worker {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

/// Where the thread finds its next session. One at most waits: however often a guest resets a device that is busy with its back end,
/// the sessions between are over before they began.
#[derive(Debug)]
struct Desk {
    state: Mutex<DeskState>,
    changed: Condvar,
    /// Whoever waits for the thread to halt.
    wake: Arc<dyn Wake>,
}

struct DeskState {
    /// Here while the thread has no session.
    engine: Option<Box<dyn Engine>>,
    next: Option<Session>,
    /// One that was halted, or that came from elsewhere.
    halted: Option<Session>,
    /// The thread is to have none; and before that, the engine is to settle.
    halting: bool,
    settle: bool,
    closed: bool,
}

impl Worker {
    /// Starts the thread. `name` is the device's, for the log; the kernel keeps its first 15 bytes. `wake` is for who has it halt.
    pub(super) fn new(
        name: String,
        engine: Box<dyn Engine>,
        interrupts: Arc<Interrupts>,
        wake: Arc<dyn Wake>,
    ) -> io::Result<Self> {
        let engine = Some(engine);
        let state = DeskState { engine, next: None, halted: None, halting: false, settle: false, closed: false };
        let desk = Arc::new(Desk { state: Mutex::new(state), changed: Condvar::new(), wake });
        let sessions = desk.clone();
        let thread = Builder::new().name(name.clone()).spawn(move || {
            let mut complaints = Complaints::default();
            while let Some((mut engine, session)) = sessions.take() {
                let Some(mut session) = session else {
                    engine.settle();
                    sessions.give_back(engine, None);
                    continue;
                };
                let halted = match run(&mut *engine, &mut session) {
                    Ok(()) => Some(session),
                    Err(error) => {
                        if error != QueueError::Revoked {
                            complaints.say(&name, format_args!("{error}; it waits for a reset"));
                            session.control.ask_for_reset();
                            interrupts.config();
                        }
                        engine.end(&mut session);
                        None
                    }
                };
                sessions.give_back(engine, halted);
            }
        })?;
        Ok(Self { desk, thread: Some(thread) })
    }

    /// Starts a session, once the one before, which has ended, lets go of the thread.
    pub(super) fn start(&self, session: Session) {
        let mut state = self.desk.state();
        session.control.halt(state.halting);
        state.next = Some(session);
        self.desk.changed.notify_one();
    }

    /// Has the thread let go of its session, which is `control`'s if there is one, and begin with none. See [`Worker::is_halted`].
    pub(super) fn halt(&self, control: Option<&Control>) {
        let mut state = self.desk.state();
        (state.halting, state.settle) = (true, true);
        if let Some(control) = control {
            control.halt(true);
        }
        self.desk.changed.notify_one();
    }

    /// Whether the thread does nothing any more. Who had it halt is woken once that is so.
    pub(super) fn is_halted(&self) -> bool {
        let state = self.desk.state();
        state.engine.is_some() && state.next.is_none() && !state.settle
    }

    /// Goes on with a session that was halted, or is about to be.
    pub(super) fn go_on(&self, control: Option<&Control>) {
        let mut state = self.desk.state();
        (state.halting, state.settle) = (false, false);
        if let Some(control) = control {
            control.halt(false);
        }
        if let Some(session) = state.halted.take() {
            state.next = Some(session);
            self.desk.changed.notify_one();
        }
    }

    /// Lets go of a session that was halted.
    pub(super) fn forget(&self) {
        self.desk.state().halted = None;
    }

    /// Shows what there is while the thread has none of it: the engine, and the session that was halted.
    pub(super) fn look<T>(&self, look: impl FnOnce(&dyn Engine, Option<&Session>) -> T) -> Option<T> {
        let state = self.desk.state();
        Some(look(&**state.engine.as_ref()?, state.halted.as_ref()))
    }

    /// Gives the engine what came from elsewhere; with it, if it takes that, a session to go on with.
    pub(super) fn load<E>(
        &self,
        mut session: Option<Session>,
        load: impl FnOnce(&mut dyn Engine, Option<&mut Session>) -> Result<(), E>,
    ) -> Option<Result<(), E>> {
        let mut state = self.desk.state();
        let loaded = load(&mut **state.engine.as_mut()?, session.as_mut());
        state.halted = session.filter(|_| loaded.is_ok());
        Some(loaded)
    }
}

impl Desk {
    /// Waits for the next session, or for when the engine is to settle without one; none: there will be neither.
    fn take(&self) -> Option<(Box<dyn Engine>, Option<Session>)> {
        let idle = |state: &mut DeskState| state.next.is_none() && !state.settle && !state.closed;
        let state = self.changed.wait_while(self.state(), idle);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return None;
        }
        let session = state.next.take();
        state.settle &= session.is_some();
        Some((state.engine.take()?, session))
    }

    /// The thread has no session any more, but for one that it may go on with.
    fn give_back(&self, engine: Box<dyn Engine>, halted: Option<Session>) {
        let mut state = self.state();
        state.engine = Some(engine);
        match halted {
            Some(session) if state.halting => state.halted = Some(session),
            // It was to go on meanwhile; unless its driver is another one now.
            Some(session) if state.next.is_none() => state.next = Some(session),
            _ => {}
        }
        let wake = state.halting && !state.settle;
        drop(state);
        if wake {
            self.wake.wake();
        }
    }

    fn state(&self) -> MutexGuard<'_, DeskState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        {
            let mut state = self.desk.state();
            state.closed = true;
            (state.next, state.halted) = (None, None);
        }
        self.desk.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It doesn't panic; and if it did, the process would be ending.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for DeskState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { next, halted, halting, settle, closed, .. } = self;
        let mut all = f.debug_struct("DeskState");
        all.field("next", next).field("halted", halted).field("halting", halting);
        all.field("settle", settle).field("closed", closed);
        all.finish_non_exhaustive()
    }
}

/// Serves a session until it halts.
///
/// # Errors
/// It has ended, for that reason.
fn run(engine: &mut dyn Engine, session: &mut Session) -> Result<(), QueueError> {
    let mut waiter = Waiter::new(session).map_err(QueueError::NoRoom)?;
    session.queues.iter_mut().flatten().try_for_each(Queue::start)?;
    let mut linger = Linger::new(session);
    loop {
        if !session.control.is_halting() {
            turn(engine, session, &mut waiter, &mut linger)?;
        } else if let Some(wait) = engine.halt(session)? {
            waiter.wait(engine, session, wait)?;
        } else {
            // What was given back belongs to what the driver knows.
            return session.queues.iter_mut().flatten().try_for_each(Queue::publish);
        }
    }
}

/// Does what there is to do, then waits for more.
fn turn(
    engine: &mut dyn Engine,
    session: &mut Session,
    waiter: &mut Waiter,
    linger: &mut Linger,
) -> Result<(), QueueError> {
    let wait = engine.serve(session)?;
    if wait == Wait::NOTHING {
        return waiter.wait(engine, session, wait);
    }
    if linger.look(engine, session, wait)? {
        return Ok(());
    }
    for queue in session.queues.iter_mut().flatten() {
        if queue.arm()? {
            return Ok(());
        }
    }
    let start = Instant::now();
    waiter.wait(engine, session, wait)?;
    linger.slept(start.elapsed());
    Ok(())
}

/// What an epoll instance says of the thing that is ready: the session's control, the engine's source, or a queue's kick by its index.
const STOP: u64 = u64::MAX;
const SOURCE: u64 = u64::MAX - 1;

/// Waits for what a session's control says, for kicks, and for the engine's source.
struct Waiter {
    epoll: Epoll,
    /// For what the source is watched.
    source: Option<EpollFlags>,
}

impl Waiter {
    fn new(session: &Session) -> nix::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(session.control.stopped(), EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        for (index, queue) in session.queues.iter().enumerate() {
            if let Some(queue) = queue {
                epoll.add(queue.kick(), EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
            }
        }
        Ok(Self { epoll, source: None })
    }

    fn wait(&mut self, engine: &dyn Engine, session: &mut Session, wait: Wait) -> Result<(), QueueError> {
        self.watch(engine.source(), wait.source).map_err(QueueError::NoRoom)?;
        let timeout = match wait.timeout {
            None => EpollTimeout::NONE,
            Some(time) if time.is_zero() => EpollTimeout::ZERO,
            // Epoll counts milliseconds.
            Some(time) if time < Duration::from_millis(1) => {
                match ppoll(&mut [PollFd::new(self.epoll.0.as_fd(), PollFlags::POLLIN)], Some(time.into()), None) {
                    Ok(_) | Err(Errno::EINTR) => EpollTimeout::ZERO,
                    Err(errno) => return Err(QueueError::NoRoom(errno)),
                }
            }
            // Rounded up, so that the time is over afterwards.
            Some(time) => EpollTimeout::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(EpollTimeout::MAX),
        };
        let mut events = [EpollEvent::empty(); 8];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(QueueError::NoRoom(errno)),
        };
        for event in &events[..count] {
            match event.data() {
                STOP => session.control.hear()?,
                SOURCE => {}
                index => {
                    if let Some(Some(queue)) = session.queues.get_mut(index as usize) {
                        queue.hear();
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes the source's part of the instance what is wanted.
    fn watch(&mut self, source: Option<BorrowedFd<'_>>, flags: EpollFlags) -> nix::Result<()> {
        let wanted = source.filter(|_| !flags.is_empty());
        let now = wanted.map(|_| flags);
        if self.source == now {
            return Ok(());
        }
        if let Some(fd) = source.filter(|_| self.source.take().is_some()) {
            self.epoll.delete(fd)?;
        }
        if let Some(fd) = wanted {
            self.epoll.add(fd, EpollEvent::new(flags, SOURCE))?;
        }
        self.source = now;
        Ok(())
    }
}
