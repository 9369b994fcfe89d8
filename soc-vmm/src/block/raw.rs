//! Raw images: the disk's bytes in a file or on a block device.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use super::error::{BlockError, ImageProblem};
use super::file::{FileId, Opened, READ, WRITE, read_up_to};
use super::lock::{lock, unlock};
use super::{BlockBackend, Extent, check_growth, check_range, write_zeros};

/// Bytes of the smallest unit that a disk has.
const SECTOR: u64 = 512;

/// A raw image.
///
/// Like QEMU, it rounds an odd size up: what the file lacks of the last sector reads as zeros, and the file grows when that sector
/// is written.
#[derive(Debug)]
pub(super) struct Raw {
    file: Arc<RawFile>,
    /// It is this process's, and locked.
    claimed: AtomicBool,
}

/// A file whose bytes are the disk's. Who calls the system himself finds here what to call, and what an answer means.
#[derive(Debug)]
pub struct RawFile {
    opened: Opened,
    /// Bytes that the file must at least have.
    len: AtomicU64,
}

impl Raw {
    pub(super) fn new(opened: Opened, claimed: bool) -> Self {
        let len = opened.len.into();
        Self { file: Arc::new(RawFile { opened, len }), claimed: claimed.into() }
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        if self.is_read_only() {
            return Err(BlockError::ReadOnly);
        }
        check_range(offset, len, self.size())
    }

    /// Has the file system do it; whether it could.
    fn allocate(&self, how: FallocateFlags, offset: u64, len: u64) -> Result<bool, BlockError> {
        // The size is a file's, which the system counts with a sign.
        let (at, count) = (offset.cast_signed(), len.cast_signed());
        loop {
            match fallocate(&self.file.opened.file, how | FallocateFlags::FALLOC_FL_KEEP_SIZE, at, count) {
                Ok(()) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(errno) if RawFile::cant_allocate(errno) => return Ok(false),
                Err(errno) => return Err(self.file.write_failed(errno)),
            }
        }
    }
}

impl RawFile {
    /// Bytes of the disk.
    pub(super) fn size(&self) -> u64 {
        self.len.load(Ordering::Acquire).next_multiple_of(SECTOR)
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.opened.read_only
    }

    /// The descriptor for a transfer: past the page cache where that is wanted and place and memory are aligned for it.
    pub(super) fn file_for(&self, memory: *const u8, offset: u64, len: usize) -> &File {
        let file = self.opened.direct.as_ref();
        let fits = |align: u64| [memory.addr() as u64, offset, len as u64].iter().all(|n| n.is_multiple_of(align));
        file.filter(|direct| fits(direct.align)).map_or(&self.opened.file, |direct| &direct.file)
    }

    /// The descriptor for everything else.
    pub(super) fn file(&self) -> &File {
        &self.opened.file
    }

    /// What a read that ends at `end` says: the file's end, behind which the last sector is zeros, or that somebody has cut it off.
    pub(super) fn check_end(&self, end: u64) -> Result<(), BlockError> {
        if end < self.len.load(Ordering::Acquire) { Err(self.failed(ImageProblem::Shrunk)) } else { Ok(()) }
    }

    /// Whether a file system or device says that it can't make holes or zeros there.
    pub(super) fn cant_allocate(errno: Errno) -> bool {
        // EINVAL: of a block device, what is no multiple of its sector.
        matches!(errno, Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENODEV)
    }

    pub(super) fn failed(&self, source: ImageProblem) -> BlockError {
        BlockError::Image { path: self.opened.path.clone(), source }
    }

    pub(super) fn read_failed(&self, source: impl Into<io::Error>) -> BlockError {
        self.failed(ImageProblem::Io { action: READ, source: source.into() })
    }

    pub(super) fn write_failed(&self, source: impl Into<io::Error>) -> BlockError {
        self.failed(ImageProblem::Io { action: WRITE, source: source.into() })
    }
}

impl BlockBackend for Raw {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn is_read_only(&self) -> bool {
        self.file.is_read_only()
    }

    fn files(&self) -> &[FileId] {
        std::slice::from_ref(&self.file.opened.id)
    }

    fn raw(&self) -> Option<Arc<RawFile>> {
        Some(self.file.clone())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.size())?;
        let file = self.file.file_for(buf.as_ptr(), offset, buf.len());
        let count = read_up_to(file, buf, offset).map_err(|error| self.file.read_failed(error))?;
        if count < buf.len() {
            self.file.check_end(offset + count as u64)?;
        }
        buf[count..].fill(0);
        Ok(())
    }

    fn extent(&self, offset: u64, len: u64) -> Result<(Extent, u64), BlockError> {
        check_range(offset, len, self.size())?;
        let file = &self.file.opened.file;
        let find = |what| lseek(file, offset.cast_signed(), what).map(|at| at.cast_unsigned().saturating_sub(offset));
        match find(Whence::SeekData) {
            // Nothing but a hole behind it; behind the file's end are zeros too.
            Err(Errno::ENXIO) => Ok((Extent::Zero, len)),
            Ok(0) => {
                let hole = find(Whence::SeekHole).ok().filter(|hole| *hole > 0);
                Ok((Extent::Data, hole.unwrap_or(len).min(len)))
            }
            Ok(data) => Ok((Extent::Zero, data.min(len))),
            // A file system that can't tell, or a block device.
            Err(_) => Ok((Extent::Data, len)),
        }
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), BlockError> {
        self.check_write(offset, data.len() as u64)?;
        let file = self.file.file_for(data.as_ptr(), offset, data.len());
        file.write_all_at(data, offset).map_err(|error| self.file.write_failed(error))
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.is_read_only() {
            return Ok(());
        }
        self.file.file().sync_data().map_err(|error| self.file.write_failed(error))
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

    fn release(&self) -> Result<(), BlockError> {
        if self.is_read_only() || !self.claimed.load(Ordering::Acquire) {
            return Ok(());
        }
        self.flush()?;
        unlock(self.file.file(), false).map_err(|problem| self.file.failed(problem))?;
        self.claimed.store(false, Ordering::Release);
        Ok(())
    }

    fn claim(&self) -> Result<(), BlockError> {
        if self.is_read_only() || self.claimed.load(Ordering::Acquire) {
            return Ok(());
        }
        let claimed = lock(self.file.file(), false)
            .and_then(|()| self.file.opened.look_again(self.file.len.load(Ordering::Acquire)));
        claimed.map_err(|problem| self.file.failed(problem))?;
        self.claimed.store(true, Ordering::Release);
        Ok(())
    }

    fn grow(&self, size: u64) -> Result<(), BlockError> {
        check_growth(self, size)?;
        let resized = self.file.opened.resize(size).map_err(|problem| self.file.failed(problem));
        resized.map(|()| self.file.len.store(size, Ordering::Release))
    }
}
