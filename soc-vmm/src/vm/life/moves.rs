//! A VM's guest on its way: held, described, saved and let go at the source; checked, loaded and started at the destination.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use api_channel::Status;
use migration::{State, VmError};
use pcie_function::SocFunction;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{LifeError, Vm};
use crate::cli::{ExitStatus, Failure};
use crate::control::{RunState, VmControl};
use crate::link::CallError;
use crate::persist::States;
use crate::slots::Hand;
use crate::vm::moving::{Description, MoveOrder, clock, packed, unpacked};
use crate::vm::worker::Command;

/// How long devices may take to halt: what a disk has under way is finished first.
const HALTING: Duration = Duration::from_secs(30);
/// How long a destination that has given up may keep the images, and how often that is looked at.
const LETTING_GO: Duration = Duration::from_secs(5);
const ONE_MORE_TRY: Duration = Duration::from_millis(50);
/// What the VM itself is, among its devices.
const NAME: &str = "vm";
const VERSION: u32 = 1;

/// The VM's own state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Life {
    /// What it was before it was held.
    was: RunState,
}

impl<F: SocFunction> Vm<F> {
    /// Does what a migration wants. A status: the guest has left or ended, and with it the VM's reason to be.
    pub(super) async fn do_move(
        &mut self,
        order: MoveOrder,
        control: &mut VmControl,
    ) -> Result<Option<ExitStatus>, Failure> {
        // Who asked may have gone.
        match order {
            MoveOrder::Describe(reply) => {
                let told =
                    self.describe_if_it_moves().await.map(|machine| serde_json::to_vec(&machine).unwrap_or_default());
                let _ = reply.send(told);
            }
            MoveOrder::Check(source, reply) => {
                let checked = self.describe().await.and_then(|machine| Ok(machine.check(&source)?));
                let _ = reply.send(checked);
            }
            MoveOrder::Blocker(reply) => drop(reply.send(self.ask(Command::Blocker).await)),
            MoveOrder::PostCopyBlocker(reply) => drop(reply.send(self.post_copy_blocker().await)),
            MoveOrder::Hold(reply) => {
                if let Some(status) = self.settle(control).await? {
                    return Ok(Some(status));
                }
                let _ = reply.send(self.hold(control).await);
            }
            MoveOrder::Release(reply) => drop(reply.send(self.release(control).await)),
            MoveOrder::Save(reply) => {
                control.jobs().guest_leaves();
                drop(reply.send(self.save().await));
            }
            MoveOrder::Throttle(percent, reply) => drop(reply.send(self.throttle(percent, control).await)),
            MoveOrder::Gone(reply) => {
                let ends = control.guest_left();
                if ends {
                    control.migration().refuse_more();
                }
                let _ = reply.send(Ok(()));
                return Ok(ends.then_some(ExitStatus::Done));
            }
            MoveOrder::Stays(paused, reply) => {
                let stays = if paused {
                    // As after a move, but nobody has the guest: whoever wants it to go on says so.
                    control.guest_left();
                    Ok(())
                } else {
                    self.release(control).await
                };
                let _ = reply.send(stays);
            }
            MoveOrder::Load(state, reply) => drop(reply.send(self.load(state).await)),
            MoveOrder::Failed(why) => {
                // It may have come, but not all of it.
                let came = control.state() != RunState::Inmigrate;
                let why = if came { why } else { format!("no guest came: {why}") };
                return Err(Failure::new(ExitStatus::Failed, why));
            }
            MoveOrder::Start(reply) => drop(reply.send(self.start(control).await)),
        }
        Ok(None)
    }

    /// What the machine is, where nothing keeps it.
    async fn describe_if_it_moves(&self) -> Result<Description, VmError> {
        match self.ask(Command::Blocker).await? {
            None => self.describe().await,
            Some(why) => Err(why.into()),
        }
    }

    /// Why no guest can go on here before all of its pages are there, if none can.
    async fn post_copy_blocker(&self) -> Result<Option<String>, VmError> {
        match self.host.can_post_copy().await {
            Ok(()) => {}
            Err(CallError::Refused { status: Status::UNKNOWN, .. }) => {
                let why = "post-copy is not possible here, because the host's host-kvm-shim doesn't know of it: it is older than this soc-vmm";
                return Ok(Some(why.into()));
            }
            Err(CallError::Refused { text, .. }) => return Ok(Some(text)),
            Err(e) => return Err(e.into()),
        }
        let keeps = |what: &str, why: &str| Some(format!("post-copy is not possible here, because {what} {why}"));
        if self.shape.iommu {
            return Ok(keeps("the guest's IOMMU", "can't wait for its tables: start both VMs without it"));
        }
        let devices = self.ask(|done| Command::Save(States::of_names(), done)).await?;
        Ok(devices.into_iter().find_map(|(name, _)| match name.split('@').next() {
            Some("hyperv") => keeps("a Hyper-V SynIC", "can't wait for its pages: start both VMs without it"),
            Some(kind) if kind.starts_with("vhost-user-") => keeps(
                &name,
                "has a back end that maps the guest's memory and can't wait for its pages: take it out first",
            ),
            _ => None,
        }))
    }

