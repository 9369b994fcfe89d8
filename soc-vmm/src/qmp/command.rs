//! The commands: one type each, named and shaped as QAPI says. [`COMMANDS`] is what dispatch, `query-commands` and everything
//! else that speaks of all commands goes by.

use std::future::Future;
use std::pin::Pin;

use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::backends::{BlockdevDel, NetdevDel, ObjectAdd, ObjectDel};
use super::cdrom::{BlockdevChangeMedium, Eject};
use super::chardevs::{ChardevAdd, ChardevRemove};
use super::cpus::{AddCpu, QueryCpusFast, QueryHotpluggableCpus};
use super::devices::{AddDisk, AddNet, DeviceDel, QomList};
use super::tune::{Balloon, BlockResize, QomGet, QomSet, QueryBalloon, SetLink};
use super::types::{CommandInfo, Empty, KvmInfo, NameInfo, OutboardVm, StatusInfo, VersionInfo};
use super::{ErrorClass, QmpError};
use crate::control::{Counters, ShutdownCause, VmHandle};
use crate::cpus::CpusHandle;
use crate::qemu::{BlockdevAdd, Device, NetdevAdd};

/// A command that is carried out.
pub type Execution = Pin<Box<dyn Future<Output = Result<Value, QmpError>> + Send>>;

/// A QMP command; its fields are the arguments.
pub trait Command: DeserializeOwned + Send + 'static {
    /// Its QAPI name.
    const NAME: &'static str;
    /// What it returns.
    type Reply: Serialize + Send;

    /// Carries it out.
    fn run(self, vm: VmHandle) -> impl Future<Output = Result<Self::Reply, QmpError>> + Send;
}

/// A row of the table of commands.
#[derive(Debug)]
pub struct Entry {
    /// The command's QAPI name.
    pub name: &'static str,
    prepare: fn(Map<String, Value>, &VmHandle) -> Result<Execution, QmpError>,
}

impl Entry {
    const fn of<C: Command>() -> Self {
        Self { name: C::NAME, prepare: prepare::<C> }
    }

    /// Reads the arguments; the command is carried out when the result is polled.
    ///
    /// # Errors
    /// An argument is missing, unknown, or of the wrong type.
    pub fn prepare(&self, arguments: Map<String, Value>, vm: &VmHandle) -> Result<Execution, QmpError> {
        (self.prepare)(arguments, vm)
    }
}

fn prepare<C: Command>(arguments: Map<String, Value>, vm: &VmHandle) -> Result<Execution, QmpError> {
    let command: C = serde_json::from_value(Value::Object(arguments))
        .map_err(|e| QmpError::generic(format!("Invalid arguments of '{}': {e}", C::NAME)))?;
    let vm = vm.clone();
    Ok(Box::pin(async move {
        let reply = command.run(vm).await?;
        serde_json::to_value(reply).map_err(|e| QmpError::generic(format!("The reply can't be written: {e}")))
    }))
}

/// Every command but `qmp_capabilities`, which is the session's own.
pub const COMMANDS: &[Entry] = &[
    Entry::of::<QueryStatus>(),
    Entry::of::<Stop>(),
    Entry::of::<Cont>(),
    Entry::of::<SystemReset>(),
    Entry::of::<SystemPowerdown>(),
    Entry::of::<Quit>(),
    Entry::of::<Eject>(),
    Entry::of::<BlockdevChangeMedium>(),
    Entry::of::<BlockdevAdd>(),
    Entry::of::<BlockdevDel>(),
    Entry::of::<NetdevAdd>(),
    Entry::of::<NetdevDel>(),
    Entry::of::<ChardevAdd>(),
    Entry::of::<ChardevRemove>(),
    Entry::of::<ObjectAdd>(),
    Entry::of::<ObjectDel>(),
    Entry::of::<Device>(),
    Entry::of::<DeviceDel>(),
    Entry::of::<QomList>(),
    Entry::of::<QomGet>(),
    Entry::of::<QomSet>(),
    Entry::of::<BlockResize>(),
    Entry::of::<SetLink>(),
    Entry::of::<Balloon>(),
    Entry::of::<QueryBalloon>(),
    Entry::of::<AddDisk>(),
    Entry::of::<AddNet>(),
    Entry::of::<AddCpu>(),
    Entry::of::<QueryCpusFast>(),
    Entry::of::<QueryHotpluggableCpus>(),
    Entry::of::<QueryName>(),
    Entry::of::<QueryVersion>(),
    Entry::of::<QueryCommands>(),
    Entry::of::<QueryKvm>(),
    Entry::of::<QueryOutboardVm>(),
    Entry::of::<QueryOutboardCounters>(),
];

