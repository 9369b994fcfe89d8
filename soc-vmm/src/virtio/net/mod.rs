//! virtio-net (virtio 1.2 §5.1): offloads as its network has them, pairs of queues, and a control queue.
//!
//! All pairs are served by the interface's one thread. Several are for the guest, whose CPUs each have a pair and an interrupt of their own;
//! a thread a pair would be another kind of session.

mod announce;
mod control;
mod counters;
mod engine;
mod features;
mod filter;
mod header;
mod link;
mod pair;
mod poller;
mod state;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

pub use counters::NetCounters;
pub use engine::NetEngine;
pub use link::NetLink;

use self::features::Features;
use super::Plumbing;
use super::limit::RateLimits;
use super::pci::{Model, VirtioPci};
use crate::net::{NetBackend, Offloads};
use crate::pci::PciFunction;

/// Entries of each queue for frames, and of the control queue. Of pair n, frames to the guest are queue 2n and frames from it 2n + 1; the
/// control queue is behind the last pair, or behind the first if the driver knows no others (§5.1.2).
pub const QUEUE_SIZE: u16 = 256;
/// See [`QUEUE_SIZE`].
pub const CONTROL_SIZE: u16 = 64;
/// Offset of the link's status in the configuration (§5.1.4).
const STATUS: usize = 6;

/// A network interface.
pub struct NetConfig {
    /// What the log calls it.
    pub name: String,
    /// Where its frames go: at least one back end, one a pair of queues, all of one network.
    pub backends: Vec<Box<dyn NetBackend>>,
    /// Its address.
    pub mac: [u8; 6],
    /// The largest packet that the guest shall send, in bytes behind the Ethernet header; none: the guest's own choice.
    pub mtu: Option<u16>,
    /// What each pair may send, and receive.
    pub limits: RateLimits,
    /// Its cable.
    pub link: Arc<NetLink>,
    /// Where it counts.
    pub counters: Arc<NetCounters>,
}

impl NetConfig {
    /// An interface without limits, of which nothing else is known.
    ///
    /// # Errors
    /// There is no more room for descriptors in this process.
    pub fn new(name: String, backends: Vec<Box<dyn NetBackend>>, mac: [u8; 6]) -> nix::Result<Self> {
        let (limits, link, counters) = (RateLimits::default(), NetLink::new()?, Arc::default());
        Ok(Self { name, backends, mac, mtu: None, limits, link, counters })
    }

    /// What all of its back ends do.
    fn offloads(&self) -> Option<Offloads> {
        self.backends.iter().map(|backend| backend.offloads()).reduce(|a, b| Some(a?.and(b?))).flatten()
    }
}

/// A network interface as a PCI function.
///
/// # Errors
/// This process can have no more threads or descriptors.
pub fn new(interface: NetConfig, plumbing: Plumbing<'_>) -> io::Result<Box<dyn PciFunction>> {
    let pairs = interface.backends.len();
    let mut queues = vec![QUEUE_SIZE; 2 * pairs];
    queues.push(CONTROL_SIZE);
    let model = Model {
        name: format!("virtio-net {}", interface.name),
        kind: VIRTIO_ID_NET,
        class: 0x02_0000,
        features: Features::offered(interface.offloads(), interface.mtu.is_some(), pairs).0,
        queues,
        config: config(interface.mac, pairs as u16, interface.mtu),
        state: (state::NAME, state::VERSION),
    };
    let engine = NetEngine::new(interface)?;
    Ok(Box::new(VirtioPci::new(model, Box::new(engine), plumbing)?))
}

/// The configuration (§5.1.4): address, link, pairs of queues, MTU.
fn config(mac: [u8; 6], pairs: u16, mtu: Option<u16>) -> Vec<u8> {
    let words = [VIRTIO_NET_S_LINK_UP as u16, pairs, mtu.unwrap_or(0)];
    mac.into_iter().chain(words.into_iter().flat_map(u16::to_le_bytes)).collect()
}
