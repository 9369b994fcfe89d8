//! virtio-console with ports (virtio 1.2 §5.3): byte streams between programs in the guest and programs on the SoC, each with a name.
//! What qemu-guest-agent speaks over is one of them.
//!
//! There is no console on it (port 0), which is what the serial port is for. A driver without VIRTIO_CONSOLE_F_MULTIPORT therefore finds
//! a device on which nobody listens.
//!
//! A port carries bytes while both of its ends are open. The guest's end is open while a program has it open; the other one while a peer
//! is connected, one at a time. Both ways wait: bytes for a guest that doesn't read stay in the peer's socket, bytes for a peer that
//! doesn't read stay in the guest, and the other ports go on. What the guest writes while there is no peer has no reader, ever, and is
//! dropped; drivers hold it back.

mod control;
mod end;
mod engine;
mod handle;
mod port;
mod state;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

pub use end::HostEnd;
pub use engine::ConsoleEngine;
pub use handle::{ConsoleHandle, PortError, PortEvents, PortStatus, check_name};

use super::Plumbing;
use super::pci::{Model, VirtioPci};
use crate::pci::PciFunction;

/// Ports that a device can have, with the console that it hasn't.
pub const MAX_PORTS: usize = 16;
/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 64;
/// The queues of control messages: to the driver, and from it (§5.3.2).
pub const CONTROL_RECEIVE: usize = 2;
/// See [`CONTROL_RECEIVE`].
pub const CONTROL_TRANSMIT: usize = 3;
/// VIRTIO_CONSOLE_F_MULTIPORT (§5.3.3).
pub const F_MULTIPORT: u32 = 1;

/// The queues of a port: to the guest, and from it (§5.3.2).
pub fn queues_of(port: usize) -> (usize, usize) {
    let first = if port == 0 { 0 } else { 2 * port + 2 };
    (first, first + 1)
}

/// A device with ports.
pub struct ConsoleConfig {
    /// What the log calls it.
    pub name: String,
    /// Its ports: at most `MAX_PORTS - 1`, the names all different.
    pub ports: Vec<PortConfig>,
    /// The side from which ports come and go.
    pub handle: Arc<ConsoleHandle>,
    /// Who hears of the guest's programs.
    pub events: Arc<dyn PortEvents>,
}

/// A port.
#[derive(Debug)]
pub struct PortConfig {
    /// What the SoC's side calls it.
    pub id: String,
    /// What the guest's side calls it: in Linux `/dev/virtio-ports/NAME`.
    pub name: String,
    /// Its other end.
    pub end: HostEnd,
}

/// A device with ports as a PCI function.
///
/// # Errors
/// This process can have no more threads or descriptors; or [`PortError`], of a port that can't be added.
pub fn new(console: ConsoleConfig, plumbing: Plumbing<'_>) -> io::Result<Box<dyn PciFunction>> {
    let model = Model {
        name: format!("virtio-console {}", console.name),
        kind: VIRTIO_ID_CONSOLE,
        class: 0x07_8000,
        features: 1 << F_MULTIPORT,
        queues: vec![QUEUE_SIZE; 2 * MAX_PORTS + 2],
        config: config(),
        state: (state::NAME, state::VERSION),
    };
    let engine = ConsoleEngine::new(console)?;
    Ok(Box::new(VirtioPci::new(model, Box::new(engine), plumbing)?))
}

/// The configuration (§5.3.4): columns and rows, which are not offered, ports, and the emergency write, which isn't either.
fn config() -> Vec<u8> {
    [0, MAX_PORTS as u32, 0].into_iter().flat_map(u32::to_le_bytes).collect()
}
