//! Commands that ask of disks, media and their images.

use std::sync::atomic::{AtomicU64, Ordering};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::QmpError;
use super::command::Command;
use super::devices::slots_of;
use super::types::Empty;
use crate::control::VmHandle;
use crate::slots::{DeviceHandle, NodeInfo, SlotsHandle};
use crate::virtio::block::{BlockCounters, DiskLimits, Sort, Trouble};
use crate::virtio::{Rate, RateLimits};

/// How QEMU calls the part of a virtio device that drives its disk.
const BACKEND: &str = "/virtio-backend";

/// QMP `query-block`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryBlock {}

/// QMP `BlockInfo`.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub(super) struct BlockInfo {
    /// Its old name: it has none.
    device: &'static str,
    /// Where it is in the tree of objects.
    qdev: String,
    #[serde(rename = "type")]
    kind: &'static str,
    removable: bool,
    locked: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    inserted: Option<BlockDeviceInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tray_open: Option<bool>,
    #[serde(rename = "io-status", skip_serializing_if = "Option::is_none")]
    io_status: Option<BlockDeviceIoStatus>,
}

/// QMP `BlockDeviceIoStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum BlockDeviceIoStatus {
    /// Nothing waits for a repair.
    Ok,
    /// Requests wait since one failed.
    Failed,
    /// They wait since there is no room.
    Nospace,
}

impl From<Option<Trouble>> for BlockDeviceIoStatus {
    fn from(trouble: Option<Trouble>) -> Self {
        match trouble {
            None => Self::Ok,
            Some(Trouble::Failed) => Self::Failed,
            Some(Trouble::NoSpace) => Self::Nospace,
        }
    }
}

/// QMP `BlockDeviceInfo`: an image, and how it is used.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub(super) struct BlockDeviceInfo {
    file: String,
    #[serde(rename = "node-name", skip_serializing_if = "Option::is_none")]
    node_name: Option<String>,
    ro: bool,
    drv: String,
    backing_file_depth: u32,
    encrypted: bool,
    detect_zeroes: &'static str,
    bps: u64,
    bps_rd: u64,
    bps_wr: u64,
    iops: u64,
    iops_rd: u64,
    iops_wr: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    bps_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bps_rd_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bps_wr_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iops_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iops_rd_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iops_wr_max: Option<u64>,
    image: ImageInfo,
    cache: BlockdevCacheInfo,
    write_threshold: u64,
}

/// QMP `ImageInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ImageInfo {
    filename: String,
    format: String,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
}

/// QMP `BlockdevCacheInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlockdevCacheInfo {
    writeback: bool,
    direct: bool,
    no_flush: bool,
}

impl BlockDeviceInfo {
    fn new(node: NodeInfo, limits: DiskLimits) -> Self {
        let DiskLimits { all, reads, writes } = limits;
        let file = node.file.display().to_string();
        let rate = |rate: Option<Rate>| rate.map_or(0, |rate| rate.per_second);
        // A burst that is what comes of the rate alone was not chosen.
        let burst = |rate: Option<Rate>| rate.filter(|rate| Rate::new(rate.per_second) != *rate).map(|rate| rate.burst);
        Self {
            node_name: Some(node.name),
            ro: node.read_only,
            drv: node.driver.to_owned(),
            backing_file_depth: 0,
            encrypted: false,
            detect_zeroes: "off",
            bps: rate(all.bytes),
            bps_rd: rate(reads.bytes),
            bps_wr: rate(writes.bytes),
            iops: rate(all.operations),
            iops_rd: rate(reads.operations),
            iops_wr: rate(writes.operations),
            bps_max: burst(all.bytes),
            bps_rd_max: burst(reads.bytes),
            bps_wr_max: burst(writes.bytes),
            iops_max: burst(all.operations),
            iops_rd_max: burst(reads.operations),
            iops_wr_max: burst(writes.operations),
            image: ImageInfo {
                filename: file.clone(),
                format: node.driver.to_owned(),
                virtual_size: node.size,
                actual_size: node.held,
            },
            cache: BlockdevCacheInfo { writeback: true, direct: node.direct, no_flush: false },
            write_threshold: 0,
            file,
        }
    }
}

impl Command for QueryBlock {
    const NAME: &'static str = "query-block";
    type Reply = Vec<BlockInfo>;

