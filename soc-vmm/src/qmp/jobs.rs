//! Commands to jobs: disks that are copied while their guest writes them.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::aside::aside;
use super::command::Command;
use super::devices::{in_world, slots_of};
use super::types::Empty;
use super::{ErrorClass, QmpError};
use crate::block::{MirrorSpec, MirrorSync};
use crate::cli::with_causes;
use crate::control::VmHandle;
use crate::jobs::{JobError, JobReport, JobStatus, KIND, NewMirror};
use crate::qemu::{World, image};
use crate::slots::SlotsHandle;

/// Bytes that are copied together, where nobody says.
const CLUSTER: u64 = 64 << 10;
/// What may be said.
const CLUSTERS: std::ops::RangeInclusive<u32> = 4096..=1 << 20;

/// QMP `blockdev-mirror`: copies a guest's disk to another node, and keeps both the same until that is ended.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct BlockdevMirror {
    /// The job's name; none: the disk's node.
    job_id: Option<String>,
    /// The node of a guest's disk.
    device: String,
    /// The node of the copy.
    target: String,
    /// What at first.
    sync: MirrorSyncMode,
    /// Bytes a second; 0: no limit.
    #[serde(default)]
    speed: u64,
    /// Bytes that are copied together.
    granularity: Option<u32>,
    /// What becomes of an error of the disk, which can be one thing.
    #[serde(rename = "on-source-error")]
    _on_source_error: Option<BlockdevOnError>,
    /// What becomes of an error of the copy, likewise.
    #[serde(rename = "on-target-error")]
    _on_target_error: Option<BlockdevOnError>,
    /// When a write is over.
    #[serde(default)]
    copy_mode: MirrorCopyMode,
    /// It goes on by itself.
    auto_finalize: Option<bool>,
    /// It is forgotten as soon as it is over.
    auto_dismiss: Option<bool>,
}

/// QMP `MirrorSyncMode`, of those that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum MirrorSyncMode {
    /// What isn't its backing file's.
    Top,
    /// Everything.
    Full,
}

/// QMP `BlockdevOnError`, of what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum BlockdevOnError {
    /// The job fails.
    Report,
}

/// QMP `MirrorCopyMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum MirrorCopyMode {
    /// When the disk has it.
    #[default]
    Background,
    /// When the copy has it too.
    WriteBlocking,
}

impl Command for BlockdevMirror {
    const NAME: &'static str = "blockdev-mirror";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        if self.auto_finalize == Some(false) {
            return Err(QmpError::generic("A job goes on by itself: leave 'auto-finalize' out"));
        }
        let cluster = self.granularity.unwrap_or(CLUSTER as u32);
        if !cluster.is_power_of_two() || !CLUSTERS.contains(&cluster) {
            return Err(QmpError::generic("'granularity' is a power of two from 4096 to 1048576"));
        }
        unused(&vm, &self.target, "target")?;
        let slots = slots_of(&vm)?;
        let disk = slots.disks().into_iter().find(|disk| disk.node.as_deref() == Some(&self.device));
        let disk = disk.ok_or_else(|| {
            QmpError::generic(format!("'{}' is not the node of a disk of the guest's: those are copied", self.device))
        })?;
        if slots.disks().iter().any(|disk| disk.node.as_deref() == Some(&self.target)) {
            return Err(QmpError::generic(format!("'{}' is a disk of the guest's: copy to another node", self.target)));
        }
        let spec = MirrorSpec {
            sync: if self.sync == MirrorSyncMode::Top { MirrorSync::Top } else { MirrorSync::Full },
            cluster: cluster.into(),
            speed: self.speed,
            blocking: self.copy_mode == MirrorCopyMode::WriteBlocking,
        };
        let jobs = vm.jobs().clone();
        let begin = move |slots: &SlotsHandle, world: &World<'_>| {
            let target = slots.disk_node(&self.target)?;
            let new = NewMirror {
                id: self.job_id.unwrap_or_else(|| self.device.clone()),
                disk: disk.id,
                source: self.device,
                handle: Arc::new(disk.handle),
                target: self.target,
                image: image(&target, world)?,
                spec,
                auto_dismiss: self.auto_dismiss != Some(false),
            };
            Ok(jobs.mirror(new)?)
        };
        in_world(vm, begin).await?;
        Ok(Empty {})
    }
}

/// Whether nobody else writes a node, or needs it as it is.
pub(super) fn unused(vm: &VmHandle, node: &str, role: &str) -> Result<(), QmpError> {
    let user = vm.jobs().of_node(node, false).map(|job| format!("job '{job}'"));
    match user.or_else(|| vm.exports().of_node(node, false).map(|export| format!("export '{export}'"))) {
        None => Ok(()),
        Some(user) => Err(QmpError::generic(format!("{role} '{node}' is in use by {user}: end that first"))),
    }
}

