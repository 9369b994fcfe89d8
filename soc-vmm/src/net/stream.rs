//! Frames over a UNIX stream socket, each behind its length in 4 bytes, the most significant first: what `passt` and QEMU's
//! `-netdev stream` speak.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::passt::Passt;
use super::{MAX_FRAME, NetBackend, NetError};
use crate::dial::dial;

/// How long a listener may take to have room for a connection.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a frame's length.
const LENGTH: usize = 4;
/// Bytes received at once: some frames, so that small ones share a call.
const RECEIVED: usize = 2 * (LENGTH + MAX_FRAME);

/// The end of a stream that connects.
#[derive(Debug)]
pub struct StreamBackend {
    name: String,
    socket: UnixStream,
    received: Box<[u8]>,
    /// What of it waits to be consumed.
    from: usize,
    to: usize,
    /// The rest of a frame that was sent in part.
    unsent: Vec<u8>,
    sent: usize,
    /// Where its peer is found again, and how often it is looked for.
    again: Option<(PathBuf, Duration)>,
    /// Its peer, if that is to end with it.
    _peer: Option<Passt>,
}

impl StreamBackend {
    /// Connects to who listens at `path`.
    ///
    /// # Errors
    /// Nobody does, or has room for another connection within 5 s.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::new(format!("stream {}", path.display()), dial(path, PATIENCE)?)
    }

    /// Speaks over `socket`.
    ///
    /// # Errors
    /// It can't be made non-blocking.
    pub fn new(name: String, socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let unsent = Vec::with_capacity(LENGTH + MAX_FRAME);
        Ok(Self {
            name,
            socket,
            received: vec![0; RECEIVED].into(),
            from: 0,
            to: 0,
            unsent,
            sent: 0,
            again: None,
            _peer: None,
        })
    }

    /// The same, whose peer is looked for at `path` so long after it left, and again so long after each time in vain.
    #[must_use]
    pub fn with_reconnect(mut self, path: PathBuf, after: Option<Duration>) -> Self {
        self.again = after.map(|after| (path, after));
        self
    }

    /// The same, whose peer ends with it.
    #[must_use]
    pub(super) fn with_peer(self, peer: Passt) -> Self {
        Self { _peer: Some(peer), ..self }
    }

    /// The length of the frame at the front, once its first bytes are there.
    fn length(&self) -> Result<Option<usize>, NetError> {
        let Some(length) = self.received[self.from..self.to].first_chunk::<LENGTH>() else { return Ok(None) };
        let len = u32::from_be_bytes(*length);
        if len == 0 || len as usize > MAX_FRAME {
            return Err(NetError::Frame { len });
        }
        Ok(Some(len as usize))
    }

    /// Receives what there is, behind what is there; whether it was anything.
    fn fill(&mut self) -> Result<bool, NetError> {
        self.received.copy_within(self.from..self.to, 0);
        (self.from, self.to) = (0, self.to - self.from);
        match not_now(self.socket.read(&mut self.received[self.to..]))? {
            Some(0) => Err(NetError::Closed),
            Some(count) => {
                self.to += count;
                Ok(true)
            }
            None => Ok(false),
        }
    }
}

impl NetBackend for StreamBackend {
    fn name(&self) -> &str {
        &self.name
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn sending(&self) -> EpollFlags {
        if self.unsent.is_empty() { EpollFlags::empty() } else { EpollFlags::EPOLLOUT }
    }

    fn send(&mut self, frame: &[u8]) -> Result<bool, NetError> {
        self.flush()?;
        if !self.unsent.is_empty() {
            return Ok(false);
        }
        let length = (frame.len() as u32).to_be_bytes();
        let parts = [IoSlice::new(&length), IoSlice::new(frame)];
        let Some(sent) = not_now(self.socket.write_vectored(&parts))? else { return Ok(false) };
        // What began must end, or the peer takes bytes of the next frame for a length.
        if sent < LENGTH + frame.len() {
            self.unsent.extend(length.iter().chain(frame).skip(sent));
        }
        Ok(true)
    }

    fn flush(&mut self) -> Result<(), NetError> {
        while self.sent < self.unsent.len() {
            let Some(sent) = not_now(self.socket.write(&self.unsent[self.sent..]))? else { return Ok(()) };
            self.sent += sent;
        }
        self.unsent.clear();
        self.sent = 0;
        Ok(())
    }

    fn receive(&mut self) -> Result<Option<&[u8]>, NetError> {
        loop {
            if let Some(len) = self.length()?
                && self.to - self.from >= LENGTH + len
            {
                return Ok(Some(&self.received[self.from + LENGTH..][..len]));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    fn consume(&mut self) {
        if let Ok(Some(len)) = self.length() {
            self.from = (self.from + LENGTH + len).min(self.to);
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        self.again.as_ref().map(|(_, after)| *after)
    }

    fn reconnect(&mut self) -> bool {
        let Some(socket) = self.again.as_ref().and_then(|(path, _)| dial_now(path).ok()) else { return false };
        self.socket = socket;
        // What came from the peer that left, and what was on its way there, begins and ends in the middle of frames.
        (self.from, self.to, self.sent) = (0, 0, 0);
        self.unsent.clear();
        true
    }
}

/// A non-blocking connection to who listens at `path`, if there is room for one at once: over UNIX sockets nothing else takes time.
fn dial_now(path: &Path) -> nix::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

/// What a call on the socket gave; none: not now.
fn not_now(result: io::Result<usize>) -> Result<Option<usize>, NetError> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(NetError::Io(error)),
    }
}
