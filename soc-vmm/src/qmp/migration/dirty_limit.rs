//! How fast vCPUs may write.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::super::QmpError;
use super::super::aside::aside;
use super::super::command::Command;
use super::super::types::Empty;
use super::parameters::MOST_WRITES;
use super::query::PATIENCE;
use crate::control::VmHandle;
use crate::migrate::VcpuWrites;

/// QMP `set-vcpu-dirty-limit`: from now on, until it is cancelled.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct SetVcpuDirtyLimit {
    /// Which; all unless said.
    #[serde(default)]
    cpu_index: Option<i64>,
    /// MiB a second; 0: no limit.
    dirty_rate: u64,
}

/// QMP `cancel-vcpu-dirty-limit`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct CancelVcpuDirtyLimit {
    /// Which; all unless said.
    #[serde(default)]
    cpu_index: Option<i64>,
}

/// QMP `query-vcpu-dirty-limit`: of the vCPUs that have one.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct QueryVcpuDirtyLimit {}

/// QMP `DirtyLimitInfo`. Rates in MiB a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct DirtyLimitInfo {
    cpu_index: i64,
    limit_rate: u64,
    /// Since this was last asked; 0 at first.
    current_rate: u64,
}

impl DirtyLimitInfo {
    fn of(writes: &VcpuWrites) -> Self {
        let mebibytes = |bytes: u64| (bytes + (1 << 19)) >> 20;
        Self {
            cpu_index: writes.vcpu.into(),
            limit_rate: mebibytes(writes.limit),
            current_rate: mebibytes(writes.rate),
        }
    }
}

impl Command for SetVcpuDirtyLimit {
    const NAME: &'static str = "set-vcpu-dirty-limit";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        if self.dirty_rate > MOST_WRITES {
            let why = format!("'dirty-rate' is out of its range: 0 to {MOST_WRITES} MiB a second");
            return Err(QmpError::generic(why));
        }
        limit(self.cpu_index, self.dirty_rate << 20, vm).await
    }
}

impl Command for CancelVcpuDirtyLimit {
    const NAME: &'static str = "cancel-vcpu-dirty-limit";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        limit(self.cpu_index, 0, vm).await
    }
}

async fn limit(cpu: Option<i64>, bytes: u64, vm: VmHandle) -> Result<Empty, QmpError> {
    let migration = vm.migration().clone();
    migration.built().await;
    let count = vm.cpus().map_or(0, |cpus| cpus.slots().len() as u32);
    let number = |cpu: i64| u32::try_from(cpu).ok().filter(|cpu| *cpu < count);
    let vcpu = match cpu {
        None => None,
        Some(cpu) => Some(number(cpu).ok_or_else(|| {
            QmpError::generic(format!("'cpu-index' {cpu} is no vCPU's: they are 0 to {}", count.saturating_sub(1)))
        })?),
    };
    soon(aside(move || Ok(migration.limit_vcpu(vcpu, bytes)?))).await?;
    Ok(Empty {})
}

/// A monitor doesn't wait for a host that is silent.
pub(super) async fn soon<T>(work: impl Future<Output = Result<T, QmpError>>) -> Result<T, QmpError> {
    let silent = || QmpError::generic("the VM's host has not answered for 10 s: see what became of its host-kvm-shim");
    timeout(PATIENCE, work).await.unwrap_or_else(|_| Err(silent()))
}

impl Command for QueryVcpuDirtyLimit {
    const NAME: &'static str = "query-vcpu-dirty-limit";
    type Reply = Vec<DirtyLimitInfo>;

    async fn run(self, vm: VmHandle) -> Result<Vec<DirtyLimitInfo>, QmpError> {
        let migration = vm.migration().clone();
        migration.built().await;
        let limited = soon(aside(move || Ok(migration.limited_vcpus()?))).await?;
        Ok(limited.iter().map(DirtyLimitInfo::of).collect())
    }
}
