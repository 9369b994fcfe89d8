//! A migration's connections with TLS.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;

use migration::Connection;

use super::{Uri, WayError};
use crate::tls::{Client, CredentialsError, CredentialsSpec, Endpoint, Server, TlsReader, TlsStream};

/// What a side needs for TLS.
#[derive(Clone, Debug)]
pub enum Secure {
    /// The guest leaves: whom the other side's certificate has to be for.
    Source(Client, String),
    /// The guest comes.
    Destination(Server),
}

impl Secure {
    /// Of the side that `uri` is said to. `host`: whom the other side's certificate has to be for, unless it is who the URI names.
    ///
    /// # Errors
    /// The credentials can't be used, or nobody knows whom the certificate has to be for.
    pub fn of(spec: &CredentialsSpec, is_source: bool, uri: &Uri, host: Option<&str>) -> Result<Self, WayError> {
        if !is_source {
            return Ok(Self::Destination(spec.server()?));
        }
        let host = match (host, uri) {
            (Some(host), _) => host,
            (None, Uri::Tcp(host, _) | Uri::Tls(host, _)) => host,
            (None, _) => return Err(WayError::Nameless),
        };
        if host.is_empty() {
            return Err(WayError::Nameless);
        }
        Ok(Self::Source(spec.client()?, host.to_owned()))
    }

    /// Of the side of `run --incoming`, whose certificates are in that directory.
    ///
    /// # Errors
    /// They can't be used.
    pub fn destination(dir: &std::path::Path) -> Result<Self, CredentialsError> {
        let spec = CredentialsSpec { dir: dir.to_owned(), endpoint: Endpoint::Server, verify_peer: true };
        spec.server().map(Self::Destination)
    }

    /// A connection over that socket, of which the first use makes the handshake.
    pub(super) fn connection(&self, socket: OwnedFd, answers: bool) -> io::Result<Connection> {
        let stream = self.stream(socket)?;
        Ok(Connection { answers, ..connection(stream) })
    }

    /// The same before anybody uses it.
    pub(super) fn stream(&self, socket: OwnedFd) -> io::Result<TlsStream> {
        let made = match self {
            Self::Source(credentials, host) => TlsStream::client(socket, credentials, host),
            Self::Destination(credentials) => TlsStream::server(socket, credentials),
        };
        made.map_err(|e| io::Error::new(ErrorKind::InvalidInput, e))
    }
}

/// As the protocol has it.
pub(super) fn connection(stream: TlsStream) -> Connection {
    let (reader, writer, cut) = stream.split();
    Connection {
        reader: Box::new(UntilEnd(reader)),
        writer: Box::new(writer),
        cut,
        answers: true,
        others_come: false,
        place: None,
    }
}

/// The protocol says itself when nothing more comes, and misses what doesn't: whoever hangs up need not say so once more.
struct UntilEnd(TlsReader);

impl Read for UntilEnd {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self.0.read(to) {
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(0),
            read => read,
        }
    }
}

/// A descriptor that is a socket, and blocks.
pub(super) fn socket_of(fd: OwnedFd) -> io::Result<OwnedFd> {
    let file = File::from(fd);
    if !file.metadata()?.file_type().is_socket() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is no socket, and only one can have TLS"));
    }
    let socket = std::net::TcpStream::from(OwnedFd::from(file));
    socket.set_nonblocking(false)?;
    Ok(socket.into())
}
