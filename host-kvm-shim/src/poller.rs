//! What the API thread waits for.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use pcie_function::HostFunction;

use crate::bootstrap::Offer;
use crate::error::ServeError;

/// An epoll of all that can wake the API thread, edge-triggered: each signal wakes once, and no eventfd is read.
pub(crate) struct Poller {
    epoll: Epoll,
    timer: TimerFd,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// The SoC raised the channel's vector.
    Channel,
    /// The function may be lost.
    Lost,
    /// A vCPU's thread says something.
    Notice,
    /// A second has passed.
    Tick,
    /// The guest ended the level-triggered interrupt of a GSI.
    Eoi(u32),
}

const CHANNEL: u64 = 0;
const LOST: u64 = 1;
const NOTICE: u64 = 2;
const TICK: u64 = 3;
const EOI: u64 = 1 << 32;

/// The vector that announces requests.
pub(crate) const CHANNEL_VECTOR: u32 = 0;

impl Poller {
    /// Waits for a function's signals, and for a tick each second.
    pub(crate) fn new<F: HostFunction>(offer: &Offer<F>) -> Result<Self, ServeError> {
        let os = |errno| ServeError::Os("set up polling", errno);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(os)?;
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK).map_err(os)?;
        timer.set(Expiration::Interval(TimeSpec::seconds(1)), TimerSetTimeFlags::empty()).map_err(os)?;
        let vector = offer.function.vector(CHANNEL_VECTOR).ok_or_else(|| {
            ServeError::Function(pcie_function::FunctionError::Unusable("the function has no vector".into()))
        })?;
        epoll.add(vector, edge(CHANNEL)).map_err(os)?;
        epoll.add(offer.function.lost_event(), edge(LOST)).map_err(os)?;
        epoll.add(offer.notices.event(), edge(NOTICE)).map_err(os)?;
        epoll.add(timer.as_fd(), edge(TICK)).map_err(os)?;
        Ok(Self { epoll, timer })
    }

    /// Waits for a guest's EOIs too; forgotten when the eventfd is closed.
    pub(crate) fn add_eoi(&self, gsi: u32, event: &EventFd) -> Result<(), Errno> {
        self.epoll.add(event, edge(EOI | u64::from(gsi)))
    }

    /// What has happened, at most 16 things; nothing after `timeout`.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Result<impl Iterator<Item = Wake> + use<>, ServeError> {
        let mut events = [EpollEvent::empty(); 16];
        let timeout = match timeout {
            None => EpollTimeout::NONE,
            Some(t) => u16::try_from(t.as_millis()).unwrap_or(u16::MAX).into(),
        };
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(ServeError::Os("wait for events", errno)),
        };
        if events[..count].iter().any(|event| event.data() == TICK) {
            // A timer goes on only once it was read.
            let _ = self.timer.wait();
        }
        Ok(events.into_iter().take(count).map(|event| match event.data() {
            CHANNEL => Wake::Channel,
            LOST => Wake::Lost,
            NOTICE => Wake::Notice,
            TICK => Wake::Tick,
            data => Wake::Eoi(data as u32),
        }))
    }
}

fn edge(data: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, data)
}