/// Whether nobody else writes a node that a guest is to have.
pub(super) fn unwritten(vm: &VmHandle, node: &str) -> Result<(), QmpError> {
    let user = vm.jobs().of_node(node, true).map(|job| format!("job '{job}'"));
    match user.or_else(|| vm.exports().of_node(node, true).map(|export| format!("export '{export}'"))) {
        None => Ok(()),
        Some(user) => Err(QmpError::generic(format!("node '{node}' is written by {user}: end that first"))),
    }
}

impl From<JobError> for QmpError {
    fn from(e: JobError) -> Self {
        let class = match e {
            JobError::NotFound(_) => ErrorClass::DeviceNotActive,
            _ => ErrorClass::GenericError,
        };
        Self { class, desc: with_causes(&e) }
    }
}

/// QMP `query-jobs`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryJobs {}

/// QMP `JobInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct JobInfo {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    status: JobStatus,
    current_progress: u64,
    total_progress: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Command for QueryJobs {
    const NAME: &'static str = "query-jobs";
    type Reply = Vec<JobInfo>;

    async fn run(self, vm: VmHandle) -> Result<Vec<JobInfo>, QmpError> {
        let info = |JobReport { id, status, done, total, error, .. }: JobReport| JobInfo {
            id,
            kind: KIND,
            status,
            current_progress: done,
            total_progress: total,
            error,
        };
        Ok(vm.jobs().list().into_iter().map(info).collect())
    }
}

/// QMP `query-block-jobs`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryBlockJobs {}

/// QMP `BlockJobInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlockJobInfo {
    #[serde(rename = "type")]
    kind: &'static str,
    device: String,
    len: u64,
    offset: u64,
    busy: bool,
    paused: bool,
    speed: u64,
    io_status: &'static str,
    ready: bool,
    status: JobStatus,
    auto_finalize: bool,
    auto_dismiss: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Command for QueryBlockJobs {
    const NAME: &'static str = "query-block-jobs";
    type Reply = Vec<BlockJobInfo>;

    async fn run(self, vm: VmHandle) -> Result<Vec<BlockJobInfo>, QmpError> {
        let info = |job: JobReport| BlockJobInfo {
            kind: KIND,
            device: job.id,
            len: job.total,
            offset: job.done,
            busy: job.status == JobStatus::Running,
            paused: false,
            speed: job.speed,
            io_status: "ok",
            ready: job.status == JobStatus::Ready,
            status: job.status,
            auto_finalize: true,
            auto_dismiss: job.auto_dismiss,
            error: job.error,
        };
        Ok(vm.jobs().list().into_iter().map(info).collect())
    }
}

/// QMP `block-job-cancel`: a copy that is ready stays what the disk is then, and any other is of no use.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockJobCancel {
    /// The job.
    device: String,
    /// A copy that is ready is of no use either.
    #[serde(default)]
    force: bool,
}

impl Command for BlockJobCancel {
    const NAME: &'static str = "block-job-cancel";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        cancel(&vm, &self.device, self.force).await?;
        Ok(Empty {})
    }
}

/// Ends a job. Who asked hears of its end before the answer, unless it takes long.
async fn cancel(vm: &VmHandle, id: &str, force: bool) -> Result<(), QmpError> {
    let job = vm.jobs().find(id)?;
    job.cancel(force)?;
    job.ends_soon().await;
    Ok(())
}

/// QMP `block-job-set-speed`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockJobSetSpeed {
    /// The job.
    device: String,
    /// Bytes a second; 0: no limit.
    speed: u64,
}

impl Command for BlockJobSetSpeed {
    const NAME: &'static str = "block-job-set-speed";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.jobs().find(&self.device)?.set_speed(self.speed)?;
        Ok(Empty {})
    }
}

/// QMP `block-job-complete`: refused, as a guest's disk stays on its image.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockJobComplete {
    /// The job.
    device: String,
}

/// Why a guest's disk doesn't change to its copy.
const STAYS: &str = "A guest's disk stays on its image: end the job by block-job-cancel, which keeps the copy";

impl Command for BlockJobComplete {
    const NAME: &'static str = "block-job-complete";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.jobs().find(&self.device)?;
        Err(QmpError::generic(STAYS))
    }
}

/// QMP `job-complete`: refused likewise.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct JobComplete {
    /// The job.
    id: String,
}

impl Command for JobComplete {
    const NAME: &'static str = "job-complete";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.jobs().find(&self.id)?;
        Err(QmpError::generic(STAYS))
    }
}

/// QMP `job-cancel`: at once.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct JobCancel {
    /// The job.
    id: String,
}

impl Command for JobCancel {
    const NAME: &'static str = "job-cancel";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        cancel(&vm, &self.id, true).await?;
        Ok(Empty {})
    }
}

/// QMP `job-dismiss`: forgets a job that is over.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct JobDismiss {
    /// The job.
    id: String,
}

impl Command for JobDismiss {
    const NAME: &'static str = "job-dismiss";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let job = vm.jobs().find(&self.id)?;
        aside(move || Ok(job.dismiss()?)).await?;
        Ok(Empty {})
    }
}
