//! A function without a device: two processes that share memfds and eventfds over a UNIX socket.
//!
//! The host end creates the card memory and the eventfds and sends them; what it maps for "the device" afterwards it announces
//! as (IOVA, length, descriptor), as VFIO would tell an IOMMU. The SoC end keeps that table and reaches host memory through it
//! alone: an IOVA that is not mapped faults, and a mapping that is taken back is used no more once the host's end is told so.

mod entry;
mod host;
mod message;
mod soc;

pub use host::{CARD_MEMORY, LocalHost, VECTORS};
pub use message::sealed_memfd;
pub use soc::{LocalFailure, LocalRemote, LocalSoc};
