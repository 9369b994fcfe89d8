//! The far ends of a VM's serial port and debug console: this process's terminal, a pseudo-terminal, a file, a socket.
//!
//! [`SerialBackend::open`] takes what a command line names, before there is a VM; [`SerialBackend::attach`] joins it to the
//! device's queues. The device never waits: who is slow lets its queue fill, and where nobody listens the output vanishes.

mod escape;
mod peer;
mod pty;
mod terminal;
mod thread;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::cli::{DebugconSpec, SerialSpec};
use crate::control::{ListenError, ListeningSocket, VmHandle};
use crate::devices::{InputWriter, OutputReader};

pub use escape::{Escapes, Typed};
pub use terminal::RawTerminal;

use pty::Pty;

/// How long the last output of a VM that ended may take.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a console can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// A file can't be written.
    #[error("can't create {0}")]
    Create(PathBuf, #[source] io::Error),
    /// A file can't be emptied.
    #[error("can't empty {0}")]
    Empty(PathBuf, #[source] io::Error),
    /// A FIFO leads nowhere.
    #[error("nobody reads the FIFO {0}; start its reader first, or give a file")]
    NoReader(PathBuf),
    /// Not something that a console writes to.
    #[error("{0} is no file, terminal or FIFO; give one of these")]
    NotAFile(PathBuf),
    /// The socket can't be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// No pseudo-terminal.
    #[error("can't make a pseudo-terminal")]
    Pty(#[source] io::Error),
    /// A debug console only writes.
    #[error("a debug console writes to a file or to standard output: give one of these")]
    NoDebugcon,
    /// Standard input or output can't be used.
    #[error("can't use the terminal")]
    Stdio(#[source] io::Error),
}

/// An opened far end of a serial port.
#[derive(Debug)]
pub struct SerialBackend {
    kind: Kind,
    /// Where a copy of the output goes.
    log: Option<Sink>,
    /// Whether somebody is connected to its socket.
    connected: Arc<AtomicBool>,
}

#[derive(Debug)]
enum Kind {
    Stdio,
    Null,
    Pty(Pty),
    File(Sink),
    Unix(ListeningSocket),
}

impl SerialBackend {
    /// Opens what `spec` names.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn open(spec: &SerialSpec) -> Result<Self, ConsoleError> {
        Ok(Self::of(match spec {
            SerialSpec::Stdio => Kind::Stdio,
            SerialSpec::Null => Kind::Null,
            SerialSpec::Pty => Kind::Pty(Pty::open().map_err(ConsoleError::Pty)?),
            SerialSpec::File(path) => Kind::File(Sink::open(path, false)?),
            SerialSpec::Unix(path) => Kind::Unix(ListeningSocket::bind(path)?),
        }))
    }

    /// A socket that listens already.
    pub fn listening(socket: ListeningSocket) -> Self {
        Self::of(Kind::Unix(socket))
    }

    /// A file that is open.
    pub fn file_of(sink: Sink) -> Self {
        Self::of(Kind::File(sink))
    }

    /// The same, of whose output a copy goes to `log`.
    #[must_use]
    pub fn logged(self, log: Sink) -> Self {
        Self { log: Some(log), ..self }
    }

    /// Whether somebody is connected to its socket, if it is one: now and later.
    pub fn connected(&self) -> Arc<AtomicBool> {
        self.connected.clone()
    }

    fn of(kind: Kind) -> Self {
        Self { kind, log: None, connected: Arc::default() }
    }

    /// Where to connect, if it is a pseudo-terminal.
    pub fn pty_path(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Pty(pty) => Some(pty.path()),
            _ => None,
        }
    }

    /// The files that it writes to: its far end if that is one, and its log.
    pub fn files(&self) -> impl Iterator<Item = &File> {
        let end = match &self.kind {
            Kind::File(sink) => Some(sink),
            _ => None,
        };
        end.into_iter().chain(&self.log).map(|sink| &sink.file)
    }

    /// Joins it to the device's queues. On a terminal this makes it raw, and Ctrl-A x ends `vm`. Must be called inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn attach(self, output: OutputReader, input: InputWriter, vm: &VmHandle) -> Result<Attached, ConsoleError> {
        let mut attached = Attached { sinks: Vec::new(), written: None, logged: None, task: None, terminal: None };
        let output = match self.log {
            None => output,
            Some(log) => {
                let (copies, written) = thread::copy(log.file_again()?).map_err(ConsoleError::Stdio)?;
                attached.logged = Some(written);
                attached.sinks.push(log);
                output.copying(copies)
            }
        };
        match self.kind {
            // Its output vanishes by itself, unless it is logged.
            Kind::Null if attached.logged.is_none() => {}
            Kind::Null => attached.task = Some(tokio::spawn(peer::discard(output))),
            Kind::File(sink) => {
                attached.written = Some(thread::write(output, sink.file_again()?).map_err(ConsoleError::Stdio)?);
                attached.sinks.push(sink);
            }
            Kind::Stdio => {
                attached.terminal = RawTerminal::enter().map_err(ConsoleError::Stdio)?;
                attached.written = Some(thread::write(output, standard_output()?).map_err(ConsoleError::Stdio)?);
                let escapes = attached.terminal.as_ref().map(|_| vm.clone());
                if escapes.is_some() || !terminal::stdin_is_terminal() {
                    thread::read_stdin(input, escapes).map_err(ConsoleError::Stdio)?;
                }
            }
            Kind::Pty(pty) => attached.task = Some(tokio::spawn(peer::serve_pty(pty, output, input))),
            Kind::Unix(socket) => {
                let failed = |e| ListenError::Io(socket.path().to_owned(), e);
                let listener = socket.listener().try_clone().and_then(UnixListener::from_std).map_err(failed)?;
                let connected = self.connected;
                attached.task = Some(tokio::spawn(async move {
                    peer::serve_unix(listener, socket, output, input, &connected).await;
                }));
            }
        }
        Ok(attached)
    }
}

