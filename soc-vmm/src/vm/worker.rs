//! The one thread that serves a VM's IOREQs: takes requests from the lanes, asks the devices, finishes the requests.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ioreq_ring::{
    BusError, BusMemory, Completion, Direction, Kind, LaneError, Request, SocIdle, SocLane, Status, drain,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pcie_function::{Doorbell, SocFunction, Window};
use tokio::sync::oneshot;

use super::counters::Counters;
use super::guest::Relay;
use super::lines::Lines;
use super::string::StringAccess;
use crate::bus::{Access, Answer, Bus, Deferred, LateAnswer, RequestId, Wake};
use crate::devices::IoApic;
use crate::hyperv::Hyperv;
use crate::persist::{Moves, StateError, States};

/// Polling goes on for at most this long without work, where work used to come soon.
const SPIN_MOST: Duration = Duration::from_micros(200);
/// And for this long where it didn't.
const SPIN_LEAST: Duration = Duration::from_micros(2);
/// So many empty rounds are made without a pause between them: about as long as a guest takes from exit to exit.
const QUICK_ROUNDS: u32 = 1024;
/// The clock is looked at once in so many empty rounds.
const ROUNDS: u32 = 32;
/// The longest sleep (docs/wire.md §5): a doorbell that was lost costs its vCPU this much, not the VM.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// The machine's buses.
#[derive(Default)]
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Memory.
    pub memory: Bus,
}

impl Buses {
    fn halt(&mut self) {
        self.ports.halt();
        self.memory.halt();
    }

    fn is_halted(&mut self) -> bool {
        self.ports.is_halted() && self.memory.is_halted()
    }

    fn blocker(&self) -> Option<String> {
        self.ports.blocker().or_else(|| self.memory.blocker())
    }

    fn go_on(&mut self) {
        self.ports.go_on();
        self.memory.go_on();
    }

    fn save_into(&self, states: &mut States) {
        self.ports.save_into(states);
        self.memory.save_into(states);
    }

    fn load(&mut self, states: &mut States) -> Result<(), StateError> {
        self.ports.load(states)?;
        self.memory.load(states)
    }
}

/// A lane of a function of type `F`.
pub(super) type Lane<F> = SocLane<<F as SocFunction>::Card, <F as SocFunction>::Remote, Window>;

/// What other threads ask the worker for. Who asked may have gone.
#[derive(Debug)]
pub(super) enum Command {
    /// Reset every device.
    Reset(oneshot::Sender<()>),
    /// Halt every device; answered once nothing is under way. No vCPU is in the guest.
    Halt(oneshot::Sender<()>),
    /// Have the devices go on, which were halted or loaded.
    GoOn(oneshot::Sender<()>),
    /// Take the devices' states, which are halted, or put names and versions alone into what is given.
    Save(States, oneshot::Sender<States>),
    /// Tell why a device can't be moved, if one can't.
    Blocker(oneshot::Sender<Option<String>>),
    /// Give the devices these states.
    Load(States, oneshot::Sender<Result<(), StateError>>),
}

/// A worker on its thread; told to end when this is dropped.
#[derive(Debug)]
pub(super) struct Serving {
    commands: Option<Sender<Command>>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl Serving {
    /// Asks the worker for something. One that has ended, its function lost, does nothing.
    pub(super) fn command(&self, command: Command) {
        if let Some(commands) = &self.commands {
            let _ = commands.send(command);
        }
        self.waker.wake();
    }

    /// Ends the worker, and waits until it has let the function go.
    pub(super) fn end(mut self) {
        let thread = self.thread.take();
        drop(self);
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.commands.take());
        self.waker.wake();
    }
}

/// Wakes the worker.
#[derive(Debug)]
pub struct Waker {
    event: EventFd,
    woken: AtomicBool,
}

impl Waker {
    /// A waker.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn new() -> std::io::Result<Arc<Self>> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Arc::new(Self { event, woken: AtomicBool::new(false) }))
    }
}

impl Wake for Waker {
    fn wake(&self) {
        self.woken.store(true, Ordering::Release);
        // Full is as good as woken.
        let _ = self.event.write(1);
    }
}

