//! What the API thread and a vCPU's thread share: orders one way, where the vCPU stands the other way.
//!
//! Nothing of it is locked on the exit path: the vCPU's thread looks at one flag between entries.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api_channel::call::CpuidEntry;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::Refusal;
use crate::kvm::RunPage;
use crate::vm::Notices;

/// One vCPU's meeting place of its thread and the API thread.
#[derive(Debug)]
pub(crate) struct Shared {
    /// The vCPU's number.
    pub(crate) index: u32,
    /// What KVM shares with it.
    pub(crate) page: RunPage,
    /// What it counted.
    pub(crate) counters: Counters,
    /// Set whenever the slot changed: the thread looks at it between entries and while it waits.
    attention: AtomicBool,
    /// Wakes the thread where it sleeps on its lane.
    pub(crate) wake: EventFd,
    slot: Mutex<Slot>,
    changed: Condvar,
    /// Tells the API thread that a pause is complete.
    notices: Arc<Notices>,
}

#[derive(Debug)]
struct Slot {
    want: Want,
    /// The thread may not enter the guest meanwhile, whatever it wants.
    hold: bool,
    place: Place,
    command: Option<Command>,
    answer: Option<Answer>,
}

/// What the vCPU should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// Run the guest.
    Run,
    /// Finish the pending exit, then stay out.
    Pause,
    /// End the thread, whatever waits.
    Stop,
}

/// Where the vCPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the guest, or about to be.
    Running,
    /// Out of the guest with an exit unfinished, and not to enter before it has looked at its orders again.
    Held,
    /// Out of the guest, no exit pending.
    Out,
    /// Its lane is broken: out of the guest for ever.
    Stuck,
}

/// What a vCPU's thread does for the API thread, out of the guest.
#[derive(Debug)]
pub(crate) enum Command {
    /// Reads the records of these groups.
    Read(u64),
    /// Sets records.
    Write(Vec<u8>),
    /// Sets the CPUID table.
    SetCpuid(Vec<CpuidEntry>),
    /// Keeps the thread on these CPUs.
    Pin(Vec<u32>),
}

/// What came of it: records, or nothing.
pub(crate) type Answer = Result<Vec<u8>, Refusal>;

/// The thread has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stop;

/// What the thread does next.
#[derive(Debug)]
pub(crate) enum Next {
    /// Enter the guest.
    Enter,
    /// Finish the pending exit, then ask again.
    Settle,
    /// Do this, give the answer to [`Shared::answer`], then ask again.
    Do(Command),
}