/// An opened far end of a debug console.
#[derive(Debug)]
pub struct DebugconBackend(Debugcon);

#[derive(Debug)]
enum Debugcon {
    Stdio(File),
    File(Sink),
}

impl DebugconBackend {
    /// Makes one of a serial port's: standard output or a file.
    ///
    /// # Errors
    /// It is neither.
    pub fn of(serial: SerialBackend) -> Result<Self, ConsoleError> {
        match serial.kind {
            Kind::Stdio => Ok(Self(Debugcon::Stdio(standard_output()?))),
            Kind::File(sink) => Ok(Self(Debugcon::File(sink))),
            Kind::Null | Kind::Pty(_) | Kind::Unix(_) => Err(ConsoleError::NoDebugcon),
        }
    }

    /// Opens what `spec` names.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn open(spec: &DebugconSpec) -> Result<Self, ConsoleError> {
        Ok(Self(match spec {
            DebugconSpec::Stdio => Debugcon::Stdio(standard_output()?),
            DebugconSpec::File(path) => Debugcon::File(Sink::open(path, false)?),
        }))
    }

    /// The file that it writes to, if it is one.
    pub fn file(&self) -> Option<&File> {
        match &self.0 {
            Debugcon::File(sink) => Some(&sink.file),
            Debugcon::Stdio(_) => None,
        }
    }

    /// Joins it to the device's queue. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn attach(self, output: OutputReader) -> Result<Attached, ConsoleError> {
        let (file, sinks) = match self.0 {
            Debugcon::Stdio(file) => (file, Vec::new()),
            Debugcon::File(sink) => (sink.file_again()?, vec![sink]),
        };
        let written = thread::write(output, file).map_err(ConsoleError::Stdio)?;
        Ok(Attached { sinks, written: Some(written), logged: None, task: None, terminal: None })
    }
}

