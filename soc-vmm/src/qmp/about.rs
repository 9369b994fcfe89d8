//! Commands that ask who answers, and what for.

use schemars::JsonSchema;
use serde::Deserialize;

use super::QmpError;
use super::command::{COMMANDS, Command, QmpCapabilities};
use super::schema::{SchemaInfo, schema};
use super::types::{CommandInfo, KvmInfo, NameInfo, StatusInfo, TargetInfo, VersionInfo};
use crate::control::VmHandle;

/// QMP `query-status`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
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

/// QMP `query-name`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
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
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
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
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
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

/// QMP `query-kvm`: a guest of soc-vmm runs on its host's KVM, or not at all. Where there is no host to run it, it tells so.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryKvm {}

impl Command for QueryKvm {
    const NAME: &'static str = "query-kvm";
    type Reply = KvmInfo;

    async fn run(self, vm: VmHandle) -> Result<KvmInfo, QmpError> {
        let there = !vm.has_no_host();
        Ok(KvmInfo { enabled: there, present: there })
    }
}

/// QMP `query-target`: guests are x86-64, whatever soc-vmm runs on.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryTarget {}

impl Command for QueryTarget {
    const NAME: &'static str = "query-target";
    type Reply = TargetInfo;

    async fn run(self, _: VmHandle) -> Result<TargetInfo, QmpError> {
        Ok(TargetInfo { arch: "x86_64" })
    }
}

/// QMP `query-qmp-schema`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryQmpSchema {}

impl Command for QueryQmpSchema {
    const NAME: &'static str = "query-qmp-schema";
    type Reply = Vec<SchemaInfo>;

    async fn run(self, _: VmHandle) -> Result<Vec<SchemaInfo>, QmpError> {
        Ok(schema())
    }
}
