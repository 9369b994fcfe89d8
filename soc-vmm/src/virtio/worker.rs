//! The thread on which a device works: one session after the other.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::complaint::Complaints;
use super::session::{Engine, Session, Wait};
use super::{Interrupts, QueueError};

/// A device's thread. Dropped, it ends and is waited for: end its session first.
#[derive(Debug)]
pub(super) struct Worker {
    sessions: Option<Sender<Session>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread. `name` is the device's, for the log; the kernel keeps its first 15 bytes.
    pub(super) fn new(name: String, mut engine: Box<dyn Engine>, interrupts: Arc<Interrupts>) -> io::Result<Self> {
        let (sessions, queue): (_, Receiver<Session>) = channel();
        let thread = Builder::new().name(name.clone()).spawn(move || {
            let mut complaints = Complaints::default();
            for mut session in queue {
                match run(&mut *engine, &mut session) {
                    QueueError::Revoked => {}
                    error => {
                        complaints.say(&name, format_args!("{error}; it waits for a reset"));
                        session.control.ask_for_reset();
                        interrupts.config();
                    }
                }
            }
        })?;
        Ok(Self { sessions: Some(sessions), thread: Some(thread) })
    }

    /// Starts a session, once the one before has ended.
    pub(super) fn start(&self, session: Session) {
        // The thread is there: it ends when the sender does.
        let _ = self.sessions.as_ref().map(|sessions| sessions.send(session));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.sessions = None;
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
    loop {
        let ended = engine.serve(session).and_then(|wait| waiter.wait(engine, session, wait));
        if let Err(error) = ended {
            return error;
        }
    }
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

    fn wait(&mut self, engine: &dyn Engine, session: &Session, wait: Wait) -> Result<(), QueueError> {
        self.watch(engine.source(), wait.source).map_err(QueueError::NoRoom)?;
        // Rounded up, so that the time is over afterwards.
        let timeout = wait.timeout.map_or(EpollTimeout::NONE, |time| {
            EpollTimeout::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(EpollTimeout::MAX)
        });
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
                    if let Some(Some(queue)) = session.queues.get(index as usize) {
                        // It doesn't block, and what it counts doesn't matter.
                        let _ = queue.kick().read();
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
