//! A pseudo-terminal whose master side is the VM's.
//!
//! tokio has no type of its own for one, and registering a descriptor with it is `unsafe`.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How often to look whether somebody has opened the slave side: the kernel doesn't tell.
const LOOK: Duration = Duration::from_millis(100);
/// How long a reader may take for the last output.
const TAKEN_TIMEOUT: Duration = Duration::from_secs(1);

/// A raw pseudo-terminal.
#[derive(Debug)]
pub(super) struct Pty {
    master: PtyMaster,
    path: PathBuf,
}

impl Pty {
    /// Makes one.
    pub(super) fn open() -> io::Result<Self> {
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = PathBuf::from(ptsname_r(&master)?);
        // Closing the slave afterwards matters: from then on the master sees a hang-up while nobody has it open.
        let slave = open_slave(&path)?;
        let mut modes = tcgetattr(&slave)?;
        cfmakeraw(&mut modes);
        tcsetattr(&slave, SetArg::TCSANOW, &modes)?;
        Ok(Self { master, path })
    }

    /// The slave side.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until somebody has the slave side open.
    pub(super) async fn opened(&self) {
        while self.is_hung_up() {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The stream to whoever has it open. Each has a registration of its own: tokio keeps a hang-up for ever.
    pub(super) fn attach(&self) -> io::Result<Peer<'_>> {
        // SAFETY: a `BorrowedFd` gives one descriptor, which `self` keeps open and the same for as long as it is borrowed.
        Ok(Peer(unsafe { AsyncFd::register(self.master.as_fd()) }?))
    }

    /// Waits until whoever has it open has read everything, at most [`TAKEN_TIMEOUT`]: what is unread when the master is closed
    /// is lost.
    pub(super) async fn taken(&self) {
        let Ok(slave) = open_slave(&self.path) else { return };
        let deadline = Instant::now() + TAKEN_TIMEOUT;
        while polled(&slave, PollFlags::POLLIN).contains(PollFlags::POLLIN) && Instant::now() < deadline {
            tokio::time::sleep(LOOK / 10).await;
        }
    }

    fn is_hung_up(&self) -> bool {
        polled(&self.master, PollFlags::empty()).contains(PollFlags::POLLHUP)
    }
}

fn open_slave(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NOCTTY | nix::libc::O_CLOEXEC).open(path)
}

/// What of `wanted` (and hang-ups) a descriptor has now; nothing if it can't be asked.
fn polled(fd: &impl AsFd, wanted: PollFlags) -> PollFlags {
    let mut asked = [PollFd::new(fd.as_fd(), wanted)];
    let answer = poll(&mut asked, PollTimeout::ZERO).ok().and_then(|_| asked[0].revents());
    answer.unwrap_or(PollFlags::empty())
}

/// One opening of the slave side, as a stream that ends with it.
#[derive(Debug)]
pub(super) struct Peer<'a>(AsyncFd<BorrowedFd<'a>>);

impl AsyncRead for Peer<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            match ready.try_io(|master| Ok(unistd::read(master.get_ref(), buf.initialize_unfilled())?)) {
                Ok(count) => return Poll::Ready(count.map(|count| buf.advance(count))),
                // Closed and opened again in between: this opening is over.
                Err(_) if ready.ready().is_read_closed() => return Poll::Ready(Ok(())),
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for Peer<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx))?;
            match ready.try_io(|master| Ok(unistd::write(master.get_ref(), bytes)?)) {
                Ok(result) => return Poll::Ready(result),
                Err(_) if ready.ready().is_write_closed() => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                Err(_) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
