//! Disk images: what a disk's or a CD-ROM's bytes are kept in.
//!
//! [`open`] takes an [`ImageSpec`] and gives a [`BlockBackend`]: a raw file or block device, or a qcow2 file with its backing files
//! (read by the `imago` crate). Images are untrusted: a damaged one is a [`BlockError`] of one line.

mod error;
mod file;
mod lock;
mod mirror;
mod qcow2;
mod queue;
mod raw;
mod spec;
#[cfg(test)]
mod tests;
mod watch;

use std::sync::Arc;

pub use error::{BlockError, ImageProblem};
pub use file::FileId;
pub use mirror::{Ending, Mirror, MirrorError, MirrorEvent, MirrorSpec, MirrorSync, Side};
pub use queue::{Aio, BUFFER_ALIGN, BlockQueue, Buffer, Done, Job, Operation, open_queue};
pub use raw::RawFile;
pub use spec::{ImageFormat, ImageSpec};
pub use watch::{WatchSlot, Watched, Watcher};

use file::Opened;

/// A disk image or medium. Calls block, and come from the device's own threads.
pub trait BlockBackend: Send + Sync {
    /// Bytes: a multiple of 512.
    fn size(&self) -> u64;

    /// Whether writes, discards and zeroing are refused.
    fn is_read_only(&self) -> bool;

    /// The files and block devices that it is kept in: the image, then what it stands on. None where it is kept elsewhere.
    fn files(&self) -> &[FileId] {
        &[]
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Not all of it is within the disk, or the image can't be read; `buf` may hold anything then.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError>;

    /// Writes `data` at `offset`. It is durable after the next [`BlockBackend::flush`].
    ///
    /// # Errors
    /// Read-only, not all of it is within the disk, or the image can't be written; a part may be written then.
    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), BlockError>;

    /// Makes every write that has returned durable.
    ///
    /// # Errors
    /// The image can't be written.
    fn flush(&self) -> Result<(), BlockError>;

    /// Says that nobody needs these bytes any more: what is read there is unspecified until it is written. May do nothing.
    ///
    /// # Errors
    /// Read-only, not all of it is within the disk, or the image can't be written.
    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError>;

    /// Makes the bytes read as zeros; with `may_unmap` they need no room afterwards.
    ///
    /// # Errors
    /// As [`BlockBackend::write_at`].
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError>;

    /// Makes the disk larger; what is new reads as zeros, unless it is a block device's. Other calls may be under way.
    ///
    /// # Errors
    /// Read-only, not larger, or it can't be; it has its size then.
    fn grow(&self, size: u64) -> Result<(), BlockError> {
        check_growth(self, size)?;
        Err(BlockError::FixedSize)
    }

    /// What the `len` bytes at `offset` are, as far as that can be told without reading them, and for how many of them it holds: at least
    /// one, if `len` is.
    ///
    /// # Errors
    /// As [`BlockBackend::read_at`].
    fn extent(&self, offset: u64, len: u64) -> Result<(Extent, u64), BlockError> {
        check_range(offset, len, self.size())?;
        Ok((Extent::Data, len))
    }

    /// Gives the image to another process, everything written to it: until [`BlockBackend::claim`] nothing is written, and what is read
    /// may be that one's. Nothing to do if it is another's already.
    ///
    /// # Errors
    /// The image can't be written: it is still this one's.
    fn release(&self) -> Result<(), BlockError> {
        Ok(())
    }

    /// Takes an image over that another process had, as that has left it. Nothing to do if it is this one's already.
    ///
    /// # Errors
    /// Somebody else has it, it has another size, or can't be read.
    fn claim(&self) -> Result<(), BlockError> {
        Ok(())
    }

    /// Has calls fail that wait for another process, and those that would: nobody wants anything more of it.
    fn interrupt(&self) {}

    /// The file whose bytes are the disk's, where that is so.
    fn raw(&self) -> Option<Arc<RawFile>> {
        None
    }
}

/// What bytes of a disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Anything.
    Data,
    /// Zeros.
    Zero,
    /// What the image's backing file has there.
    Below,
}

/// Opens an image. It stays open, whatever happens to its name.
///
/// Without a format the image is raw, or qcow2 if its name ends in `.qcow2`: its content never decides, since the guest writes that
/// (a raw disk whose first sector the guest makes a qcow2 header would name any file of this machine as its backing file). A raw
/// image that begins like a qcow2 one is refused until its format is given.
///
/// The image and its backing files are locked while they are open, as QEMU does it: who writes one has it for himself.
///
/// # Errors
/// What is wrong with which file, and what to do.
pub fn open(spec: &ImageSpec) -> Result<Arc<dyn BlockBackend>, BlockError> {
    let problem = |source| BlockError::Image { path: spec.path.clone(), source };
    let opened = Opened::new(&spec.path, spec.read_only).map_err(problem)?;
    if !spec.unclaimed {
        lock::lock(&opened.file, spec.read_only).map_err(problem)?;
    }
    let format = file::format_of(&opened, spec.format).map_err(problem)?;
    let opened = if spec.direct { opened.past_cache().map_err(problem)? } else { opened };
    Ok(match format {
        ImageFormat::Raw => Arc::new(raw::Raw::new(opened, !spec.unclaimed)),
        ImageFormat::Qcow2 => Arc::new(qcow2::Qcow2::new(opened, !spec.unclaimed).map_err(problem)?),
    })
}

/// Writes zeros one by one, where neither a file system nor a format can make them.
pub(crate) fn write_zeros(image: &dyn BlockBackend, offset: u64, len: u64) -> Result<(), BlockError> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    for at in (offset..offset + len).step_by(ZEROS.len()) {
        let count = (offset + len - at).min(ZEROS.len() as u64) as usize;
        image.write_at(&ZEROS[..count], at)?;
    }
    Ok(())
}

/// `Ok` if the range is within a disk of `size` bytes.
pub(crate) fn check_range(offset: u64, len: u64, size: u64) -> Result<(), BlockError> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(BlockError::OutOfRange { offset, len, size }),
    }
}

/// `Ok` if a disk may become that large.
fn check_growth(disk: &(impl BlockBackend + ?Sized), wanted: u64) -> Result<(), BlockError> {
    let size = disk.size();
    if disk.is_read_only() {
        Err(BlockError::ReadOnly)
    } else if !wanted.is_multiple_of(512) || wanted > i64::MAX as u64 {
        Err(BlockError::OddSize { wanted })
    } else if wanted < size {
        Err(BlockError::Shrinks { size, wanted })
    } else {
        Ok(())
    }
}
