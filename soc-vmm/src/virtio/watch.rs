//! Several descriptors as the one source of an engine: an epoll instance, which can be waited for itself.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// What is told of a descriptor at once.
const BATCH: usize = 32;

/// Descriptors that are watched for any change: told once each time that one becomes ready for something. Who tried in vain
/// (EAGAIN) will be told; who didn't try must remember.
#[derive(Debug)]
pub(super) struct Watch(Epoll);

/// What became of a descriptor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    /// Which one.
    pub(super) token: u64,
    /// It may have something to read, or an end.
    pub(super) readable: bool,
    /// It may have room to write, or be gone.
    pub(super) writable: bool,
    /// Its other end is gone, for both directions.
    pub(super) hung_up: bool,
}

impl Watch {
    pub(super) fn new() -> nix::Result<Self> {
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(Self)
    }

    /// Watches `fd`, until it is closed, under that name.
    pub(super) fn add(&self, fd: impl AsFd, token: u64) -> nix::Result<()> {
        let both = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP;
        self.0.add(fd, EpollEvent::new(both | EpollFlags::EPOLLET, token))
    }

    /// What changed since the last time; false: there may be more.
    pub(super) fn changes(&self, mut tell: impl FnMut(Change)) -> bool {
        let mut events = [EpollEvent::empty(); BATCH];
        // It has no reason to fail that another call wouldn't meet: a signal.
        let count = self.0.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        for event in &events[..count] {
            let has = |flags| event.events().intersects(flags);
            let gone = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
            tell(Change {
                token: event.data(),
                readable: has(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | gone),
                writable: has(EpollFlags::EPOLLOUT | gone),
                hung_up: has(gone),
            });
        }
        count < BATCH
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}
