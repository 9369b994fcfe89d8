//! A running guest's way to another server: what goes over the wire, and what is done in which order, over the traits [`SourceVm`] and
//! [`DestinationVm`]. No KVM, no device, no socket by name: soc-vmm brings them.
//!
//! [`send`] and [`receive`] block, and use threads of their own, one a connection and a few more: what a migration does is move
//! pages by calls that block, as many at once as there are connections, so there is nothing that an asynchronous runtime would add.
//! `docs/migration.md` specifies both the stream and the protocol.

mod bitmap;
mod bucket;
mod connection;
mod control;
mod destination;
mod ending;
mod error;
mod parameters;
mod progress;
mod session;
mod source;
pub mod stream;
mod vm;
mod watch;

pub use connection::{Connection, Cut, Place};
pub use control::{Control, Event, Phase};
pub use destination::{Accept, receive};
pub use error::MigrationError;
pub use parameters::{After, Parameters};
pub use progress::Progress;
pub use source::{Open, send};
pub use vm::{DestinationVm, DeviceState, Region, SourceVm, State, VmError};

/// A migration that succeeded.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// All of its figures.
    pub progress: Progress,
    /// The version of the stream.
    pub version: u16,
    /// What both sides agreed to use.
    pub features: stream::Features,
}
