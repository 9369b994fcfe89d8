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
use super::session::{Engine, Session, Wait};
use super::{Interrupts, QueueError};

/// A device's thread. Dropped, it ends and is waited for: end its session first.
#[derive(Debug)]
pub(super) struct Worker {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

/// Where the thread finds its next session. One at most waits: however often a guest resets a device that is busy with its back end,
/// the sessions between are over before they began.
#[derive(Debug, Default)]
struct Desk {
    state: Mutex<DeskState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct DeskState {
    next: Option<Session>,
    closed: bool,
}

impl Worker {
    /// Starts the thread. `name` is the device's, for the log; the kernel keeps its first 15 bytes.
    pub(super) fn new(name: String, mut engine: Box<dyn Engine>, interrupts: Arc<Interrupts>) -> io::Result<Self> {
        let desk = Arc::new(Desk::default());
        let sessions = desk.clone();
        let thread = Builder::new().name(name.clone()).spawn(move || {
            let mut complaints = Complaints::default();
            while let Some(mut session) = sessions.take() {
                match run(&mut *engine, &mut session) {
                    QueueError::Revoked => {}
                    error => {
                        complaints.say(&name, format_args!("{error}; it waits for a reset"));
                        session.control.ask_for_reset();
                        interrupts.config();
                    }
                }
                engine.end(&mut session);
            }
        })?;
        Ok(Self { desk, thread: Some(thread) })
    }

    /// Starts a session, once the one before, which has ended, lets go of the thread.
    pub(super) fn start(&self, session: Session) {
        self.desk.state().next = Some(session);
        self.desk.changed.notify_one();
    }
}

impl Desk {
    /// Waits for the next session; none: there will be none.
    fn take(&self) -> Option<Session> {
        let idle = |state: &mut DeskState| state.next.is_none() && !state.closed;
        let state = self.changed.wait_while(self.state(), idle);
        state.unwrap_or_else(PoisonError::into_inner).next.take()
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
            state.next = None;
        }
        self.desk.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It doesn't panic; and if it did, the process would be ending.
            let _ = thread.join();
        }
    }
}

/// Serves a session until it ends, and says why it did.
fn run(engine: &mut dyn Engine, session: &mut Session) -> QueueError {
    let mut waiter = match Waiter::new(session) {
        Ok(waiter) => waiter,
        Err(errno) => return QueueError::NoRoom(errno),
    };
    for queue in session.queues.iter_mut().flatten() {
        if let Err(error) = queue.start() {
            return error;
        }
    }
    let mut linger = Linger::new(session);
    loop {
        if let Err(error) = turn(engine, session, &mut waiter, &mut linger) {
            return error;
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

/// What an epoll instance says of the thing that is ready: the session's end, the engine's source, or a queue's kick by its index.
const STOP: u64 = u64::MAX;
const SOURCE: u64 = u64::MAX - 1;

/// Waits for the end of a session, for kicks, and for the engine's source.
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
                STOP => return Err(QueueError::Revoked),
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
