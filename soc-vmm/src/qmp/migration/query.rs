//! How far a migration is.

use std::sync::Arc;
use std::time::Duration;

use migration::Progress;
use migration::stream::PAGE;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::super::QmpError;
use super::super::aside::aside;
use super::super::command::Command;
use crate::control::VmHandle;
use crate::migrate::{Migration, Step, failure};

/// How long a VM may take to say why its guest can't be moved: one whose host is silent tells of the rest without that.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// QMP `query-migrate`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct QueryMigrate {}

/// QMP `MigrationInfo`.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct MigrationInfo {
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Step>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ram: Option<MigrationStats>,
    /// Milliseconds, as all times.
    #[serde(skip_serializing_if = "Option::is_none")]
    total_time: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_downtime: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    downtime: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    setup_time: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_throttle_percentage: Option<u8>,
    /// Microseconds that a vCPU stands still for each dirty ring that it fills, at most, with capability dirty-limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    dirty_limit_throttle_time_per_round: Option<u64>,
    /// Microseconds that it takes a vCPU to fill its ring.
    #[serde(skip_serializing_if = "Option::is_none")]
    dirty_limit_ring_full_time: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_desc: Option<String>,
    /// vCPUs are limited.
    #[serde(skip)]
    limits: bool,
    /// What keeps the guest here.
    #[serde(skip_serializing_if = "Option::is_none")]
    blocked_reasons: Option<Vec<String>>,
}

/// QMP `MigrationStats`. Sizes in bytes.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct MigrationStats {
    transferred: u64,
    remaining: u64,
    total: u64,
    /// Pages of zeros.
    duplicate: u64,
    /// Other pages.
    normal: u64,
    normal_bytes: u64,
    /// Pages a second.
    dirty_pages_rate: u64,
    /// Megabits a second.
    mbps: f64,
    dirty_sync_count: u64,
    postcopy_requests: u64,
    page_size: u64,
    multifd_bytes: u64,
    pages_per_second: u64,
    precopy_bytes: u64,
    downtime_bytes: u64,
    postcopy_bytes: u64,
    dirty_sync_missed_zero_copy: u64,
}

impl MigrationInfo {
    fn of(progress: &Progress) -> Self {
        let milliseconds = |time: std::time::Duration| time.as_millis() as u64;
        let is_over = progress.phase.is_last();
        let why = failure(&progress.phase);
        Self {
            status: Some(Step::of(&progress.phase)),
            ram: Some(MigrationStats::of(progress)),
            total_time: Some(milliseconds(progress.total_time)),
            expected_downtime: (!is_over).then(|| milliseconds(progress.expected_downtime)),
            downtime: is_over.then(|| milliseconds(progress.downtime)),
            setup_time: Some(milliseconds(progress.setup_time)),
            cpu_throttle_percentage: (progress.throttle > 0).then_some(progress.throttle),
            limits: !is_over && progress.write_limit != 0,
            dirty_limit_throttle_time_per_round: None,
            dirty_limit_ring_full_time: None,
            error_desc: why.map(str::to_owned),
            blocked_reasons: None,
        }
    }
}

impl MigrationInfo {
    /// And how vCPUs fare with their limits, where the host tells that soon.
    async fn with_limits(self, migration: Arc<Migration>) -> Self {
        let limited = timeout(PATIENCE, aside(move || Ok(migration.limited_vcpus()?))).await;
        let limited = limited.ok().and_then(Result::ok).unwrap_or_default();
        let microseconds = |time: Duration| time.as_micros() as u64;
        let filling: Vec<_> =
            limited.iter().map(|vcpu| microseconds(vcpu.fills_ring)).filter(|time| *time != 0).collect();
        Self {
            dirty_limit_throttle_time_per_round: limited.iter().map(|vcpu| microseconds(vcpu.stands)).max(),
            dirty_limit_ring_full_time: filling.iter().sum::<u64>().checked_div(filling.len() as u64),
            ..self
        }
    }
}

impl MigrationStats {
    fn of(progress: &Progress) -> Self {
        Self {
            transferred: progress.transferred,
            remaining: progress.remaining,
            total: progress.total,
            duplicate: progress.zero_pages,
            normal: progress.normal_pages,
            normal_bytes: progress.normal_pages * PAGE,
            dirty_pages_rate: progress.dirty_rate,
            mbps: progress.rate as f64 * 8.0 / 1e6,
            dirty_sync_count: progress.rounds,
            postcopy_requests: progress.postcopy_requests,
            page_size: PAGE,
            multifd_bytes: 0,
            pages_per_second: progress.bandwidth / PAGE,
            precopy_bytes: progress.precopy_bytes,
            downtime_bytes: progress.downtime_bytes,
            postcopy_bytes: progress.postcopy_bytes,
            dirty_sync_missed_zero_copy: 0,
        }
    }
}

impl Command for QueryMigrate {
    const NAME: &'static str = "query-migrate";
    type Reply = MigrationInfo;

    async fn run(self, vm: VmHandle) -> Result<MigrationInfo, QmpError> {
        let migration = vm.migration().clone();
        let info = migration.progress().map_or_else(MigrationInfo::default, |progress| MigrationInfo::of(&progress));
        let info = if info.limits { info.with_limits(migration.clone()).await } else { info };
        // Who looks how far it is needs no thread for that, which may be lacking.
        let blocker = if migration.is_under_way() {
            None
        } else {
            timeout(PATIENCE, aside(move || Ok(migration.blocker()))).await.ok().and_then(Result::ok).flatten()
        };
        Ok(MigrationInfo { blocked_reasons: blocker.map(|why| vec![why]), ..info })
    }
}
