//! virtio-net (virtio 1.2 §5.1), one pair of queues, without offloads.

mod engine;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS};

pub use engine::NetEngine;

use super::Plumbing;
use super::pci::{Model, VirtioPci};
use crate::net::NetBackend;
use crate::pci::PciFunction;

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// The queues: frames to the guest, frames from it (§5.1.2).
pub const RECEIVE: usize = 0;
/// See [`RECEIVE`].
pub const TRANSMIT: usize = 1;
/// Offset of the link's status in the configuration, and its bit (§5.1.4).
const STATUS: usize = 6;
const LINK_UP: u16 = 1;

/// A network interface.
pub struct NetConfig {
    /// What the log calls it.
    pub name: String,
    /// Where its frames go.
    pub backend: Box<dyn NetBackend>,
    /// Its address.
    pub mac: [u8; 6],
    /// The largest packet that the guest shall send, in bytes behind the Ethernet header; none: the guest's own choice.
    pub mtu: Option<u16>,
    /// Where it counts.
    pub counters: Arc<NetCounters>,
}

/// Frames of an interface.
#[derive(Debug, Default)]
pub struct NetCounters {
    sent: AtomicU64,
    unsent: AtomicU64,
    received: AtomicU64,
    unreceived: AtomicU64,
}

impl NetCounters {
    /// Frames of the guest that its network took.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Frames of the guest that were dropped: the peer was slow or gone, or they were none.
    pub fn unsent(&self) -> u64 {
        self.unsent.load(Ordering::Relaxed)
    }

    /// Frames that the guest was given.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Frames for the guest that were dropped: it had no buffer for them.
    pub fn unreceived(&self) -> u64 {
        self.unreceived.load(Ordering::Relaxed)
    }

    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// A network interface as a PCI function.
///
/// # Errors
/// This process can have no more threads or descriptors.
pub fn new(interface: NetConfig, plumbing: Plumbing<'_>) -> io::Result<Box<dyn PciFunction>> {
    let mut features = [VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MRG_RXBUF].to_vec();
    features.extend(interface.mtu.map(|_| VIRTIO_NET_F_MTU));
    let model = Model {
        name: format!("virtio-net {}", interface.name),
        kind: VIRTIO_ID_NET,
        class: 0x02_0000,
        features: features.iter().fold(0, |features, bit| features | 1 << bit),
        queues: vec![QUEUE_SIZE; 2],
        config: config(interface.mac, interface.mtu),
    };
    let engine = NetEngine::new(interface);
    Ok(Box::new(VirtioPci::new(model, Box::new(engine), plumbing)?))
}

/// The configuration (§5.1.4): address, link, pairs of queues, MTU.
fn config(mac: [u8; 6], mtu: Option<u16>) -> Vec<u8> {
    let words = [LINK_UP, 1, mtu.unwrap_or(0)];
    mac.into_iter().chain(words.into_iter().flat_map(u16::to_le_bytes)).collect()
}
