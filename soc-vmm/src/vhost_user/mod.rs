//! The vhost-user protocol, front end: what a VMM and a process that is a device's back end say to each other on a UNIX socket
//! (QEMU's docs/interop/vhost-user.rst).
//!
//! The messages are our own and not the `vhost` crate's. Its front end reads from a blocking socket without a deadline and tries again when
//! the system says "not now", so a back end that stops answering, or that sends a byte a minute, holds the calling thread for ever; here
//! every conversation has one deadline, whatever the other end does. What would be shared besides are a dozen structures of integers.
//!
//! A back end is not trusted: what it says has a size that is known before it is read, descriptors that it sends are never taken, and
//! whatever is wrong ends the connection with an error that says what.
//!
//! - [`Frontend`]: the conversations: connect and negotiate, start queues, stop them, read the configuration.
//! - [`wire`]: the messages as bytes.

mod error;
mod frontend;
mod notices;
mod record;
mod socket;
#[cfg(test)]
mod tests;
pub mod wire;

pub use error::VhostUserError;
pub use frontend::{Frontend, QueueSetup, Region, Setup};
pub use record::Record;
