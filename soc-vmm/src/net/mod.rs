//! Where a guest's network frames go.

mod stream;

use std::io;
use std::os::fd::BorrowedFd;

use nix::sys::epoll::EpollFlags;

pub use stream::StreamBackend;

/// The longest frame that passes: what a segmentation offload can make of 64 KiB, with every header.
pub const MAX_FRAME: usize = (64 << 10) + (4 << 10);

/// A network, from the device's side. One thread calls it, and no call blocks.
pub trait NetBackend: Send {
    /// What it is, for the log.
    fn name(&self) -> &str;

    /// What to wait for before the next call.
    fn fd(&self) -> BorrowedFd<'_>;

    /// What of it: frames are always waited for by the device, so this is about what is yet to be sent.
    fn sending(&self) -> EpollFlags {
        EpollFlags::empty()
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
}

/// Why a network is gone.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The peer ended it.
    #[error("the peer has closed the connection")]
    Closed,
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
