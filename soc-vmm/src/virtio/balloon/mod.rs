//! virtio-balloon (virtio 1.2 §5.5): memory that the guest doesn't need goes back to the host.
//!
//! Two ways lead there. The host asks for a size and the driver fills its balloon until the guest has no more than that; and the driver
//! reports pages that happen to be free, unasked. Either way the frames go back through [`Pages`], in two phases.
//!
//! Where guest memory is pinned (a function that reaches it by DMA, a device of the host's that is assigned), no frame can go back. There
//! the device has the guest's statistics alone: a balloon that takes memory from the guest and gives none to the host is worse than none.

mod engine;
mod handle;
mod pages;
mod state;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

pub use engine::BalloonEngine;
pub use handle::{BalloonEvents, BalloonHandle, GuestStats, Pinned};
pub use pages::{PAGE, PageRun, Pages, PagesError};

use super::Plumbing;
use super::pci::{Model, VirtioPci};
use super::word::DriverWord;
use crate::pci::PciFunction;

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 128;
/// The queues: frames that are given, frames that are taken back, statistics (§5.5.2). Behind them reports: the fourth by the
/// specification, and the third where the driver counts only those queues that it uses, as Linux did for years.
pub const INFLATE: usize = 0;
/// See [`INFLATE`].
pub const DEFLATE: usize = 1;
/// See [`INFLATE`].
pub const STATISTICS: usize = 2;
const QUEUES: usize = 5;
/// Features (§5.5.3).
pub const F_STATS_VQ: u32 = 1;
/// See [`F_STATS_VQ`].
pub const F_DEFLATE_ON_OOM: u32 = 2;
/// See [`F_STATS_VQ`].
pub const F_PAGE_POISON: u32 = 4;
/// See [`F_STATS_VQ`].
pub const F_PAGE_REPORTING: u32 = 5;
/// Offsets in the configuration (§5.5.4): pages wanted, pages given, what the guest fills free pages with.
const NUM_PAGES: usize = 0;
const ACTUAL: u64 = 4;
const POISON: u64 = 12;
const CONFIG_SIZE: usize = 16;

/// A balloon.
pub struct BalloonConfig {
    /// What the log calls it.
    pub name: String,
    /// Whether the guest may take pages back before it kills programs for want of memory.
    pub deflate_on_oom: bool,
    /// Whether the guest is to report free pages.
    pub reporting: bool,
    /// The guest's memory.
    pub pages: Box<dyn Pages>,
    /// The side that asks and is told.
    pub handle: Arc<BalloonHandle>,
    /// Who hears of its size.
    pub events: Arc<dyn BalloonEvents>,
}

/// Why there is no balloon.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// The guest was to report free pages, and no memory can go back to the host.
    #[error("free-page-reporting=on: {0}; leave it out")]
    Reporting(Pinned),
    /// This process can have no more threads or descriptors.
    #[error("can't make a balloon")]
    Io(#[from] io::Error),
}

/// What the driver writes of the configuration.
#[derive(Clone, Debug)]
pub(super) struct Words {
    actual: Arc<DriverWord>,
    poison: Arc<DriverWord>,
}

/// A balloon as a PCI function.
///
/// # Errors
/// See [`BalloonError`].
pub fn new(balloon: BalloonConfig, plumbing: Plumbing<'_>) -> Result<Box<dyn PciFunction>, BalloonError> {
    if let Some(why) = balloon.pages.pinned() {
        let pinned = Pinned(why);
        if balloon.reporting {
            return Err(BalloonError::Reporting(pinned));
        }
        balloon.handle.pin(pinned);
    }
    let mut features = vec![F_STATS_VQ];
    features.extend(balloon.deflate_on_oom.then_some(F_DEFLATE_ON_OOM));
    if balloon.reporting {
        features.extend([F_PAGE_POISON, F_PAGE_REPORTING]);
    }
    let word = |at| DriverWord::new(at).map(Arc::new).map_err(io::Error::from);
    let words = Words { actual: word(ACTUAL)?, poison: word(POISON)? };
    let model = Model {
        name: format!("virtio-balloon {}", balloon.name),
        kind: VIRTIO_ID_BALLOON,
        class: 0x00_ff00,
        features: features.iter().fold(0, |features, bit| features | 1 << bit),
        queues: vec![QUEUE_SIZE; QUEUES],
        config: vec![0; CONFIG_SIZE],
        state: (state::NAME, state::VERSION),
    };
    let engine = BalloonEngine::with_words(balloon, words.clone())?;
    let function = VirtioPci::new(model, Box::new(engine), plumbing)?;
    Ok(Box::new(function.with_words(vec![words.actual, words.poison])))
}
