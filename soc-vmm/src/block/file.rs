//! The file or block device under an image.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use nix::unistd::{SysconfVar, sysconf};

use super::error::ImageProblem;
use super::queue::{BUFFER_ALIGN, Buffer};
use super::spec::ImageFormat;

/// The first bytes of a qcow2 file.
pub(super) const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

// What can fail, and what the user can look at.
const OPEN: &str = "open it (check its path and permissions)";
const OPEN_TO_WRITE: &str = "open it to write (check its permissions, or say readonly=on)";
const OPEN_DIRECT: &str = "open it past the page cache (its file system must know O_DIRECT; else say cache=writeback)";
const GROW: &str = "grow it (check its permissions and the room on its file system)";
const EXAMINE: &str = "examine it (check the file system that it is on)";
pub(super) const READ: &str = "read it (check the disk that it is on)";
pub(super) const WRITE: &str = "write it (check the disk that it is on)";

/// Which file or block device it is, whatever names it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    /// The device that it is on; [`u64::MAX`]: it is one itself.
    device: u64,
    /// Its inode, or a block device's own number.
    number: u64,
}

impl FileId {
    /// Of what `metadata` describes.
    pub fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self { device: u64::MAX, number: metadata.rdev() }
        } else {
            Self { device: metadata.dev(), number: metadata.ino() }
        }
    }
}

/// A file that is open, and is known to be of the kind that can hold an image.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) read_only: bool,
    /// Bytes.
    pub(super) len: u64,
    pub(super) id: FileId,
    /// The same file past the page cache, where that is wanted.
    pub(super) direct: Option<Direct>,
}

/// A file opened with O_DIRECT (open(2)).
#[derive(Debug)]
pub(super) struct Direct {
    pub(super) file: File,
    /// What addresses, places and lengths must be multiples of. Above 512 it is no less than a page: the page cache, through which
    /// everything else goes, then never has a part of what is transferred past it.
    pub(super) align: u64,
}

impl Opened {
    pub(super) fn new(path: &Path, read_only: bool) -> Result<Self, ImageProblem> {
        let failed = |action| move |source| ImageProblem::Io { action, source };
        // Without O_NONBLOCK, open(2) of a FIFO waits for its other end. It means nothing to files and block devices.
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let open = |write| OpenOptions::new().read(true).write(write).custom_flags(flags.bits()).open(path);
        let mut file = match open(!read_only) {
            // What it is matters more than that it can't be written.
            Err(error) if !read_only && error.kind() != io::ErrorKind::NotFound => match open(false) {
                Ok(file) if !is_disk(&file) => file,
                Ok(_) => return Err(failed(OPEN_TO_WRITE)(error)),
                Err(_) => return Err(failed(OPEN)(error)),
            },
            other => other.map_err(failed(OPEN))?,
        };
        let metadata = file.metadata().map_err(failed(EXAMINE))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let kind = match () {
                () if kind.is_dir() => "a directory",
                () if kind.is_fifo() => "a FIFO",
                () => "a character device",
            };
            return Err(ImageProblem::NotADisk { kind });
        }
        if !read_only && kind.is_block_device() && is_write_protected(&file).map_err(failed(EXAMINE))? {
            // Some systems open it nevertheless, and refuse every write.
            return Err(failed(OPEN_TO_WRITE)(io::Error::other("the block device is read-only")));
        }
        // A block device has its size there alone.
        let len = file.seek(SeekFrom::End(0)).map_err(failed(EXAMINE))?;
        if len == 0 {
            return Err(ImageProblem::Empty);
        }
        Ok(Self { file, path: path.into(), read_only, len, id: FileId::of(&metadata), direct: None })
    }

    /// Opens it past the page cache as well.
    pub(super) fn past_cache(mut self) -> Result<Self, ImageProblem> {
        let direct = || {
            let mut options = OpenOptions::new();
            options.read(true).write(!self.read_only).custom_flags(OFlag::O_DIRECT.bits());
            // The same file, whatever has its name by now.
            let file = options.open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
            let align = alignment(&file)?;
            Ok(Direct { file, align })
        };
        let direct = direct().map_err(|source| ImageProblem::Io { action: OPEN_DIRECT, source })?;
        self.direct = Some(direct);
        Ok(self)
    }

    /// Makes a file `size` bytes long, which is more than it has; of a block device, looks whether somebody has.
    pub(super) fn resize(&self, size: u64) -> Result<(), ImageProblem> {
        let failed = |source| ImageProblem::Io { action: GROW, source };
        let metadata = self.file.metadata().map_err(failed)?;
        if metadata.is_file() {
            return self.file.set_len(size).map_err(failed);
        }
        let len = (&self.file).seek(SeekFrom::End(0)).map_err(failed)?;
        if len < size { Err(ImageProblem::SmallDevice { size, len }) } else { Ok(()) }
    }

    /// Forgets what this system remembers of it, which on a network's file system may be old.
    pub(super) fn forget(&self) {
        // Advice: where it can't be taken nothing is remembered.
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }

    /// Looks at it anew after somebody else had it: whether it still has `len` bytes.
    pub(super) fn look_again(&self, len: u64) -> Result<(), ImageProblem> {
        self.forget();
        let now = (&self.file).seek(SeekFrom::End(0)).map_err(|source| ImageProblem::Io { action: EXAMINE, source })?;
        if now == len { Ok(()) } else { Err(ImageProblem::OtherSize { now, len }) }
    }

    /// The same open file once more.
    pub(super) fn again(&self) -> Result<Self, ImageProblem> {
        let file = self.file.try_clone().map_err(|source| ImageProblem::Io { action: OPEN, source })?;
        let Self { ref path, read_only, len, id, .. } = *self;
        let again = Self { file, path: path.clone(), read_only, len, id, direct: None };
        if self.direct.is_some() { again.past_cache() } else { Ok(again) }
    }

    /// Fills `buf` from `offset`; the bytes that there were.
    pub(super) fn read_up_to(&self, buf: &mut [u8], offset: u64) -> Result<usize, ImageProblem> {
        read_up_to(&self.file, buf, offset).map_err(|source| ImageProblem::Io { action: READ, source })
    }
}

