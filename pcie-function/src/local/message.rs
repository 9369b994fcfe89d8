//! What the two ends of a local function say over their socket.
//!
//! SOCK_SEQPACKET, one packet a message: 6 words, little-endian, and descriptors by SCM_RIGHTS.

use std::ffi::CString;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg, setsockopt, sockopt,
};
use nix::sys::time::TimeVal;

use crate::function::eventfd;
use crate::{BusError, FunctionError};

/// Most descriptors in one packet (the kernel's SCM_MAX_FD is 253).
pub(super) const MOST_FDS: usize = 128;
const WORDS: usize = 6;

/// A message between the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// Host: card memory of so many bytes, with its memfd and the two doorbells; so many vectors follow.
    Hello { card_len: u64, vectors: u64 },
    /// Host: the next vectors' eventfds.
    Vectors,
    /// Host: the descriptor's bytes from `offset` are now at `iova`.
    Map { iova: u64, len: u64, offset: u64, device_writes: bool },
    /// Host: what was mapped at `iova` is not any more.
    Unmap { iova: u64 },
    /// Host: asks for the eventfd that was shared by this number.
    Shared { event: u32 },
    /// SoC: what the host said last is done. Behind [`Message::Shared`], with the eventfd, if there is one.
    Done,
}

const MAGIC: u64 = u64::from_le_bytes(*b"OUTBLOC1");

impl Message {
    fn to_words(self) -> [u64; WORDS] {
        match self {
            Self::Hello { card_len, vectors } => [MAGIC, 1, card_len, vectors, 0, 0],
            Self::Vectors => [MAGIC, 2, 0, 0, 0, 0],
            Self::Map { iova, len, offset, device_writes } => [MAGIC, 3, iova, len, offset, device_writes.into()],
            Self::Unmap { iova } => [MAGIC, 4, iova, 0, 0, 0],
            Self::Done => [MAGIC, 5, 0, 0, 0, 0],
            Self::Shared { event } => [MAGIC, 6, event.into(), 0, 0, 0],
        }
    }

    fn parse(words: [u64; WORDS]) -> Option<Self> {
        match words {
            [MAGIC, 1, card_len, vectors, 0, 0] => Some(Self::Hello { card_len, vectors }),
            [MAGIC, 2, 0, 0, 0, 0] => Some(Self::Vectors),
            [MAGIC, 3, iova, len, offset, w @ (0 | 1)] => Some(Self::Map { iova, len, offset, device_writes: w == 1 }),
            [MAGIC, 4, iova, 0, 0, 0] => Some(Self::Unmap { iova }),
            [MAGIC, 5, 0, 0, 0, 0] => Some(Self::Done),
            [MAGIC, 6, event, 0, 0, 0] => Some(Self::Shared { event: u32::try_from(event).ok()? }),
            _ => None,
        }
    }

    /// Sends the message with `fds`.
    pub(super) fn send(self, socket: BorrowedFd<'_>, fds: &[RawFd]) -> Result<(), FunctionError> {
        let mut bytes = [0; WORDS * 8];
        for (chunk, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.to_words()) {
            *chunk = word.to_le_bytes();
        }
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        loop {
            let sent =
                sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
            match sent {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(BusError::Gone.into()),
                Err(e) => return Err(FunctionError::Os("send to the function's other end", e)),
            }
        }
    }

    /// Receives a message and its descriptors; `None` when the peer has hung up.
    pub(super) fn receive(socket: BorrowedFd<'_>) -> Result<Option<(Self, Vec<OwnedFd>)>, FunctionError> {
        let mut bytes = [0; WORDS * 8];
        let mut space = nix::cmsg_space!([RawFd; MOST_FDS]);
        let (len, fds) = loop {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            match recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
                Ok(packet) => break (packet.bytes, owned(&packet)?),
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Ok(None),
                Err(e) => return Err(FunctionError::Os("receive from the function's other end", e)),
            }
        };
        if len == 0 {
            return Ok(None);
        }
        let words = std::array::from_fn(|i| u64::from_le_bytes(bytes.as_chunks::<8>().0[i]));
        let message = if len == bytes.len() { Self::parse(words) } else { None };
        match message {
            Some(message) => Ok(Some((message, fds))),
            None => Err(FunctionError::Unusable("the peer of the function's socket is not Outboard".into())),
        }
    }
}

/// Bounds how long a call on `socket` may wait for the peer: it fails with EAGAIN then. Zero: no bound.
pub(super) fn limit_waits(socket: &impl AsFd, most: Duration) -> Result<(), FunctionError> {
    let most = TimeVal::new(most.as_secs() as i64, most.subsec_micros().into());
    setsockopt(socket, sockopt::ReceiveTimeout, &most)
        .and_then(|()| setsockopt(socket, sockopt::SendTimeout, &most))
        .map_err(|e| FunctionError::Os("bound the waits on a socket", e))
}

/// The descriptors of a packet.
///
/// `unsafe`: a descriptor received by SCM_RIGHTS comes as a number.
#[allow(unsafe_code)]
fn owned(packet: &nix::sys::socket::RecvMsg<'_, '_, UnixAddr>) -> Result<Vec<OwnedFd>, FunctionError> {
    let mut fds = Vec::new();
    let control = packet.cmsgs().map_err(|e| {
        // Cut off: the peer sent more than there is room for here, or this process may have no more.
        let why = eventfd().err();
        why.unwrap_or(FunctionError::Os("receive descriptors", e))
    })?;
    for message in control {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: the kernel has just made these descriptors for this process, and nobody else knows their numbers.
            fds.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(fds)
}

/// A memfd of `len` zero bytes that can't change its size: a peer can't make an access to it fault.
///
/// # Errors
/// No memory or descriptor left.
pub fn sealed_memfd(name: &str, len: u64) -> Result<OwnedFd, FunctionError> {
    let os = |what| move |e| FunctionError::Os(what, e);
    let name = CString::new(name).map_err(|_| FunctionError::Unusable("a memfd's name has a NUL".into()))?;
    let fd = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
        .map_err(os("create a memfd"))?;
    let len = i64::try_from(len).map_err(|_| FunctionError::Os("size a memfd", Errno::EFBIG))?;
    nix::unistd::ftruncate(&fd, len).map_err(os("size a memfd"))?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(os("seal a memfd"))?;
    Ok(fd)
}

/// Whether a memfd has at least `len` bytes and can't shrink.
pub(super) fn is_sealed(fd: BorrowedFd<'_>, len: u64) -> bool {
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_truncate);
    let size = nix::sys::stat::fstat(fd).map(|s| s.st_size as u64);
    seals.is_ok_and(|s| s.contains(SealFlag::F_SEAL_SHRINK)) && size.is_ok_and(|s| s >= len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_parsed_message_says_the_same_again(kind in 0u64..8, words: [u64; 4]) {
            let mut words = [MAGIC, kind, words[0], words[1], words[2], words[3] % 3];
            if kind == 6 {
                words = [MAGIC, kind, words[2] >> 31, 0, 0, 0];
            }
            if let Some(message) = Message::parse(words) {
                prop_assert_eq!(message.to_words(), words);
            }
        }
    }
}
