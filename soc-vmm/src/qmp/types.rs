//! QAPI types of replies, by their QAPI names.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ErrorClass;
use crate::cli::one_line;
use crate::control::RunState;
use crate::migrate::Step;

/// The reply of a command that has nothing to say: `{}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "empty")]
pub struct Empty {}

/// QMP `StatusInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StatusInfo {
    /// Whether the vCPUs run.
    pub running: bool,
    /// The state.
    pub status: RunState,
}

/// QMP `NameInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NameInfo {
    /// The VM's name.
    pub name: String,
}

/// QMP `VersionTriple`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VersionTriple {
    /// Major.
    pub major: u32,
    /// Minor.
    pub minor: u32,
    /// Micro.
    pub micro: u32,
}

/// QMP `VersionInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VersionInfo {
    /// The QEMU release whose QMP this is: clients choose their commands by it.
    pub qemu: VersionTriple,
    /// Who answers.
    pub package: String,
}

impl VersionInfo {
    /// This program's.
    pub fn ours() -> Self {
        Self {
            qemu: VersionTriple { major: 7, minor: 2, micro: 0 },
            package: concat!("soc-vmm ", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// QMP `CommandInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CommandInfo {
    /// A command's name.
    pub name: String,
}

/// QMP `KvmInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KvmInfo {
    /// The guest runs on KVM.
    pub enabled: bool,
    /// KVM could be used.
    pub present: bool,
}

/// QMP `TargetInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct TargetInfo {
    /// The guest's architecture.
    pub arch: &'static str,
}

/// `x-outboard-counter`, a type of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "x-outboard-counter")]
pub struct OutboardCounter {
    /// What is counted.
    pub name: String,
    /// How often.
    pub value: u64,
}

/// QMP `ObjectPropertyInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "ObjectPropertyInfo")]
pub struct ObjectProperty {
    /// Its name.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
}

/// `x-outboard-device`, a type of ours: a device that was added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "x-outboard-device")]
pub struct NewDeviceId {
    /// Its name.
    pub id: String,
}

/// `x-outboard-vm`, a type of ours: what `soc-vmm list` shows of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "x-outboard-vm")]
pub struct OutboardVm {
    /// Its name.
    pub name: String,
    /// Its state.
    pub status: RunState,
    /// Its vCPUs.
    pub cpus: u16,
    /// Its RAM in bytes.
    pub memory: u64,
    /// Its function, as `--function` named it.
    pub function: String,
    /// The process id of its soc-vmm.
    pub pid: u32,
    /// The migration that is under way, or the last one if it came to nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<OutboardMigration>,
}

/// `x-outboard-migration`, a type of ours: what `soc-vmm status` shows of a migration. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "x-outboard-migration")]
pub struct OutboardMigration {
    /// Where it is.
    pub status: Step,
    /// Why it failed or stands still, if it does.
    #[serde(rename = "error-desc", default, skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
    /// Where the guest is waited for, if it is to come from elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub door: Option<String>,
    /// What is still to come or to go, as far as this side knows.
    pub remaining: u64,
    /// The guest's memory.
    pub total: u64,
    /// What has come or gone.
    #[serde(default)]
    pub transferred: u64,
    /// What comes or goes a second.
    #[serde(default)]
    pub rate: u64,
    /// Times that memory was gone through.
    #[serde(default)]
    pub rounds: u64,
    /// How long the guest would stand still, were it to stop now, in milliseconds; 0: nobody knows yet.
    #[serde(rename = "expected-downtime", default)]
    pub expected_downtime: u64,
    /// The part of their time that vCPUs stand still, in percent.
    #[serde(rename = "cpu-throttle-percentage", default)]
    pub throttle: u8,
    /// What each vCPU may write, in MiB a second; 0: as much as it can.
    #[serde(rename = "vcpu-dirty-limit", default)]
    pub limit: u64,
}

/// The first object on a monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// What it greets with.
    #[serde(rename = "QMP")]
    pub qmp: GreetingBody,
}

/// The inside of a [`Greeting`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GreetingBody {
    /// As `query-version` answers.
    pub version: VersionInfo,
    /// QMP `QMPCapability` that may be enabled.
    pub capabilities: Vec<String>,
}

impl Greeting {
    /// This program's: no capability is offered.
    pub fn ours() -> Self {
        Self { qmp: GreetingBody { version: VersionInfo::ours(), capabilities: Vec::new() } }
    }
}

/// QMP `BalloonInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BalloonInfo {
    /// Bytes of memory that the guest has.
    pub actual: u64,
}

/// An event's `timestamp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timestamp {
    /// Seconds since the epoch.
    pub seconds: u64,
    /// And microseconds.
    pub microseconds: u32,
}

/// A reply as it goes over the wire.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Response {
    /// The command was done.
    Return {
        /// What it gave.
        #[serde(rename = "return")]
        value: serde_json::Value,
        /// The command's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<serde_json::Value>,
    },
    /// It was not.
    Error {
        /// Why.
        error: super::QmpError,
        /// The command's id, where it had a legible one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<serde_json::Value>,
    },
}

impl Response {
    /// The reply to the command with this id.
    pub fn to(id: Option<serde_json::Value>, outcome: Result<serde_json::Value, super::QmpError>) -> Self {
        match outcome {
            Ok(value) => Self::Return { value, id },
            // What a client said may be in it.
            Err(error) => Self::Error { error: super::QmpError { desc: one_line(&error.desc), ..error }, id },
        }
    }

    /// The error's class, if it is one.
    pub fn error_class(&self) -> Option<ErrorClass> {
        match self {
            Self::Return { .. } => None,
            Self::Error { error, .. } => Some(error.class),
        }
    }
}