    async fn run(self, vm: VmHandle) -> Result<Vec<BlockInfo>, QmpError> {
        let slots = slots_of(&vm)?;
        let nodes = slots.nodes();
        let find = |name: &Option<String>| nodes.iter().find(|node| Some(&node.name) == name.as_ref()).cloned();
        let disks = slots.disks().into_iter().map(|disk| BlockInfo {
            device: "",
            qdev: disk.path,
            kind: "unknown",
            removable: false,
            locked: false,
            inserted: find(&disk.node).map(|node| BlockDeviceInfo::new(node, disk.handle.limits())),
            tray_open: None,
            io_status: Some(disk.handle.trouble().into()),
        });
        let drives = vm.cdroms().iter().map(|drive| {
            let tray = drive.handle.tray();
            BlockInfo {
                device: "",
                qdev: drive.id.clone(),
                kind: "unknown",
                removable: true,
                locked: tray.locked,
                inserted: find(&drive.node()).map(|node| BlockDeviceInfo::new(node, DiskLimits::default())),
                tray_open: Some(tray.open),
                io_status: Some(BlockDeviceIoStatus::Ok),
            }
        });
        Ok(disks.chain(drives).collect())
    }
}

/// QMP `query-named-block-nodes`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryNamedBlockNodes {
    /// Without what images stand on: that is never told.
    #[serde(rename = "flat")]
    _flat: Option<bool>,
}

impl Command for QueryNamedBlockNodes {
    const NAME: &'static str = "query-named-block-nodes";
    type Reply = Vec<BlockDeviceInfo>;

    async fn run(self, vm: VmHandle) -> Result<Vec<BlockDeviceInfo>, QmpError> {
        let slots = slots_of(&vm)?;
        let disks = slots.disks();
        let limits = |node: &NodeInfo| {
            let disk = disks.iter().find(|disk| disk.node.as_ref() == Some(&node.name));
            disk.map(|disk| disk.handle.limits()).unwrap_or_default()
        };
        let info = |node: NodeInfo| {
            let limits = limits(&node);
            BlockDeviceInfo::new(node, limits)
        };
        Ok(slots.nodes().into_iter().map(info).collect())
    }
}

/// QMP `query-blockstats`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct QueryBlockstats {
    /// Of each node instead of each device.
    #[serde(default)]
    query_nodes: bool,
}

/// QMP `BlockStats`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlockStats {
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    qdev: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_name: Option<String>,
    stats: BlockDeviceStats,
}

/// QMP `BlockDeviceStats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct BlockDeviceStats {
    rd_bytes: u64,
    wr_bytes: u64,
    unmap_bytes: u64,
    rd_operations: u64,
    wr_operations: u64,
    flush_operations: u64,
    unmap_operations: u64,
    rd_total_time_ns: u64,
    wr_total_time_ns: u64,
    flush_total_time_ns: u64,
    unmap_total_time_ns: u64,
    /// The image's end that was written: it isn't kept.
    wr_highest_offset: u64,
    rd_merged: u64,
    wr_merged: u64,
    unmap_merged: u64,
    failed_rd_operations: u64,
    failed_wr_operations: u64,
    failed_flush_operations: u64,
    failed_unmap_operations: u64,
    invalid_rd_operations: u64,
    invalid_wr_operations: u64,
    invalid_flush_operations: u64,
    invalid_unmap_operations: u64,
    account_invalid: bool,
    account_failed: bool,
    timed_stats: [(); 0],
}

impl BlockDeviceStats {
    fn of(counters: &BlockCounters) -> Self {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let done = |sort| get(&counters.of(sort).done);
        let failed = |sort| get(&counters.of(sort).failed);
        let time = |sort| get(&counters.of(sort).nanoseconds);
        Self {
            rd_bytes: get(&counters.read),
            wr_bytes: get(&counters.written),
            rd_operations: done(Sort::Read),
            wr_operations: done(Sort::Write),
            flush_operations: done(Sort::Flush),
            unmap_operations: done(Sort::Discard),
            rd_total_time_ns: time(Sort::Read),
            wr_total_time_ns: time(Sort::Write),
            flush_total_time_ns: time(Sort::Flush),
            unmap_total_time_ns: time(Sort::Discard),
            failed_rd_operations: failed(Sort::Read),
            failed_wr_operations: failed(Sort::Write),
            failed_flush_operations: failed(Sort::Flush),
            failed_unmap_operations: failed(Sort::Discard),
            account_invalid: true,
            account_failed: true,
            ..Self::default()
        }
    }
}

impl Command for QueryBlockstats {
    const NAME: &'static str = "query-blockstats";
    type Reply = Vec<BlockStats>;

    async fn run(self, vm: VmHandle) -> Result<Vec<BlockStats>, QmpError> {
        let slots = slots_of(&vm)?;
        let disks = slots.disks();
        if self.query_nodes {
            let stats = |node: NodeInfo| {
                let disk = disks.iter().find(|disk| disk.node.as_ref() == Some(&node.name));
                let stats = disk.map(|disk| BlockDeviceStats::of(disk.handle.counters()));
                BlockStats { device: None, qdev: None, node_name: Some(node.name), stats: stats.unwrap_or_default() }
            };
            return Ok(slots.nodes().into_iter().map(stats).collect());
        }
        let of_disks = disks.into_iter().map(|disk| BlockStats {
            device: Some(""),
            qdev: Some(disk.path),
            node_name: disk.node,
            stats: BlockDeviceStats::of(disk.handle.counters()),
        });
        let of_drives = vm.cdroms().iter().map(|drive| BlockStats {
            device: Some(""),
            qdev: Some(drive.id.clone()),
            node_name: drive.node(),
            stats: BlockDeviceStats::default(),
        });
        Ok(of_disks.chain(of_drives).collect())
    }
}

