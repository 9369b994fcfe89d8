//! UNIX sockets that this process listens on: private, never stolen from a living owner, removed at the end.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockname, getsockopt, listen, socket,
    sockopt,
};
use nix::sys::stat::{Mode, fchmod};

use crate::own::Identity;

/// Why a path can't be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process answers there.
    #[error("{0} is in use: another process listens there; choose another path, or end that process")]
    InUse(PathBuf),
    /// Something that is no socket lies there.
    #[error("{0} exists and is not a socket; choose another path, or remove it")]
    NotASocket(PathBuf),
    /// A descriptor of something else.
    #[error("descriptor {0} is no UNIX stream socket that listens: pass one on which listen(2) was called")]
    NoListener(i32),
    /// The system refused.
    #[error("can't listen on {0}")]
    Io(PathBuf, #[source] io::Error),
}

/// A listening stream socket with mode 0600. Dropped, it removes its path if that is still its own.
#[derive(Debug)]
pub struct ListeningSocket {
    listener: UnixListener,
    path: PathBuf,
    /// What the path was when it was bound; none: its path is another's to remove.
    identity: Option<Identity>,
}

impl ListeningSocket {
    /// Listens on `path`. A socket that nobody listens on any more (its process died) is replaced.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        remove_stale(path)?;
        let failed = |e: io::Error| ListenError::Io(path.to_owned(), e);
        let listener = bind_private(path).map_err(|e| failed(e.into()))?;
        let placed = std::fs::symlink_metadata(path).map_err(failed)?;
        Ok(Self { listener, path: path.to_owned(), identity: Some(Identity::of(&placed)) })
    }

    /// Takes over a socket that listens already, whose path stays.
    ///
    /// # Errors
    /// It is no UNIX stream socket that listens.
    pub fn inherited(fd: OwnedFd) -> Result<Self, ListenError> {
        let listens = getsockopt(&fd, sockopt::AcceptConn).unwrap_or(false);
        let stream = getsockopt(&fd, sockopt::SockType).is_ok_and(|kind| kind == SockType::Stream);
        let address = getsockname::<UnixAddr>(fd.as_raw_fd()).ok().filter(|_| listens && stream);
        let Some(address) = address else { return Err(ListenError::NoListener(fd.as_raw_fd())) };
        let listener = UnixListener::from(fd);
        let path = address.path().map_or_else(|| "(unnamed)".into(), Path::to_owned);
        listener.set_nonblocking(true).map_err(|e| ListenError::Io(path.clone(), e))?;
        Ok(Self { listener, path, identity: None })
    }

    /// Whether somebody else made it, and passed it to this process.
    pub fn is_inherited(&self) -> bool {
        self.identity.is_none()
    }

    /// The socket; its accepts don't block.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Removes its path already. Somebody may have removed or replaced that: then it is not ours to remove.
    pub fn remove(&self) {
        if let Some(identity) = self.identity {
            let _ = identity.remove(&self.path);
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ListeningSocket {
    fn drop(&mut self) {
        self.remove();
    }
}

fn bind_private(path: &Path) -> nix::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // Before bind(2), which gives the path the socket's own mode: there is no moment at which others may connect.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(16)?)?;
    Ok(UnixListener::from(fd))
}

fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |e| ListenError::Io(path.to_owned(), e);
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
        Ok(found) if !found.file_type().is_socket() => return Err(ListenError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match knock(path) {
        // The queue of an owner that is stopped is full.
        Ok(()) | Err(Errno::EAGAIN) => Err(ListenError::InUse(path.to_owned())),
        Err(Errno::ECONNREFUSED) => std::fs::remove_file(path).map_err(failed),
        Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Connects, without waiting for anybody.
fn knock(path: &Path) -> nix::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn private_while_it_lives_and_gone_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = ListeningSocket::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(ListeningSocket::bind(&path), Err(ListenError::InUse(p)) if p == path));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn an_owner_that_is_stopped_keeps_its_socket_and_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _deaf = ListeningSocket::bind(&path).unwrap();
        while knock(&path).is_ok() {}
        let (done, result) = std::sync::mpsc::channel();
        std::thread::spawn({
            let path = path.clone();
            move || done.send(ListeningSocket::bind(&path).map(drop))
        });
        let result =
            result.recv_timeout(std::time::Duration::from_secs(10)).expect("it waits for a place in the queue");
        assert!(matches!(result, Err(ListenError::InUse(p)) if p == path));
    }

    #[test]
    fn a_dead_owners_socket_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves its path behind, as a killed process does");
        let first = ListeningSocket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = ListeningSocket::bind(&path).unwrap();
        drop(first);
        assert!(path.exists(), "the first owner removed the second one's socket");
        drop(second);
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(ListeningSocket::bind(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn a_socket_that_listens_already_keeps_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = ListeningSocket::inherited(UnixListener::bind(&path).unwrap().into()).unwrap();
        assert_eq!(socket.path(), path);
        drop(socket);
        assert!(path.exists());
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(ListeningSocket::inherited(one.into()), Err(ListenError::NoListener(_))));
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(ListeningSocket::inherited(file.into()), Err(ListenError::NoListener(_))));
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_an_error() {
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(200)));
        assert!(matches!(ListeningSocket::bind(&long), Err(ListenError::Io(..))));
    }
}
