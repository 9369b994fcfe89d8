//! What a device has to work with from DRIVER_OK to the next reset, and what makes it the device that it is.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::epoll::EpollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Chain, Interrupts, Lease, QueueError, Ring, RingLayout, RingPosition};
use crate::memory::{Borrower, RamFiles};
use crate::persist::{StateError, States};

/// What a device does. It runs on the device's own thread and may block there.
pub trait Engine: Send {
    /// Does what there is to do, and says what to wait for. It is called after each kick and after each thing waited for; a call too
    /// many costs nothing. Before it waits it has allowed kicks on every queue from which it wants more.
    ///
    /// # Errors
    /// The driver broke a queue, or took its memory back: the session is over.
    fn serve(&mut self, session: &mut Session) -> Result<Wait, QueueError>;

    /// Called in place of [`Engine::serve`] while the session is to halt ([`Control::halt`]): comes to a point from which it can go on, here or
    /// in another process. There nothing is under way, everything pushed is published, and what was taken and not given back is part of
    /// [`Engine::save_into`]. What to wait for before the next call; none: it is there. [`Engine::serve`] may come instead at any time.
    ///
    /// # Errors
    /// As [`Engine::serve`].
    fn halt(&mut self, session: &mut Session) -> Result<Option<Wait>, QueueError>;

    /// Puts its own state into `states`, under a name that says what kind of device it is: of `session`, which is halted, and of what is
    /// there without one.
    fn save_into(&self, at: &str, states: &mut States, session: Option<&Session>);

    /// Takes that state out of `states` as one that may come from a peer. `session` has been served by nobody here, but it is not a new one for
    /// its driver; `config` is as it was saved.
    ///
    /// # Errors
    /// It isn't there, or none that the device can have.
    fn load(
        &mut self,
        at: &str,
        states: &mut States,
        config: &Config,
        session: Option<&mut Session>,
    ) -> Result<(), StateError>;

    /// Whether what its source tells of is there, where that can be told without a system call; none: it can't.
    fn is_ready(&mut self) -> Option<bool> {
        None
    }

    /// Waits for what it has left under way outside when its last session ended, before the device moves. It may take its time.
    fn settle(&mut self) {}

    /// The session is over, by the driver or by an error. What it lent ([`Control::lend`]) it takes back; it may take its time.
    fn end(&mut self, session: &mut Session) {
        let _ = session;
    }

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
    halting: AtomicBool,
    lent: AtomicBool,
}

impl Control {
    /// For a session over the memory of `lease`.
    ///
    /// # Errors
    /// There is no more room for descriptors in this process.
    pub fn new(lease: Lease) -> nix::Result<Self> {
        Ok(Self {
            lease: Arc::new(lease),
            stop: eventfd()?,
            needs_reset: AtomicBool::new(false),
            halting: AtomicBool::new(false),
            lent: AtomicBool::new(false),
        })
    }

    /// Has the session halt at the next point from which it can go on, or not any more.
    pub(super) fn halt(&self, halting: bool) {
        self.halting.store(halting, Ordering::Release);
        ring_bell(&self.stop);
    }

    /// Whether it is to halt, or is halted.
    pub(super) fn is_halting(&self) -> bool {
        self.halting.load(Ordering::Acquire)
    }

    /// Ends the session: on return it reaches the guest's memory no more, but through who borrowed it ([`Control::is_lent`]).
    pub fn end(&self) {
        self.lease.revoke();
        ring_bell(&self.stop);
    }

    /// The files of guest memory, for somebody else to map; none: it is not in files.
    ///
    /// # Errors
    /// The session is over.
    pub(super) fn lend(&self, borrower: &Arc<Borrower>) -> Result<Option<RamFiles>, QueueError> {
        // Before the session ends, if at all: who ends it sees it.
        self.lease.lend(borrower, || self.lent.store(true, Ordering::Release))
    }

    /// Nobody else reaches guest memory any more.
    pub(super) fn take_back(&self) {
        self.lent.store(false, Ordering::Release);
    }

    /// Whether somebody else may reach guest memory, also when the session is over.
    pub(super) fn is_lent(&self) -> bool {
        self.lent.load(Ordering::Acquire)
    }