/// The worker, on its thread.
pub(super) struct Worker<F: SocFunction> {
    pub(super) function: Arc<F>,
    pub(super) lanes: Vec<Lane<F>>,
    /// The lanes' words in the state file.
    pub(super) private: Window,
    /// The vector that wakes each lane's vCPU.
    pub(super) vectors: Vec<u32>,
    pub(super) idle: SocIdle<F::Remote>,
    pub(super) buses: Buses,
    /// The I/O APIC, if it is not the host's.
    pub(super) io_apic: Option<IoApic>,
    /// There where the vCPUs have a SynIC.
    pub(super) hyperv: Option<Arc<Hyperv>>,
    pub(super) lines: Arc<Lines<F>>,
    pub(super) relay: Arc<Relay>,
    pub(super) counters: Arc<Counters>,
    pub(super) waker: Arc<Waker>,
    pub(super) commands: Receiver<Command>,
    /// Who wait until every device is halted.
    pub(super) halting: Vec<oneshot::Sender<()>>,
}

/// Why the worker ended.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("vCPU {0}'s lane: {1}")]
    Lane(usize, LaneError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error("its state file was truncated; leave the files in the run directory alone while their VM runs")]
    StateFile,
    #[error("can't wait for work: {0}")]
    Poll(#[from] nix::Error),
}

/// Requests whose device answers later.
struct Late {
    sender: Sender<LateAnswer>,
    receiver: Receiver<LateAnswer>,
    /// By lane.
    waiting: Vec<Option<Request>>,
    wake: Arc<dyn Wake>,
}

