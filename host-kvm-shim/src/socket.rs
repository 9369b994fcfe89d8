//! Sockets on which the peers of local functions come.
//!
//! `unsafe`: descriptors that come as numbers.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, getsockopt, listen as nix_listen,
    socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};

/// Takes over a descriptor that this process inherited; it is not inherited further.
///
/// # Errors
/// It is not open ([`Errno::EBADF`]), or no SOCK_SEQPACKET socket ([`Errno::EPROTOTYPE`]).
pub fn inherited(fd: i32) -> Result<OwnedFd, Errno> {
    if fd < 0 {
        return Err(Errno::EBADF);
    }
    // SAFETY: the borrow is used for calls that report a descriptor that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    match getsockopt(&borrowed, sockopt::SockType) {
        Ok(SockType::SeqPacket) => {}
        Ok(_) | Err(Errno::ENOTSOCK) => return Err(Errno::EPROTOTYPE),
        Err(errno) => return Err(errno),
    }
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: it is open, and whoever started this process left it to the one who names it on the command line.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Listens at `path`, for this user alone; a socket that a shim left behind is replaced.
///
/// # Errors
/// Somebody listens there already, something that is no socket lies there ([`Errno::EEXIST`]), or the path can't be used.
pub fn listen(path: &Path) -> Result<OwnedFd, Errno> {
    let new = |flags| socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | flags, None);
    let fd = new(SockFlag::empty())?;
    // Before bind(2), which gives the path the socket's own mode: there is no moment at which others may connect.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let address = UnixAddr::new(path)?;
    match bind(fd.as_raw_fd(), &address) {
        // Connecting to what is no socket is refused too: that is not ours to remove.
        Err(Errno::EADDRINUSE) if !is_socket(path) => return Err(Errno::EEXIST),
        // Without waiting: the queue of a shim that is stopped may be full.
        Err(Errno::EADDRINUSE)
            if connect(new(SockFlag::SOCK_NONBLOCK)?.as_raw_fd(), &address) == Err(Errno::ECONNREFUSED) =>
        {
            std::fs::remove_file(path).map_err(|_| Errno::EADDRINUSE)?;
            bind(fd.as_raw_fd(), &address)?;
        }
        bound => bound?,
    }
    nix_listen(&fd, Backlog::new(4)?)?;
    Ok(fd)
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

/// Takes the next connection.
///
/// # Errors
/// There is none any more, or no descriptor is left.
pub fn accept(listener: &OwnedFd) -> Result<OwnedFd, Errno> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_nothing_else_is() {
        let directory = std::env::temp_dir().join(format!("outboard-socket-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (file, link, socket) = (directory.join("file"), directory.join("link"), directory.join("socket"));
        std::fs::write(&file, "kept").unwrap();
        drop(listen(&socket).unwrap());
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        for path in [&file, &link, &directory] {
            assert_eq!(listen(path).unwrap_err(), Errno::EEXIST, "{}", path.display());
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"kept");
        let first = listen(&socket).unwrap();
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(listen(&socket).unwrap_err(), Errno::EADDRINUSE);
        // As one that is stopped: nobody takes what waits, and the queue is full.
        while connected(&socket) {}
        let (done, result) = std::sync::mpsc::channel();
        let path = socket.clone();
        std::thread::spawn(move || done.send(listen(&path).map(drop)));
        let result =
            result.recv_timeout(std::time::Duration::from_secs(10)).expect("it waits for a place in the queue");
        assert_eq!(result, Err(Errno::EADDRINUSE));
        drop(first);
        std::fs::remove_dir_all(&directory).unwrap();
    }

    /// Whether a connection found room in the queue of the socket at `path`; it is gone again, but its place is taken.
    fn connected(path: &Path) -> bool {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = super::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).is_ok()
    }
}
