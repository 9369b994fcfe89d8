//! Connections of a migration: dialled by the source, accepted by the destination.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use migration::Connection;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getpeername};

use super::Uri;
use super::made::Made;
use super::reception::Reception;
use super::secure::{Secure, socket_of};
use super::uri::FilePlace;
use crate::control::{ListenError, ListeningSocket};
use crate::dial::dial;
use crate::fds::{FdError, Fds};
use crate::tls::CredentialsError;

/// How long a destination may take to answer the first packet.
const DIALING: Duration = Duration::from_secs(10);

/// A way that is known to be one: names are looked up when it is gone.
#[derive(Debug)]
pub enum Way {
    /// A TCP port.
    Tcp(String, u16),
    /// A UNIX socket.
    Unix(PathBuf),
    /// A socket that is connected, a pipe, or a file at its position.
    Fd(OwnedFd),
    /// A file; or what was passed for it.
    File(FilePlace, Option<OwnedFd>),
    /// A socket of another way, with TLS.
    Tls(Box<Way>, Secure),
}

impl Way {
    /// What a URI means to the source, or to the destination; none: that is said later.
    ///
    /// # Errors
    /// There is no such descriptor.
    pub fn of(uri: &Uri, is_source: bool, fds: &Fds) -> Result<Option<Self>, WayError> {
        Ok(Some(match uri {
            Uri::Tcp(host, port) | Uri::Tls(host, port) if is_source && host.is_empty() => {
                return Err(WayError::NoHost(*port));
            }
            Uri::Tcp(host, port) | Uri::Tls(host, port) => Self::Tcp(host.clone(), *port),
            Uri::Unix(path) => Self::Unix(path.clone()),
            Uri::File(place) if is_source && place.pages_first => return Err(WayError::PagesFirst),
            Uri::File(place) => {
                let mode = if is_source { OFlag::O_WRONLY } else { OFlag::O_RDONLY };
                Self::File(place.clone(), fds.open_path(&place.path, mode).transpose()?)
            }
            Uri::Fd(name) => Self::Fd(fds.take(name)?),
            Uri::Defer => return Ok(None),
        }))
    }

    /// A file that isn't there yet, and is from here on.
    ///
    /// # Errors
    /// It is there, or can't be.
    pub(super) fn new_file(path: PathBuf) -> Result<(Self, Made), WayError> {
        let (file, made) = create_new(path.clone())?;
        Ok((Self::File(FilePlace { path, offset: 0, pages_first: false }, Some(file)), made))
    }

    /// Has the file be there that a guest goes into; that, if it wasn't before.
    ///
    /// # Errors
    /// It can't be.
    pub(super) fn make(self) -> Result<(Self, Option<Made>), WayError> {
        match self {
            Self::File(place, None) => match create_new(place.path.clone()) {
                Ok((file, made)) => Ok((Self::File(place, Some(file)), Some(made))),
                // Whether it may be written is looked at when it is opened.
                Err(WayError::Exists(_)) => Ok((Self::File(place, None), None)),
                Err(e) => Err(e),
            },
            way => Ok((way, None)),
        }
    }

    /// The same with TLS.
    ///
    /// # Errors
    /// It is no socket.
    pub fn with(self, tls: Secure) -> Result<Self, WayError> {
        match self {
            Self::File(place, _) => Err(WayError::Open(place.path)),
            way => Ok(Self::Tls(Box::new(way), tls)),
        }
    }

    /// Where it leads to, as a message says it.
    pub(super) fn place(&self) -> String {
        match self {
            Self::Tcp(host, port) => Uri::Tcp(host.clone(), *port).to_string(),
            Self::Unix(path) => format!("unix:{}", path.display()),
            Self::Fd(_) => "the descriptor".into(),
            Self::File(place, _) => format!("file:{}", place.path.display()),
            Self::Tls(way, _) => match &**way {
                Self::Tcp(host, port) => Uri::Tls(host.clone(), *port).to_string(),
                way => format!("{} with TLS", way.place()),
            },
        }
    }

