//! A regular file, for pages that have places in it. Its position is that of whoever reads or writes the connection beside.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};

/// A file from some place on: where it stood.
#[derive(Debug)]
pub struct Place {
    file: File,
    start: u64,
    /// It had a name. What is made without one is for who holds it.
    is_named: bool,
}

impl Place {
    /// That of a file; none: it is a pipe, or something else without places.
    pub(super) fn of(file: &File) -> io::Result<Option<Self>> {
        let found = file.metadata()?;
        if !found.is_file() {
            return Ok(None);
        }
        // What is opened to append writes nowhere else.
        let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
        if flags.contains(OFlag::O_APPEND) {
            return Ok(None);
        }
        let mut file = file.try_clone()?;
        let start = file.stream_position()?;
        Ok(Some(Self { file, start, is_named: found.nlink() > 0 }))
    }

    /// Where it begins in its file.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// How many bytes there are from here on.
    pub(crate) fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len().saturating_sub(self.start))
    }

    pub(crate) fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(to, self.in_file(at)?)
    }

    pub(crate) fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.in_file(at)?)
    }

    /// Gives bytes back to the file system, where it takes them: they are not looked at again.
    pub(crate) fn forget(&self, at: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let number = |value: u64| i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge));
        // It is a matter of room alone.
        _ = fallocate(&self.file, flags, number(self.in_file(at)?)?, number(len)?);
        Ok(())
    }

    /// Has whoever reads or writes the connection go on there.
    pub(crate) fn go_to(&mut self, at: u64) -> io::Result<()> {
        let at = self.in_file(at)?;
        self.file.seek(SeekFrom::Start(at)).map(drop)
    }

    /// Where whoever reads or writes the connection is.
    pub(crate) fn position(&self) -> io::Result<u64> {
        Ok((&self.file).stream_position()?.saturating_sub(self.start))
    }

    /// It ends there, whatever was behind that.
    pub(crate) fn ends(&self, at: u64) -> io::Result<()> {
        self.file.set_len(self.in_file(at)?)
    }

    /// Whoever looks for it can find it.
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.is_named && self.file.metadata()?.nlink() == 0 {
            return Err(io::Error::other("somebody removed or replaced it meanwhile"));
        }
        Ok(())
    }

    /// Returns when all of it is on the disk.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn in_file(&self, at: u64) -> io::Result<u64> {
        self.start.checked_add(at).ok_or_else(|| io::ErrorKind::FileTooLarge.into())
    }
}
