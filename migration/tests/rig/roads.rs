//! Ways from one side to the other.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use migration::{Connection, Control, Cut, DestinationVm, MigrationError, SourceVm, Summary, receive, send};

pub(crate) type Opens = Box<dyn FnMut(u16) -> io::Result<Connection>>;
pub(crate) type Accepts = Box<dyn FnMut(Duration) -> io::Result<Option<Connection>> + Send>;

/// Into that file, from where it stands; once.
pub(crate) fn into(file: &File) -> Opens {
    let mut file = Some(file.try_clone().unwrap());
    Box::new(move |_| Connection::into_file(file.take().ok_or(io::ErrorKind::Unsupported)?))
}

/// Out of that file, from there on, by a position of its own.
pub(crate) fn out_of(file: &File, start: u64) -> Accepts {
    let mut file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    file.seek(SeekFrom::Start(start)).unwrap();
    once(Connection::out_of_file(file).unwrap())
}

/// Accepts what another closure opens.
pub(crate) fn accepts(from: mpsc::Receiver<Connection>) -> Accepts {
    Box::new(move |time| match from.recv_timeout(time) {
        Ok(connection) => Ok(Some(connection)),
        Err(mpsc::RecvTimeoutError::Timeout) => Ok(None),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(io::ErrorKind::ConnectionAborted.into()),
    })
}

/// Over pairs of UNIX sockets.
pub(crate) fn unix() -> (Opens, Accepts) {
    let (gives, takes) = mpsc::channel();
    let opens = move |_| {
        let (ours, theirs) = UnixStream::pair()?;
        gives.send(Connection::unix(theirs)?).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Connection::unix(ours)
    };
    (Box::new(opens), accepts(takes))
}

/// Over TCP.
pub(crate) fn tcp() -> (Opens, Accepts) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    let (gives, takes) = mpsc::channel();
    let opens = move |_| {
        // Accepted in the order in which they were opened, by whoever opens: the backlog is the kernel's.
        let socket = TcpStream::connect(at)?;
        gives.send(Connection::tcp(listener.accept()?.0)?).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Connection::tcp(socket)
    };
    (Box::new(opens), accepts(takes))
}

/// One connection.
pub(crate) fn once(connection: Connection) -> Accepts {
    let mut connection = Some(connection);
    Box::new(move |_| connection.take().map(Some).ok_or_else(|| io::ErrorKind::Unsupported.into()))
}

/// Moves a guest.
pub(crate) fn travel(
    source: &dyn SourceVm,
    destination: &dyn DestinationVm,
    (mut opens, accepts): (Opens, Accepts),
    controls: (&Control, &Control),
) -> (Result<Summary, MigrationError>, Result<Summary, MigrationError>) {
    thread::scope(|scope| {
        let receives = scope.spawn(move || {
            let mut accepts = accepts;
            // Whoever still comes once that is over finds nobody.
            receive(destination, &mut accepts, controls.1)
        });
        let sent = send(source, &mut opens, controls.0);
        // From here on nobody can ask.
        drop(opens);
        (sent, receives.join().unwrap())
    })
}

/// What went by a connection.
#[derive(Default)]
pub(crate) struct Toll {
    /// Bytes, to the destination and back.
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
    /// Where calls of either kind ended.
    pub(crate) ends: std::sync::Mutex<[Vec<u64>; 2]>,
}

/// Where a connection breaks, in bytes of a direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Breaks {
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

impl Breaks {
    pub(crate) const NEVER: Self = Self { sent: u64::MAX, received: u64::MAX };
}

/// The source's end of a connection that breaks, in both directions.
pub(crate) fn breaking(connection: Connection, breaks: Breaks, toll: &Arc<Toll>) -> Connection {
    let Connection { reader, writer, cut, answers, others_come, place } = connection;
    let half =
        |of: fn(&Toll) -> &AtomicU64, index, at| Half { of, index, at, toll: Arc::clone(toll), cut: Arc::clone(&cut) };
    Connection {
        reader: Box::new(Reads(reader, half(|toll| &toll.received, 1, breaks.received))),
        writer: Box::new(Writes(writer, half(|toll| &toll.sent, 0, breaks.sent))),
        cut: Arc::clone(&cut),
        answers,
        others_come,
        place,
    }
}

struct Half {
    of: fn(&Toll) -> &AtomicU64,
    index: usize,
    at: u64,
    toll: Arc<Toll>,
    cut: Cut,
}

impl Half {
    /// Of so many bytes those that still go; none: it is broken.
    fn allows(&self, len: usize) -> io::Result<usize> {
        let left = self.at - (self.of)(&self.toll).load(Ordering::Relaxed).min(self.at);
        if left == 0 {
            (self.cut)();
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(len.min(usize::try_from(left).unwrap_or(usize::MAX)))
    }

    fn count(&self, len: usize) -> usize {
        let total = (self.of)(&self.toll).fetch_add(len as u64, Ordering::Relaxed) + len as u64;
        self.toll.ends.lock().unwrap()[self.index].push(total);
        if total >= self.at {
            (self.cut)();
        }
        len
    }
}

struct Reads(Box<dyn Read + Send>, Half);

impl Read for Reads {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let most = self.1.allows(to.len())?;
        Ok(self.1.count(self.0.read(&mut to[..most])?))
    }
}

struct Writes(Box<dyn Write + Send>, Half);

impl Write for Writes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let most = self.1.allows(bytes.len())?;
        Ok(self.1.count(self.0.write(&bytes[..most])?))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