/// QMP `block_set_io_throttle`: what a disk is held to from now on.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockSetIoThrottle {
    /// The disk.
    id: Option<String>,
    /// The disk, by its old name.
    device: Option<String>,
    bps: u64,
    bps_rd: u64,
    bps_wr: u64,
    iops: u64,
    iops_rd: u64,
    iops_wr: u64,
    #[serde(default)]
    bps_max: u64,
    #[serde(default)]
    bps_rd_max: u64,
    #[serde(default)]
    bps_wr_max: u64,
    #[serde(default)]
    iops_max: u64,
    #[serde(default)]
    iops_rd_max: u64,
    #[serde(default)]
    iops_wr_max: u64,
    #[serde(default)]
    bps_max_length: u64,
    #[serde(default)]
    bps_rd_max_length: u64,
    #[serde(default)]
    bps_wr_max_length: u64,
    #[serde(default)]
    iops_max_length: u64,
    #[serde(default)]
    iops_rd_max_length: u64,
    #[serde(default)]
    iops_wr_max_length: u64,
    #[serde(default)]
    iops_size: u64,
    /// Disks that share their limits: each has its own.
    group: Option<String>,
}

impl BlockSetIoThrottle {
    fn limits(&self) -> Result<DiskLimits, QmpError> {
        let lengths = [self.bps_max_length, self.iops_max_length];
        let apart_lengths =
            [self.bps_rd_max_length, self.bps_wr_max_length, self.iops_rd_max_length, self.iops_wr_max_length];
        // 1 is QEMU's own default.
        if lengths.into_iter().chain(apart_lengths).any(|length| length > 1) {
            return Err(QmpError::generic("A burst lasts a second: leave the lengths of bursts out"));
        }
        if self.iops_size > 0 {
            return Err(QmpError::generic("Requests of any size count as one: leave 'iops_size' out"));
        }
        let rate = |name: &str, per_second: u64, burst: u64| match (per_second, burst) {
            (0, 0) => Ok(None),
            (0, _) => Err(QmpError::generic(format!("'{name}_max' needs '{name}'"))),
            (per_second, 0) => Ok(Some(Rate::new(per_second))),
            (per_second, burst) if burst >= per_second => Ok(Some(Rate { per_second, burst })),
            _ => Err(QmpError::generic(format!("'{name}_max' is less than '{name}'"))),
        };
        Ok(DiskLimits {
            all: RateLimits {
                operations: rate("iops", self.iops, self.iops_max)?,
                bytes: rate("bps", self.bps, self.bps_max)?,
            },
            reads: RateLimits {
                operations: rate("iops_rd", self.iops_rd, self.iops_rd_max)?,
                bytes: rate("bps_rd", self.bps_rd, self.bps_rd_max)?,
            },
            writes: RateLimits {
                operations: rate("iops_wr", self.iops_wr, self.iops_wr_max)?,
                bytes: rate("bps_wr", self.bps_wr, self.bps_wr_max)?,
            },
        })
    }
}

impl Command for BlockSetIoThrottle {
    const NAME: &'static str = "block_set_io_throttle";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let limits = self.limits()?;
        let name = match (&self.id, &self.device) {
            (Some(name), None) | (None, Some(name)) => disk_of(name),
            _ => return Err(QmpError::generic("block_set_io_throttle needs either 'id' or 'device'")),
        };
        let slots = slots_of(&vm)?;
        if self.group.as_deref().is_some_and(|group| is_shared(&slots, name, group)) {
            return Err(QmpError::generic("Each disk has limits of its own: leave 'group' out"));
        }
        match slots.device(name)? {
            DeviceHandle::Disk(disk) => disk.set_limits(limits),
            _ => return Err(QmpError::generic(format!("'{name}' is no disk whose requests are served here"))),
        }
        Ok(Empty {})
    }
}

/// Whether a group of limits is another disk's: that of its own name is as good as none.
fn is_shared(slots: &SlotsHandle, disk: &str, group: &str) -> bool {
    slots.disks().iter().any(|other| other.id != disk && other.id == disk_of(group))
}

/// A disk's name, however it is told: by its place in the tree of objects too.
pub(super) fn disk_of(name: &str) -> &str {
    let name = super::tree::in_peripheral(name).unwrap_or(name);
    name.strip_suffix(BACKEND).unwrap_or(name)
}
