//! virtio-vsock (virtio 1.2 §5.10): stream connections between the guest and programs on the SoC, whose sockets are UNIX ones, as
//! Firecracker and cloud-hypervisor have it.
//!
//! The guest connects to port P of the host (CID 2): the device connects to the socket `PATH_P`. A program on the SoC connects to `PATH` and
//! writes `CONNECT P\n`: the device connects to port P in the guest and answers `OK N\n`, N being the port on the host's side; from there
//! on it is the connection. Where the guest refuses, the socket is closed without an answer.
//!
//! Each side tells how much it can hold and how much of what came it has passed on (§5.10.6.3), and nobody sends more than that. What the
//! guest sends for a peer that doesn't read is held here up to that bound; what peers send stays in their sockets until the guest has room.

mod connection;
mod engine;
mod handshake;
mod packet;
mod state;

use std::io;
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

pub use engine::VsockEngine;

use super::Plumbing;
use super::pci::{Model, VirtioPci};
use crate::control::{ListenError, ListeningSocket};
use crate::pci::PciFunction;

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 128;
/// The queues: packets to the guest, packets from it, events (§5.10.2), of which there is one, when the guest was moved.
pub const RECEIVE: usize = 0;
/// See [`RECEIVE`].
pub const TRANSMIT: usize = 1;
/// See [`RECEIVE`].
pub const EVENTS: usize = 2;
/// The host's CID (§5.10.4).
pub const HOST_CID: u64 = 2;
/// Connections at once, those included that are not made yet.
pub const MAX_CONNECTIONS: usize = 512;
/// Bytes that the device holds of one connection for a peer that doesn't read: what it tells the guest as its buf_alloc.
pub const BUFFER: u32 = 64 << 10;
/// VIRTIO_VSOCK_F_STREAM (§5.10.3).
const F_STREAM: u32 = 0;
/// Least CID that a guest can have (§5.10.4).
pub const FIRST_CID: u32 = 3;

/// A socket device.
#[derive(Debug)]
pub struct VsockConfig {
    /// What the log calls it.
    pub name: String,
    /// The guest's CID: from [`FIRST_CID`] on, and not all ones.
    pub cid: u32,
    /// Where programs of the SoC connect; what the guest connects to begins with its path.
    pub socket: ListeningSocket,
}

impl VsockConfig {
    /// A device that listens on `path`.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn listen(name: String, cid: u32, path: &Path) -> Result<Self, ListenError> {
        Ok(Self { name, cid, socket: ListeningSocket::bind(path)? })
    }
}

/// A socket device as a PCI function.
///
/// # Errors
/// This process can have no more threads or descriptors.
pub fn new(vsock: VsockConfig, plumbing: Plumbing<'_>) -> io::Result<Box<dyn PciFunction>> {
    let model = Model {
        name: format!("virtio-vsock {}", vsock.name),
        kind: VIRTIO_ID_VSOCK,
        class: 0x02_8000,
        features: 1 << F_STREAM,
        queues: vec![QUEUE_SIZE; 3],
        config: u64::from(vsock.cid).to_le_bytes().to_vec(),
        state: (state::NAME, state::VERSION),
    };
    let engine = VsockEngine::new(vsock)?;
    Ok(Box::new(VirtioPci::new(model, Box::new(engine), plumbing)?))
}

/// The socket of the host's port `port`.
fn path_of(path: &Path, port: u32) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}