/// The command of this name.
///
/// # Errors
/// [`ErrorClass::CommandNotFound`].
pub fn find(name: &str) -> Result<&'static Entry, QmpError> {
    COMMANDS.iter().find(|entry| entry.name == name).ok_or_else(|| QmpError {
        class: ErrorClass::CommandNotFound,
        desc: format!("The command {name} has not been found"),
    })
}

/// QMP `qmp_capabilities`: ends the negotiation.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QmpCapabilities {
    /// QMP `QMPCapability` to enable.
    #[serde(default)]
    pub enable: Vec<String>,
}

impl QmpCapabilities {
    /// Its QAPI name.
    pub const NAME: &'static str = "qmp_capabilities";
}

/// QMP `query-status`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryStatus {}

impl Command for QueryStatus {
    const NAME: &'static str = "query-status";
    type Reply = StatusInfo;

    async fn run(self, vm: VmHandle) -> Result<StatusInfo, QmpError> {
        let status = vm.state();
        Ok(StatusInfo { running: status.is_running(), status })
    }
}

/// QMP `stop`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {}

impl Command for Stop {
    const NAME: &'static str = "stop";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.stop().await?;
        Ok(Empty {})
    }
}

/// QMP `cont`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cont {}

impl Command for Cont {
    const NAME: &'static str = "cont";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.cont().await?;
        Ok(Empty {})
    }
}

/// QMP `system_reset`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SystemReset {}

impl Command for SystemReset {
    const NAME: &'static str = "system_reset";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.reset().await?;
        Ok(Empty {})
    }
}

/// QMP `system_powerdown`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SystemPowerdown {}

impl Command for SystemPowerdown {
    const NAME: &'static str = "system_powerdown";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.powerdown().await?;
        Ok(Empty {})
    }
}

/// QMP `quit`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quit {}

impl Command for Quit {
    const NAME: &'static str = "quit";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.quit(ShutdownCause::HostQmpQuit).await?;
        Ok(Empty {})
    }
}

/// QMP `query-name`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryName {}

impl Command for QueryName {
    const NAME: &'static str = "query-name";
    type Reply = NameInfo;

    async fn run(self, vm: VmHandle) -> Result<NameInfo, QmpError> {
        Ok(NameInfo { name: vm.info().name.clone() })
    }
}

/// QMP `query-version`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryVersion {}

impl Command for QueryVersion {
    const NAME: &'static str = "query-version";
    type Reply = VersionInfo;

    async fn run(self, _: VmHandle) -> Result<VersionInfo, QmpError> {
        Ok(VersionInfo::ours())
    }
}

/// QMP `query-commands`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryCommands {}

impl Command for QueryCommands {
    const NAME: &'static str = "query-commands";
    type Reply = Vec<CommandInfo>;

    async fn run(self, _: VmHandle) -> Result<Vec<CommandInfo>, QmpError> {
        let names = COMMANDS.iter().map(|entry| entry.name).chain([QmpCapabilities::NAME]);
        Ok(names.map(|name| CommandInfo { name: name.to_owned() }).collect())
    }
}

/// QMP `query-kvm`: a guest of soc-vmm runs on its host's KVM, or not at all.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryKvm {}

impl Command for QueryKvm {
    const NAME: &'static str = "query-kvm";
    type Reply = KvmInfo;

    async fn run(self, _: VmHandle) -> Result<KvmInfo, QmpError> {
        Ok(KvmInfo { enabled: true, present: true })
    }
}

/// `x-query-outboard-vm`, a command of ours: what `soc-vmm list` shows.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryOutboardVm {}

impl Command for QueryOutboardVm {
    const NAME: &'static str = "x-query-outboard-vm";
    type Reply = OutboardVm;

    async fn run(self, vm: VmHandle) -> Result<OutboardVm, QmpError> {
        let info = vm.info().clone();
        let present = |cpus: &CpusHandle| cpus.slots().iter().filter(|slot| slot.occupant.is_some()).count() as u16;
        Ok(OutboardVm {
            name: info.name,
            status: vm.state(),
            cpus: vm.cpus().map_or(info.cpus, present),
            memory: info.memory,
            function: info.function,
            pid: std::process::id(),
        })
    }
}

/// `x-query-outboard-counters`, a command of ours: what `soc-vmm status --json` adds.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryOutboardCounters {}

impl Command for QueryOutboardCounters {
    const NAME: &'static str = "x-query-outboard-counters";
    type Reply = Counters;

    async fn run(self, vm: VmHandle) -> Result<Counters, QmpError> {
        Ok(vm.counters().await?)
    }
}
