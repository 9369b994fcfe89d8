//! The server: which disks it shows, to whom, until when.

mod exports;
mod handshake;
mod transmission;

use std::io::BufReader;

pub use exports::{Export, ExportError, ExportInfo, Exports};

use super::{NbdError, Stream};

/// Bytes that are read ahead of what a client says.
const AHEAD: usize = 16 << 10;

/// Where a server finds what it shows.
pub trait Gallery {
    /// An export that is shown, from now on to this client.
    fn find(&self, name: &str) -> Option<Export>;

    /// The names of those that are shown.
    fn names(&self) -> Vec<String>;
}

/// Serves a client until it goes.
///
/// # Errors
/// It breaks the protocol, or its connection broke. That ends it, and touches nobody else.
pub fn serve(stream: impl Stream, gallery: &dyn Gallery) -> Result<(), NbdError> {
    let mut stream = BufReader::with_capacity(AHEAD, stream);
    let Some(export) = handshake::greet(&mut stream, gallery)? else { return Ok(()) };
    stream.get_mut().settled();
    transmission::serve(&mut stream, &export)
}
