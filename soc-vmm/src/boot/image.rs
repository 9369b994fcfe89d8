//! Image files: opened without waiting, read in bounded pieces, watched for changes.

use std::{
    fs::{File, Metadata, OpenOptions},
    io,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::fcntl::OFlag;

use super::error::{BootError, ImageError, Role};
use crate::memory::GuestMemory;

/// Bytes of one write to guest memory: large enough to keep a DMA engine busy, small enough to hold.
const CHUNK: usize = 1 << 20;

// What can fail, and what the user can look at.
const OPEN: &str = "open it (check its path and permissions)";
const EXAMINE: &str = "examine it (check the file system that it is on)";
const READ: &str = "read it (check the disk that it is on)";

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
    stamp: Stamp,
}

/// What tells a changed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self { size: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) }
    }
}

impl ImageFile {
    /// Opens `path`. It stays open, so that a reset of the guest loads the same bytes also after the file was replaced by rename.
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
        Ok(Self { file, path: path.into(), role, stamp: Stamp::of(&metadata) })
    }

    /// `problem`, said of this file.
    pub(super) fn blame(&self, problem: ImageError) -> BootError {
        BootError::File { role: self.role, path: self.path.clone(), source: problem }
    }

    /// Copies `len` bytes from `offset` to guest-physical `to`, with one buffer of bounded size.
    pub(super) fn copy_to(&self, memory: &dyn GuestMemory, offset: u64, len: u64, to: u64) -> Result<(), BootError> {
        let mut buffer = vec![0; usize::try_from(len).map_or(CHUNK, |len| len.min(CHUNK))];
        let mut done = 0;
        while done < len {
            let count = usize::try_from(len - done).map_or(CHUNK, |rest| rest.min(CHUNK));
            let chunk = &mut buffer[..count];
            self.read_exact_at(chunk, offset + done, "content").map_err(|problem| self.blame(problem))?;
            memory.write(to + done, chunk)?;
            done += count as u64;
        }
        Ok(())
    }

    /// Fails if the file was written to since it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), BootError> {
        let metadata = self.file.metadata().map_err(|source| self.blame(ImageError::Io { action: EXAMINE, source }))?;
        if Stamp::of(&metadata) == self.stamp { Ok(()) } else { Err(self.blame(ImageError::Changed)) }
    }
}

impl ReadAt for ImageFile {
    fn size(&self) -> u64 {
        self.stamp.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, part: &'static str) -> Result<(), ImageError> {
        let need = offset.saturating_add(buf.len() as u64);
        if need > self.stamp.size {
            return Err(ImageError::Truncated { part, need, size: self.stamp.size });
        }
        self.file.read_exact_at(buf, offset).map_err(|source| match source.kind() {
            // It was long enough when it was opened.
            io::ErrorKind::UnexpectedEof => ImageError::Changed,
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

/// Writes `len` zero bytes at guest-physical `to`.
pub(super) fn write_zeros(memory: &dyn GuestMemory, to: u64, len: u64) -> Result<(), BootError> {
    let zeros = vec![0; usize::try_from(len).map_or(CHUNK, |len| len.min(CHUNK))];
    let mut done = 0;
    while done < len {
        let count = usize::try_from(len - done).map_or(CHUNK, |rest| rest.min(CHUNK));
        memory.write(to + done, &zeros[..count])?;
        done += count as u64;
    }
    Ok(())
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
    fn copies_in_large_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let content: Vec<u8> = (0..CHUNK * 2 + 4097).map(|index| (index % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let image = ImageFile::open(Role::Initrd, &path).unwrap();
        let memory = TestMemory::new(16 << 20);
        image.copy_to(&memory, 1, image.size() - 1, 0x10_0000).unwrap();
        image.check_unchanged().unwrap();
        assert_eq!(memory.bytes(0x10_0000, content.len() - 1), content[1..]);
        assert_eq!(memory.writes(), [CHUNK, CHUNK, 4096]);
    }

    #[test]
    fn a_file_that_changes_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, [1; 8192]).unwrap();
        let image = ImageFile::open(Role::Kernel, &path).unwrap();
        let memory = TestMemory::new(16 << 20);
        File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
        let error = image.copy_to(&memory, 0, 8192, 0x10_0000).unwrap_err();
        assert!(matches!(error, BootError::File { source: ImageError::Changed, .. }), "{error:?}");
        assert!(matches!(image.check_unchanged(), Err(BootError::File { source: ImageError::Changed, .. })));
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
