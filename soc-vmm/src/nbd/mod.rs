//! NBD, the network block device protocol (its specification: the NetworkBlockDevice project's proto.md): a disk of this VM for others, and
//! a disk of others for this VM. libvirt copies disks that way while their guest moves.
//!
//! Spoken is the fixed newstyle handshake with `NBD_OPT_GO`, `INFO`, `LIST`, `ABORT` and the old `EXPORT_NAME`, and simple replies. Both
//! sides copy what a peer says once and check it then; what it may make them hold is bounded.

mod client;
mod error;
mod server;
mod socket;
mod stream;
#[cfg(test)]
mod tests;
pub mod wire;

pub use client::{NbdDisk, Offer, negotiate};
pub use error::NbdError;
pub use server::{Export, ExportError, ExportInfo, Exports, Gallery, serve};
pub use socket::{Address, Socket};
pub use stream::Stream;

/// Bytes of an export's name at most, which the specification has as 4096.
pub const NAME_MOST: usize = 4096;
/// Bytes of one request at most, which peers take for granted.
pub const REQUEST_MOST: u32 = 32 << 20;
/// Bytes that are moved at once: what a connection holds.
const PIECE: usize = 256 << 10;
