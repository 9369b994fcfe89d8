//! virtio-rng (virtio 1.2 §5.4): random bytes of the SoC's kernel.

mod engine;

use std::io;
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

pub use engine::EntropyEngine;

use super::Plumbing;
use super::pci::{Model, VirtioPci};
use crate::pci::PciFunction;

/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 64;

/// A source of entropy.
#[derive(Clone, Debug)]
pub struct EntropyConfig {
    /// What the log calls it.
    pub name: String,
    /// How much the guest may have; none: what it asks for.
    pub limit: Option<RateLimit>,
}

/// So many bytes in each period: QEMU's `max-bytes` and `period`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes, more than 0.
    pub bytes: u64,
    /// The period, which begins with the first byte.
    pub period: Duration,
}

/// A source of entropy as a PCI function.
///
/// # Errors
/// This process can have no more threads or descriptors.
pub fn new(source: EntropyConfig, plumbing: Plumbing<'_>) -> io::Result<Box<dyn PciFunction>> {
    let model = Model {
        name: format!("virtio-rng {}", source.name),
        kind: VIRTIO_ID_RNG,
        class: 0x00_ff00,
        features: 0,
        queues: vec![QUEUE_SIZE],
        config: Vec::new(),
        state: (engine::NAME, engine::VERSION),
    };
    Ok(Box::new(VirtioPci::new(model, Box::new(EntropyEngine::new(source)), plumbing)?))
}
