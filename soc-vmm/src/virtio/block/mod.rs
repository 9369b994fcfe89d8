//! virtio-blk (virtio 1.2 §5.2).

mod engine;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

pub use engine::BlockEngine;

use super::Plumbing;
use super::pci::{Model, VirtioPci};
use crate::block::BlockBackend;
use crate::pci::PciFunction;

/// Bytes of a sector, which is what the device counts in.
pub const SECTOR: u64 = 512;
/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 256;
/// Sectors of one range to discard or to zero, at most: 1 GiB, so that the device answers a reset before long.
const MAX_RANGE: u32 = 1 << 21;
/// Ranges of one request, at most.
const MAX_RANGES: u32 = 32;

/// A disk.
pub struct BlockConfig {
    /// What the log calls it.
    pub name: String,
    /// What holds its bytes.
    pub backend: Arc<dyn BlockBackend>,
    /// What the guest sees as its serial number: the first 20 bytes.
    pub serial: String,
}

/// A disk as a PCI function.
///
/// # Errors
/// This process can have no more threads or descriptors.
pub fn new(disk: BlockConfig, plumbing: Plumbing<'_>) -> io::Result<Box<dyn PciFunction>> {
    let read_only = disk.backend.is_read_only();
    let mut features = [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH].to_vec();
    if read_only {
        features.push(VIRTIO_BLK_F_RO);
    } else {
        features.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    let model = Model {
        name: format!("virtio-blk {}", disk.name),
        kind: VIRTIO_ID_BLOCK,
        class: 0x01_0000,
        features: features.iter().fold(0, |features, bit| features | 1 << bit),
        queues: vec![QUEUE_SIZE],
        config: config(disk.backend.size() / SECTOR),
    };
    let engine = BlockEngine::new(disk);
    Ok(Box::new(VirtioPci::new(model, Box::new(engine), plumbing)?))
}

/// The configuration (§5.2.4).
fn config(sectors: u64) -> Vec<u8> {
    let mut config = vec![0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    // Segments of a request: header and status have a descriptor each.
    put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(34, &1u16.to_le_bytes());
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
