//! TLS 1.3 (RFC 8446) for connections between servers: who the other side is, and nobody in between.
//!
//! [`Credentials`] are what a directory of certificates makes of one side, as QEMU and libvirt lay it out. A [`TlsStream`] is a connection,
//! one half of which reads and the other writes, each in a thread of its own. Nothing is resumed and nothing is sent early (0-RTT), so each
//! connection stands for itself.

mod credentials;
mod error;
mod stream;
#[cfg(test)]
mod tests;

pub use credentials::{Client, Credentials, CredentialsError, CredentialsSpec, Endpoint, Server};
pub use error::TlsError;
pub use stream::{Cut, TlsReader, TlsStream, TlsWriter};
