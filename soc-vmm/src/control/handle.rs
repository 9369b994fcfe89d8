//! How the rest of soc-vmm asks a VM for things.

use std::sync::Arc;

use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::cpus::CpusPlace;
use super::host::HostPlace;
use super::slots::SlotsPlace;
use super::{
    Actions, COMMAND_TIMEOUT, CdromDrive, CdromSlot, Command, ControlError, Counters, Event, EventKind, Request,
    RunState, ShutdownCause, StandIns, VmInfo,
};
use crate::chardev::Chardevs;
use crate::cpuid::HostCpu;
use crate::cpus::CpusHandle;
use crate::fds::Fds;
use crate::jobs::Jobs;
use crate::migrate::Migration;
use crate::nbd::Exports;
use crate::slots::SlotsHandle;

/// Asks one VM for things. Cheap to clone.
#[derive(Clone, Debug)]
pub struct VmHandle {
    pub(super) info: Arc<VmInfo>,
    pub(super) commands: mpsc::Sender<Request>,
    pub(super) state: watch::Receiver<RunState>,
    /// Weak, so that monitors see the stream's end when the VM has ended.
    pub(super) events: broadcast::WeakSender<Event>,
    pub(super) cdrom: CdromSlot,
    pub(super) slots: SlotsPlace,
    pub(super) cpus: CpusPlace,
    pub(super) host: HostPlace,
    pub(super) migration: Arc<Migration>,
    pub(super) jobs: Arc<Jobs>,
    pub(super) exports: Arc<Exports>,
    pub(super) built: watch::Receiver<bool>,
    /// Says at once that the VM is to end; commands have their turn.
    pub(super) quits: watch::Sender<Option<ShutdownCause>>,
    pub(super) fds: Arc<Fds>,
    pub(super) chardevs: Arc<Chardevs>,
    pub(super) stand_ins: StandIns,
    pub(super) actions: Actions,
}

impl VmHandle {
    /// Descriptors that others opened for it.
    pub fn fds(&self) -> &Arc<Fds> {
        &self.fds
    }

    /// Its character devices.
    pub fn chardevs(&self) -> &Arc<Chardevs> {
        &self.chardevs
    }

    /// What resets, powering off and panics come to.
    pub fn actions(&self) -> &Actions {
        &self.actions
    }

    /// A port of a device for ports was taken out: monitors hear of it.
    pub fn port_deleted(&self, id: &str) {
        self.chardevs.release(id);
        let path = format!("/machine/peripheral/{id}");
        let event = Event::now(EventKind::DeviceDeleted { device: Some(id.to_owned()), path });
        if let Some(events) = self.events.upgrade() {
            // An error says that no monitor listens.
            let _ = events.send(event);
        }
    }

    /// What the VM is.
    pub fn info(&self) -> &VmInfo {
        &self.info
    }

    /// Its state now; the last one if it has ended.
    pub fn state(&self) -> RunState {
        *self.state.borrow()
    }

    /// Every event from now on, `None` if the VM has ended. The stream closes when it ends.
    pub fn events(&self) -> Option<broadcast::Receiver<Event>> {
        self.events.upgrade().map(|events| events.subscribe())
    }

    /// The CD-ROM drive of that name.
    pub fn cdrom(&self, id: &str) -> Option<&CdromDrive> {
        self.cdroms().iter().find(|drive| drive.id == id)
    }

    /// The CD-ROM drives; none: the machine is still being built.
    pub fn cdroms(&self) -> &[CdromDrive] {
        self.cdrom.get()
    }

    /// The slots of the machine; none: it is still being built.
    pub fn slots(&self) -> Option<&SlotsHandle> {
        self.slots.get()
    }

    /// Its processors; none: the machine is still being built.
    pub fn cpus(&self) -> Option<&CpusHandle> {
        self.cpus.get()
    }

    /// The host's processor; none: there is no host, or it was not asked yet.
    pub fn host(&self) -> Option<&HostCpu> {
        self.host.get()
    }

    /// Its way elsewhere, or here from elsewhere.
    pub fn migration(&self) -> &Arc<Migration> {
        &self.migration
    }

    /// The jobs on its disks.
    pub fn jobs(&self) -> &Arc<Jobs> {
        &self.jobs
    }

    /// The disks that it shows to others.
    pub fn exports(&self) -> &Arc<Exports> {
        &self.exports
    }

    /// The threads that stand for its vCPUs here.
    pub fn stand_ins(&self) -> &StandIns {
        &self.stand_ins
    }

    /// Waits until the machine is built: everything can be asked of it from then on. False: the VM has ended before.
    pub async fn built(&self) -> bool {
        self.built.clone().wait_for(|built| *built).await.is_ok()
    }

    /// Whether the host was asked, and there is none.
    pub fn has_no_host(&self) -> bool {
        self.host.is_missing()
    }

    /// QMP `stop`: returns when no vCPU runs. Nothing to do unless it runs.
    ///
    /// # Errors
    /// See [`ControlError`]; likewise below.
    pub async fn stop(&self) -> Result<(), ControlError> {
        self.ask(Command::Stop).await
    }

    /// QMP `cont`. Nothing to do if it runs; refused if it needs a reset.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn cont(&self) -> Result<(), ControlError> {
        self.ask(Command::Cont).await
    }

    /// QMP `system_reset`. A machine that doesn't run is [`RunState::Prelaunch`] afterwards.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn reset(&self) -> Result<(), ControlError> {
        self.ask(Command::Reset).await
    }

    /// QMP `system_powerdown`: presses the power button; the guest may ignore it.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn powerdown(&self) -> Result<(), ControlError> {
        self.ask(Command::Powerdown).await
    }

    /// Ends the VM: QMP `quit`, a signal, Ctrl-A x.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn quit(&self, cause: ShutdownCause) -> Result<(), ControlError> {
        self.quits.send_replace(Some(cause));
        self.ask(Command::Quit(cause)).await
    }

    /// [`VmHandle::quit`] from a thread outside tokio's, without waiting for the end.
    pub fn quit_from_thread(&self, cause: ShutdownCause) {
        let (reply, _) = oneshot::channel();
        self.quits.send_replace(Some(cause));
        // A closed queue means that the VM has ended, which is what was asked for.
        let _ = self.commands.blocking_send(Request { command: Command::Quit(cause), reply });
    }

    /// The VM's counters by name: exits by kind, crossings of the bus, what its host counts.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn counters(&self) -> Result<Counters, ControlError> {
        self.question(Command::Count).await
    }

    pub(super) async fn ask(&self, command: Command) -> Result<(), ControlError> {
        self.question(command).await.map(drop)
    }

    async fn question(&self, command: Command) -> Result<Counters, ControlError> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.commands.send(Request { command, reply }).await.map_err(|_| ControlError::Ended)?;
            answer.await.map_err(|_| ControlError::Ended)?
        };
        tokio::time::timeout(COMMAND_TIMEOUT, exchange).await.map_err(|_| ControlError::Timeout)?
    }
}