impl<F: SocFunction> Worker<F> {
    /// Serves on a thread of its own; `commands` are those that it takes.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn start(self, commands: Sender<Command>) -> std::io::Result<Serving> {
        let waker = self.waker.clone();
        let thread = std::thread::Builder::new().name("ioreq".into()).spawn(|| self.run())?;
        Ok(Serving { commands: Some(commands), waker, thread: Some(thread) })
    }

    /// Serves until it is told to stop, or the function is lost.
    fn run(mut self) {
        if let Err(fault) = self.serve() {
            self.relay.lost(fault.to_string());
        }
    }

    fn serve(&mut self) -> Result<(), Fault> {
        let (sender, receiver) = channel();
        let waiting = self.lanes.iter().map(|_| None).collect();
        let mut late = Late { sender, receiver, waiting, wake: self.waker.clone() };
        let mut spin = Spin::new();
        self.lines.serve_here();
        self.idle.awake();
        loop {
            if self.waker.woken.load(Ordering::Relaxed) && self.waker.woken.swap(false, Ordering::Acquire) {
                let _ = self.waker.event.read();
                if self.obey(&mut late)? {
                    return Ok(());
                }
            }
            if self.round(&mut late)? {
                // One who takes over would find nothing there.
                if self.private.is_lost() {
                    return Err(Fault::StateFile);
                }
                spin.worked();
                continue;
            }
            spin.relax();
            if !spin.looks_at_clock() {
                continue;
            }
            let now = Instant::now();
            self.keep_deadlines(now);
            if spin.is_over(now) {
                self.sleep()?;
                spin.slept(now);
            }
        }
    }

    /// One look at every lane; whether there was work.
    fn round(&mut self, late: &mut Late) -> Result<bool, Fault> {
        let mut worked = false;
        for i in 0..self.lanes.len() {
            if let Some(request) = self.lanes[i].poll().map_err(|e| Fault::Lane(i, e))? {
                worked = true;
                self.drain(late)?;
                self.request(i, request, late)?;
            }
        }
        if !worked {
            worked = self.drain(late)?;
        }
        Ok(worked)
    }

    /// Serves all posted writes; whether there were any.
    fn drain(&mut self, late: &Late) -> Result<bool, Fault> {
        let Self { lanes, buses, counters, .. } = self;
        let mut served = 0;
        drain(lanes, |lane, write| {
            served += 1;
            let request = &write.request;
            let access = access(lane, request);
            let id = RequestId { vcpu: lane as u16, sequence: 0 };
            // Nobody waits: what a device would answer later, or failed at, is only counted.
            let reply = Deferred::new(id, &late.sender, &late.wake);
            let answer = match request.kind {
                Kind::PIO => buses.ports.write(request.address, request.data, &access, reply),
                _ => buses.memory.write(request.address, request.data, &access, reply),
            };
            if matches!(answer, Answer::Unclaimed) {
                counters.unclaimed.add(1);
            }
        })
        .map_err(|(lane, error)| Fault::Lane(lane, error))?;
        self.counters.posted.add(served);
        Ok(served != 0)
    }

    fn request(&mut self, lane: usize, request: Request, late: &mut Late) -> Result<(), Fault> {
        self.counters.exit(request.kind);
        self.lines.gather();
        let answer = match request.kind {
            Kind::PIO if request.string => self.string(lane, &request, late),
            Kind::PIO | Kind::MMIO => self.access(lane, &request, late),
            Kind::EXIT_REPORT => {
                self.relay.report(lane, &request);
                Answer::Done(0)
            }
            Kind::EOI => {
                if let Some(io_apic) = &self.io_apic {
                    io_apic.end(request.address as u8);
                }
                Answer::Done(0)
            }
            Kind::HV_HYPERCALL | Kind::HV_SYNIC if self.hyperv.is_some() => self.hyperv(lane, &request),
            _ => {
                return self.finish(lane, Completion { status: Status::UNKNOWN_KIND, ..Completion::ok(u64::MAX) });
            }
        };
        if matches!(answer, Answer::Deferred) {
            self.lines.send_gathered();
            late.waiting[lane] = Some(request);
            return Ok(());
        }
        self.answer(lane, &request, answer)
    }

    /// One access of a device.
    fn access(&mut self, lane: usize, request: &Request, late: &Late) -> Answer {
        let access = access(lane, request);
        let id = RequestId { vcpu: lane as u16, sequence: self.lanes[lane].sequence() };
        let reply = Deferred::new(id, &late.sender, &late.wake);
        let bus = if request.kind == Kind::PIO { &mut self.buses.ports } else { &mut self.buses.memory };
        match request.direction {
            Direction::Read => bus.read(request.address, &access, reply),
            Direction::Write => bus.write(request.address, request.data, &access, reply),
        }
    }

    /// What a guest with Hyper-V's interfaces has for them.
    fn hyperv(&self, lane: usize, request: &Request) -> Answer {
        let (Some(hyperv), [a, b, c, _]) = (&self.hyperv, request.words.unwrap_or_default()) else {
            return Answer::Unclaimed;
        };
        if request.kind == Kind::HV_HYPERCALL {
            return Answer::Done(hyperv.hypercall(request.address, [a, b]));
        }
        hyperv.changed(lane as u16, [a, b, c]);
        Answer::Done(0)
    }

    /// A string: its elements one after another. A device that defers an element of a string is answered for: all ones.
    fn string(&mut self, lane: usize, request: &Request, late: &Late) -> Answer {
        let mut string = StringAccess::new(request);
        if request.direction == Direction::Write {
            self.lanes[lane].outs().copy_out(0, string.bytes());
        }
        for element in 0..string.count() {
            let one = string.element(request, element);
            match self.access(lane, &one, late) {
                Answer::Done(value) => string.set(element, value),
                Answer::Unclaimed => {
                    self.counters.unclaimed.add(1);
                    string.set(element, u64::MAX);
                }
                Answer::Failed(why) => return Answer::Failed(why),
                Answer::Deferred => return Answer::Failed("a device deferred part of a string"),
            }
        }
        if request.direction == Direction::Read {
            self.lanes[lane].ins().copy_in(0, string.bytes());
        }
        Answer::Done(0)
    }

    /// Finishes a request as its device answered.
    fn answer(&mut self, lane: usize, request: &Request, answer: Answer) -> Result<(), Fault> {
        let mut completion = match answer {
            Answer::Done(value) => Completion::ok(value),
            Answer::Unclaimed => {
                self.counters.unclaimed.add(1);
                tracing::debug!(address = request.address, kind = request.kind.0, "nothing claims an access");
                Completion { status: Status::UNCLAIMED, ..Completion::ok(u64::MAX) }
            }
            Answer::Failed(why) => {
                self.counters.failed.add(1);
                tracing::debug!(address = request.address, why, "a device failed an access");
                Completion { status: Status::DEVICE_FAILED, ..Completion::ok(u64::MAX) }
            }
            Answer::Deferred => unreachable!("a deferred access is answered later"),
        };
        completion.lines = self.lines.gathered();
        completion.park = self.relay.take_park();
        self.finish(lane, completion)
    }

    fn finish(&mut self, lane: usize, completion: Completion) -> Result<(), Fault> {
        self.lanes[lane].complete(&completion).map_err(|e| Fault::Lane(lane, e))?;
        if self.lanes[lane].host_sleeps()? {
            self.counters.vectors.add(1);
            self.function.raise(self.vectors[lane]);
        }
        Ok(())
    }

    /// Does what other threads want; whether to end.
    fn obey(&mut self, late: &mut Late) -> Result<bool, Fault> {
        self.buses.ports.poll();
        self.buses.memory.poll();
        self.hyperv.iter().for_each(|hyperv| hyperv.poll());
        while let Ok(LateAnswer { id, answer }) = late.receiver.try_recv() {
            let lane = usize::from(id.vcpu);
            let current = self.lanes.get(lane).is_some_and(|lane| lane.sequence() == id.sequence);
            // A ticket of a posted write, or of a request that is no longer there, finishes nothing.
            if let Some(request) = late.waiting.get_mut(lane).filter(|_| current).and_then(Option::take) {
                self.answer(lane, &request, answer)?;
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(Command::Reset(done)) => {
                    self.buses.ports.reset();
                    self.buses.memory.reset();
                    self.hyperv.iter().for_each(|hyperv| hyperv.reset());
                    let _ = done.send(());
                }
                Ok(Command::Halt(done)) => {
                    // The vCPUs that made them are out.
                    self.drain(late)?;
                    self.buses.halt();
                    self.hyperv.iter_mut().for_each(Moves::halt);
                    self.halting.push(done);
                }
                Ok(Command::GoOn(done)) => {
                    self.halting.clear();
                    self.buses.go_on();
                    self.hyperv.iter_mut().for_each(Moves::go_on);
                    let _ = done.send(());
                }
                Ok(Command::Save(states, done)) => {
                    let _ = done.send(self.save(states));
                }
                Ok(Command::Blocker(done)) => {
                    let _ = done.send(self.buses.blocker());
                }
                Ok(Command::Load(states, done)) => {
                    let _ = done.send(self.load(states));
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(true),
            }
        }
        if !self.halting.is_empty() && self.buses.is_halted() {
            for done in self.halting.drain(..) {
                let _ = done.send(());
            }
        }
        Ok(false)
    }

    fn save(&self, mut states: States) -> States {
        self.buses.save_into(&mut states);
        self.hyperv.iter().for_each(|hyperv| hyperv.save_into("", &mut states));
        states
    }

    fn load(&mut self, mut states: States) -> Result<(), StateError> {
        self.buses.load(&mut states)?;
        self.hyperv.iter_mut().try_for_each(|hyperv| hyperv.load("", &mut states))?;
        states.end()
    }

    fn deadline(&self) -> Option<Instant> {
        [self.buses.ports.deadline(), self.buses.memory.deadline()].into_iter().flatten().min()
    }

    fn keep_deadlines(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.buses.ports.poll();
            self.buses.memory.poll();
        }
    }

    /// Sleeps until a doorbell, a waker, a deadline, or the function's loss, and never for long.
    fn sleep(&mut self) -> Result<(), Fault> {
        self.function.check()?;
        self.idle.about_to_sleep()?;
        if self.lanes.iter().any(Lane::<F>::has_work) {
            self.idle.awake();
            return Ok(());
        }
        self.counters.sleeps.add(1);
        let left = self.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()));
        // Rounded up: to wake a little early would only mean to sleep once more.
        let left = left.map_or(LONGEST_SLEEP, |left| (left + Duration::from_millis(1)).min(LONGEST_SLEEP));
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let bell = self.function.doorbell(Doorbell::Lanes);
        let lost = self.function.lost_event();
        let mut fds = [bell, self.waker.event.as_fd(), lost].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let [rung, _, gone] = fds.map(|fd| fd.any().unwrap_or(true));
        if rung {
            self.counters.doorbells.add(1);
            take(bell);
        }
        if gone {
            self.function.check()?;
        }
        self.idle.awake();
        Ok(())
    }
}