/// Fills `buf` from `offset`; the bytes that there were.
pub(super) fn read_up_to(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut count = 0;
    while count < buf.len() {
        match file.read_at(&mut buf[count..], offset.saturating_add(count as u64)) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

/// What a file that is open with O_DIRECT wants to be aligned: it is tried, as there are kernels that don't tell.
fn alignment(file: &File) -> io::Result<u64> {
    let mut buffer = Buffer::default();
    match file.read_at(buffer.front(512), 0) {
        Ok(_) => return Ok(512),
        Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {}
        Err(error) => return Err(error),
    }
    file.read_at(buffer.front(BUFFER_ALIGN), 0)?;
    let page = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or(0);
    Ok((BUFFER_ALIGN as u64).max(page as u64))
}

fn is_disk(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.is_file() || metadata.file_type().is_block_device())
}

/// Whether a block device takes no writes (`BLKROGET`).
#[allow(unsafe_code, reason = "an ioctl")]
fn is_write_protected(device: &File) -> io::Result<bool> {
    /// `_IO(0x12, 94)` of linux/fs.h.
    const BLKROGET: libc::Ioctl = 0x125e;
    let mut flag: libc::c_int = 0;
    // SAFETY: the call writes an int where it is told, and keeps nothing.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), BLKROGET, &raw mut flag) };
    Errno::result(done)?;
    Ok(flag != 0)
}

/// The format of an image: the one given, or the one that its name tells. See [`super::open`].
pub(super) fn format_of(opened: &Opened, given: Option<ImageFormat>) -> Result<ImageFormat, ImageProblem> {
    if let Some(format) = given {
        return Ok(format);
    }
    if opened.path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2")) {
        return Ok(ImageFormat::Qcow2);
    }
    let mut magic = [0; 4];
    opened.read_up_to(&mut magic, 0)?;
    if magic == QCOW2_MAGIC { Err(ImageProblem::LooksLikeQcow2) } else { Ok(ImageFormat::Raw) }
}
