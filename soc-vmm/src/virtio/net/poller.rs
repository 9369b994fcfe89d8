//! Several descriptors to wait for as one: an epoll instance is itself readable while anything in it is ready.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

/// What an engine waits for.
#[derive(Debug)]
pub(super) struct Poller {
    epoll: Epoll,
    /// For what each of the descriptors is watched.
    watched: Vec<EpollFlags>,
}

impl Poller {
    /// Waits for `bell` always, and for `count` others as it is told.
    ///
    /// # Errors
    /// The system has no room for it.
    pub(super) fn new(bell: BorrowedFd<'_>, count: usize) -> nix::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(bell, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        Ok(Self { epoll, watched: vec![EpollFlags::empty(); count] })
    }

    /// Says for what descriptor `index` is watched. It costs a call where that is another than before.
    ///
    /// # Errors
    /// The system has no room for it.
    pub(super) fn watch(&mut self, index: usize, fd: BorrowedFd<'_>, flags: EpollFlags) -> nix::Result<()> {
        let was = std::mem::replace(&mut self.watched[index], flags);
        match (was.is_empty(), flags.is_empty()) {
            _ if was == flags => Ok(()),
            (true, _) => self.epoll.add(fd, EpollEvent::new(flags, 0)),
            (_, true) => self.epoll.delete(fd),
            _ => self.epoll.modify(fd, &mut EpollEvent::new(flags, 0)),
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
