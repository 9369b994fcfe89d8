//! Sockets, over TCP and in the file system.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};

use super::Stream;
use crate::dial::dial;

/// How long a server may take to answer the first packet.
const DIALING: Duration = Duration::from_secs(10);
/// How long a handshake may take, all of it.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// How long a peer may take to make room for what is sent: its disk may be slow.
const SENDING: Duration = Duration::from_secs(120);
/// A peer that says nothing is asked whether it is there after so long, and again, so often.
const ASKED_AFTER: (u32, u32, u32) = (10, 5, 4);

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A host and a port.
    Tcp(String, u16),
    /// A socket in the file system.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "nbd://[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "nbd://{host}:{port}"),
            Self::Unix(path) => write!(f, "nbd+unix://{}", path.display()),
        }
    }
}

/// A connection.
#[derive(Debug)]
pub struct Socket {
    kind: Kind,
    /// Until when what is read must have come.
    deadline: Option<Instant>,
}

#[derive(Debug)]
enum Kind {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Connects to a server; its handshake has 30 s.
    ///
    /// # Errors
    /// The system's: nobody answers there.
    pub fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => Self::new(Kind::Unix(dial(path, DIALING)?)),
            Address::Tcp(host, port) => {
                let mut last = io::Error::from(ErrorKind::AddrNotAvailable);
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, DIALING) {
                        Ok(stream) => return Self::new(Kind::Tcp(stream)),
                        Err(e) => last = e,
                    }
                }
                Err(last)
            }
        }
    }

    fn new(kind: Kind) -> io::Result<Self> {
        match &kind {
            Kind::Unix(stream) => {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(SENDING))?;
            }
            Kind::Tcp(stream) => {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(SENDING))?;
                stream.set_nodelay(true)?;
                // A host that is gone is noticed although nothing is said.
                let (idle, interval, count) = ASKED_AFTER;
                setsockopt(stream, sockopt::KeepAlive, &true)?;
                setsockopt(stream, sockopt::TcpKeepIdle, &idle)?;
                setsockopt(stream, sockopt::TcpKeepInterval, &interval)?;
                setsockopt(stream, sockopt::TcpKeepCount, &count)?;
                setsockopt(stream, sockopt::TcpUserTimeout, &(SENDING.as_millis() as u32))?;
            }
        }
        Ok(Self { kind, deadline: Some(Instant::now() + HANDSHAKE) })
    }

    /// The same connection once more, for another thread.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn again(&self) -> io::Result<Self> {
        let kind = match &self.kind {
            Kind::Tcp(stream) => Kind::Tcp(stream.try_clone()?),
            Kind::Unix(stream) => Kind::Unix(stream.try_clone()?),
        };
        Ok(Self { kind, deadline: None })
    }

    /// Ends it for whoever has it.
    pub fn cut(&self) {
        // An error says that the peer has.
        let _ = match &self.kind {
            Kind::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Kind::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    fn wait_at_most(&self, time: Option<Duration>) -> io::Result<()> {
        match &self.kind {
            Kind::Tcp(stream) => stream.set_read_timeout(time),
            Kind::Unix(stream) => stream.set_read_timeout(time),
        }
    }
}

impl TryFrom<UnixStream> for Socket {
    type Error = io::Error;

    fn try_from(stream: UnixStream) -> io::Result<Self> {
        Self::new(Kind::Unix(stream))
    }
}

impl Stream for Socket {
    fn settled(&mut self) {
        self.deadline = None;
        // It was set before, so it can be taken back.
        let _ = self.wait_at_most(None);
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.wait_at_most(Some(left))?;
        }
        match &mut self.kind {
            Kind::Tcp(stream) => stream.read(buf),
            Kind::Unix(stream) => stream.read(buf),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let fd = match &self.kind {
            Kind::Tcp(stream) => stream.as_raw_fd(),
            Kind::Unix(stream) => stream.as_raw_fd(),
        };
        Ok(send(fd, buf, MsgFlags::MSG_NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where clients come in.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    /// Its name in the file system goes with it.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    pub(super) fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(host, port) => {
                let host = if host.is_empty() { "::" } else { host };
                let addresses: Vec<_> = (host, *port).to_socket_addrs()?.collect();
                let listener = TcpListener::bind(&addresses[..])?;
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(listener))
            }
            Address::Unix(path) => {
                remove_dead(path)?;
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                Ok(Self::Unix(listener, path.clone()))
            }
        }
    }

    /// The port that it has, where none was said.
    pub(super) fn port(&self) -> Option<u16> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok().map(|address| address.port()),
            Self::Unix(..) => None,
        }
    }

    /// Whoever waits, if anybody does.
    pub(super) fn accept(&self) -> io::Result<Socket> {
        Socket::new(match self {
            Self::Tcp(listener) => Kind::Tcp(listener.accept()?.0),
            Self::Unix(listener, _) => Kind::Unix(listener.accept()?.0),
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener, _) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Somebody may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A socket that a dead process left is in nobody's way.
fn remove_dead(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() && UnixStream::connect(path).is_err() => std::fs::remove_file(path),
        _ => Ok(()),
    }
}
