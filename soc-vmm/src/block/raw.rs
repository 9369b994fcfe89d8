//! Raw images: the disk's bytes in a file or on a block device.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::error::{BlockError, ImageProblem};
use super::file::{FileId, Opened, WRITE};
use super::{BlockBackend, check_range, write_zeros};

/// Bytes of the smallest unit that a disk has.
const SECTOR: u64 = 512;

/// A raw image.
///
/// Like QEMU, it rounds an odd size up: what the file lacks of the last sector reads as zeros, and the file grows when that sector
/// is written.
#[derive(Debug)]
pub(super) struct Raw {
    opened: Opened,
    size: u64,
}

impl Raw {
    pub(super) fn new(opened: Opened) -> Result<Self, ImageProblem> {
        let size = opened.len.next_multiple_of(SECTOR);
        Ok(Self { opened, size })
    }

    fn path(&self) -> PathBuf {
        self.opened.path.clone()
    }

    fn failed(&self, source: ImageProblem) -> BlockError {
        BlockError::Image { path: self.path(), source }
    }

    fn write_failed(&self, source: impl Into<io::Error>) -> BlockError {
        self.failed(ImageProblem::Io { action: WRITE, source: source.into() })
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        if self.opened.read_only {
            return Err(BlockError::ReadOnly);
        }
        check_range(offset, len, self.size)
    }

    /// Has the file system do it; whether it could.
    fn allocate(&self, how: FallocateFlags, offset: u64, len: u64) -> Result<bool, BlockError> {
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // The size is a file's, which the system counts with a sign.
        let (at, count) = (offset.cast_signed(), len.cast_signed());
        loop {
            match fallocate(&self.opened.file, how | keep, at, count) {
                Ok(()) => return Ok(true),
                Err(Errno::EINTR) => {}
                // EINVAL: of a block device, what is no multiple of its sector.
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENODEV) => return Ok(false),
                Err(errno) => return Err(self.write_failed(errno)),
            }
        }
    }
}

impl BlockBackend for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.opened.read_only
    }

    fn files(&self) -> &[FileId] {
        std::slice::from_ref(&self.opened.id)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.size)?;
        let count = self.opened.read_up_to(buf, offset).map_err(|problem| self.failed(problem))?;
        if count < buf.len() && offset + (count as u64) < self.opened.len {
            return Err(self.failed(ImageProblem::Shrunk));
        }
        buf[count..].fill(0);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), BlockError> {
        self.check_write(offset, data.len() as u64)?;
        self.opened.file.write_all_at(data, offset).map_err(|error| self.write_failed(error))
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.opened.read_only {
            return Ok(());
        }
        self.opened.file.sync_data().map_err(|error| self.write_failed(error))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.check_write(offset, len)?;
        if len > 0 {
            self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.check_write(offset, len)?;
        let punched = len > 0 && may_unmap && self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len)?;
        if len == 0 || punched || self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len)? {
            return Ok(());
        }
        write_zeros(self, offset, len)
    }
}
