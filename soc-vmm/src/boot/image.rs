//! Image files: opened without waiting, and read again at each reset.

use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::fcntl::OFlag;

use super::error::{BootError, ImageError, Role};
use crate::memory::GuestMemory;
use crate::own::Identity;

/// Bytes of one write to guest memory: large enough to keep a DMA engine busy, small enough to hold.
pub(super) const CHUNK: usize = 1 << 20;

// What can fail, and what the user can look at.
const OPEN: &str = "open it (check its path and permissions)";
const EXAMINE: &str = "examine it (check the file system that it is on)";
const READ: &str = "read it (check the disk that it is on)";
const HOLD: &str = "hold a part of it in memory (ulimit -v limits that)";

/// Bytes at offsets: what the parsers read from, a file or a slice.
pub trait ReadAt {
    /// How many bytes there are.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`ImageError::Truncated`] with `part` if that is more than there is, or reading failed.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64, part: &'static str) -> Result<(), ImageError>;
}

impl ReadAt for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, part: &'static str) -> Result<(), ImageError> {
        let truncated =
            ImageError::Truncated { part, need: offset.saturating_add(buf.len() as u64), size: self.size() };
        let Ok(start) = usize::try_from(offset) else { return Err(truncated) };
        let Some(bytes) = self.get(start..).and_then(|rest| rest.get(..buf.len())) else { return Err(truncated) };
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

/// A regular file that holds an image.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    path: PathBuf,
    role: Role,
    /// Bytes when it was opened.
    size: u64,
    identity: Identity,
}

impl ImageFile {
    /// Opens `path`. It stays open, so that a reset of the guest loads the same file also after it was replaced by rename.
    ///
    /// # Errors
    /// [`BootError::File`]: missing, unreadable, empty or not a regular file.
    pub fn open(role: Role, path: &Path) -> Result<Self, BootError> {
        let failed = |source| BootError::File { role, path: path.into(), source };
        let io_failed = |action| move |source| failed(ImageError::Io { action, source });
        // Without O_NONBLOCK, open(2) of a FIFO waits for its writer.
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(io_failed(OPEN))?;
        let metadata = file.metadata().map_err(io_failed(EXAMINE))?;
        if let Some(kind) = irregular(&metadata) {
            return Err(failed(ImageError::NotRegular { kind }));
        }
        if metadata.len() == 0 {
            return Err(failed(ImageError::Empty));
        }
        let identity = Identity::of(&metadata);
        Ok(Self { file, path: path.into(), role, size: metadata.len(), identity })
    }

    /// What it is meant to be.
    pub(super) fn role(&self) -> Role {
        self.role
    }

    /// `problem`, said of this file.
    pub(super) fn blame(&self, problem: ImageError) -> BootError {
        BootError::File { role: self.role, path: self.path.clone(), source: problem }
    }

    /// Has `buffer` have room for that many bytes of it.
    pub(super) fn room(&self, buffer: &mut Vec<u8>, count: usize) -> Result<(), BootError> {
        let reserved = buffer.try_reserve_exact(count);
        reserved.map_err(|_| self.blame(ImageError::Io { action: HOLD, source: ErrorKind::OutOfMemory.into() }))
    }

    /// Copies `buffer.len()` bytes from `offset` to guest-physical `to`.
    pub(super) fn copy_to(
        &self,
        memory: &dyn GuestMemory,
        offset: u64,
        buffer: &mut [u8],
        to: u64,
    ) -> Result<(), BootError> {
        self.read_exact_at(buffer, offset, "content").map_err(|problem| self.blame(problem))?;
        Ok(memory.write(to, buffer)?)
    }

    /// Fails if the file has become shorter since it was opened: all of it is needed. What is written in it is its owner's business.
    pub(super) fn check(&self) -> Result<(), BootError> {
        let metadata = self.file.metadata().map_err(|source| self.blame(ImageError::Io { action: EXAMINE, source }))?;
        if metadata.len() >= self.size { Ok(()) } else { Err(self.blame(ImageError::Shrunk)) }
    }

    /// Whether `metadata` is this very file's, by whatever path.
    pub(super) fn is(&self, metadata: &Metadata) -> bool {
        self.identity == Identity::of(metadata)
    }
}

impl ReadAt for ImageFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, part: &'static str) -> Result<(), ImageError> {
        let need = offset.saturating_add(buf.len() as u64);
        if need > self.size {
            return Err(ImageError::Truncated { part, need, size: self.size });
        }
        self.file.read_exact_at(buf, offset).map_err(|source| match source.kind() {
            // It was long enough when it was opened.
            io::ErrorKind::UnexpectedEof => ImageError::Shrunk,
            _ => ImageError::Io { action: READ, source },
        })
    }
}

/// What a file is if it is not a regular one.
fn irregular(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    if kind.is_file() {
        None
    } else if kind.is_dir() {
        Some("a directory")
    } else if kind.is_fifo() {
        Some("a FIFO")
    } else if kind.is_socket() {
        Some("a socket")
    } else {
        Some("a device")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::test_memory::TestMemory;

    fn problem(result: Result<ImageFile, BootError>) -> String {
        let error = result.unwrap_err();
        let BootError::File { source, .. } = error else { panic!("{error}") };
        source.to_string()
    }

    #[test]
    fn refuses_what_is_no_regular_file_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let empty = dir.path().join("empty");
        File::create(&empty).unwrap();

        let open = |path: &Path| problem(ImageFile::open(Role::Kernel, path));
        assert!(open(dir.path()).contains("a directory"));
        assert!(open(&fifo).contains("a FIFO"));
        assert!(open(Path::new("/dev/zero")).contains("a device"));
        assert!(open(&empty).contains("empty"));
        assert!(open(&dir.path().join("missing")).starts_with("can't open it"));
        assert!(open(&socket).starts_with("can't open it"));
    }

    #[test]
    fn a_file_that_shrinks_is_noticed_and_one_that_is_written_to_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, [1; 8192]).unwrap();
        let image = ImageFile::open(Role::Kernel, &path).unwrap();
        assert!(image.is(&std::fs::metadata(&path).unwrap()) && !image.is(&std::fs::metadata(dir.path()).unwrap()));
        let memory = TestMemory::new(16 << 20);
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[2], 0).unwrap();
        file.set_len(9000).unwrap();
        image.check().unwrap();
        image.copy_to(&memory, 0, &mut [0; 8192], 0x10_0000).unwrap();
        assert_eq!(memory.bytes(0x10_0000, 2), [2, 1]);
        file.set_len(4096).unwrap();
        let error = image.copy_to(&memory, 0, &mut [0; 8192], 0x10_0000).unwrap_err();
        assert!(matches!(error, BootError::File { source: ImageError::Shrunk, .. }), "{error:?}");
        assert!(matches!(image.check(), Err(BootError::File { source: ImageError::Shrunk, .. })));
    }

    #[test]
    fn reads_beyond_a_slice_are_truncations() {
        let bytes: &[u8] = &[1, 2, 3];
        let mut buf = [0; 2];
        bytes.read_exact_at(&mut buf, 1, "x").unwrap();
        assert_eq!(buf, [2, 3]);
        for offset in [2, 3, 4, u64::MAX] {
            assert!(matches!(
                bytes.read_exact_at(&mut buf, offset, "x"),
                Err(ImageError::Truncated { part: "x", size: 3, .. })
            ));
        }
    }
}
