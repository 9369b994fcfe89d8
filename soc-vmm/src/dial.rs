//! Connections to UNIX sockets, bounded in time.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

/// Connects to who listens at `path`. Where the queue of a listener that accepts nobody is full, connect(2) waits as long as sending may: for
/// ever, if nobody says else. What is connected has no such limit.
///
/// # Errors
/// The system's; [`io::ErrorKind::TimedOut`] after `patience`.
pub(crate) fn dial(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let deadline = Instant::now() + patience;
    let address = UnixAddr::new(path)?;
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Zero would be no bound.
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::milliseconds(left.as_millis().max(1) as i64))?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => {
                setsockopt(&fd, sockopt::SendTimeout, &TimeVal::milliseconds(0))?;
                return Ok(UnixStream::from(fd));
            }
            // With a timeout, a signal that this process has a handler for ends the call, and so does being stopped.
            Err(Errno::EINTR) if !left.is_zero() => {}
            Err(Errno::EAGAIN | Errno::EINTR) => return Err(io::ErrorKind::TimedOut.into()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Connects to who listens at `path`, if that takes no waiting. The stream doesn't block.
///
/// # Errors
/// The system's; [`io::ErrorKind::WouldBlock`]: it is to be tried again.
pub(crate) fn dial_now(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) => Ok(UnixStream::from(fd)),
        Err(Errno::EINTR) => Err(io::ErrorKind::WouldBlock.into()),
        Err(errno) => Err(errno.into()),
    }
}
