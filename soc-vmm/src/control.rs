//! How the rest of soc-vmm asks a VM for things: orders in, events and states out.
//!
//! [`channel`] makes the two ends. Any number of [`VmHandle`]s (monitors, the console, signals) ask; the VM's one control loop
//! holds the [`VmControl`]:
//!
//! ```text
//! while let Some(order) = control.next().await {
//!     let outcome = match order.action() { Action::Pause => vm.pause().await, … };
//!     control.finish(order, outcome);
//! }
//! ```
//!
//! The rules (what a command means in which state, which event goes with which change) are here once: the loop sees only
//! actions that are to be done, and [`VmControl::finish`] changes the state, tells the monitors, then answers who asked.

mod actions;
mod cdrom;
mod cpus;
mod devices;
mod event;
mod handle;
mod host;
mod listen;
mod run_dir;
mod run_state;
mod signals;
mod slots;
mod stand_ins;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::ahci::TrayListener;
use crate::chardev::Chardevs;
use crate::cpuid::HostCpu;
use crate::cpus::{CpuListener, CpusHandle};
use crate::jobs::Jobs;
use crate::migrate::{MigrateError, Migration, Movable, Way};
use crate::nbd::Exports;
use crate::slots::{DeviceListeners, SlotListener, SlotsHandle};

use cpus::CpusPlace;
use host::HostPlace;
use slots::SlotsPlace;

pub use actions::{Actions, Chosen};
pub use cdrom::{BALLOON_ID, CDROM_ID, CdromDrive, CdromSlot};
pub use event::{BlockJobFigures, CrashAction, Event, EventKind, Heard, IoAction, IoOperation, ShutdownCause};
pub use handle::VmHandle;
pub use listen::{ListenError, ListeningSocket};
pub use run_dir::{Claim, NameError, RunDir, RunDirError, VmName};
pub use run_state::RunState;
pub use signals::end_on_signals;
pub use stand_ins::StandIns;

/// Commands that may wait for the VM; who asks more waits for room.
const QUEUED_COMMANDS: usize = 16;
/// Events a monitor may be behind; one that is further behind is dropped.
const QUEUED_EVENTS: usize = 256;
/// How long a command may take: an emulated server starves for seconds.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// What a VM is, as lists show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// Its vCPUs.
    pub cpus: u16,
    /// Its RAM in bytes.
    pub memory: u64,
    /// Its function, as it was named on the command line.
    pub function: String,
}

/// Makes the two ends of a VM's control; the VM is in [`RunState::Prelaunch`].
pub fn channel(info: VmInfo) -> (VmHandle, VmControl) {
    let (commands_in, commands) = mpsc::channel(QUEUED_COMMANDS);
    let (state_in, state) = watch::channel(RunState::Prelaunch);
    let (events, _) = broadcast::channel(QUEUED_EVENTS);
    let (built_in, built) = watch::channel(false);
    let (quits, quit) = watch::channel(None);
    let cdrom = CdromSlot::default();
    let slots = SlotsPlace::default();
    let cpus = CpusPlace::default();
    let host = HostPlace::default();
    let migration = Arc::new(Migration::new(events.downgrade()));
    let jobs = Arc::new(Jobs::new(events.downgrade()));
    let exports = Arc::new(Exports::new(events.downgrade()));
    let (actions, chardevs) = (Actions::default(), Arc::<Chardevs>::default());
    let handle = VmHandle {
        info: info.into(),
        commands: commands_in,
        state,
        events: events.downgrade(),
        cdrom: cdrom.clone(),
        slots: slots.clone(),
        cpus: cpus.clone(),
        host: host.clone(),
        migration: migration.clone(),
        jobs: jobs.clone(),
        exports: exports.clone(),
        built,
        quits,
        fds: Arc::default(),
        chardevs: chardevs.clone(),
        stand_ins: StandIns::default(),
        actions: actions.clone(),
    };
    (
        handle,
        VmControl {
            commands,
            state: state_in,
            events,
            autostart: true,
            emulates: false,
            cdrom,
            slots,
            cpus,
            host,
            migration,
            jobs,
            exports,
            incoming: None,
            actions,
            chardevs,
            built: built_in,
            quit,
        },
    )
}

