//! What this process put at a path, and removes: what somebody else put there since stays.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    /// Of what this tells of.
    pub(crate) fn of(found: &Metadata) -> Self {
        Self { device: found.dev(), inode: found.ino() }
    }

    /// Removes `path` if it is still this file's; whether it was.
    ///
    /// # Errors
    /// Nothing is there, or it can't be removed.
    pub(crate) fn remove(self, path: &Path) -> io::Result<bool> {
        let own = Self::of(&fs::symlink_metadata(path)?) == self;
        if own {
            fs::remove_file(path)?;
        }
        Ok(own)
    }
}
