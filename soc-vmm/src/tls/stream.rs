//! A connection with TLS.
//!
//! Two threads have it at the same time, and neither may wait for the other: a thread that waits for bytes, or for room, holds nothing that
//! the other needs. So the state of the cryptography is behind a lock that is held while it computes, and what it takes and gives is moved
//! by the system outside of that lock. What it wants to say on account of what it heard (the answer to a new key, RFC 8446 §4.6.3) leaves
//! with what this side says next, as it has to.
//!
//! | lock | held | by |
//! | --- | --- | --- |
//! | `out` | while bytes leave, so that records do in the order in which they were made | who writes; who reads takes it for a last word if it is free |
//! | `state` | while records are made or opened; and in the handshake, when nobody has anything else to say | both |

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, send};
use rustls::{ClientConnection, Connection, ServerConnection};

use super::credentials::name;
use super::{Client, CredentialsError, Server, TlsError};

/// How long the handshake may take where nobody says else.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// How long who was refused may take to hear why, and how much of what they said meanwhile is thrown away.
const FAREWELL: Duration = Duration::from_secs(1);
const MOST_UNHEARD: usize = 256 << 10;
/// Most bytes of a write: a run of pages with its record's head.
const MOST_AT_ONCE: usize = 320 << 10;
/// Bytes that are read at once.
const PIECE: usize = 128 << 10;

/// Ends both directions at once, from any thread.
pub type Cut = Arc<dyn Fn() + Send + Sync>;

/// A connection with TLS, whose handshake is made by whoever uses it first.
#[derive(Debug)]
pub struct TlsStream(pub(super) Arc<Shared>);

/// What comes from the other side.
#[derive(Debug)]
pub struct TlsReader {
    shared: Arc<Shared>,
    /// Records as they came, of which `left` were not looked at.
    wire: Box<[u8]>,
    left: Range<usize>,
}

/// What goes there.
#[derive(Debug)]
pub struct TlsWriter(Arc<Shared>);

#[derive(Debug)]
pub(super) struct Shared {
    /// A stream socket of any family: nothing is used of it that TCP alone has.
    socket: TcpStream,
    /// This side's certificates, for who wants to know.
    dir: Arc<Path>,
    state: Mutex<Connection>,
    /// Records on their way out.
    out: Mutex<Vec<u8>>,
    /// The handshake is made.
    greeted: AtomicBool,
}

impl TlsStream {
    /// Of who connected to a host of that name or address, by a stream socket that blocks.
    ///
    /// # Errors
    /// Nobody can be called that.
    pub fn client(socket: OwnedFd, credentials: &Client, host: &str) -> Result<Self, CredentialsError> {
        let made = ClientConnection::new(Arc::clone(&credentials.config), name(host)?);
        let failed = |e| CredentialsError::Unusable(credentials.dir.to_path_buf(), "what it holds", e);
        Ok(Self::of(socket, Arc::clone(&credentials.dir), made.map_err(failed)?.into()))
    }

    /// Of who was connected to, by a stream socket that blocks.
    ///
    /// # Errors
    /// The credentials can't be used.
    pub fn server(socket: OwnedFd, credentials: &Server) -> Result<Self, CredentialsError> {
        let made = ServerConnection::new(Arc::clone(&credentials.config));
        let failed = |e| CredentialsError::Unusable(credentials.dir.to_path_buf(), "what it holds", e);
        Ok(Self::of(socket, Arc::clone(&credentials.dir), made.map_err(failed)?.into()))
    }

    fn of(socket: OwnedFd, dir: Arc<Path>, mut state: Connection) -> Self {
        state.set_buffer_limit(Some(MOST_AT_ONCE));
        let (state, out) = (Mutex::new(state), Mutex::new(Vec::new()));
        Self(Arc::new(Shared { socket: socket.into(), dir, state, out, greeted: AtomicBool::new(false) }))
    }

    /// Makes the handshake, unless it is made, within that time. A server knows then who the client is; a client hears what the server
    /// thinks of it when it reads.
    ///
    /// # Errors
    /// [`TlsError`] says why not, or the system's: the connection is cut then.
    pub fn handshake(&self, patience: Duration) -> io::Result<()> {
        self.0.greet(patience)
    }