    /// Readable once the session has ended, or is to halt, or no more; see [`Control::hear`].
    pub(super) fn stopped(&self) -> BorrowedFd<'_> {
        self.stop.as_fd()
    }

    /// Hears what [`Control::stopped`] tells of.
    ///
    /// # Errors
    /// The session is over.
    pub(super) fn hear(&self) -> Result<(), QueueError> {
        // Before the look: who ends it afterwards signals it again.
        let _ = self.stop.read();
        self.lease.during(|| ())
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
    /// Signalled for the driver's kicks that go past this process.
    bypass: Option<Arc<EventFd>>,
    /// A kick was heard since somebody asked.
    kicked: bool,
    /// Whether the device is to be kicked while it sleeps.
    wanted: bool,
}

impl Queue {
    /// Queue `index` of a device. `kick` is signalled when the driver has something for it.
    pub fn new(ring: Ring, index: usize, interrupts: Arc<Interrupts>, kick: Arc<EventFd>) -> Self {
        Self { ring, index, interrupts, kick, bypass: None, kicked: false, wanted: false }
    }

    /// Whose kicks may come by another eventfd too, which somebody else reads.
    pub(super) fn with_bypass(mut self, bypass: Option<Arc<EventFd>>) -> Self {
        self.bypass = bypass;
        self
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

    /// The eventfd for kicks that go past this process, if there is one.
    pub(super) fn bypass(&self) -> Option<&Arc<EventFd>> {
        self.bypass.as_ref()
    }

    /// Hears a kick.
    pub(super) fn hear(&mut self) {
        // It doesn't block, and what it counts doesn't matter.
        let _ = self.kick.read();
        self.kicked = true;
    }

    /// Whether a kick was heard here since this was last asked.
    pub(super) fn take_kicked(&mut self) -> bool {
        std::mem::take(&mut self.kicked)
    }

    /// Where it is.
    pub(super) fn layout(&self) -> RingLayout {
        self.ring.layout()
    }

    /// Tells the driver of what somebody else has used.
    pub(super) fn interrupt(&self) {
        self.interrupts.queue(self.index);
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

    /// See [`Ring::retake`].
    ///
    /// # Errors
    /// As there.
    pub fn retake(&mut self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        self.ring.retake(head, chain)
    }

    /// See [`Ring::move_to`].
    pub(super) fn move_to(&mut self, next: u16) {
        self.ring.move_to(next);
    }

    /// How far it is.
    pub(super) fn position(&self) -> RingPosition {
        self.ring.position()
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
        self.wanted = false;
        self.ring.hold_kicks()
    }

    /// Says that the device is to go on when the driver makes something available; whether it has done so already. The driver itself is
    /// told when the device goes to sleep ([`Queue::arm`]).
    ///
    /// # Errors
    /// As [`Ring::has_news`].
    pub fn allow_kicks(&mut self) -> Result<bool, QueueError> {
        self.wanted = true;
        self.ring.has_news()
    }

    /// Whether there is something that the device wants.
    ///
    /// # Errors
    /// As [`Ring::has_news`].
    pub(super) fn has_news(&mut self) -> Result<bool, QueueError> {
        if self.wanted { self.ring.has_news() } else { Ok(false) }
    }

    /// Asks the driver for kicks where the device wants them; whether there is something already, for which none may come.
    ///
    /// # Errors
    /// As [`Ring::allow_kicks`].
    pub(super) fn arm(&mut self) -> Result<bool, QueueError> {
        if self.wanted { self.ring.allow_kicks() } else { Ok(false) }
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

    /// Its bytes, and how often they have changed.
    pub(super) fn save(&self) -> (Vec<u8>, u8) {
        let state = self.state();
        (state.bytes.clone(), state.generation)
    }

    /// Makes it what it was; whether it has as many bytes.
    #[must_use]
    pub(super) fn restore(&self, bytes: &[u8], generation: u8) -> bool {
        let mut state = self.state();
        let fits = state.bytes.len() == bytes.len();
        if fits {
            state.bytes.copy_from_slice(bytes);
            state.generation = generation;
        }
        fits
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