    /// What the machine is.
    async fn describe(&self) -> Result<Description, VmError> {
        let topology = self.shape.topology;
        let (devices, facts) = Description::of_devices(self.ask(|done| Command::Save(States::of_names(), done)).await?);
        Ok(Description {
            memory: self.shape.layout.ram(),
            regions: self.regions.clone(),
            topology: [topology.sockets(), topology.cores(), topology.threads()],
            processors: self.cpus.present(),
            cpuid: self.cpuid.clone(),
            tsc_khz: self.host.created.tsc_khz,
            split: self.shape.iommu,
            devices,
            facts,
        })
    }

    /// Takes the vCPUs out of the guest, and sees to what they reported on the way: a guest that is just about to be reset or off is
    /// moved after that, if there is anything left.
    async fn settle(&mut self, control: &mut VmControl) -> Result<Option<ExitStatus>, Failure> {
        self.throttle.end();
        loop {
            self.host.pause().await.map_err(|e| LifeError::from(e).of_a_vm())?;
            let Ok(event) = self.guest.try_recv() else { return Ok(None) };
            if let Some(status) = self.hear(event, control).await? {
                return Ok(Some(status));
            }
        }
    }

    /// Has devices stand still, as the vCPUs do.
    async fn hold(&mut self, control: &mut VmControl) -> Result<(), VmError> {
        let was = control.state();
        if !was.may_become(RunState::FinishMigrate) {
            return Err(format!("a VM that is {was} can't be moved").into());
        }
        let (done, halted) = oneshot::channel();
        self.worker.command(Command::Halt(done));
        self.held = Some(was);
        if !matches!(tokio::time::timeout(HALTING, halted).await, Ok(Ok(()))) {
            self.let_go(was).await?;
            return Err(format!(
                "a device still waited for its back end after {} s: see that its disks answer, then try again",
                HALTING.as_secs()
            )
            .into());
        }
        if let Err(e) = self.hand_disks(Hand::Over) {
            self.let_go(was).await?;
            return Err(e);
        }
        control.held();
        Ok(())
    }

    /// Has everything go on that was held.
    async fn release(&mut self, control: &mut VmControl) -> Result<(), VmError> {
        let Some(was) = self.held else { return Ok(()) };
        self.take_disks_back().await?;
        self.let_go(was).await?;
        if control.state() == RunState::FinishMigrate {
            control.released(was);
        }
        Ok(())
    }

    /// Has devices go on, and vCPUs if they ran.
    async fn let_go(&mut self, was: RunState) -> Result<(), VmError> {
        self.held = None;
        self.ask(Command::GoOn).await?;
        if was.is_running() {
            self.run().await?;
        }
        Ok(())
    }

    /// Devices that were held go on: somebody else than the migration wants the guest to run.
    pub(super) async fn unhold(&mut self) -> Result<(), VmError> {
        if self.held.is_some() {
            self.take_disks_back().await?;
            self.held = None;
            self.ask(Command::GoOn).await?;
        }
        Ok(())
    }

    /// Images are this VM's again. A destination that has given up may take a moment until it is gone.
    async fn take_disks_back(&self) -> Result<(), VmError> {
        let deadline = Instant::now() + LETTING_GO;
        loop {
            match self.hand_disks(Hand::Back) {
                Err(_) if Instant::now() < deadline => tokio::time::sleep(ONE_MORE_TRY).await,
                done => return done,
            }
        }
    }

    /// Files are written, locked and read: off the threads that serve sockets.
    fn hand_disks(&self, hand: Hand) -> Result<(), VmError> {
        Ok(tokio::task::block_in_place(|| self.slots.handle().hand_disks(hand))?)
    }

    /// Whatever becomes of the migration, the guest is to stand still.
    pub(super) fn stays_paused(&mut self) {
        self.held = self.held.map(|was| if was.is_running() { RunState::Paused } else { was });
    }

