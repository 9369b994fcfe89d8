//! A port's end on the SoC: a UNIX stream socket on which one peer at a time connects, or which connects to one.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use crate::control::{ListenError, ListeningSocket};
use crate::dial::{dial, dial_now};
use crate::virtio::watch::{Change, Watch};

/// How long a listener may take to have room for the first connection.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause before the next attempt at a connection that failed.
const PAUSE: Duration = Duration::from_millis(500);

/// An end, and its peer if there is one.
#[derive(Debug)]
pub struct HostEnd {
    way: Way,
    peer: Option<Peer>,
    /// There may be somebody to accept.
    knocked: bool,
    /// No attempt before then.
    pause: Option<Instant>,
}

#[derive(Debug)]
enum Way {
    Listen(ListeningSocket),
    Connect(PathBuf),
    Shut(PathBuf),
}

#[derive(Debug)]
struct Peer {
    socket: UnixStream,
    readable: bool,
    writable: bool,
    /// It is gone, though it may have left bytes.
    hung_up: bool,
    /// It takes nothing any more.
    deaf: bool,
}

/// What a transfer came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    Bytes(usize),
    /// The peer must do something first.
    NotNow,
    /// There is no peer, or no more.
    NoPeer,
}

impl HostEnd {
    /// Listens on `path`, as libvirt wants it for qemu-guest-agent.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn listen(path: &Path) -> Result<Self, ListenError> {
        Ok(Self::listening(ListeningSocket::bind(path)?))
    }

    /// Accepts on a socket that listens.
    pub fn listening(socket: ListeningSocket) -> Self {
        Self { way: Way::Listen(socket), peer: None, knocked: true, pause: None }
    }

    /// Connects to who listens at `path`, and again whenever that peer has gone.
    ///
    /// # Errors
    /// Nobody listens there now, or has room for another connection within 5 s.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = dial(path, PATIENCE)?;
        socket.set_nonblocking(true)?;
        Ok(Self { way: Way::Connect(path.to_owned()), peer: Some(Peer::new(socket)), knocked: false, pause: None })
    }

    /// None, for a port that is to go.
    pub(super) fn nobody() -> Self {
        Self { way: Way::Shut(PathBuf::new()), peer: None, knocked: false, pause: None }
    }

    /// Where it listens or connects to.
    pub fn path(&self) -> &Path {
        match &self.way {
            Way::Listen(socket) => socket.path(),
            Way::Connect(path) | Way::Shut(path) => path,
        }
    }

    /// Whether there is a peer.
    pub(super) fn is_open(&self) -> bool {
        self.peer.is_some()
    }

    /// Watches what there is to watch: names are `token` for the peer, the next one for the listener.
    pub(super) fn watch(&self, watch: &Watch, token: u64) -> nix::Result<()> {
        if let Way::Listen(socket) = &self.way {
            watch.add(socket.listener(), token + 1)?;
        }
        self.peer.as_ref().map_or(Ok(()), |peer| watch.add(&peer.socket, token))
    }

    /// Takes note of what [`HostEnd::watch`] asked for.
    pub(super) fn note(&mut self, of_listener: bool, change: Change) {
        if of_listener {
            self.knocked = true;
        } else if let Some(peer) = &mut self.peer {
            peer.readable |= change.readable;
            peer.writable |= change.writable;
            peer.hung_up |= change.hung_up;
        }
    }

    /// Has a peer, if one is to be had without waiting.
    ///
    /// # Errors
    /// It can't, for now; it is tried again.
    pub(super) fn open(&mut self, watch: &Watch, token: u64) -> io::Result<()> {
        if self.peer.is_some() || self.pause.is_some_and(|until| Instant::now() < until) {
            return Ok(());
        }
        let socket = match &self.way {
            Way::Listen(_) if !self.knocked => return Ok(()),
            Way::Listen(socket) => socket.listener().accept().map(|(socket, _)| socket),
            Way::Connect(path) => dial_now(path),
            Way::Shut(_) => return Ok(()),
        };
        let opened = socket.and_then(|socket| {
            // Accepted ones are not what their listener is.
            socket.set_nonblocking(true)?;
            watch.add(&socket, token)?;
            Ok(socket)
        });
        match opened {
            Ok(socket) => (self.peer, self.pause) = (Some(Peer::new(socket)), None),
            Err(error) => match (&self.way, error.kind()) {
                (Way::Listen(_), ErrorKind::WouldBlock) => self.knocked = false,
                // It went away before it was accepted; or nobody listens now.
                (Way::Listen(_), ErrorKind::Interrupted | ErrorKind::ConnectionAborted)
                | (Way::Connect(_), ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::WouldBlock) => {
                    self.pause = Some(Instant::now() + PAUSE);
                }
                _ => {
                    self.pause = Some(Instant::now() + PAUSE);
                    return Err(error);
                }
            },
        }
        Ok(())
    }

    /// How long until [`HostEnd::open`] is worth another call that no event asks for.
    pub(super) fn pause(&self) -> Option<Duration> {
        let pause = self.pause.filter(|_| self.peer.is_none())?;
        Some(pause.saturating_duration_since(Instant::now()))
    }

    /// Reads what the peer has. At its end it is let go.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> Moved {
        let Some(peer) = &mut self.peer else { return Moved::NoPeer };
        match (&peer.socket).read(bytes) {
            Ok(count) if count > 0 => Moved::Bytes(count),
            Err(error) if error.kind() == ErrorKind::Interrupted => Moved::Bytes(0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                peer.readable = false;
                Moved::NotNow
            }
            _ => {
                self.close();
                Moved::NoPeer
            }
        }
    }

    /// Writes what the peer takes. One that takes nothing any more may still have left something to read.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Moved {
        let Some(peer) = self.peer.as_mut().filter(|peer| !peer.deaf) else { return Moved::NoPeer };
        if !peer.writable {
            return Moved::NotNow;
        }
        match (&peer.socket).write(bytes) {
            Ok(count) => Moved::Bytes(count),
            Err(error) if error.kind() == ErrorKind::Interrupted => Moved::Bytes(0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                peer.writable = false;
                Moved::NotNow
            }
            Err(_) => {
                peer.deaf = true;
                Moved::NoPeer
            }
        }
    }

    /// Whether [`HostEnd::read`] may have something.
    pub(super) fn may_read(&self) -> bool {
        self.peer.as_ref().is_some_and(|peer| peer.readable)
    }

    /// Whether the peer is gone, though it may have left bytes.
    pub(super) fn is_hung_up(&self) -> bool {
        self.peer.as_ref().is_some_and(|peer| peer.hung_up)
    }

    /// Lets a peer go that has left nothing to be read.
    pub(super) fn close_if_done(&mut self) {
        let gone = self.peer.as_ref().filter(|peer| peer.hung_up).map(|peer| peer.socket.as_raw_fd());
        if let Some(fd) = gone
            && !matches!(recv(fd, &mut [0], MsgFlags::MSG_PEEK), Ok(1) | Err(Errno::EINTR))
        {
            self.close();
        }
    }

    /// Lets the peer go, and has no other any more; a socket that was listened on is gone.
    pub(super) fn shut(&mut self) {
        self.close();
        self.way = Way::Shut(self.path().to_owned());
    }

    /// Lets the peer go.
    pub(super) fn close(&mut self) {
        self.peer = None;
        if matches!(self.way, Way::Connect(_)) {
            self.pause = Some(Instant::now() + PAUSE);
        }
    }
}

impl Peer {
    fn new(socket: UnixStream) -> Self {
        Self { socket, readable: true, writable: true, hung_up: false, deaf: false }
    }
}
