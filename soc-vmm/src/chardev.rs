//! The VM's character devices: what `-chardev` and QMP `chardev-add` name, until a device or a monitor uses it, and what `query-chardev` tells
//! of it afterwards.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::OFlag;

use crate::cli::SerialSpec;
use crate::console::{ConsoleError, SerialBackend, Sink};
use crate::control::{ListenError, ListeningSocket};
use crate::fds::{FdError, Fds};
use crate::qemu::{Chardev, ChardevKind, Socket};
use crate::virtio::console::{HostEnd, PortStatus};

/// Why a character device can't be had, or used.
#[derive(Debug, thiserror::Error)]
pub enum ChardevError {
    /// Another one's name.
    #[error("chardev '{0}' is there already: give another id")]
    Taken(String),
    /// No such name.
    #[error("there is no chardev '{0}'")]
    NotFound(String),
    /// It has a user.
    #[error("chardev '{0}' is used by '{1}': each has one user")]
    InUse(String, String),
    /// It had one.
    #[error("chardev '{0}' was used before: remove it and add it again")]
    Spent(String),
    /// It can't be used so.
    #[error("chardev '{0}' is no {1}")]
    Kind(String, &'static str),
    /// Its descriptor can't be had.
    #[error("chardev '{0}'")]
    Fd(String, #[source] FdError),
    /// Its socket can't be listened on.
    #[error("chardev '{0}'")]
    Listen(String, #[source] ListenError),
    /// Its far end can't be opened.
    #[error("chardev '{0}'")]
    Console(String, #[source] ConsoleError),
    /// Nobody is at the other end.
    #[error("chardev '{0}': can't open {1}")]
    Open(String, PathBuf, #[source] io::Error),
}

/// A character device, as `query-chardev` tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChardevInfo {
    /// Its name.
    pub label: String,
    /// What it is, as QEMU shows it: `pty:/dev/pts/3`, `unix:/path,server=on`, `disconnected:unix:…`.
    pub filename: String,
    /// Whether its user listens: a program in the guest, where it is a port.
    pub frontend_open: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Chardevs(Mutex<BTreeMap<String, Entry>>);

#[derive(Debug)]
struct Entry {
    /// None: its user has it.
    opened: Option<Opened>,
    shown: Shown,
    user: Option<String>,
}

#[derive(Debug)]
enum Opened {
    Serial(SerialBackend),
    Listen(ListeningSocket, Option<Sink>),
    Connect(PathBuf),
}

/// What it is, in words.
#[derive(Debug)]
enum Shown {
    /// These.
    Words(String),
    /// A socket that this process listens on.
    Server(PathBuf, Arc<AtomicBool>),
    /// One that it connects to.
    Client(PathBuf),
}

impl Chardevs {
    /// Opens one.
    ///
    /// # Errors
    /// See [`ChardevError`].
    pub fn add(&self, spec: &Chardev, fds: &Fds) -> Result<(), ChardevError> {
        let id = &spec.id;
        // Opened twice, a socket's second opening would take the first one's away.
        let mut all = self.all();
        if all.contains_key(id) {
            return Err(ChardevError::Taken(id.clone()));
        }
        let console = |e| ChardevError::Console(id.clone(), e);
        let log = spec.log.as_ref().map(|log| open_file(id, &log.path, log.append, fds)).transpose()?;
        let (opened, shown) = match &spec.kind {
            ChardevKind::Pty => {
                let serial = SerialBackend::open(&SerialSpec::Pty).map_err(console)?;
                let path = serial.pty_path().unwrap_or(Path::new("")).display().to_string();
                (Opened::Serial(with_log(serial, log)), Shown::Words(format!("pty:{path}")))
            }
            ChardevKind::Null => {
                let serial = SerialBackend::open(&SerialSpec::Null).map_err(console)?;
                (Opened::Serial(with_log(serial, log)), Shown::Words("null".into()))
            }
            ChardevKind::Stdio => {
                let serial = SerialBackend::open(&SerialSpec::Stdio).map_err(console)?;
                (Opened::Serial(with_log(serial, log)), Shown::Words("stdio".into()))
            }
            ChardevKind::File { path, append } => {
                let serial = SerialBackend::file_of(open_file(id, path, *append, fds)?);
                (Opened::Serial(with_log(serial, log)), Shown::Words("file".into()))
            }
            ChardevKind::Listen(socket) => {
                let socket = match socket {
                    Socket::Path(path) => ListeningSocket::bind(path),
                    Socket::Descriptor(fd) => {
                        let fd = fds.take(fd).map_err(|e| ChardevError::Fd(id.clone(), e))?;
                        ListeningSocket::inherited(fd)
                    }
                };
                let socket = socket.map_err(|e| ChardevError::Listen(id.clone(), e))?;
                let path = socket.path().to_owned();
                (Opened::Listen(socket, log), Shown::Server(path, Arc::default()))
            }
            ChardevKind::Connect(path) => (Opened::Connect(path.clone()), Shown::Client(path.clone())),
        };
        all.insert(id.clone(), Entry { opened: Some(opened), shown, user: None });
        Ok(())
    }

    /// Closes one that nobody uses.
    ///
    /// # Errors
    /// There is none, or it has a user.
    pub fn remove(&self, id: &str) -> Result<(), ChardevError> {
        let mut all = self.all();
        let entry = all.get(id).ok_or_else(|| ChardevError::NotFound(id.into()))?;
        if let Some(user) = &entry.user {
            return Err(ChardevError::InUse(id.into(), user.clone()));
        }
        all.remove(id);
        Ok(())
    }

    /// Its user is gone, and with it what was open.
    pub fn release(&self, user: &str) {
        let mut all = self.all();
        all.values_mut().filter(|entry| entry.user.as_deref() == Some(user)).for_each(|entry| entry.user = None);
    }

    /// Where a pseudo-terminal's other side is, if it is one.
    pub fn pty(&self, id: &str) -> Option<PathBuf> {
        match self.all().get(id)?.opened.as_ref()? {
            Opened::Serial(serial) => serial.pty_path().map(Path::to_owned),
            Opened::Listen(..) | Opened::Connect(_) => None,
        }
    }

    /// Gives it to a serial port or a debug console.
    ///
    /// # Errors
    /// There is none, it has a user, or is no stream of bytes.
    pub fn take_serial(&self, id: &str, user: &str) -> Result<SerialBackend, ChardevError> {
        let mut all = self.all();
        let entry = free(&mut all, id)?;
        match entry.opened.take() {
            Some(Opened::Serial(serial)) => {
                entry.user = Some(user.into());
                Ok(serial)
            }
            Some(Opened::Listen(socket, log)) => {
                entry.user = Some(user.into());
                let serial = SerialBackend::listening(socket);
                if let Shown::Server(_, connected) = &mut entry.shown {
                    *connected = serial.connected();
                }
                Ok(with_log(serial, log))
            }
            other => refuse(entry, other, id, "stream of a serial port: a pty, a file, a socket with server=on"),
        }
    }

    /// Gives it to a monitor.
    ///
    /// # Errors
    /// There is none, it has a user, or is no socket that listens.
    pub fn take_listener(&self, id: &str, user: &str) -> Result<ListeningSocket, ChardevError> {
        let mut all = self.all();
        let entry = free(&mut all, id)?;
        match entry.opened.take() {
            Some(Opened::Listen(socket, _)) => {
                entry.user = Some(user.into());
                if let Shown::Server(_, connected) = &entry.shown {
                    // Who asks is.
                    connected.store(true, Ordering::Relaxed);
                }
                Ok(socket)
            }
            other => refuse(entry, other, id, "socket with server=on,wait=off"),
        }
    }

    /// Gives it to a port of a virtio-serial-pci.
    ///
    /// # Errors
    /// There is none, it has a user, is no socket, or nobody listens there.
    pub fn take_end(&self, id: &str, user: &str) -> Result<HostEnd, ChardevError> {
        let mut all = self.all();
        let entry = free(&mut all, id)?;
        match entry.opened.take() {
            Some(Opened::Listen(socket, _)) => {
                entry.user = Some(user.into());
                Ok(HostEnd::listening(socket))
            }
            Some(Opened::Connect(path)) => match HostEnd::connect(&path) {
                Ok(end) => {
                    entry.user = Some(user.into());
                    Ok(end)
                }
                Err(e) => {
                    entry.opened = Some(Opened::Connect(path.clone()));
                    Err(ChardevError::Open(id.into(), path, e))
                }
            },
            other => refuse(entry, other, id, "socket"),
        }
    }

    /// Gives it to a device of another process's: where that listens.
    ///
    /// # Errors
    /// There is none, it has a user, or is no socket that is connected to.
    pub fn take_peer(&self, id: &str, user: &str) -> Result<PathBuf, ChardevError> {
        let mut all = self.all();
        let entry = free(&mut all, id)?;
        match entry.opened.take() {
            Some(Opened::Connect(path)) => {
                entry.user = Some(user.into());
                Ok(path)
            }
            other => refuse(entry, other, id, "socket that is connected to (path=, without server=on)"),
        }
    }

    /// All of them; `ports` are those of the VM's devices for ports, which know their peers.
    pub fn list(&self, ports: &[PortStatus]) -> Vec<ChardevInfo> {
        let info = |(label, entry): (&String, &Entry)| {
            let port = ports.iter().find(|port| Some(&port.id) == entry.user.as_ref());
            let filename = match &entry.shown {
                Shown::Words(words) => words.clone(),
                Shown::Server(path, connected) => {
                    let is_connected = port.map_or_else(|| connected.load(Ordering::Relaxed), |port| port.host_open);
                    let state = if is_connected { "" } else { "disconnected:" };
                    format!("{state}unix:{},server=on", path.display())
                }
                Shown::Client(path) => format!("unix:{}", path.display()),
            };
            let frontend_open = port.map_or(entry.user.is_some(), |port| port.guest_open);
            ChardevInfo { label: label.clone(), filename, frontend_open }
        };
        self.all().iter().map(info).collect()
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn with_log(serial: SerialBackend, log: Option<Sink>) -> SerialBackend {
    match log {
        Some(log) => serial.logged(log),
        None => serial,
    }
}

/// One that is there and has no user.
fn free<'a>(all: &'a mut BTreeMap<String, Entry>, id: &str) -> Result<&'a mut Entry, ChardevError> {
    let entry = all.get_mut(id).ok_or_else(|| ChardevError::NotFound(id.into()))?;
    match (&entry.user, &entry.opened) {
        (Some(user), _) => Err(ChardevError::InUse(id.into(), user.clone())),
        (None, None) => Err(ChardevError::Spent(id.into())),
        (None, Some(_)) => Ok(entry),
    }
}

fn refuse<T>(entry: &mut Entry, opened: Option<Opened>, id: &str, wanted: &'static str) -> Result<T, ChardevError> {
    entry.opened = opened;
    Err(ChardevError::Kind(id.into(), wanted))
}

/// Opens a file to be written, or a descriptor of a set. It is emptied when a VM is about to run, if at all: it may be somebody's disk.
fn open_file(id: &str, path: &Path, append: bool, fds: &Fds) -> Result<Sink, ChardevError> {
    match fds.open_path(path, OFlag::O_WRONLY) {
        Some(Ok(opened)) => Ok(Sink::opened(opened.into(), path.to_owned())),
        Some(Err(e)) => Err(ChardevError::Fd(id.into(), e)),
        None => Sink::open(path, append).map_err(|e| ChardevError::Console(id.into(), e)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn add(all: &Chardevs, text: &str) -> Result<(), ChardevError> {
        all.add(&Chardev::parse(text).unwrap(), &Fds::default())
    }

    fn shown(all: &Chardevs, label: &str) -> (String, bool) {
        let found = all.list(&[]).into_iter().find(|info| info.label == label).unwrap();
        (found.filename, found.frontend_open)
    }

    #[test]
    fn each_is_shown_as_qemu_does_and_has_one_user() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let path = path.to_str().unwrap();
        let all = Chardevs::default();
        add(&all, "pty,id=p").unwrap();
        add(&all, "null,id=n").unwrap();
        add(&all, &format!("socket,id=s,path={path},server=on,wait=off")).unwrap();
        add(&all, &format!("socket,id=c,path={path}")).unwrap();
        assert!(matches!(add(&all, "null,id=n"), Err(ChardevError::Taken(_))));
        let (pty, open) = shown(&all, "p");
        assert!(pty.starts_with("pty:/dev/pts/") && !open, "{pty}");
        assert_eq!(shown(&all, "n"), ("null".into(), false));
        assert_eq!(shown(&all, "s"), (format!("disconnected:unix:{path},server=on"), false));
        assert_eq!(shown(&all, "c"), (format!("unix:{path}"), false));

        assert!(matches!(all.take_listener("p", "mon"), Err(ChardevError::Kind(..))));
        all.take_serial("p", "serial0").unwrap();
        assert!(shown(&all, "p").1);
        assert!(matches!(all.take_serial("p", "x"), Err(ChardevError::InUse(_, user)) if user == "serial0"));
        assert!(matches!(all.remove("p"), Err(ChardevError::InUse(..))));
        all.release("serial0");
        assert!(matches!(all.take_serial("p", "x"), Err(ChardevError::Spent(_))));
        all.remove("p").unwrap();
        assert!(matches!(all.remove("p"), Err(ChardevError::NotFound(_))));

        drop(all.take_listener("s", "monitor").unwrap());
        assert_eq!(shown(&all, "s"), (format!("unix:{path},server=on"), true));
        assert!(matches!(all.take_end("c", "port"), Err(ChardevError::Open(..))), "nobody listens any more");
        let _listener = UnixListener::bind(path).unwrap();
        all.take_end("c", "port").unwrap();
    }

    #[test]
    fn a_file_keeps_its_content_until_a_vm_runs_and_a_set_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "before").unwrap();
        let all = Chardevs::default();
        add(&all, &format!("file,id=a,path={},append=on", path.display())).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"before");
        add(&all, &format!("null,id=l,logfile={}", path.display())).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"before", "it may be somebody's disk");
        let fds = Fds::default();
        let set = Chardev::parse("file,id=s,path=/dev/fdset/3,append=on").unwrap();
        assert!(matches!(all.add(&set, &fds), Err(ChardevError::Fd(_, FdError::NoSet(3)))));
        fds.add_to_set(Some(3), File::options().append(true).open(&path).unwrap().into(), None).unwrap();
        all.add(&set, &fds).unwrap();
        assert_eq!(shown(&all, "s").0, "file");
    }

    #[test]
    fn nobody_waits_for_a_fifo_s_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let all = Chardevs::default();
        for (id, text) in [("a", "file,id=a,append=on,path"), ("b", "file,id=b,path"), ("c", "pty,id=c,logfile")] {
            let why = add(&all, &format!("{text}={}", path.display())).unwrap_err();
            assert!(matches!(why, ChardevError::Console(of, ConsoleError::NoReader(_)) if of == id));
        }
        assert!(all.list(&[]).is_empty());
    }
}
