//! Commands of our own, for `soc-vmm list` and `soc-vmm status`.

use schemars::JsonSchema;
use serde::Deserialize;

use super::QmpError;
use super::command::Command;
use super::types::{OutboardCounter, OutboardMigration, OutboardVm};
use crate::control::VmHandle;
use crate::cpus::CpusHandle;
use crate::migrate::{Step, failure};

/// `x-query-outboard-vm`, a command of ours: what `soc-vmm list` shows.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
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
            migration: vm.migration().without_success().map(|progress| OutboardMigration {
                status: Step::of(&progress.phase),
                error_desc: failure(&progress.phase).map(str::to_owned),
                door: vm.migration().door(),
                remaining: progress.remaining,
                total: progress.total,
                transferred: progress.transferred,
                rate: progress.rate,
                rounds: progress.rounds,
                expected_downtime: progress.expected_downtime.as_millis() as u64,
                throttle: progress.throttle,
                limit: progress.write_limit >> 20,
            }),
        })
    }
}

/// `x-query-outboard-counters`, a command of ours: what `soc-vmm status --json` adds.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryOutboardCounters {}

impl Command for QueryOutboardCounters {
    const NAME: &'static str = "x-query-outboard-counters";
    type Reply = Vec<OutboardCounter>;

    async fn run(self, vm: VmHandle) -> Result<Vec<OutboardCounter>, QmpError> {
        Ok(vm.counters().await?.into_iter().map(|(name, value)| OutboardCounter { name, value }).collect())
    }
}
