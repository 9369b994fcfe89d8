//! Commands to the processors.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::command::Command;
use super::types::NewDeviceId;
use super::{ErrorClass, QmpError};
use crate::control::VmHandle;
use crate::cpuid::Place;
use crate::cpus::{CpuError, CpuSlot, CpusHandle, NewCpu, Occupant};
use crate::slots::SlotError;

/// What every processor is called: a guest has one kind.
const TYPE: &str = "host-x86_64-cpu";

/// Puts a processor in as `device_add` says: into this socket, core and thread, or, with none of them, the first place that is free.
pub(super) async fn add(vm: &VmHandle, id: Option<String>, at: [Option<u32>; 3]) -> Result<String, QmpError> {
    let place = match at {
        [None, None, None] => None,
        [Some(socket), Some(core), Some(thread)] => Some(Place { socket, core, thread }),
        _ => return Err(QmpError::generic("A processor needs socket-id, core-id and thread-id, or none of them")),
    };
    if let Some(id) = id.as_ref().filter(|id| is_device(vm, id)) {
        return Err(QmpError::generic(format!("id={id} is a device of this VM already: give another id")));
    }
    Ok(cpus_of(vm)?.add(NewCpu { place, id }).await?)
}

/// `Ok` unless a processor has this name: a device of it could not be told from that.
pub(super) fn is_none(vm: &VmHandle, id: Option<&str>) -> Result<(), QmpError> {
    match id.filter(|id| vm.cpus().is_some_and(|cpus| cpus.has(id))) {
        Some(id) => Err(SlotError::Taken(id.into()).into()),
        None => Ok(()),
    }
}

/// Whether a device in a slot has this name.
fn is_device(vm: &VmHandle, id: &str) -> bool {
    vm.slots().is_some_and(|slots| slots.devices().iter().any(|device| device.id == id))
}

/// What a processor lacks of its model, which is nothing: it would not have been made.
pub(super) const UNAVAILABLE: &str = "unavailable-features";

/// Whether a processor is at that place in the tree of objects.
pub(super) fn is_cpu_path(vm: &VmHandle, path: &str) -> bool {
    let mut slots = vm.cpus().map(CpusHandle::slots).unwrap_or_default().into_iter();
    slots.any(|slot| slot.occupant.is_some_and(|cpu| cpu.path == path))
}

/// Takes a processor out as `device_del` says, if it is one.
pub(super) fn remove(vm: &VmHandle, id: &str) -> Option<Result<(), QmpError>> {
    let cpus = vm.cpus().filter(|cpus| cpus.has(id))?;
    Some(cpus.remove(id).map_err(QmpError::from))
}

/// The processors that were added, as `qom-list` has them: name and type.
pub(super) fn added(vm: &VmHandle) -> impl Iterator<Item = (String, &'static str)> {
    let occupants = vm.cpus().map(CpusHandle::slots).unwrap_or_default().into_iter().filter_map(|slot| slot.occupant);
    occupants.filter(|cpu| cpu.path.starts_with(super::PERIPHERAL)).map(|cpu| (cpu.id, TYPE))
}

/// `x-outboard-add-cpu`, a command of ours: `soc-vmm add-cpu`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AddCpu {}

impl Command for AddCpu {
    const NAME: &'static str = "x-outboard-add-cpu";
    const ALTERS: bool = true;
    const PLUGS: bool = true;
    type Reply = NewDeviceId;

    async fn run(self, vm: VmHandle) -> Result<NewDeviceId, QmpError> {
        Ok(NewDeviceId { id: add(&vm, None, [None; 3]).await? })
    }
}

/// QMP `CpuInstanceProperties`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(rename = "CpuInstanceProperties")]
#[serde(rename_all = "kebab-case")]
pub(super) struct CpuProperties {
    socket_id: u32,
    core_id: u32,
    thread_id: u32,
}

impl From<Place> for CpuProperties {
    fn from(Place { socket, core, thread }: Place) -> Self {
        Self { socket_id: socket, core_id: core, thread_id: thread }
    }
}

/// QMP `HotpluggableCPU`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(rename = "HotpluggableCPU")]
#[serde(rename_all = "kebab-case")]
pub(super) struct HotpluggableCpu {
    #[serde(rename = "type")]
    kind: &'static str,
    vcpus_count: u32,
    props: CpuProperties,
    #[serde(skip_serializing_if = "Option::is_none")]
    qom_path: Option<String>,
}

/// QMP `query-hotpluggable-cpus`: every place for a processor.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryHotpluggableCpus {}

impl Command for QueryHotpluggableCpus {
    const NAME: &'static str = "query-hotpluggable-cpus";
    type Reply = Vec<HotpluggableCpu>;

    async fn run(self, vm: VmHandle) -> Result<Vec<HotpluggableCpu>, QmpError> {
        let place = |slot: CpuSlot| HotpluggableCpu {
            kind: TYPE,
            vcpus_count: 1,
            props: slot.place.into(),
            qom_path: slot.occupant.map(|cpu| cpu.path),
        };
        Ok(cpus_of(&vm)?.slots().into_iter().map(place).collect())
    }
}

/// QMP `CpuInfoFast`. The thread stands for the vCPU, which runs on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(rename = "CpuInfoFast")]
#[serde(rename_all = "kebab-case")]
pub(super) struct CpuInfo {
    cpu_index: usize,
    qom_path: String,
    thread_id: i32,
    props: CpuProperties,
    target: &'static str,
}

/// QMP `query-cpus-fast`: the processors that are there.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryCpusFast {}

impl Command for QueryCpusFast {
    const NAME: &'static str = "query-cpus-fast";
    type Reply = Vec<CpuInfo>;

    async fn run(self, vm: VmHandle) -> Result<Vec<CpuInfo>, QmpError> {
        let cpu = |CpuSlot { index, place, occupant }| {
            let Occupant { path, .. } = occupant?;
            let thread = vm.stand_ins().of(index);
            let thread = thread.map_err(|e| QmpError::generic(format!("There is no thread for vCPU {index}: {e}")));
            Some(thread.map(|thread_id| CpuInfo {
                cpu_index: index,
                qom_path: path,
                thread_id,
                props: place.into(),
                target: "x86_64",
            }))
        };
        cpus_of(&vm)?.slots().into_iter().filter_map(cpu).collect()
    }
}

fn cpus_of(vm: &VmHandle) -> Result<CpusHandle, QmpError> {
    vm.cpus().cloned().ok_or_else(|| QmpError::generic(super::devices::NO_MACHINE))
}

impl From<CpuError> for QmpError {
    fn from(e: CpuError) -> Self {
        let class = match e {
            CpuError::NotFound(_) => ErrorClass::DeviceNotFound,
            _ => ErrorClass::GenericError,
        };
        Self { class, desc: e.to_string() }
    }
}
