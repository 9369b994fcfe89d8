//! Where a guest's network frames go.

mod open;
mod passt;
mod stream;
mod tap;

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::sys::epoll::EpollFlags;

pub use open::{MAX_QUEUES, NetSource, OpenError, TapSource, open, passed, user};
pub use stream::StreamBackend;
pub use tap::TapBackend;

/// The longest frame that passes: what a segmentation offload can make of 64 KiB, with every header.
pub const MAX_FRAME: usize = (64 << 10) + (4 << 10);
/// Bytes of virtio's header (virtio 1.2 §5.1.6.1), where there is one before a frame.
pub const HEADER: usize = 12;

/// A network, from the device's side: what one pair of queues sends and receives. One thread calls it, and no call blocks.
pub trait NetBackend: Send {
    /// What it is, for the log.
    fn name(&self) -> &str;

    /// What to wait for before the next call. It is another one only after [`NetBackend::reconnect`].
    fn fd(&self) -> BorrowedFd<'_>;

    /// What of it: frames are always waited for by the device, so this is about what is yet to be sent.
    fn sending(&self) -> EpollFlags {
        EpollFlags::empty()
    }

    /// What it finishes of a frame that is sent. With any answer a [`HEADER`] stands before each frame, both ways; none: frames are
    /// complete, and nothing stands before them.
    fn offloads(&self) -> Option<Offloads> {
        None
    }

    /// Says what the guest finishes of a frame that comes.
    ///
    /// # Errors
    /// The network is gone.
    fn set_guest_offloads(&mut self, _: Offloads) -> Result<(), NetError> {
        Ok(())
    }

    /// Says whether this pair of queues is in use: the network sends its frames elsewhere while it isn't.
    ///
    /// # Errors
    /// The network is gone.
    fn set_active(&mut self, _: bool) -> Result<(), NetError> {
        Ok(())
    }

    /// Sends a frame of at most [`MAX_FRAME`] bytes; whether it was taken. One that isn't was dropped: the peer is slow.
    ///
    /// # Errors
    /// The network is gone.
    fn send(&mut self, frame: &[u8]) -> Result<bool, NetError>;

    /// Goes on with what [`NetBackend::send`] took and could not send at once.
    ///
    /// # Errors
    /// The network is gone.
    fn flush(&mut self) -> Result<(), NetError> {
        Ok(())
    }

    /// The next frame that came, if there is one; it is the same until [`NetBackend::consume`].
    ///
    /// # Errors
    /// The network is gone.
    fn receive(&mut self) -> Result<Option<&[u8]>, NetError>;

    /// Makes room for the frame behind the one that [`NetBackend::receive`] gave.
    fn consume(&mut self);

    /// How long to wait before each [`NetBackend::reconnect`] once the network is gone; none: it doesn't come back.
    fn retry_after(&self) -> Option<Duration> {
        None
    }

    /// Looks whether a network that was gone is there again.
    fn reconnect(&mut self) -> bool {
        false
    }
}

/// What the receiver of a frame does so that its sender needn't (virtio 1.2 §5.1.3).
///
/// UDP fragmentation is not among them: it makes the host invent the identification of a guest's fragments, and Linux took it out of its
/// own stack for that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums.
    pub checksum: bool,
    /// Segments of TCP over IPv4.
    pub tso4: bool,
    /// Segments of TCP over IPv6.
    pub tso6: bool,
    /// Segments of TCP with ECN.
    pub ecn: bool,
}

impl Offloads {
    /// Nothing.
    pub const NONE: Self = Self { checksum: false, tso4: false, tso6: false, ecn: false };

    /// Those of them whose requirements are met (§5.1.3.1).
    #[must_use]
    pub fn consistent(self) -> Self {
        let (tso4, tso6) = (self.tso4 && self.checksum, self.tso6 && self.checksum);
        Self { checksum: self.checksum, tso4, tso6, ecn: self.ecn && (tso4 || tso6) }
    }

    /// What is in both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            checksum: self.checksum && other.checksum,
            tso4: self.tso4 && other.tso4,
            tso6: self.tso6 && other.tso6,
            ecn: self.ecn && other.ecn,
        }
    }
}

/// Why a network is gone.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The peer ended it.
    #[error("the peer has closed the connection")]
    Closed,
    /// The interface was deleted.
    #[error("the interface is gone")]
    Gone,
    /// The peer doesn't speak the protocol.
    #[error("the peer sent a frame of {len} bytes, where one has 1 to {MAX_FRAME}")]
    Frame {
        /// What it said.
        len: u32,
    },
    /// The system says so.
    #[error("the connection failed: {0}")]
    Io(io::Error),
}