/// Takes what an eventfd has counted.
fn take(event: BorrowedFd<'_>) {
    let _ = nix::unistd::read(event, &mut [0; 8]);
}

fn access(lane: usize, request: &Request) -> Access {
    Access { vcpu: lane as u16, host_tsc: request.host_tsc, len: request.length as u8 }
}

/// How long to poll before sleeping: long where work came soon after the last sleep began, short where it didn't.
struct Spin {
    budget: Duration,
    idle_since: Option<Instant>,
    rounds: u32,
}

impl Spin {
    fn new() -> Self {
        Self { budget: SPIN_LEAST, idle_since: None, rounds: 0 }
    }

    fn worked(&mut self) {
        self.idle_since = None;
        self.rounds = 0;
    }

    /// Gives the core's other thread a turn, once work isn't coming at once: the pause itself takes as long as a line from core to core.
    fn relax(&self) {
        if self.rounds >= QUICK_ROUNDS {
            std::hint::spin_loop();
        }
    }

    fn looks_at_clock(&mut self) -> bool {
        self.rounds = self.rounds.wrapping_add(1);
        self.rounds.is_multiple_of(ROUNDS)
    }

    fn is_over(&mut self, now: Instant) -> bool {
        now - *self.idle_since.get_or_insert(now) >= self.budget
    }

    fn slept(&mut self, since: Instant) {
        let soon = since.elapsed() < SPIN_MOST * 4;
        self.budget = if soon { SPIN_MOST } else { (self.budget / 2).max(SPIN_LEAST) };
        self.worked();
    }
}