/// Why a command was not done.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ControlError {
    /// Not in this state, or the VM couldn't.
    #[error("{0}")]
    Refused(String),
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
    /// No answer; the command may still be done later.
    #[error("the VM did not answer within {} s", COMMAND_TIMEOUT.as_secs())]
    Timeout,
}

#[derive(Debug)]
struct Request {
    command: Command,
    reply: Reply,
}

/// Who waits for a command; what is not a question is answered without counters.
type Reply = oneshot::Sender<Result<Counters, ControlError>>;

#[derive(Clone, Copy, Debug)]
enum Command {
    Count,
    Stop,
    Cont,
    Reset,
    Powerdown,
    Quit(ShutdownCause),
}

/// Counters by name.
pub type Counters = BTreeMap<String, u64>;

/// Something that the VM's control loop is to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Count: end the order by [`VmControl::answer`].
    Count,
    /// Take the vCPUs out of the guest. It runs.
    Pause,
    /// Let the vCPUs run. It doesn't.
    Resume,
    /// Reset machine, vCPUs and lanes; the vCPUs run on afterwards if they ran before ([`VmControl::state`]).
    Reset,
    /// Press the ACPI power button.
    PowerButton,
    /// Stop and let everything go; the loop ends after [`VmControl::finish`].
    Quit(ShutdownCause),
}

/// An action and who waits for it. Dropped unfinished, it tells the asker that the VM has ended.
#[derive(Debug)]
#[must_use = "someone waits for it: give it to VmControl::finish"]
pub struct Order {
    action: Action,
    reply: Reply,
}

impl Order {
    /// What to do.
    pub fn action(&self) -> Action {
        self.action
    }
}

/// The VM's end: its control loop takes orders from it and reports what the guest does by itself.
#[derive(Debug)]
pub struct VmControl {
    commands: mpsc::Receiver<Request>,
    state: watch::Sender<RunState>,
    events: broadcast::Sender<Event>,
    /// Whether the vCPUs run once the VM is built.
    autostart: bool,
    /// Whether it stands in for QEMU.
    emulates: bool,
    cdrom: CdromSlot,
    slots: SlotsPlace,
    cpus: CpusPlace,
    host: HostPlace,
    migration: Arc<Migration>,
    jobs: Arc<Jobs>,
    exports: Arc<Exports>,
    /// Where the guest comes from, until it is waited for there.
    incoming: Option<Way>,
    actions: Actions,
    built: watch::Sender<bool>,
    /// Why it is to end, as soon as somebody wants it to, whatever is done for others meanwhile.
    quit: watch::Receiver<Option<ShutdownCause>>,
    chardevs: Arc<Chardevs>,
}

impl VmControl {
    /// What resets, powering off and panics come to.
    pub fn actions(&self) -> Chosen {
        self.actions.chosen()
    }

    /// Whether the vCPUs run once the VM is built: yes, if nobody says otherwise.
    pub fn autostart(&self) -> bool {
        self.autostart
    }

    /// The VM is lost as one of QEMU's is: without an event, by the end of its monitors.
    pub fn emulate(&mut self) {
        self.emulates = true;
    }

    /// Sets [`VmControl::autostart`].
    pub fn set_autostart(&mut self, autostart: bool) {
        self.autostart = autostart;
    }

    /// Makes those who hear of a CD-ROM drive's tray, by its name, and tell monitors.
    pub fn tray_listeners(&self) -> impl Fn(&str) -> Arc<dyn TrayListener> + Send + Sync + use<> {
        let events = self.events.downgrade();
        move |id| Arc::new(cdrom::Tray(events.clone(), id.to_owned()))
    }

    /// The machine has these CD-ROM drives.
    pub fn has_cdroms(&self, drives: Vec<CdromDrive>) {
        self.cdrom.fill(drives);
    }