    /// Whether whoever is at its other end can answer.
    pub(super) fn is_two_way(&self) -> bool {
        match self {
            Self::Tcp(..) | Self::Unix(_) | Self::Tls(..) => true,
            Self::Fd(fd) => {
                fd.try_clone().and_then(|fd| File::from(fd).metadata()).is_ok_and(|of| of.file_type().is_socket())
            }
            Self::File(..) => false,
        }
    }

    /// Whether it is a file, which what is written to it stays in.
    pub(super) fn is_file(&self) -> bool {
        matches!(self, Self::File(..))
    }

    /// Whether all pages are to be there before the guest starts.
    pub(super) fn reads_first(&self) -> bool {
        matches!(self, Self::File(place, _) if place.pages_first)
    }
}

/// Of a file.
const TAKEN: &str = "a guest is being kept in it or gets its pages from it: take another file";

/// Why there is no way.
#[derive(Debug, thiserror::Error)]
pub enum WayError {
    /// A name that nobody knows.
    #[error("{0}: no address of that name is known")]
    Name(String, #[source] io::Error),
    /// Nowhere to go.
    #[error("every address is no place to go to: say which host, as in tcp:HOST:{0}")]
    NoHost(u16),
    /// A door that can't be opened.
    #[error("can't listen at {0}")]
    Listen(String, #[source] io::Error),
    /// The same, at a path.
    #[error(transparent)]
    Socket(#[from] ListenError),
    /// A file that can't be opened.
    #[error("{}: it can't be opened", .0.display())]
    File(PathBuf, #[source] io::Error),
    /// A file where there is to be none.
    #[error("{}: it is there already: remove it, or take another name", .0.display())]
    Exists(PathBuf),
    /// A file that a guest still needs.
    #[error("{}: {TAKEN}", .0.display())]
    Taken(PathBuf),
    /// It is for the guest that comes.
    #[error("pages=first is for --incoming: leave it out")]
    PagesFirst,
    /// There is no such descriptor.
    #[error(transparent)]
    NoDescriptor(#[from] FdError),
    /// A descriptor that is neither.
    #[error("the descriptor is no socket, pipe or file")]
    Descriptor(#[source] io::Error),
    /// A file can't answer.
    #[error("{}: a file has no TLS: empty tls-creds for it", .0.display())]
    Open(PathBuf),
    /// There is nothing to compare a certificate with.
    #[error(
        "nobody said whom the destination's certificate is for, and the place names no host: say it by tls-hostname (--tls-hostname)"
    )]
    Nameless,
    /// What TLS needs can't be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

/// The source's side.
pub(super) struct Dialer {
    way: Way,
    /// Whether whatever is at the other end of a descriptor answers.
    answers: bool,
}

impl Dialer {
    pub(super) fn new(way: Way, answers: bool) -> Self {
        Self { way, answers }
    }

    /// Opens a connection.
    pub(super) fn dial(&mut self, connection: u16) -> io::Result<Connection> {
        self.open(connection).map_err(|e| {
            let place = self.way.place();
            // A VM is built before its door opens.
            let not_yet =
                matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) && self.way.is_two_way();
            let why = if not_yet { ": no VM waits there, or not yet" } else { "" };
            io::Error::new(e.kind(), format!("{place}: {e}{why}"))
        })
    }

    fn open(&self, connection: u16) -> io::Result<Connection> {
        match &self.way {
            Way::Tcp(host, port) => Connection::tcp(dial_tcp(host, *port)?),
            Way::Unix(path) => Connection::unix(dial(path, DIALING)?),
            Way::File(place, passed) => Connection::into_file(create(place, passed.as_ref())?),
            Way::Fd(_) if connection > 0 => {
                Err(io::Error::new(ErrorKind::Unsupported, "a descriptor is one connection: ask for no more"))
            }
            Way::Fd(fd) => Ok(of_descriptor(fd.try_clone()?, self.answers, Connection::into_file)?),
            Way::Tls(way, tls) => {
                let socket = match &**way {
                    Way::Tcp(host, port) => {
                        let socket = dial_tcp(host, *port)?;
                        socket.set_nodelay(true)?;
                        socket.into()
                    }
                    Way::Unix(path) => dial(path, DIALING)?.into(),
                    Way::Fd(fd) if connection == 0 => socket_of(fd.try_clone()?)?,
                    Way::Fd(_) | Way::File(..) | Way::Tls(..) => {
                        return Err(io::Error::new(ErrorKind::Unsupported, "one connection with TLS is all there is"));
                    }
                };
                // Who comes to a door that others come to has a way back, or is sent away.
                tls.connection(socket, self.answers || !matches!(**way, Way::Fd(_)))
            }
        }
    }
}

/// The destination's side.
pub(super) enum Door {
    Tcp(TcpListener),
    Unix(Arc<ListeningSocket>),
    /// Who comes has to show who it is.
    Guarded(Reception),
    /// What there is comes once.
    Once(Option<Connection>),
}

impl Door {
    /// Opens it.
    pub(super) fn open(way: Way) -> Result<Self, WayError> {
        match way {
            Way::Tcp(host, port) => {
                let name = format!("{host}:{port}");
                let addresses = addresses(if host.is_empty() { "::" } else { &host }, port)?;
                let bound = TcpListener::bind(&addresses[..]);
                let listener = bound.map_err(|e| WayError::Listen(name, e))?;
                Ok(Self::Tcp(listener))
            }
            Way::Unix(path) => Ok(Self::Unix(Arc::new(ListeningSocket::bind(&path)?))),
            Way::File(FilePlace { path, offset, .. }, passed) => {
                let opened = passed.map_or_else(|| open(&path, OpenOptions::new().read(true)), |fd| Ok(fd.into()));
                let failed = |e| WayError::File(path.clone(), e);
                let mut file = opened.map_err(failed)?;
                // Whoever writes to it changes a guest that still gets its pages from it.
                match file.try_lock_shared() {
                    Err(TryLockError::WouldBlock) => return Err(WayError::Taken(path)),
                    // Not every file system has locks.
                    Ok(()) | Err(TryLockError::Error(_)) => {}
                }
                let connection = file.seek(SeekFrom::Start(offset)).and_then(|_| Connection::out_of_file(file));
                Ok(Self::Once(Some(connection.map_err(failed)?)))
            }
            Way::Fd(fd) => {
                let connection = of_descriptor(fd, true, Connection::out_of_file).map_err(WayError::Descriptor)?;
                Ok(Self::Once(Some(connection)))
            }
            Way::Tls(way, tls) => match *way {
                Way::Fd(fd) => {
                    let connection = socket_of(fd).and_then(|socket| tls.connection(socket, true));
                    Ok(Self::Once(Some(connection.map_err(WayError::Descriptor)?)))
                }
                way => Ok(Self::Guarded(Reception::new(Self::open(way)?, tls).map_err(WayError::Descriptor)?)),
            },
        }
    }

    /// The socket that has a path, where it is one.
    pub(super) fn socket(&self) -> Option<&Arc<ListeningSocket>> {
        match self {
            Self::Unix(socket) => Some(socket),
            Self::Guarded(reception) => reception.socket(),
            Self::Tcp(_) | Self::Once(_) => None,
        }
    }

    /// Waits for a connection; none: there was none for that long.
    pub(super) fn accept(&mut self, patience: Duration) -> io::Result<Option<Connection>> {
        let connection = match self {
            Self::Tcp(listener) if knocks(listener, patience)? => Connection::tcp(listener.accept()?.0)?,
            Self::Unix(socket) if knocks(socket.listener(), patience)? => {
                Connection::unix(socket.listener().accept()?.0)?
            }
            Self::Tcp(_) | Self::Unix(_) => return Ok(None),
            Self::Guarded(reception) => match reception.accept(patience)? {
                Some(connection) => connection,
                None => return Ok(None),
            },
            Self::Once(connection) => return connection.take().map(Some).ok_or(ErrorKind::NotConnected.into()),
        };
        Ok(Some(Connection { others_come: true, ..connection }))
    }
}

/// Whether somebody wants in, within that time.
fn knocks(listener: &impl AsFd, patience: Duration) -> io::Result<bool> {
    let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], patience) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn dial_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::from(ErrorKind::AddrNotAvailable);
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, DIALING) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn addresses(host: &str, port: u16) -> Result<Vec<SocketAddr>, WayError> {
    let found = (host, port).to_socket_addrs().map(Vec::from_iter);
    found.map_err(|e| WayError::Name(host.to_owned(), e))
}

/// Guest memory is for its owner alone.
const OWNER: u32 = 0o600;

/// A file that wasn't there.
fn create_new(path: PathBuf) -> Result<(OwnedFd, Made), WayError> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(OWNER).open(&path);
    match opened.and_then(|file| Ok((Made::new(path.clone(), &file)?, file))) {
        Ok((made, file)) => Ok((file.into(), made)),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Err(WayError::Exists(path)),
        Err(e) => Err(WayError::File(path, e)),
    }
}

/// Opens a file to write a stream into; what is before its offset stays.
fn create(place: &FilePlace, passed: Option<&OwnedFd>) -> io::Result<File> {
    let FilePlace { path, offset, .. } = place;
    let offset = *offset;
    let mut file: File = match passed {
        Some(fd) => fd.try_clone()?.into(),
        None => open(path, OpenOptions::new().write(true).create(true).truncate(false).mode(OWNER))?,
    };
    let found = file.metadata()?;
    let is_disk = found.file_type().is_block_device() || found.is_file() && found.len() > offset;
    if passed.is_none() && is_disk {
        let why = "something is there already, which may be a disk: remove it, or take another name";
        return Err(io::Error::new(ErrorKind::AlreadyExists, why));
    }
    if found.is_file() {
        lock(&file)?;
        file.set_len(offset)?;
        file.seek(SeekFrom::Start(offset))?;
    }
    Ok(file)
}

/// Opens a file, which takes no waiting: a pipe by its path might wait for its other end for ever.
fn open(path: &Path, how: &mut OpenOptions) -> io::Result<File> {
    let pipe = || io::Error::new(ErrorKind::InvalidInput, "it is a pipe: pass it as a descriptor, by fd:");
    let file = match how.custom_flags(OFlag::O_NONBLOCK.bits()).open(path) {
        // Nobody reads it.
        Err(e) if e.raw_os_error() == Some(Errno::ENXIO as i32) => return Err(pipe()),
        opened => opened?,
    };
    let kind = file.metadata()?.file_type();
    if kind.is_char_device() {
        let why = "it is a device that keeps nothing, as a terminal or /dev/null: take a file";
        return Err(io::Error::new(ErrorKind::InvalidInput, why));
    }
    if kind.is_fifo() { Err(pipe()) } else { Ok(file) }
}

/// Has nobody else write it meanwhile, nor a guest get its pages from it.
fn lock(file: &File) -> io::Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(io::Error::new(ErrorKind::ResourceBusy, TAKEN)),
        // Not every file system has locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

fn of_descriptor(
    fd: OwnedFd,
    answers: bool,
    one_way: impl Fn(File) -> io::Result<Connection>,
) -> io::Result<Connection> {
    let file = File::from(fd);
    if !file.metadata()?.file_type().is_socket() {
        return one_way(file);
    }
    let peer = getpeername::<SockaddrStorage>(file.as_raw_fd())?;
    let socket = OwnedFd::from(file);
    let connection = match peer.family() {
        Some(AddressFamily::Unix) => Connection::unix(socket.into())?,
        _ => {
            let stream = TcpStream::from(socket);
            stream.set_nonblocking(false)?;
            Connection::tcp(stream)?
        }
    };
    Ok(Connection { answers, ..connection })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::dial::dial_now;

    fn way(text: &str, is_source: bool, fds: &Fds) -> Way {
        Way::of(&text.parse().unwrap(), is_source, fds).unwrap().unwrap()
    }

    #[test]
    fn a_file_may_be_one_that_was_passed() {
        let (fds, file) = (Fds::default(), tempfile::NamedTempFile::new().unwrap());
        std::fs::write(file.path(), "before, and what is in the way").unwrap();
        fds.add_to_set(Some(3), file.reopen().unwrap().into(), None).unwrap();
        let passed = OpenOptions::new().read(true).write(true).open(file.path()).unwrap();
        fds.add_to_set(Some(4), passed.into(), None).unwrap();
        let uri = "file:/dev/fdset/4,offset=8";
        let mut connection = Dialer::new(way(uri, true, &fds), false).dial(0).unwrap();
        connection.writer.write_all(b"a guest").unwrap();
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "before, a guest");
        let Ok(Door::Once(Some(mut connection))) = Door::open(way(uri, false, &fds)) else { panic!("it is no door") };
        let mut text = String::new();
        connection.reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "a guest");
        assert!(matches!(
            Way::of(&"file:/dev/fdset/9".parse().unwrap(), true, &fds),
            Err(WayError::NoDescriptor(FdError::NoSet(9)))
        ));
        let first = "file:/a,pages=first".parse().unwrap();
        assert!(matches!(Way::of(&first, true, &fds), Err(WayError::PagesFirst)));
        assert!(way("file:/a,pages=first", false, &fds).reads_first());
    }

    #[test]
    fn what_is_there_stays() {
        let (fds, dir) = (Fds::default(), tempfile::tempdir().unwrap());
        let at = |name: &str| dir.path().join(name);
        let to = |name: &str| Dialer::new(way(&format!("file:{}", at(name).display()), true, &fds), false).dial(0);
        std::fs::write(at("disk"), "a disk").unwrap();
        assert_eq!(to("disk").err().unwrap().kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(at("disk")).unwrap(), "a disk");
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(to("pipe").err().unwrap().kind(), ErrorKind::InvalidInput);
        assert_eq!(to("../../../../../../dev/null").err().unwrap().kind(), ErrorKind::InvalidInput);
        let from = format!("file:{}", at("pipe").display());
        assert!(matches!(Door::open(way(&from, false, &fds)), Err(WayError::File(..))));
        to("new").unwrap();
    }

    #[test]
    fn a_socket_that_somebody_has_stays_theirs() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| Door::open(Way::Unix(dir.path().join(name)));
        let _datagrams = std::os::unix::net::UnixDatagram::bind(dir.path().join("log")).unwrap();
        assert!(matches!(open("log"), Err(WayError::Socket(_))));
        let busy = UnixListener::bind(dir.path().join("busy")).unwrap();
        nix::sys::socket::listen(&busy, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = dial_now(&dir.path().join("busy")) {
            waiting.push(stream);
        }
        assert!(matches!(open("busy"), Err(WayError::Socket(_))));
        drop(UnixListener::bind(dir.path().join("dead")).unwrap());
        assert!(open("dead").is_ok());
        assert!(!dir.path().join("dead").exists(), "a door that is shut leaves nothing");
    }

    #[test]
    fn nobody_writes_to_a_file_that_a_guest_needs() {
        let (fds, dir) = (Fds::default(), tempfile::tempdir().unwrap());
        let uri = format!("file:{}", dir.path().join("saved").display());
        let dial = || Dialer::new(way(&uri, true, &fds), false).dial(0);
        let writes = dial().unwrap();
        assert!(matches!(Door::open(way(&uri, false, &fds)), Err(WayError::Taken(_))));
        assert_eq!(dial().err().unwrap().kind(), ErrorKind::ResourceBusy);
        drop(writes);
        // Several may read.
        let _readers = [(); 2].map(|()| Door::open(way(&uri, false, &fds)).ok().unwrap());
        assert_eq!(dial().err().unwrap().kind(), ErrorKind::ResourceBusy);
        let new = Way::new_file(dir.path().join("saved"));
        assert!(matches!(new, Err(WayError::Exists(_))));
        Dialer::new(Way::new_file(dir.path().join("new")).unwrap().0, false).dial(0).unwrap();
    }
}