    /// Both directions, and what cuts them. The handshake is made by who uses one of them first.
    #[must_use]
    pub fn split(self) -> (TlsReader, TlsWriter, Cut) {
        let Self(shared) = self;
        let cuts = Arc::clone(&shared);
        let reader = TlsReader { shared: Arc::clone(&shared), wire: vec![0; PIECE].into_boxed_slice(), left: 0..0 };
        (reader, TlsWriter(shared), Arc::new(move || cuts.cut()))
    }
}

impl Shared {
    fn greet(&self, patience: Duration) -> io::Result<()> {
        if self.greeted.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut state = lock(&self.state);
        let deadline = Instant::now() + patience;
        while state.is_handshaking() || state.wants_write() {
            let mut timed = Timed { socket: &self.socket, deadline };
            if let Err(error) = state.complete_io(&mut timed) {
                let said_why = error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<rustls::Error>);
                if said_why {
                    while state.wants_write() && matches!(state.write_tls(&mut timed), Ok(1..)) {}
                    part(&self.socket);
                }
                self.cut();
                return Err(TlsError::of_system(error, patience, &self.dir));
            }
        }
        self.socket.set_read_timeout(None)?;
        self.socket.set_write_timeout(None)?;
        self.greeted.store(true, Ordering::Release);
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn new_keys(&self) -> Result<(), rustls::Error> {
        lock(&self.state).refresh_traffic_keys()
    }

    #[cfg(test)]
    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    fn cut(&self) {
        // It fails where it is cut already.
        _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Tells the other side what is wrong, if that needs no waiting.
    fn last_word(&self, state: &mut Connection) {
        let Ok(mut out) = self.out.try_lock() else { return };
        while state.wants_write() && state.write_tls(&mut *out).is_ok() {}
        // Whoever doesn't hear it finds out by itself.
        _ = send(self.socket.as_raw_fd(), &out, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
        out.clear();
    }
}

impl TlsReader {
    /// Opens records that have come, as long as `to` has room; how many bytes of it are filled then. None: nothing more will ever come.
    fn open(&mut self, to: &mut [u8]) -> io::Result<Option<usize>> {
        let Self { shared, wire, left } = self;
        let mut state = lock(&shared.state);
        let mut filled = 0;
        loop {
            match state.reader().read(&mut to[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Ok(Some(filled)),
                Ok(read) => filled += read,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if left.start == left.end {
                        return Ok(Some(filled));
                    }
                    left.start += state.read_tls(&mut &wire[left.clone()])?;
                    if let Err(error) = state.process_new_packets() {
                        shared.last_word(&mut state);
                        return Err(TlsError::of(error, &shared.dir).into());
                    }
                }
                Err(e) => return Err(e),
            }
            if filled == to.len() {
                return Ok(Some(filled));
            }
        }
    }
}

impl Read for TlsReader {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if to.is_empty() {
            return Ok(0);
        }
        self.shared.greet(HANDSHAKE)?;
        loop {
            match self.open(to)? {
                None => return Ok(0),
                Some(0) => {}
                Some(filled) => return Ok(filled),
            }
            self.left = match (&self.shared.socket).read(&mut self.wire)? {
                0 => return Err(TlsError::Truncated.into()),
                read => 0..read,
            };
        }
    }
}

impl Write for TlsWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let Self(shared) = self;
        shared.greet(HANDSHAKE)?;
        let mut out = lock(&shared.out);
        let taken = {
            let mut state = lock(&shared.state);
            let taken = state.writer().write_vectored(slices)?;
            while state.wants_write() {
                state.write_tls(&mut *out)?;
            }
            taken
        };
        let sent = (&shared.socket).write_all(&out);
        out.clear();
        sent.map(|()| taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket until a moment.
struct Timed<'a> {
    socket: &'a TcpStream,
    deadline: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(to)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Leaves the other side time to hear why it was refused: a socket that is closed with something unread forgets what it has sent.
fn part(socket: &TcpStream) {
    let mut timed = Timed { socket, deadline: Instant::now() + FAREWELL };
    _ = socket.shutdown(Shutdown::Write);
    let mut unheard = [0; 4096];
    let mut heard = 0;
    while let Ok(read @ 1..) = timed.read(&mut unheard) {
        heard += read;
        if heard > MOST_UNHEARD {
            return;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
