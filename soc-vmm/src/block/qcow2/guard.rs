//! A file of a chain, as imago gets it: its first cluster nobody writes but as a header, and what somebody cut off is missed.
//!
//! imago gives out whatever cluster the reference counts call free, and knows a block of counts at offset 0 as one that is not there. An
//! image whose own counts forget the header would so lose it to a guest's data, and a block put there would be made anew without end.
//!
//! imago reads zeros behind a file's end, which at the tail of an image is right. Where there were bytes before, as they were when it was
//! opened or as it wrote them since, the zeros would be silent damage: there a read is an error. That costs no call of the system, since
//! the reads are made here, and show by themselves where the file ends; a write, which might make the file long again, costs an fstat(2).

use std::fmt;
use std::fs;
use std::io::{self, IoSliceMut};
use std::path::{Path, PathBuf};

use imago::Storage;
use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::storage::{PreallocateMode, StorageOpenOptions};

use nix::errno::Errno;
use nix::sys::uio::preadv;

use super::header;
use crate::block::file::Opened;

/// Most buffers of one read.
const IOV_MAX: usize = 1024;

/// A file has become shorter than it was.
#[derive(Debug, thiserror::Error)]
#[error("{} is shorter than when it was opened: restore it", path.display())]
pub(super) struct Shrunk {
    /// Where it lies.
    pub(super) path: PathBuf,
}

/// The file of an image.
#[derive(Debug)]
pub(super) struct Guarded {
    /// Its size is what the file must at least have: what it had when it was opened, or has been given since.
    file: File,
    /// The same open file.
    raw: fs::File,
    /// The one that the image's locks belong to, where it is another one.
    _locked: Option<fs::File>,
    path: PathBuf,
    /// It is no block device.
    regular: bool,
    /// Bytes at its start that hold the header alone; none if it isn't a qcow2 file.
    header: u64,
}

impl Guarded {
    /// A file with a header of `header` bytes, its first cluster.
    pub(super) fn new(opened: Opened, header: u64) -> io::Result<Self> {
        let regular = opened.file.metadata()?.is_file();
        let options = StorageOpenOptions::new().write(!opened.read_only).filename(&opened.path);
        let options = options.direct(opened.direct.is_some());
        let (file, locked) = match opened.direct {
            Some(direct) => (direct.file, Some(opened.file)),
            None => (opened.file, None),
        };
        let raw = file.try_clone()?;
        let file = File::from_open_file(file, options)?;
        Ok(Self { file, raw, _locked: locked, path: opened.path, regular, header })
    }

    /// Whether `len` bytes at `offset` may be changed: behind the header, or all fields of it that change; and nothing was cut off.
    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let least = self.file.size()?;
        if self.regular && self.raw.metadata()?.len() < least {
            return Err(self.shrunk());
        }
        // Past the page cache what is around the fields is written with them.
        let fields = header::LEN_2.next_multiple_of(self.file.req_align().max(self.file.mem_align()));
        let changes_header = (offset, len) == (0, fields as u64);
        if offset >= self.header || len == 0 || changes_header {
            return Ok(());
        }
        Err(io::Error::other("its reference counts are damaged: they call the cluster of its header free"))
    }

    fn shrunk(&self) -> io::Error {
        io::Error::other(Shrunk { path: self.path.clone() })
    }
}

impl fmt::Display for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

#[allow(unsafe_code, reason = "what the trait declares unsafe is passed on")]
impl Storage for Guarded {
    fn open(_: StorageOpenOptions) -> io::Result<Self> {
        // It opens no file itself.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn mem_align(&self) -> usize {
        self.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        self.file.resolve_relative_path(relative)
    }

    fn get_filename(&self) -> Option<PathBuf> {
        self.file.get_filename()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // Before the read: what is written meanwhile is there or not.
        let least = self.file.size()?;
        let end = offset.saturating_add(bufv.len());
        let mut buffers = bufv.into_inner();
        let (mut rest, mut at) = (&mut buffers[..], offset);
        while at < end {
            let signed = at.try_into().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            let some = rest.len().min(IOV_MAX);
            match preadv(&self.raw, &mut rest[..some], signed) {
                Ok(0) => break,
                Ok(count) => {
                    IoSliceMut::advance_slices(&mut rest, count);
                    at += count as u64;
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        if at < end.min(least) {
            return Err(self.shrunk());
        }
        rest.iter_mut().for_each(|buffer| buffer.fill(0));
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.check(offset, bufv.len())?;
        // SAFETY: What the caller promises of this file holds for the one within.
        unsafe { self.file.pure_writev(bufv, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        // SAFETY: As above.
        unsafe { self.file.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        // SAFETY: As above.
        unsafe { self.file.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        // SAFETY: As above.
        unsafe { self.file.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn settle_writes(&self) -> io::Result<()> {
        self.file.settle_writes()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: As above.
        unsafe { self.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    fn resize(&self, new_size: u64, prealloc_mode: PreallocateMode) -> io::Result<()> {
        self.file.resize(new_size, prealloc_mode)
    }
}
