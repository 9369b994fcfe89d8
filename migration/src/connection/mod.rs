//! Connections, whatever they are made of.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

mod pipe;
mod place;

pub use place::Place;

/// Ends both directions of a connection at once, from any thread, as shutdown(2) does: who reads or writes then gets an end or an error,
/// and what the other side had sent before may still be read.
pub type Cut = Arc<dyn Fn() + Send + Sync>;

/// A connection.
pub struct Connection {
    /// What comes from the other side.
    pub reader: Box<dyn Read + Send>,
    /// What goes there.
    pub writer: Box<dyn Write + Send>,
    /// Ends it.
    pub cut: Cut,
    /// Whether there is a way back. A source that has none writes a one-way stream.
    pub answers: bool,
    /// Whether others can come by the same door: then one that turns out to be no source's is sent away, and ends no wait.
    pub others_come: bool,
    /// The file itself, where it is one in which pages can have places.
    pub place: Option<Place>,
}

impl Connection {
    /// Over TCP.
    ///
    /// # Errors
    /// The socket can't be set up.
    pub fn tcp(socket: TcpStream) -> io::Result<Self> {
        // A record is one write, and the last of them must not wait for acknowledgements.
        socket.set_nodelay(true)?;
        let (reader, writer) = (socket.try_clone()?, socket.try_clone()?);
        // It fails where it is cut already.
        let cut = move || _ = socket.shutdown(Shutdown::Both);
        Ok(Self { answers: true, ..Self::new(reader, writer, Arc::new(cut)) })
    }

    /// Over a UNIX socket.
    ///
    /// # Errors
    /// The socket can't be set up.
    pub fn unix(socket: UnixStream) -> io::Result<Self> {
        let (reader, writer) = (socket.try_clone()?, socket.try_clone()?);
        let cut = move || _ = socket.shutdown(Shutdown::Both);
        Ok(Self { answers: true, ..Self::new(reader, writer, Arc::new(cut)) })
    }

    /// One way into a file or a pipe, from where it stands.
    ///
    /// # Errors
    /// It can't be set up.
    pub fn into_file(file: File) -> io::Result<Self> {
        let place = Place::of(&file)?;
        let (file, cut) = pipe::cuttable(file)?;
        Ok(Self { place, ..Self::new(io::empty(), file, cut) })
    }

    /// One way out of a file or a pipe, from where it stands.
    ///
    /// # Errors
    /// It can't be set up.
    pub fn out_of_file(file: File) -> io::Result<Self> {
        let place = Place::of(&file)?;
        let (file, cut) = pipe::cuttable(file)?;
        Ok(Self { place, ..Self::new(file, io::sink(), cut) })
    }

    /// One way, with a place in no file.
    fn new(reader: impl Read + Send + 'static, writer: impl Write + Send + 'static, cut: Cut) -> Self {
        let (reader, writer) = (Box::new(reader), Box::new(writer));
        Self { reader, writer, cut, answers: false, others_come: false, place: None }
    }
}