    /// Who hears of devices that were taken out, and tells monitors.
    pub fn slot_listener(&self) -> Arc<dyn SlotListener> {
        Arc::new(slots::Gone {
            events: self.events.downgrade(),
            chardevs: self.chardevs.clone(),
            jobs: self.jobs.clone(),
        })
    }

    /// The jobs on its disks.
    pub fn jobs(&self) -> &Arc<Jobs> {
        &self.jobs
    }

    /// Its way elsewhere, or here from elsewhere.
    pub fn migration(&self) -> &Arc<Migration> {
        &self.migration
    }

    /// The disks that it shows.
    pub fn exports(&self) -> &Arc<Exports> {
        &self.exports
    }

    /// Who hear of what devices meet, and tell monitors.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn device_listeners(&self) -> DeviceListeners {
        let events = Arc::new(devices::DeviceEvents::new(self.events.downgrade()));
        DeviceListeners { disks: events.clone(), ports: events.clone(), balloons: events }
    }

    /// The machine is built, with these slots.
    pub fn has_slots(&self, slots: SlotsHandle) {
        self.slots.fill(slots);
    }

    /// The machine is built, and all that belongs to it was told.
    pub fn is_built(&self) {
        self.built.send_replace(true);
    }

    /// The machine is built, and moves by this.
    pub fn has_mover(&self, mover: Arc<dyn Movable>) {
        self.migration.fill(mover);
    }

    /// Who hears of processors, and tells monitors.
    pub fn cpu_listener(&self) -> Arc<dyn CpuListener> {
        Arc::new(cpus::Teller(self.events.downgrade()))
    }

    /// The machine is built, with these processors.
    pub fn has_cpus(&self, cpus: CpusHandle) {
        self.cpus.fill(cpus);
    }

    /// The host was asked what processors it can give; `None`: there is none to ask.
    pub fn has_host(&self, host: Option<HostCpu>) {
        self.host.fill(host);
    }

    /// Waits for the order to quit while the VM is being built: returns when it came, and waits for ever if nobody is left who could
    /// give it. `stop` and `cont` say meanwhile whether the VM is to run once it is built; nothing else can be done to it. Safe to
    /// cancel.
    pub async fn told_to_quit(&mut self) {
        while let Some(Request { command, reply }) = self.commands.recv().await {
            let mut answer = Ok(Counters::new());
            match command {
                Command::Stop => self.autostart = false,
                Command::Cont => self.autostart = true,
                Command::Quit(cause) => self.ends(cause),
                Command::Count | Command::Reset | Command::Powerdown => {
                    answer = Err(ControlError::Refused("the VM is still being built".into()));
                }
            }
            // Who asked may have gone.
            let _ = reply.send(answer);
            if matches!(command, Command::Quit(_)) {
                return;
            }
        }
        std::future::pending::<()>().await;
    }

    /// The next thing to do; commands that are nothing to do or not legal now are answered on the way. `None`: no handle is
    /// left. Safe to cancel: no order is lost.
    pub async fn next(&mut self) -> Option<Order> {
        loop {
            let Request { command, reply } = self.commands.recv().await?;
            if self.state() == RunState::Inmigrate && matches!(command, Command::Stop | Command::Cont) {
                self.autostart = matches!(command, Command::Cont);
                // Who asked may have gone.
                let _ = reply.send(Ok(Counters::new()));
                continue;
            }
            match decide(command, self.state()) {
                Decision::Do(action) => return Some(Order { action, reply }),
                // Who asked may have gone: then nobody wants the answer.
                Decision::Answer(answer) => drop(reply.send(answer.map(|()| Counters::new()))),
            }
        }
    }

    /// Waits until somebody wants the VM to end, and why, beside what is done for others; for ever if nobody is left who could.
    pub fn wanted_to_end(&self) -> impl Future<Output = ShutdownCause> + use<> {
        let mut quit = self.quit.clone();
        async move {
            match quit.wait_for(Option::is_some).await.map(|cause| *cause) {
                Ok(Some(cause)) => cause,
                Ok(None) | Err(_) => std::future::pending().await,
            }
        }
    }

    /// Ends an order. Done: the state changes, monitors hear of it, then the asker. Failed: only the asker hears why, unless
    /// [`VmControl::stopped`] said before what became of the VM.
    pub fn finish(&mut self, order: Order, outcome: Result<(), String>) {
        if outcome.is_ok() {
            match order.action {
                // The guest may have ended or failed while the order was carried out; that state stands.
                Action::Pause if self.state().is_running() => self.enter(RunState::Paused),
                Action::Resume if self.state().may_become(RunState::Running) => self.enter(RunState::Running),
                Action::Pause | Action::Resume | Action::Count => {}
                Action::Reset => self.was_reset(ShutdownCause::HostQmpSystemReset),
                Action::PowerButton => self.tell(EventKind::Powerdown),
                Action::Quit(cause) => self.ends(cause),
            }
        }
        // Who asked may have gone.
        let _ = order.reply.send(outcome.map(|()| Counters::new()).map_err(ControlError::Refused));
    }

    /// Ends an order to which something else happens than what was asked for, which is told apart.
    pub fn finish_otherwise(&self, order: Order) {
        // Who asked may have gone.
        let _ = order.reply.send(Ok(Counters::new()));
    }

    /// Ends an order that is a question.
    pub fn answer(&self, order: Order, counters: Counters) {
        // Who asked may have gone.
        let _ = order.reply.send(Ok(counters));
    }

    /// The state now.
    pub fn state(&self) -> RunState {
        *self.state.borrow()
    }

    /// The vCPUs run for the first time, without a command (no `--paused`).
    pub fn started(&mut self) {
        self.enter(RunState::Running);
    }

    /// The guest reset the machine, and the reset is done.
    pub fn guest_reset(&mut self) {
        self.was_reset(ShutdownCause::GuestReset);
    }

    /// The guest told of its kernel's panic, and this becomes of it.
    pub fn panicked(&self, action: CrashAction) {
        self.tell(EventKind::GuestPanicked { action });
    }

    /// The guest told of its kernel's panic, and was stopped for that.
    ///
    /// # Panics
    /// It didn't run.
    pub fn stopped_by_panic(&mut self) {
        self.enter_for(RunState::GuestPanicked, Some(EventKind::GuestPanicked { action: CrashAction::Pause }));
    }

    /// The guest's kernel panicked, and another one takes over that sees to it.
    pub fn crash_loaded(&self) {
        self.tell(EventKind::GuestCrashloaded { action: CrashAction::Run });
    }

    /// This VM waits for a guest from elsewhere, by `way` once it is built; none: a monitor will say where.
    pub fn waits_for_guest(&mut self, way: Option<Way>) {
        self.incoming = way;
        self.enter(RunState::Inmigrate);
    }

    /// Opens the door to the guest that the VM waits for, if it is known where.
    ///
    /// # Errors
    /// It can't be.
    pub fn opens_door(&mut self) -> Result<(), MigrateError> {
        match self.incoming.take() {
            Some(way) => tokio::task::block_in_place(|| self.migration.come(way)),
            None => Ok(()),
        }
    }

    /// The guest from elsewhere is here, as it was there.
    pub fn arrived(&mut self, state: RunState) {
        self.enter(state);
    }

    /// The guest stands still to be moved.
    pub fn held(&mut self) {
        self.enter(RunState::FinishMigrate);
    }

    /// It was not moved, and is what it was before.
    pub fn released(&mut self, was: RunState) {
        self.enter(was);
    }

    /// The guest is at its destination; whether the VM ends with that. One that stands in for QEMU waits for whoever drives it.
    pub fn guest_left(&mut self) -> bool {
        if self.state().may_become(RunState::Postmigrate) {
            self.enter(RunState::Postmigrate);
        }
        !self.emulates
    }

    /// The guest was woken from its sleep, and runs.
    pub fn woke(&mut self) {
        self.enter(RunState::Running);
    }

    /// The VM stopped by itself: [`RunState::Suspended`], [`RunState::IoError`], [`RunState::GuestPanicked`] from running,
    /// [`RunState::InternalError`].
    ///
    /// # Panics
    /// `state` may not follow the present one.
    pub fn stopped(&mut self, state: RunState) {
        self.enter(state);
    }

    /// The VM ends now: the last thing to say before this end is dropped.
    ///
    /// Where powering off is to be a pause it is the same, and goes on.
    pub fn ends(&mut self, cause: ShutdownCause) {
        // libvirt takes whatever says SHUTDOWN for a guest that was shut down; one whose process just ends has crashed.
        let told = !(self.emulates && cause == ShutdownCause::HostError);
        let event = told.then(|| EventKind::Shutdown { guest: cause.by_guest(), reason: cause });
        let last = if cause == ShutdownCause::HostError { RunState::InternalError } else { RunState::Shutdown };
        if self.state().may_become(last) {
            self.enter_for(last, event);
        } else {
            event.into_iter().for_each(|event| self.tell(event));
        }
    }

    fn was_reset(&mut self, reason: ShutdownCause) {
        let event = EventKind::Reset { guest: reason.by_guest(), reason };
        match self.state() {
            // A reset wakes it: it runs.
            RunState::Suspended => self.enter_for(RunState::Running, Some(event)),
            // No guest is here that could have been reset.
            RunState::Inmigrate => self.tell(event),
            state if state.may_become(RunState::Prelaunch) => self.enter_for(RunState::Prelaunch, Some(event)),
            _ => self.tell(event),
        }
    }

    fn enter(&mut self, next: RunState) {
        self.enter_for(next, None);
    }

    /// Enters a state because of something that is told first: who hears of that finds the state entered.
    fn enter_for(&mut self, next: RunState, because: Option<EventKind>) {
        let before = self.state.send_replace(next);
        assert!(before.may_become(next), "a VM that is {before} can't become {next}");
        because.into_iter().for_each(|event| self.tell(event));
        match (before, next) {
            (RunState::Suspended, RunState::Running) => self.tell(EventKind::Wakeup),
            (_, RunState::Suspended) => self.tell(EventKind::Suspend),
            (_, RunState::Running) => self.tell(EventKind::Resume),
            (RunState::Running, _) => self.tell(EventKind::Stop),
            _ => {}
        }
    }

    fn tell(&self, kind: EventKind) {
        // An error says that no monitor listens.
        let _ = self.events.send(Event::now(kind));
    }
}

