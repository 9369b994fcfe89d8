//! virtio 1.2 devices, on PCI.
//!
//! A [`VirtioPci`] is the function that the guest sees: registers, negotiation, interrupts. Behind it an [`Engine`] is what the device
//! does, on a thread of its own, from DRIVER_OK to the next reset: one [`Session`]. The two share only the session's [`Control`], the
//! device's configuration and its [`Interrupts`], so the thread that serves IOREQs never waits for data or files:
//!
//! - a kick is an eventfd, which the host may just as well signal itself, or the function, where the guest sees a notify page of it;
//! - a reset ends the session's [`Lease`] of guest memory. That waits for the one transfer that is under way, and then the old session
//!   can reach the guest no more; what it still does to its back end is finished before the next session starts, since both run on the
//!   same thread.
//!
//! Before a guest moves to another process each engine halts ([`Engine::halt`]): its session comes to a point from which it goes on, where it was or,
//! from the states that are taken then, in the other process (`pci/state.rs`). Until it is there the thread that serves IOREQs has other things to do.
//!
//! Rings and buffers are reached by copies ([`crate::memory::GuestMemory`]), never by reference. This is why the rings are our own and
//! not the `virtio-queue` crate's: it reaches memory through vm-memory's `Bytes<GuestAddress>`, which is implemented for everything,
//! and solely, by slices that are mapped here; a function that moves memory by DMA has none. It also takes a transfer for each word,
//! tells a broken chain and one that ends from each other only in part, and doesn't know VIRTQ_AVAIL_F_NO_INTERRUPT. Memory that is
//! mapped after all can be served behind [`Lease`], without a change to any device.
//!
//! Of the features that concern the platform (§6): VIRTIO_F_ORDER_PLATFORM is offered, for the device reaches memory as a PCIe device
//! does and not as another CPU of the guest, so the driver must order its stores as for a device; a driver that doesn't know it gets
//! what its CPU's ordering gives. VIRTIO_F_ACCESS_PLATFORM is not: the guest has no IOMMU in front of the device, and a device that
//! offers it may not be driven without it.

mod ahead;
pub mod balloon;
pub mod block;
mod chain;
pub(crate) mod complaint;
pub mod console;
pub mod entropy;
mod interrupt;
mod lease;
mod limit;
mod linger;
pub mod net;
mod notify;
mod pci;
mod registers;
mod ring;
mod session;
pub mod vhost;
pub mod vsock;
mod watch;
mod word;
mod worker;

use std::sync::Arc;

pub use chain::Chain;
pub use interrupt::Interrupts;
pub use lease::Lease;
pub use limit::{Clock, Rate, RateLimits};
pub use notify::NotifyPages;
pub use pci::VirtioPci;
pub use registers::{QueueRegisters, Registers};
pub use ring::{MAX_CHAIN, Ring, RingFeatures, RingLayout, RingPosition};
pub use session::{Config, Control, Engine, Queue, Session, Wait};

use crate::bus::Wake;
use crate::interrupt::{InterruptLine, MessageSink};
use crate::memory::{GuestMemory, MemoryError};

/// What a function is connected to.
pub struct Plumbing<'a> {
    /// The guest's memory.
    pub memory: Arc<dyn GuestMemory>,
    /// Where MSI-X messages go.
    pub messages: &'a dyn MessageSink,
    /// INTA.
    pub line: InterruptLine,
    /// Where kicks may come from.
    pub notify: Arc<NotifyPages>,
    /// Wakes the thread that serves IOREQs: a device that was to halt has done so.
    pub wake: Arc<dyn Wake>,
}

/// Why a queue can't be served any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The driver took its memory back.
    #[error("its driver has reset it")]
    Revoked,
    /// The driver broke a rule of virtio 1.2 §2.7 or of the device.
    #[error("its driver made {0}")]
    Broken(&'static str),
    /// A ring or a buffer is where there is no memory, or the function is lost.
    #[error("a ring or buffer can't be reached: {0}")]
    Memory(MemoryError),
    /// The system gives the device nothing to wait with.
    #[error("it can't wait for its driver: {}", .0.desc())]
    NoRoom(nix::errno::Errno),
}
