//! What happened to a VM, as every monitor hears it.

use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::{Duration, SystemTime};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::jobs::JobStatus;
use crate::migrate::Step;

/// An event and when it happened.
#[derive(Clone, Debug)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// When, by the SoC's clock.
    pub at: SystemTime,
    /// Goes with the last monitor's copy.
    _heard: Option<SyncSender<()>>,
}

impl Event {
    /// That happens now.
    pub fn now(kind: EventKind) -> Self {
        Self { kind, at: SystemTime::now(), _heard: None }
    }

    /// The same, and what tells when every monitor has been sent it.
    pub fn now_heard(kind: EventKind) -> (Self, Heard) {
        let (heard, waits) = mpsc::sync_channel(0);
        (Self { _heard: Some(heard), ..Self::now(kind) }, Heard(waits))
    }
}

/// Tells when every monitor has been sent an event.
#[derive(Debug)]
pub struct Heard(Receiver<()>);

impl Heard {
    /// Waits for that, for `limit` at most: one that doesn't listen holds nobody up for longer.
    pub fn wait(&self, limit: Duration) {
        // Nothing is ever sent: the last sender goes.
        _ = self.0.recv_timeout(limit);
    }
}

/// QMP events of a VM's life, with their QAPI names and data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(tag = "event", content = "data", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum EventKind {
    /// The vCPUs stopped.
    Stop,
    /// The vCPUs run.
    Resume,
    /// The machine was reset.
    Reset {
        /// Whether the guest asked.
        guest: bool,
        /// Why.
        reason: ShutdownCause,
    },
    /// The machine ends.
    Shutdown {
        /// Whether the guest asked.
        guest: bool,
        /// Why.
        reason: ShutdownCause,
    },
    /// The guest sleeps.
    Suspend,
    /// The guest was woken.
    Wakeup,
    /// The power button was pressed by command.
    Powerdown,
    /// The guest's kernel panicked.
    GuestPanicked {
        /// What becomes of the VM.
        action: CrashAction,
    },
    /// The tray of a removable drive moved.
    #[serde(rename_all = "kebab-case")]
    DeviceTrayMoved {
        /// The drive's old name: it has none.
        device: &'static str,
        /// The drive.
        id: String,
        /// Whether it is open now.
        tray_open: bool,
    },
    /// A device was taken out.
    DeviceDeleted {
        /// Its name; none of what is within it.
        #[serde(skip_serializing_if = "Option::is_none")]
        device: Option<String>,
        /// Where it was.
        path: String,
    },
    /// A disk's image failed.
    BlockIoError {
        /// The disk.
        device: String,
        /// Its block node, if that has a name.
        #[serde(rename = "node-name", skip_serializing_if = "Option::is_none")]
        node_name: Option<String>,
        /// What was asked of it.
        operation: IoOperation,
        /// What became of it.
        action: IoAction,
        /// There is no room.
        nospace: bool,
        /// What went wrong with which file.
        reason: String,
    },
    /// A program in the guest opened a port, or closed it.
    VserportChange {
        /// The port.
        id: String,
        /// Whether it is open now.
        open: bool,
    },
    /// The guest has given memory, or taken some back.
    BalloonChange {
        /// Bytes that it has now.
        actual: u64,
    },
    /// The guest reports of what ACPI told it.
    AcpiDeviceOst {
        /// What.
        info: AcpiOstInfo,
    },
    /// A migration went on.
    Migration {
        /// Where it is now.
        status: Step,
    },
    /// A migration looked at what was written.
    MigrationPass {
        /// How often it has.
        pass: i64,
    },
    /// A job went on.
    JobStatusChange {
        /// Which.
        id: String,
        /// To where.
        status: JobStatus,
    },
    /// A copy is the same as its disk.
    BlockJobReady(BlockJobFigures),
    /// A job has done what it should, or failed.
    BlockJobCompleted {
        /// Which, and how far it came.
        #[serde(flatten)]
        job: BlockJobFigures,
        /// Why it failed, if it did.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// Somebody has ended a job.
    BlockJobCancelled(BlockJobFigures),
    /// A disk failed under a job.
    BlockJobError {
        /// The job.
        device: String,
        /// What was asked of the disk.
        operation: IoOperation,
        /// What became of it: the job fails.
        action: IoAction,
    },
    /// An export is no more.
    BlockExportDeleted {
        /// Its id.
        id: String,
    },
    /// The guest's kernel panicked, and another one takes over.
    GuestCrashloaded {
        /// What becomes of the VM.
        action: CrashAction,
    },
}

/// A job and how far it came, as QMP's events of block jobs have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BlockJobFigures {
    /// `mirror`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Its id.
    pub device: String,
    /// Bytes that are to be done.
    pub len: u64,
    /// Bytes that are done.
    pub offset: u64,
    /// Bytes a second at most; 0: no limit.
    pub speed: u64,
}

/// QMP `IoOperationType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "IoOperationType")]
pub enum IoOperation {
    /// A read.
    Read,
    /// Anything that writes.
    Write,
}

/// QMP `BlockErrorAction`: what became of a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "BlockErrorAction")]
pub enum IoAction {
    /// The guest was told that all is well.
    Ignore,
    /// The guest was told.
    Report,
    /// It waits, and the VM stops.
    Stop,
}

/// QMP `ACPIOSTInfo`: what a guest reports (ACPI 6.5 §6.3.5).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "ACPIOSTInfo")]
pub struct AcpiOstInfo {
    /// The device's name, if it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Its number.
    pub slot: String,
    /// What kind of number.
    pub slot_type: &'static str,
    /// Of what it reports: a notification's number, or more.
    pub source: u32,
    /// How it went; 0: well.
    pub status: u32,
}

/// QMP `GuestPanicAction`: what becomes of a VM whose guest told of its panic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "GuestPanicAction")]
pub enum CrashAction {
    /// It ends.
    Poweroff,
    /// It stops.
    Pause,
    /// It runs on.
    Run,
}

/// QMP `ShutdownCause`: why a machine was reset or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownCause {
    /// The function, its host or its shim failed.
    HostError,
    /// QMP `quit`.
    HostQmpQuit,
    /// QMP `system_reset`.
    HostQmpSystemReset,
    /// SIGINT or SIGTERM.
    HostSignal,
    /// Ctrl-A x on the console.
    HostUi,
    /// The guest powered off.
    GuestShutdown,
    /// The guest reset the machine.
    GuestReset,
    /// The guest told of its kernel's panic.
    GuestPanic,
}

impl ShutdownCause {
    /// Whether the guest asked.
    pub fn by_guest(self) -> bool {
        matches!(self, Self::GuestShutdown | Self::GuestReset | Self::GuestPanic)
    }
}
