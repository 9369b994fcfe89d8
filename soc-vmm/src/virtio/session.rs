//! What a device has to work with from DRIVER_OK to the next reset, and what makes it the device that it is.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::epoll::EpollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Chain, Interrupts, Lease, QueueError, Ring};

/// What a device does. It runs on the device's own thread and may block there.
pub trait Engine: Send {
    /// Does what there is to do, and says what to wait for. It is called after each kick and after each thing waited for; a call too
    /// many costs nothing. Before it waits it has allowed kicks on every queue from which it wants more.
    ///
    /// # Errors
    /// The driver broke a queue, or took its memory back: the session is over.
    fn serve(&mut self, session: &mut Session) -> Result<Wait, QueueError>;

    /// What else than kicks it waits for, if [`Wait::source`] says so. It is the same for the whole of a session.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// What an engine waits for beside kicks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// Of [`Engine::source`]; empty: nothing.
    pub source: EpollFlags,
    /// At most so long.
    pub timeout: Option<Duration>,
}

impl Wait {
    /// Kicks alone.
    pub const KICKS: Self = Self { source: EpollFlags::empty(), timeout: None };
    /// There is more to do: only looks whether the session goes on.
    pub const NOTHING: Self = Self { source: EpollFlags::empty(), timeout: Some(Duration::ZERO) };
}

/// A device's life from DRIVER_OK to the next reset.
#[derive(Debug)]
pub struct Session {
    /// What was negotiated.
    pub features: u64,
    /// The queues; none: the driver doesn't use it.
    pub queues: Vec<Option<Queue>>,
    /// The side that ends it.
    pub control: Arc<Control>,
    /// For changes of the configuration.
    pub config: Arc<Config>,
}

impl Session {
    /// Whether a feature was negotiated.
    pub fn has(&self, feature: u32) -> bool {
        self.features >> feature & 1 != 0
    }
}

/// What both threads know of a session.
#[derive(Debug)]
pub struct Control {
    /// The session's hold on guest memory.
    pub lease: Arc<Lease>,
    stop: EventFd,
    needs_reset: AtomicBool,
}

impl Control {
    /// For a session over the memory of `lease`.
    ///
    /// # Errors
    /// There is no more room for descriptors in this process.
    pub fn new(lease: Lease) -> nix::Result<Self> {
        Ok(Self { lease: Arc::new(lease), stop: eventfd()?, needs_reset: AtomicBool::new(false) })
    }

    /// Ends the session: on return it reaches the guest's memory no more.
    pub fn end(&self) {
        self.lease.revoke();
        ring_bell(&self.stop);
    }

    /// Readable once the session has ended.
    pub(super) fn stopped(&self) -> BorrowedFd<'_> {
        self.stop.as_fd()
    }

    /// Whether the device waits for a reset (§2.1.2).
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn ask_for_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
    }
}

/// A queue in use.
#[derive(Debug)]
pub struct Queue {
    ring: Ring,
    index: usize,
    interrupts: Arc<Interrupts>,
    kick: Arc<EventFd>,
}

impl Queue {
    /// Queue `index` of a device. `kick` is signalled when the driver has something for it.
    pub fn new(ring: Ring, index: usize, interrupts: Arc<Interrupts>, kick: Arc<EventFd>) -> Self {
        Self { ring, index, interrupts, kick }
    }

    /// See [`Ring::start`].
    ///
    /// # Errors
    /// As there.
    pub fn start(&mut self) -> Result<(), QueueError> {
        self.ring.start()
    }

    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Where its chains are.
    pub fn lease(&self) -> &Lease {
        self.ring.lease()
    }

    /// See [`Ring::pop`].
    ///
    /// # Errors
    /// As there.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        self.ring.pop(chain)
    }

    /// See [`Ring::put_back`].
    pub fn put_back(&mut self, count: u16) {
        self.ring.put_back(count);
    }

    /// Gives a chain back; see [`Ring::push`].
    ///
    /// # Errors
    /// As there.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.ring.push(head, written)
    }

    /// Shows the driver what was pushed, and interrupts if it wants that.
    ///
    /// # Errors
    /// As [`Ring::publish`].
    pub fn publish(&mut self) -> Result<(), QueueError> {
        if self.ring.publish()? {
            self.interrupts.queue(self.index);
        }
        Ok(())
    }

    /// See [`Ring::hold_kicks`].
    ///
    /// # Errors
    /// As there.
    pub fn hold_kicks(&mut self) -> Result<(), QueueError> {
        self.ring.hold_kicks()
    }

    /// See [`Ring::allow_kicks`].
    ///
    /// # Errors
    /// As there.
    pub fn allow_kicks(&mut self) -> Result<bool, QueueError> {
        self.ring.allow_kicks()
    }
}

/// A device's configuration (§2.5), which the device may change while the guest reads it.
#[derive(Debug)]
pub struct Config {
    state: Mutex<State>,
    interrupts: Arc<Interrupts>,
}

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    generation: u8,
}

impl Config {
    /// A configuration of these bytes, whose changes `interrupts` tells.
    pub fn new(bytes: Vec<u8>, interrupts: Arc<Interrupts>) -> Self {
        Self { state: Mutex::new(State { bytes, generation: 0 }), interrupts }
    }

    /// Changes bytes at `offset`, where they are within the configuration, and tells the driver.
    pub fn change(&self, offset: usize, bytes: &[u8]) {
        {
            let mut state = self.state();
            let Some(old) = state.bytes.get_mut(offset..).and_then(|rest| rest.get_mut(..bytes.len())) else { return };
            old.copy_from_slice(bytes);
            state.generation = state.generation.wrapping_add(1);
        }
        self.interrupts.config();
    }

    /// Fills `data` from `offset`; zeros past the end.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        let state = self.state();
        for (to, from) in data.iter_mut().zip(state.bytes.iter().skip(offset)) {
            *to = *from;
        }
    }

    /// How often it has changed.
    pub(super) fn generation(&self) -> u8 {
        self.state().generation
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An eventfd that doesn't block.
pub(super) fn eventfd() -> nix::Result<EventFd> {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
}

/// Signals an eventfd. A full counter is as good as a signalled one.
pub(super) fn ring_bell(event: &EventFd) {
    let _ = event.write(1);
}