impl Shared {
    /// A vCPU that is paused and has never run.
    pub(crate) fn new(index: u32, page: RunPage, notices: Arc<Notices>) -> Result<Self, Errno> {
        Ok(Self {
            index,
            page,
            notices,
            counters: Counters::default(),
            attention: AtomicBool::new(true),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            slot: Mutex::new(Slot { want: Want::Pause, hold: false, place: Place::Out, command: None, answer: None }),
            changed: Condvar::new(),
        })
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        // A thread that panicked left the slot as consistent as it found it: every change is one assignment.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // For the vCPU's thread.

    /// Whether the thread should look at its orders.
    pub(crate) fn called(&self) -> bool {
        self.attention.load(Ordering::Acquire)
    }

    /// Waits until there is something to do: never returns [`Next::Enter`] while the vCPU is paused or held. `pending` says
    /// whether an exit may be unfinished.
    pub(crate) fn attend(&self, pending: bool) -> Result<Next, Stop> {
        let mut slot = self.slot();
        loop {
            self.attention.store(false, Ordering::Release);
            match slot.want {
                Want::Stop => return Err(Stop),
                Want::Run if !slot.hold && slot.command.is_none() => {
                    slot.place = Place::Running;
                    return Ok(Next::Enter);
                }
                Want::Run => slot.place = if pending { Place::Held } else { Place::Out },
                Want::Pause if pending => {
                    // It settles without running the guest's code, so a hold need not wait for it; but KVM touches guest
                    // memory then, so memslots must.
                    if !slot.hold {
                        slot.place = Place::Running;
                        return Ok(Next::Settle);
                    }
                    slot.place = Place::Held;
                }
                Want::Pause => {
                    if slot.place != Place::Out {
                        slot.place = Place::Out;
                        self.notices.moved();
                    }
                }
            }
            if !pending && let Some(command) = slot.command.take() {
                return Ok(Next::Do(command));
            }
            self.changed.notify_all();
            slot = self.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Stands still out of the guest for a time, or until there is an order; for how long.
    pub(crate) fn stand(&self, time: Duration) -> Duration {
        let start = Instant::now();
        // An order is given under the lock.
        drop(self.changed.wait_timeout_while(self.slot(), time, |_| !self.called()));
        start.elapsed()
    }

    /// Takes notice of an order while the thread waits on its lane: it is out of the guest, and calls [`Shared::attend`] before
    /// it enters again.
    pub(crate) fn acknowledge(&self) -> Result<(), Stop> {
        let mut slot = self.slot();
        self.attention.store(false, Ordering::Release);
        if slot.want == Want::Stop {
            return Err(Stop);
        }
        slot.place = Place::Held;
        self.changed.notify_all();
        Ok(())
    }

    /// Pauses the vCPU from its own thread.
    pub(crate) fn park(&self) {
        let mut slot = self.slot();
        if slot.want == Want::Run {
            slot.want = Want::Pause;
        }
        self.attention.store(true, Ordering::Release);
    }

    /// Leaves the guest for ever, and waits to be stopped.
    pub(crate) fn stuck(&self) {
        let mut slot = self.slot();
        slot.place = Place::Stuck;
        self.notices.moved();
        self.changed.notify_all();
        while slot.want != Want::Stop {
            slot = self.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives the answer to a command.
    pub(crate) fn answer(&self, answer: Answer) {
        self.slot().answer = Some(answer);
        self.changed.notify_all();
    }

    // For the API thread.

    /// Gives an order. The caller kicks the thread afterwards.
    pub(crate) fn want(&self, want: Want) {
        let mut slot = self.slot();
        if slot.want != Want::Stop {
            slot.want = want;
        }
        self.call(slot);
    }

    /// Keeps the vCPU out of the guest, or no longer. The caller kicks the thread afterwards.
    pub(crate) fn hold(&self, hold: bool) {
        let mut slot = self.slot();
        slot.hold = hold;
        self.call(slot);
    }

    /// Makes the thread look at its orders, though nothing may have changed.
    pub(crate) fn nudge(&self) {
        self.call(self.slot());
    }

    fn call(&self, slot: MutexGuard<'_, Slot>) {
        self.attention.store(true, Ordering::SeqCst);
        self.changed.notify_all();
        drop(slot);
        self.page.leave();
    }

    /// What it was told, and where it is.
    pub(crate) fn standing(&self) -> (Want, Place) {
        let slot = self.slot();
        (slot.want, slot.place)
    }

    /// Waits until it is out of the guest, at most until `deadline`; says whether it is.
    pub(crate) fn out_by(&self, deadline: Instant) -> bool {
        let mut slot = self.slot();
        while slot.place == Place::Running {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            slot = self.changed.wait_timeout(slot, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Has the thread do something; it must be out of the guest with no exit pending.
    pub(crate) fn ask(&self, command: Command) -> Answer {
        let slot = self.command(command)?;
        self.answered(slot)
    }

    /// The same; where it takes longer than `limit`, `give_up` is called, which has what it waits for end.
    pub(crate) fn ask_in(&self, limit: Duration, command: Command, give_up: impl FnOnce()) -> Answer {
        let slot = self.command(command)?;
        let (slot, waited) = self
            .changed
            .wait_timeout_while(slot, limit, |slot| slot.answer.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            give_up();
        }
        self.answered(slot)
    }

    fn command(&self, command: Command) -> Result<MutexGuard<'_, Slot>, Refusal> {
        let mut slot = self.slot();
        // One that was told to run is no longer out, though its thread may not have got so far.
        if slot.place != Place::Out || slot.want != Want::Pause {
            return Err(Refusal::state(format!("vCPU {} runs: pause it first", self.index)));
        }
        slot.command = Some(command);
        self.changed.notify_all();
        Ok(slot)
    }

    fn answered(&self, mut slot: MutexGuard<'_, Slot>) -> Answer {
        loop {
            if let Some(answer) = slot.answer.take() {
                return answer;
            }
            slot = self.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Counters of a vCPU, written by its thread alone.
#[derive(Debug, Default)]
pub(crate) struct Counters([AtomicU64; NAMES.len()]);

/// What is counted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Count {
    Pio,
    Mmio,
    Msr,
    Hypercall,
    Eoi,
    Report,
    OtherKind,
    String,
    Posted,
    PostedFull,
    Doorbell,
    Sleep,
    SleepLate,
    SpinNs,
    WaitNs,
    Unclaimed,
    Failed,
    LineStale,
    RingFull,
    StandNs,
}

const NAMES: [&str; 20] = [
    "shim.pio",
    "shim.mmio",
    "shim.msr",
    "shim.hypercall",
    "shim.eoi",
    "shim.report",
    "shim.other",
    "shim.string",
    "shim.posted",
    "shim.posted_full",
    "shim.doorbell",
    "shim.sleep",
    "shim.sleep_late",
    "shim.spin_ns",
    "shim.wait_ns",
    "shim.unclaimed",
    "shim.device_failed",
    "shim.line_stale",
    "shim.ring_full",
    "shim.stand_ns",
];

impl Counters {
    /// Adds to a counter. Only the vCPU's thread may: there is no read-modify-write.
    pub(crate) fn add(&self, count: Count, n: u64) {
        let counter = &self.0[count as usize];
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Every counter by its name.
    pub(crate) fn read(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        NAMES.into_iter().zip(self.0.iter().map(|n| n.load(Ordering::Relaxed)))
    }
}

const _: () = assert!(Count::StandNs as usize + 1 == NAMES.len());
