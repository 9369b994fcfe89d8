//! Commands that ask what machines and processors a VM can have.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::QmpError;
use super::command::Command;
use crate::control::VmHandle;
use crate::cpuid::{CpuSpec, HostCpu, MAX_CPUS, ModelExpansion};

/// How each processor's type ends.
const CPU_SUFFIX: &str = "-x86_64-cpu";
/// The machine's name: what a guest sees of it is the q35 of that release of QEMU's.
pub(super) const MACHINE: &str = "pc-q35-7.2";
/// What it is called for short.
const ALIAS: &str = "q35";

/// QMP `query-machines`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryMachines {}

/// QMP `MachineInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct MachineInfo {
    name: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    alias: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    is_default: Option<bool>,
    cpu_max: u32,
    hotpluggable_cpus: bool,
    numa_mem_supported: bool,
    deprecated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    default_cpu_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    default_ram_id: Option<&'static str>,
}

impl Command for QueryMachines {
    const NAME: &'static str = "query-machines";
    type Reply = Vec<MachineInfo>;

    async fn run(self, _: VmHandle) -> Result<Vec<MachineInfo>, QmpError> {
        let q35 = MachineInfo {
            name: MACHINE,
            alias: Some(ALIAS),
            is_default: Some(true),
            cpu_max: MAX_CPUS,
            hotpluggable_cpus: true,
            numa_mem_supported: false,
            deprecated: false,
            default_cpu_type: default_cpu(),
            default_ram_id: Some("pc.ram"),
        };
        let none = MachineInfo {
            name: "none",
            alias: None,
            is_default: None,
            cpu_max: 1,
            hotpluggable_cpus: false,
            default_cpu_type: None,
            default_ram_id: None,
            ..q35.clone()
        };
        Ok(vec![q35, none])
    }
}

/// The processor of a domain without `<cpu>`, for libvirt 9.0. By `host` it makes that host-passthrough, which it refuses where it itself runs on another
/// architecture, and `max` it doesn't know. Told of none it says none, and the guest's processor is the host's all the same.
fn default_cpu() -> Option<String> {
    (std::env::consts::ARCH == "x86_64").then(|| format!("host{CPU_SUFFIX}"))
}

/// QMP `query-cpu-definitions`: every model, and what the host lacks of it.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryCpuDefinitions {}

/// QMP `CpuDefinitionInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct CpuDefinitionInfo {
    name: &'static str,
    typename: String,
    migration_safe: bool,
    #[serde(rename = "static")]
    is_static: bool,
    unavailable_features: Vec<&'static str>,
    deprecated: bool,
}

impl Command for QueryCpuDefinitions {
    const NAME: &'static str = "query-cpu-definitions";
    type Reply = Vec<CpuDefinitionInfo>;

    async fn run(self, vm: VmHandle) -> Result<Vec<CpuDefinitionInfo>, QmpError> {
        let definition = |model: crate::cpuid::ModelDefinition| CpuDefinitionInfo {
            name: model.name,
            typename: format!("{}{CPU_SUFFIX}", model.name),
            migration_safe: !is_host_s(model.name),
            is_static: false,
            unavailable_features: model.unavailable,
            deprecated: false,
        };
        let Some(host) = vm.host() else {
            // libvirtd 9.0 crashes where this is an error, or empty: the model that is the host's whatever that is.
            let (name, unavailable_features) = ("host", Vec::new());
            let typename = format!("{name}{CPU_SUFFIX}");
            let is = CpuDefinitionInfo {
                name,
                typename,
                migration_safe: false,
                is_static: false,
                unavailable_features,
                deprecated: false,
            };
            return Ok(vec![is]);
        };
        Ok(host.definitions().into_iter().map(definition).collect())
    }
}

/// Whether what a model is depends on the host.
fn is_host_s(name: &str) -> bool {
    matches!(name, "host" | "max")
}

/// QMP `query-cpu-model-expansion`: all that a model has on this host.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryCpuModelExpansion {
    /// How much is told: here that is the same.
    #[serde(rename = "type")]
    _kind: CpuModelExpansionType,
    /// The model.
    model: CpuModelInfo,
}

/// QMP `CpuModelExpansionType`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum CpuModelExpansionType {
    Static,
    Full,
}

/// QMP `CpuModelInfo`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CpuModelInfo {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    props: Option<BTreeMap<String, Value>>,
}

/// QMP `CpuModelExpansionInfo`.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub(super) struct CpuModelExpansionInfo {
    model: CpuModelInfo,
}

/// What a client may set that changes nothing of what is told: an expansion's own members come back in the next one's question.
const EXPANSION_ONLY: [&str; 6] = ["migratable", "hv-passthrough", "family", "model", "stepping", "vendor"];

impl Command for QueryCpuModelExpansion {
    const NAME: &'static str = "query-cpu-model-expansion";
    type Reply = CpuModelExpansionInfo;

    async fn run(self, vm: VmHandle) -> Result<CpuModelExpansionInfo, QmpError> {
        let host = host_of(&vm)?;
        let CpuModelInfo { name, props } = self.model;
        let mut text = name.clone();
        for (property, value) in props.unwrap_or_default() {
            if EXPANSION_ONLY.contains(&&*property) {
                continue;
            }
            match value {
                Value::Bool(on) => text += &format!(",{property}={}", if on { "on" } else { "off" }),
                _ => return Err(QmpError::generic(format!("Property '{property}' is true or false"))),
            }
        }
        let spec: CpuSpec = text.parse().map_err(|e: crate::cpuid::CpuSpecError| QmpError::generic(e.to_string()))?;
        let ModelExpansion { features, vendor, identity: (family, model, stepping) } = host.expand(&spec);
        let features = features.into_iter().map(|(name, on)| (name.to_owned(), Value::Bool(on)));
        let identity = [("family", family), ("model", model), ("stepping", stepping)];
        let identity = identity.map(|(name, number)| (name.to_owned(), Value::from(number)));
        let vendor = ("vendor".to_owned(), Value::from(vendor));
        let props = features.chain(identity).chain([vendor]).collect();
        Ok(CpuModelExpansionInfo { model: CpuModelInfo { name, props: Some(props) } })
    }
}

fn host_of(vm: &VmHandle) -> Result<&HostCpu, QmpError> {
    vm.host().ok_or_else(|| {
        QmpError::generic(
            "There is no host to ask: its KVM or its function can't be used, or the VM is still being built",
        )
    })
}

/// QMP `query-tpm-models`: there is no TPM.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryTpmModels {}

/// QMP `TpmModel`, of which there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) enum TpmModel {}

impl Command for QueryTpmModels {
    const NAME: &'static str = "query-tpm-models";
    type Reply = Vec<TpmModel>;

    async fn run(self, _: VmHandle) -> Result<Vec<TpmModel>, QmpError> {
        Ok(Vec::new())
    }
}

/// QMP `query-tpm-types`: there is no TPM.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryTpmTypes {}

/// QMP `TpmType`, of which there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) enum TpmType {}

impl Command for QueryTpmTypes {
    const NAME: &'static str = "query-tpm-types";
    type Reply = Vec<TpmType>;

    async fn run(self, _: VmHandle) -> Result<Vec<TpmType>, QmpError> {
        Ok(Vec::new())
    }
}
