//! What becomes of a request that the disk's image fails.

use crate::block::BlockError;

/// What is done, in the words of QEMU's `werror=` and `rerror=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// The guest is told.
    Report,
    /// The VM stops, and the request is made again when it goes on.
    Stop,
    /// The guest is told that all is well.
    Ignore,
    /// Stop where there is no room, else report: for writes.
    Enospc,
}

/// What is done with errors of reads, and of everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorPolicy {
    /// Reads.
    pub read: OnError,
    /// Writes, flushes, discards, zeroing.
    pub write: OnError,
}

/// As QEMU's.
impl Default for ErrorPolicy {
    fn default() -> Self {
        Self { read: OnError::Report, write: OnError::Enospc }
    }
}

impl ErrorPolicy {
    /// What is done about `error`.
    pub(super) fn action(&self, is_write: bool, error: &BlockError) -> ErrorAction {
        match if is_write { self.write } else { self.read } {
            OnError::Enospc if error.is_no_space() => ErrorAction::Stop,
            OnError::Report | OnError::Enospc => ErrorAction::Report,
            OnError::Stop => ErrorAction::Stop,
            OnError::Ignore => ErrorAction::Ignore,
        }
    }
}

/// What was done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// The guest was told.
    Report,
    /// The request waits, and the VM is to stop.
    Stop,
    /// The guest was told that all is well.
    Ignore,
}

/// An error of a disk's image, as the VM hears of it (QMP BLOCK_IO_ERROR).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskError {
    /// The disk's name.
    pub disk: String,
    /// Its block node, if it stands on one with a name.
    pub node: Option<String>,
    /// Whether it is one of a read; else of anything that writes.
    pub is_write: bool,
    /// There is no room.
    pub no_space: bool,
    /// What is done.
    pub action: ErrorAction,
    /// What went wrong with which file, in one line.
    pub reason: String,
}

/// Hears of errors.
pub trait DiskErrorListener: Send + Sync {
    /// An image failed. For [`ErrorAction::Stop`] it has the VM stopped, soon, and calls [`super::DiskHandle::retry`] when the VM goes on.
    /// It comes from the disk's thread, and may not wait for that.
    fn failed(&self, error: DiskError);
}