enum Decision {
    Do(Action),
    Answer(Result<(), ControlError>),
}

/// What a command means in a state.
fn decide(command: Command, state: RunState) -> Decision {
    match command {
        Command::Count => Decision::Do(Action::Count),
        // Should it not come to the move, it stays stopped.
        Command::Stop if state == RunState::FinishMigrate => Decision::Do(Action::Pause),
        Command::Stop if !state.is_running() => Decision::Answer(Ok(())),
        Command::Stop => Decision::Do(Action::Pause),
        // A sleeping guest waits for what it sleeps for.
        Command::Cont if state.is_running() || state == RunState::Suspended => Decision::Answer(Ok(())),
        Command::Cont if state.needs_reset() => {
            Decision::Answer(Err(ControlError::Refused("Resetting the Virtual Machine is required".into())))
        }
        Command::Cont | Command::Reset if state == RunState::FinishMigrate => {
            Decision::Answer(Err(ControlError::Refused("the VM is just being moved: wait, cancel that, or go on if its connection broke (soc-vmm migrate URI NAME --resume)".into())))
        }
        Command::Reset | Command::Powerdown if state == RunState::Inmigrate => {
            Decision::Answer(Err(ControlError::Refused("the VM waits for its guest to come from elsewhere".into())))
        }
        Command::Cont => Decision::Do(Action::Resume),
        Command::Reset => Decision::Do(Action::Reset),
        Command::Powerdown => Decision::Do(Action::PowerButton),
        Command::Quit(cause) => Decision::Do(Action::Quit(cause)),
    }
}

#[cfg(test)]
mod tests;
