//! Messages of the back end's own accord, on a channel of their own (`VHOST_USER_SET_BACKEND_REQ_FD`).

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use zerocopy::FromBytes;

use super::VhostUserError;
use super::socket::{needs_reply, not_now, reply};
use super::wire::{CONFIG_CHANGED, Header, MAX_PAYLOAD, VERSION, VERSION_MASK};

/// Messages that are taken at once; a back end can send any number.
const TURN: usize = 32;

/// Our end of the channel.
#[derive(Debug)]
pub(super) struct Notices {
    stream: UnixStream,
    /// The message that is under way: its first bytes.
    message: Vec<u8>,
    changed: bool,
}

impl Notices {
    /// Our end, and the back end's.
    pub(super) fn pair() -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((Self { stream: ours, message: Vec::new(), changed: false }, theirs))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether the back end said that the configuration has changed, since this was last asked.
    pub(super) fn take_change(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Takes what there is; false: the back end has closed the channel, which it may, and there will be no more.
    pub(super) fn take(&mut self) -> Result<bool, VhostUserError> {
        for _ in 0..TURN {
            let Some(wanted) = self.missing()? else { continue };
            let have = self.message.len();
            self.message.resize(have + wanted, 0);
            let read = self.stream.read(&mut self.message[have..]);
            self.message.truncate(have + read.as_ref().map_or(0, |count| *count));
            match read {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(error) => return not_now(error).map(|()| true),
            }
        }
        Ok(true)
    }

    /// How many bytes the message lacks; none: it was whole, and is done.
    fn missing(&mut self) -> Result<Option<usize>, VhostUserError> {
        let Ok((header, payload)) = Header::read_from_prefix(&self.message) else {
            return Ok(Some(size_of::<Header>() - self.message.len()));
        };
        if header.flags & VERSION_MASK != VERSION || header.size as usize > MAX_PAYLOAD {
            return Err(VhostUserError::Protocol("a message of its own that is none"));
        }
        let missing = header.size as usize - payload.len();
        if missing > 0 {
            return Ok(Some(missing));
        }
        self.message.clear();
        let known = header.request == CONFIG_CHANGED && header.size == 0;
        self.changed |= known;
        if needs_reply(&header) {
            reply(&self.stream, header.request, u64::from(!known))?;
        }
        Ok(None)
    }
}
