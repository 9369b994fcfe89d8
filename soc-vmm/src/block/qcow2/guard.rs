//! A file whose first cluster nobody writes but as a header.
//!
//! imago gives out whatever cluster the reference counts call free, and knows a block of counts at offset 0 as one that is not there. An
//! image whose own counts forget the header would so lose it to a guest's data, and a block put there would be made anew without end.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use imago::Storage;
use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::storage::{PreallocateMode, StorageOpenOptions};

use super::header;

/// The file of an image.
#[derive(Debug)]
pub(super) struct Guarded {
    file: File,
    /// Bytes at its start that hold the header alone; none if it isn't a qcow2 file.
    header: u64,
}

impl Guarded {
    /// A file with a header of `header` bytes, its first cluster.
    pub(super) fn new(file: File, header: u64) -> Self {
        Self { file, header }
    }

    /// Whether `len` bytes at `offset` may be changed: behind the header, or all fields of it that change.
    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let changes_header = (offset, len) == (0, header::LEN_2 as u64);
        if offset >= self.header || len == 0 || changes_header {
            return Ok(());
        }
        Err(io::Error::other("its reference counts are damaged: they call the cluster of its header free"))
    }
}

impl fmt::Display for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

#[allow(unsafe_code, reason = "what the trait declares unsafe is passed on")]
impl Storage for Guarded {
    fn open(options: StorageOpenOptions) -> io::Result<Self> {
        // Of all files of a chain, those that imago would open itself. It opens none.
        File::open(options).map(|file| Self::new(file, 0))
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
        // SAFETY: What the caller promises of this file holds for the one within.
        unsafe { self.file.pure_readv(bufv, offset) }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.check(offset, bufv.len())?;
        // SAFETY: As above.
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
