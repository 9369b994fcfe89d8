//! What goes over the wire, or into a file.
//!
//! A migration has one main connection and up to [`MOST_CONNECTIONS`] − 1 for pages. Each begins with a [`Preamble`], which the
//! destination answers by its own with the version and the features that it chose; then come records, in both directions. A file
//! has one preamble, whose version stands, and no answer.
//!
//! A record is a header of 16 bytes and a payload, all of it little-endian:
//!
//! | offset | bytes | |
//! | --- | --- | --- |
//! | 0 | 2 | [`Kind`] |
//! | 2 | 2 | 0 |
//! | 4 | 4 | length of the payload, [`Kind::most_bytes`] at most |
//! | 8 | 4 | how many records this side has sent before on this connection, modulo 2³² |
//! | 12 | 4 | CRC-32 (IEEE 802.3) of the 12 bytes before and of the payload |
//!
//! The checksum finds what memory and cards on the way damage; who wants to be safe from people uses TLS. A record that is no such
//! record, or not the next one, ends the migration: nothing is guessed.
//!
//! A page takes always the same connection ([`connection_of`]), so what is sent of it twice arrives in order, and connections need not
//! wait for each other before the end.

mod page;
mod placed;
mod preamble;
mod record;
mod wire;

pub use page::{PAGE, Pages, Run, connection_of};
pub use placed::PlacedHead;
pub use preamble::{Features, MOST_CONNECTIONS, Mismatch, Preamble, VERSIONS};
pub use record::{Kind, MOST_PAGES, Record};
pub(crate) use record::{MOST_PLACED, MOST_RUNS, SUM};
pub use wire::{Receiver, Sender};

/// Why a stream can't be read on.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// It is no migration of Outboard's.
    #[error("it does not begin as a migration stream does")]
    NoStream,
    /// It is TLS.
    #[error("the other side speaks TLS and this one doesn't: have both sides use it, or neither")]
    Tls,
    /// Whoever wrote that file did not come to its end.
    #[error("the file has no whole guest: whoever saved it did not come to the end")]
    Unfinished,
    /// Somebody took too long over it.
    #[error("nobody said there within {limit:?} who they are: the other side is stuck, or the network is")]
    Late {
        /// How long they had.
        limit: std::time::Duration,
    },
    /// It ended within something.
    #[error("it ends in the middle")]
    Truncated,
    /// A checksum is wrong.
    #[error("record {sequence} was damaged on its way")]
    Damaged {
        /// Which.
        sequence: u32,
    },
    /// A record is missing, or there twice.
    #[error("record {found} comes where {expected} should")]
    OutOfOrder {
        /// Which came.
        found: u32,
        /// Which should have.
        expected: u32,
    },
    /// Nobody knows such a record.
    #[error("record {sequence} is of the unknown kind {kind}")]
    UnknownKind {
        /// Which.
        sequence: u32,
        /// Its kind.
        kind: u16,
    },
    /// Longer than its kind may be.
    #[error("record {sequence} claims {len} bytes, {most} is the most for its kind")]
    TooLong {
        /// Which.
        sequence: u32,
        /// Its length.
        len: u32,
        /// The longest of its kind.
        most: u32,
    },
    /// A payload that its kind doesn't allow.
    #[error("record {sequence} is malformed: {why}")]
    Malformed {
        /// Which.
        sequence: u32,
        /// What is wrong.
        why: &'static str,
    },
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[source] std::io::Error),
}

impl From<std::io::Error> for StreamError {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Self::Truncated,
            _ => Self::Io(error),
        }
    }
}
