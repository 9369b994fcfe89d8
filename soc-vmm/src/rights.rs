//! Descriptors that go over a socket (SCM_RIGHTS, unix(7)).
//!
//! `unsafe`: received descriptors come as numbers.
#![allow(unsafe_code)]

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc::{
    CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CMSG_NXTHDR, MSG_CMSG_CLOEXEC, MSG_CTRUNC, SCM_RIGHTS, SOL_SOCKET, cmsghdr,
    iovec, msghdr, recvmsg,
};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

/// Descriptors that are received with one message at most.
pub(crate) const MOST: usize = 16;
/// Most that the kernel takes in one (SCM_MAX_FD).
const OF_A_MESSAGE: usize = 253;

/// Sends bytes, with them descriptors; how many bytes went.
///
/// # Errors
/// The system's.
pub(crate) fn send(socket: &impl AsFd, bytes: &[u8], fds: &[OwnedFd]) -> Result<usize, Errno> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &rights[..0] } else { &rights };
    let socket = socket.as_fd().as_raw_fd();
    sendmsg::<UnixAddr>(socket, &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None)
}

/// What came with one message.
#[derive(Debug)]
pub(crate) struct Received {
    /// Bytes; 0: the peer has hung up.
    pub(crate) bytes: usize,
    /// Descriptors: all that were sent, or none.
    pub(crate) fds: Vec<OwnedFd>,
    /// There were more than [`MOST`], or than this process may have: they are closed.
    pub(crate) lost: bool,
}

/// Receives some bytes, and the descriptors that come with them.
///
/// # Errors
/// The system's.
pub(crate) fn receive(socket: &impl AsFd, bytes: &mut [u8]) -> Result<Received, Errno> {
    /// Room for what a message may have at most, and what is before it, aligned as a header is: what doesn't fit in one would be told by a flag
    /// alone, which qemu-user doesn't pass on.
    const SPACE: usize = (size_of::<cmsghdr>() + OF_A_MESSAGE * size_of::<RawFd>()).div_ceil(8);
    let mut space = [0_u64; SPACE];
    let mut part = iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: it is plain data, of which zeros are "nothing".
    let mut message: msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = space.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&space) as _;
    // SAFETY: both buffers are there for the call, and have the lengths that it is told.
    let count = Errno::result(unsafe { recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, MSG_CMSG_CLOEXEC) })?;
    // Also where not all of them came: those that did are open.
    let mut fds = rights_of(&message);
    let lost = message.msg_flags & MSG_CTRUNC != 0 || fds.len() > MOST;
    if lost {
        fds.clear();
    }
    Ok(Received { bytes: count as usize, fds, lost })
}

/// The descriptors of a message that was just received.
fn rights_of(message: &msghdr) -> Vec<OwnedFd> {
    let mut found = Vec::new();
    // SAFETY: the kernel wrote headers as far as msg_controllen says; none: null.
    let mut at = unsafe { CMSG_FIRSTHDR(message) };
    while !at.is_null() {
        // SAFETY: above, and the buffer is aligned for it.
        let header = unsafe { &*at };
        if (header.cmsg_level, header.cmsg_type) == (SOL_SOCKET, SCM_RIGHTS) {
            // SAFETY: no more than arithmetic.
            let before = unsafe { CMSG_LEN(0) } as usize;
            for n in 0..(header.cmsg_len as usize).saturating_sub(before) / size_of::<RawFd>() {
                // SAFETY: cmsg_len says that it is there. The kernel has just made it for this process, and nobody else knows its number.
                found.push(unsafe { OwnedFd::from_raw_fd(CMSG_DATA(at).cast::<RawFd>().add(n).read_unaligned()) });
            }
        }
        // SAFETY: as above.
        at = unsafe { CMSG_NXTHDR(message, at) };
    }
    found
}

#[cfg(test)]
mod tests {
    use std::io::{self, ErrorKind, Read};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Pipes of which this process keeps the reading ends: one is at its end once nobody has its writing end.
    fn pipes(count: usize) -> (Vec<io::PipeReader>, Vec<OwnedFd>) {
        (0..count).map(|_| io::pipe().unwrap()).map(|(reader, writer)| (reader, OwnedFd::from(writer))).unzip()
    }

    #[test]
    fn descriptors_come_with_their_bytes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut readers, writers) = pipes(MOST);
        send(&theirs, b"x", &writers).unwrap();
        drop(writers);
        let mut bytes = [0; 8];
        let received = receive(&ours, &mut bytes).unwrap();
        assert_eq!((received.bytes, bytes[0], received.fds.len(), received.lost), (1, b'x', MOST, false));
        drop(received);
        assert!(readers.iter_mut().all(|reader| reader.read(&mut [0]).unwrap() == 0));
        send(&theirs, b"yz", &[]).unwrap();
        let received = receive(&ours, &mut bytes).unwrap();
        assert_eq!((received.bytes, received.fds.len(), received.lost), (2, 0, false));
        drop(theirs);
        assert_eq!(receive(&ours, &mut bytes).unwrap().bytes, 0);
    }

    #[test]
    fn of_too_many_descriptors_none_is_left_open() {
        for count in [MOST + 1, OF_A_MESSAGE] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (mut readers, writers) = pipes(count);
            send(&theirs, b"x", &writers).unwrap();
            drop(writers);
            let received = receive(&ours, &mut [0; 8]).unwrap();
            assert_eq!((received.bytes, received.fds.len(), received.lost), (1, 0, true));
            for reader in &mut readers {
                // One that is open somewhere would make this wait.
                nix::fcntl::fcntl(&*reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
                assert_eq!(reader.read(&mut [0]).map_err(|e| e.kind()), Ok::<_, ErrorKind>(0));
            }
        }
    }
}