    /// The state of a VM that is held.
    async fn save(&self) -> Result<State, VmError> {
        let was = self.held.ok_or("the VM is not held")?;
        let mut states = self.ask(|done| Command::Save(States::default(), done)).await?;
        states.put(NAME, "", VERSION, &Life { was });
        // The clock is read before the vCPUs' TSCs and is set after them: what passes between counts for neither.
        let mut guest = vec![(None, self.host.chips().await?)];
        for vcpu in 0..self.shape.topology.cpus() {
            guest.push((Some(vcpu), self.host.state(vcpu).await?));
        }
        Ok(State { devices: packed(states), guest })
    }

    /// Has nobody wait for a page of the guest's any more, once the VM is wanted to end: whoever does may hold up everything else, the loop that
    /// ends it too.
    pub(super) fn gives_up_pages(&self, control: &VmControl) -> JoinHandle<()> {
        let (wanted, ram) = (control.wanted_to_end(), self.host.ram.clone());
        tokio::spawn(async move {
            wanted.await;
            ram.give_up();
        })
    }

    /// Has devices stand still that no guest has touched: what comes in from outside waits for the guest that will be here.
    pub(super) async fn stand_still(&self) {
        // The worker ends only when the function is lost, which is reported on its own.
        let _ = self.ask(Command::Halt).await;
    }

    /// Takes a state over. Interrupt controllers go first, local ones too: then devices raise their lines.
    async fn load(&mut self, state: State) -> Result<(), VmError> {
        let mut states = unpacked(state.devices)?;
        let Life { was } = states.take(NAME, "", VERSION)?;
        let was = was
            .on_arrival()
            .ok_or_else(|| format!("the source says that its VM is {was}, which none is that moves"))?;
        let cpus = self.shape.topology.cpus();
        let mut expected = std::iter::once(None).chain((0..cpus).map(Some));
        if state.guest.len() != cpus as usize + 1 || !state.guest.iter().all(|(of, _)| Some(*of) == expected.next()) {
            return Err("what the source says of its vCPUs is not that of this machine's".into());
        }
        let malformed = |_| "what the source says of its vCPUs can't be read";
        let (mut before, mut after) = (None, None);
        for (vcpu, records) in state.guest {
            match vcpu {
                None => {
                    before = clock::clock(&records).map_err(malformed)?;
                    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                    let records = clock::arrived(&records, now.as_nanos() as u64).map_err(malformed)?;
                    self.host.set_chips(records).await?;
                }
                Some(vcpu) => {
                    if vcpu == 0 {
                        after = clock::clock(&self.host.chips().await?).map_err(malformed)?;
                    }
                    let records = match before.as_ref().zip(after.as_ref()) {
                        None => records,
                        Some((before, after)) => {
                            clock::gone_on(&records, before, after, self.host.created.tsc_khz).map_err(malformed)?
                        }
                    };
                    self.host.set_state(vcpu, records).await?;
                }
            }
        }
        let (done, loaded) = oneshot::channel();
        self.worker.command(Command::Load(states, done));
        loaded.await.map_err(|_| LOST)??;
        self.arranger.settled().await;
        self.held = Some(was);
        Ok(())
    }

    /// Lets a guest that was loaded go on as it was, or wait where nobody wants it to run.
    async fn start(&mut self, control: &mut VmControl) -> Result<(), VmError> {
        let was = self.held.ok_or("no guest was loaded")?;
        tokio::task::block_in_place(|| control.exports().guest_arrives());
        self.hand_disks(Hand::Back)?;
        self.held = None;
        self.ask(Command::GoOn).await?;
        let state = if was.is_running() && !control.autostart() { RunState::Paused } else { was };
        if state.is_running() {
            self.run().await?;
        }
        control.arrived(state);
        Ok(())
    }

    /// Has vCPUs stand still so many percent of their time from now on.
    async fn throttle(&mut self, percent: u8, control: &VmControl) -> Result<(), VmError> {
        let stood = self.throttle.set(percent);
        if stood && control.state().is_running() { Ok(self.run().await?) } else { Ok(()) }
    }

    /// The throttle's turn: vCPUs that run stand still now, or go on.
    pub(super) async fn throttled(&self, stand: bool, control: &VmControl) -> Result<(), LifeError> {
        if !control.state().is_running() {
            return Ok(());
        }
        let done = if stand { self.host.pause().await } else { self.run().await };
        Ok(done?)
    }

    /// Asks the thread that serves IOREQs.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, VmError> {
        let (done, answer) = oneshot::channel();
        self.worker.command(command(done));
        Ok(answer.await.map_err(|_| LOST)?)
    }
}

/// Whoever noticed reports it on its own.
const LOST: &str = "the function is lost";
