//! virtio-blk (virtio 1.2 §5.2).
//!
//! One thread serves all of a disk's queues. It hands requests to the image's [`crate::block::BlockQueue`] and sleeps; buffers go with
//! them, so that guest memory is touched by this thread alone, and only while the session lasts.
//!
//! VIRTIO_BLK_F_CONFIG_WCE isn't offered: a driver that could turn the cache off would gain nothing over `cache=writethrough`, where
//! VIRTIO_BLK_F_FLUSH isn't offered either, which tells a driver that what it has written is durable (§5.2.6.2).

mod engine;
mod handle;
mod limits;
mod policy;
mod request;
mod state;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

pub use engine::BlockEngine;
pub use handle::{BlockCounters, DiskHandle, Sort, SortCounters, Trouble};
pub use limits::DiskLimits;
pub use policy::{DiskError, DiskErrorListener, ErrorAction, ErrorPolicy, OnError};

use super::Plumbing;
use super::limit::{Clock, RateLimits};
use super::pci::{Model, VirtioPci};
use crate::block::{Aio, BlockBackend};
use crate::pci::PciFunction;

/// Bytes of a sector, which is what the device counts in.
pub const SECTOR: u64 = 512;
/// Entries of a queue.
pub const QUEUE_SIZE: u16 = 256;
/// Queues at most.
pub const MAX_QUEUES: u16 = 64;
/// Sectors of one range to discard or to zero, at most: 1 GiB, so that the device answers a reset before long.
const MAX_RANGE: u32 = 1 << 21;
/// Ranges of one request, at most.
const MAX_RANGES: u32 = 32;
/// Sectors, as a power of two, of what is best written as a whole: 4 KiB, a page of any cache and a block of most file systems.
const PHYSICAL_EXPONENT: u8 = 3;

/// A disk.
pub struct BlockConfig {
    /// What the log calls it.
    pub name: String,
    /// The block node that it stands on, if that has a name.
    pub node: Option<String>,
    /// What holds its bytes.
    pub backend: Arc<dyn BlockBackend>,
    /// What the guest sees as its serial number: the first 20 bytes.
    pub serial: String,
    /// How its back end is asked.
    pub aio: Aio,
    /// Queues, from 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// The guest is told that what it writes is durable after a flush; else it is before the write is over.
    pub write_cache: bool,
    /// What it may do in a time.
    pub limits: RateLimits,
    /// What errors come to.
    pub on_error: ErrorPolicy,
    /// Who hears of them. Without anyone a VM is never stopped: the guest is told instead.
    pub listener: Option<Arc<dyn DiskErrorListener>>,
    /// By what its limits are measured.
    pub clock: Clock,
}

impl BlockConfig {
    /// A disk with one queue, a write cache and no limits.
    pub fn new(name: impl Into<String>, backend: Arc<dyn BlockBackend>, serial: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            node: None,
            backend,
            serial: serial.into(),
            aio: Aio::default(),
            queues: 1,
            write_cache: true,
            limits: RateLimits::default(),
            on_error: ErrorPolicy::default(),
            listener: None,
            clock: Arc::new(Instant::now),
        }
    }
}

/// A disk as a PCI function.
///
/// # Errors
/// This process can have no more threads or descriptors.
pub fn new(disk: BlockConfig, plumbing: Plumbing<'_>) -> io::Result<Box<dyn PciFunction>> {
    new_with_handle(disk, plumbing).map(|(function, _)| function)
}

/// The same, and what the VM reaches the disk by afterwards.
///
/// # Errors
/// As [`new`].
pub fn new_with_handle(
    mut disk: BlockConfig,
    plumbing: Plumbing<'_>,
) -> io::Result<(Box<dyn PciFunction>, DiskHandle)> {
    disk.queues = disk.queues.clamp(1, MAX_QUEUES);
    let mut features = [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY].to_vec();
    if disk.write_cache {
        features.push(VIRTIO_BLK_F_FLUSH);
    }
    if disk.queues > 1 {
        features.push(VIRTIO_BLK_F_MQ);
    }
    if disk.backend.is_read_only() {
        features.push(VIRTIO_BLK_F_RO);
    } else {
        features.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    let model = Model {
        name: format!("virtio-blk {}", disk.name),
        kind: VIRTIO_ID_BLOCK,
        class: 0x01_0000,
        features: features.iter().fold(0, |features, bit| features | 1 << bit),
        queues: vec![QUEUE_SIZE; disk.queues.into()],
        config: config(disk.backend.size() / SECTOR, disk.queues),
        state: (state::NAME, state::VERSION),
    };
    let engine = BlockEngine::new(disk)?;
    let handle = engine.handle();
    Ok((Box::new(VirtioPci::new(model, Box::new(engine), plumbing)?), handle))
}

/// The configuration (§5.2.4).
fn config(sectors: u64, queues: u16) -> Vec<u8> {
    let mut config = vec![0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    // Segments of a request: header and status have a descriptor each.
    put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // Topology: the physical block, where the first one begins, the least and the best to write at once.
    put(24, &[PHYSICAL_EXPONENT, 0]);
    put(26, &(1u16 << PHYSICAL_EXPONENT).to_le_bytes());
    put(34, &queues.to_le_bytes());
    // Discard: sectors of a range, ranges, alignment.
    put(36, &MAX_RANGE.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &1u32.to_le_bytes());
    // Write zeroes: sectors of a range, ranges, whether it may give room back.
    put(48, &MAX_RANGE.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]);
    config
}
