//! Messages to the back end and its answers, each conversation within its deadline.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use zerocopy::{FromBytes, IntoBytes};

use super::VhostUserError;
use super::notices::Notices;
use super::wire::{Header, MAX_PAYLOAD, NEED_REPLY, REPLY, Request, VERSION, VERSION_MASK};

/// The connection to a back end.
#[derive(Debug)]
pub(super) struct Socket {
    stream: UnixStream,
    patience: Duration,
    /// The end of the conversation that is under way.
    deadline: Instant,
}

impl Socket {
    /// Speaks over `stream`; a conversation may take as long as `patience`.
    pub(super) fn new(stream: UnixStream, patience: Duration) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, patience, deadline: Instant::now() })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Begins a conversation.
    pub(super) fn begin(&mut self) {
        self.deadline = Instant::now() + self.patience;
    }

    /// Sends a message.
    pub(super) fn send(
        &mut self,
        request: Request,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), VhostUserError> {
        let header = Header { request: request as u32, flags: VERSION | flags, size: payload.len() as u32 };
        let message = [header.as_bytes(), payload].concat();
        let mut sent = 0;
        while sent < message.len() {
            // Descriptors go with the first byte.
            let fds: Vec<RawFd> = fds.iter().filter(|_| sent == 0).map(AsRawFd::as_raw_fd).collect();
            let rights = (!fds.is_empty()).then_some(ControlMessage::ScmRights(&fds));
            let part = [IoSlice::new(&message[sent..])];
            let flags = MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.stream.as_raw_fd(), &part, rights.as_slice(), flags, None) {
                Ok(count) => sent += count,
                Err(Errno::EAGAIN) => self.wait(request, PollFlags::POLLOUT, &mut None)?,
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(VhostUserError::Closed),
                Err(errno) => return Err(failed("can't send to the back end")(errno.into())),
            }
        }
        Ok(())
    }

    /// The answer to `request`, which has no more than [`MAX_PAYLOAD`] bytes. What the back end asks meanwhile is taken, or it would wait
    /// for us as we do for it.
    pub(super) fn answer(
        &mut self,
        request: Request,
        notices: &mut Option<Notices>,
    ) -> Result<Vec<u8>, VhostUserError> {
        let mut header = [0; size_of::<Header>()];
        self.fill(request, &mut header, notices)?;
        let Ok(Header { request: to, flags, size }) = Header::read_from_bytes(&header) else {
            return Err(VhostUserError::Protocol("an answer without a header"));
        };
        if to != request as u32 || flags & VERSION_MASK != VERSION || flags & REPLY == 0 {
            return Err(VhostUserError::Protocol("an answer to another question"));
        }
        if size as usize > MAX_PAYLOAD {
            return Err(VhostUserError::Protocol("an answer longer than any"));
        }
        let mut payload = vec![0; size as usize];
        self.fill(request, &mut payload, notices)?;
        Ok(payload)
    }

    /// Looks at a connection on which nothing is expected.
    pub(super) fn check(&mut self) -> Result<(), VhostUserError> {
        match self.stream.read(&mut [0]) {
            Ok(0) => Err(VhostUserError::Closed),
            Ok(_) => Err(VhostUserError::Protocol("an answer to no question")),
            Err(error) => not_now(error),
        }
    }

    /// Reads all of `data`. With read(2) alone: descriptors that come with it are closed by the kernel.
    fn fill(&mut self, request: Request, data: &mut [u8], notices: &mut Option<Notices>) -> Result<(), VhostUserError> {
        let mut have = 0;
        while have < data.len() {
            match self.stream.read(&mut data[have..]) {
                Ok(0) => return Err(VhostUserError::Closed),
                Ok(count) => have += count,
                Err(error) => {
                    not_now(error)?;
                    self.wait(request, PollFlags::POLLIN, notices)?;
                }
            }
        }
        Ok(())
    }

    /// Waits until the socket is ready, or there is a notice, which is taken.
    fn wait(&self, request: Request, flags: PollFlags, notices: &mut Option<Notices>) -> Result<(), VhostUserError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(VhostUserError::Silent { request, patience: self.patience });
        }
        let timeout = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        let channel = notices.as_ref().map(|notices| PollFd::new(notices.fd(), PollFlags::POLLIN));
        let socket = PollFd::new(self.stream.as_fd(), flags);
        let waited = match channel {
            Some(channel) => poll(&mut [socket, channel], timeout),
            None => poll(&mut [socket], timeout),
        };
        match waited {
            Ok(_) | Err(Errno::EINTR) => take_notices(notices),
            Err(errno) => Err(failed("can't wait for the back end")(errno.into())),
        }
    }
}

/// Takes what the back end says of its own accord, as long as it keeps its channel open.
pub(super) fn take_notices(channel: &mut Option<Notices>) -> Result<(), VhostUserError> {
    if let Some(notices) = channel
        && !notices.take()?
    {
        *channel = None;
    }
    Ok(())
}

/// Sends an answer on the channel of the back end's own messages, where there is room for it: it is read by who asked.
pub(super) fn reply(mut stream: &UnixStream, request: u32, code: u64) -> Result<(), VhostUserError> {
    let header = Header { request, flags: VERSION | REPLY, size: size_of::<u64>() as u32 };
    let message = [header.as_bytes(), code.as_bytes()].concat();
    match stream.write(&message) {
        Ok(count) if count == message.len() => Ok(()),
        Ok(_) => Err(VhostUserError::Protocol("it doesn't read its answers")),
        Err(error) => {
            not_now(error)?;
            Err(VhostUserError::Protocol("it doesn't read its answers"))
        }
    }
}

/// Whether a message of the back end's wants an answer.
pub(super) fn needs_reply(header: &Header) -> bool {
    header.flags & NEED_REPLY != 0
}

/// An error that only says that it is to be tried again later, or not.
pub(super) fn not_now(error: io::Error) -> Result<(), VhostUserError> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Err(VhostUserError::Closed),
        _ => Err(failed("the connection failed")(error)),
    }
}

pub(super) fn failed(what: &'static str) -> impl FnOnce(io::Error) -> VhostUserError {
    move |source| VhostUserError::System { what, source }
}
