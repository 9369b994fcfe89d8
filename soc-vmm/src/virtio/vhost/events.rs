//! What of a back end is waited for, as one descriptor: that it goes or says something, and its calls.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Numbers below are a queue's, whose call it is.
const WORD: u64 = 64;
/// Something that is looked at anyway: the cable of an interface, or the log of what is written.
const BELL: u64 = 65;

/// What has happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// The back end has to say something, or is gone.
    pub(super) word: bool,
    /// By bits: queues that it has called for.
    pub(super) calls: u64,
}

/// What is waited for.
#[derive(Debug)]
pub(super) struct Events(Epoll);

impl Events {
    /// Nothing yet.
    ///
    /// # Errors
    /// The system has no room for it.
    pub(super) fn new() -> nix::Result<Self> {
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(Self)
    }

    /// Waits for words of the back end until the descriptor is closed.
    pub(super) fn watch(&self, fd: BorrowedFd<'_>) -> nix::Result<()> {
        self.0.add(fd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, WORD))
    }

    /// Waits for a queue's eventfd to be signalled, each time: it needs no reading.
    pub(super) fn watch_call(&self, queue: usize, call: impl AsFd) -> nix::Result<()> {
        self.0.add(call, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, queue as u64))
    }

    /// Waits for a bell, which is silenced by who hears it.
    pub(super) fn watch_bell(&self, bell: BorrowedFd<'_>) -> nix::Result<()> {
        self.0.add(bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL))
    }

    /// Waits for a bell, each time that it is rung: it needs no silencing.
    pub(super) fn watch_rings(&self, bell: BorrowedFd<'_>) -> nix::Result<()> {
        self.0.add(bell, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, BELL))
    }

    /// Waits for it no longer. Closing it doesn't suffice: the back end has it too.
    pub(super) fn forget(&self, call: impl AsFd) {
        // It is there, or the system never took it.
        let _ = self.0.delete(call);
    }

    /// Takes what has happened.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn take(&self) -> nix::Result<Heard> {
        let mut events = [EpollEvent::empty(); 16];
        let count = match self.0.wait(&mut events, EpollTimeout::ZERO) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno),
        };
        let mut heard = Heard::default();
        for event in &events[..count] {
            match event.data() {
                WORD => heard.word = true,
                BELL => {}
                queue => heard.calls |= 1 << queue,
            }
        }
        Ok(heard)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}