/// A console at work. Dropped, it restores the terminal at once.
#[derive(Debug)]
pub struct Attached {
    /// What is to be emptied before its VM runs.
    sinks: Vec<Sink>,
    /// Closes when the last byte is written.
    written: Option<oneshot::Receiver<()>>,
    /// Likewise of the log.
    logged: Option<oneshot::Receiver<()>>,
    task: Option<JoinHandle<()>>,
    terminal: Option<RawTerminal>,
}

impl Attached {
    /// The VM is about to run: what a file has of an earlier one goes.
    ///
    /// # Errors
    /// [`ConsoleError::Empty`].
    pub fn begin(&self) -> Result<(), ConsoleError> {
        self.sinks.iter().try_for_each(Sink::empty)
    }

    /// Waits until the output of a device that is gone is out, at most 2 s, and restores the terminal.
    pub async fn finish(self) {
        let rest = async {
            // Errors say that the thread or the task ended otherwise: nothing more comes out then either.
            if let Some(written) = self.written {
                let _ = written.await;
            }
            if let Some(mut task) = self.task
                && tokio::time::timeout(FINISH_TIMEOUT, &mut task).await.is_err()
            {
                task.abort();
                let _ = task.await;
            }
            if let Some(logged) = self.logged {
                let _ = logged.await;
            }
        };
        let _ = tokio::time::timeout(FINISH_TIMEOUT + Duration::from_millis(100), rest).await;
        drop(self.terminal);
    }
}

/// A file to write to, or what is used like one. Its content stays until it is [emptied](Sink::empty): before the VM runs nothing is
/// known to work.
#[derive(Debug)]
pub struct Sink {
    file: File,
    path: PathBuf,
    /// Its content stays.
    keeps: bool,
}

impl Sink {
    /// Opens or creates `path`, without waiting: not for a FIFO's reader, nor for a terminal's line. What it has already stays if more is
    /// to be appended.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn open(path: &Path, append: bool) -> Result<Self, ConsoleError> {
        let failed = |e| ConsoleError::Create(path.to_owned(), e);
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let mut options = OpenOptions::new();
        options.write(true).append(append).create(true).truncate(false).custom_flags(flags.bits());
        let file = options.open(path).map_err(|e| match e.raw_os_error() {
            Some(nix::libc::ENXIO) if path.metadata().is_ok_and(|m| m.file_type().is_fifo()) => {
                ConsoleError::NoReader(path.to_owned())
            }
            _ => failed(e),
        })?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !(kind.is_file() || kind.is_char_device() || kind.is_fifo()) {
            return Err(ConsoleError::NotAFile(path.to_owned()));
        }
        // From now on writes wait, on a thread of their own.
        let flags = if append { OFlag::O_APPEND } else { OFlag::empty() };
        fcntl(&file, FcntlArg::F_SETFL(flags)).map_err(|e| failed(e.into()))?;
        Ok(Self { file, path: path.to_owned(), keeps: append })
    }

    /// One that somebody else opened as `path`, whose content stays.
    pub fn opened(file: File, path: PathBuf) -> Self {
        Self { file, path, keeps: true }
    }

    fn file_again(&self) -> Result<File, ConsoleError> {
        self.file.try_clone().map_err(|e| ConsoleError::Create(self.path.clone(), e))
    }

    fn empty(&self) -> Result<(), ConsoleError> {
        if self.keeps {
            return Ok(());
        }
        let emptied = self.file.metadata().and_then(|m| if m.is_file() { self.file.set_len(0) } else { Ok(()) });
        emptied.map_err(|e| ConsoleError::Empty(self.path.clone(), e))
    }
}

/// Standard output without a buffer of ours.
fn standard_output() -> Result<File, ConsoleError> {
    io::stdout().as_fd().try_clone_to_owned().map(File::from).map_err(ConsoleError::Stdio)
}

#[cfg(test)]
mod tests;
