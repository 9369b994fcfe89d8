//! An initramfs, built in memory (Linux' Documentation/driver-api/early-userspace/buffer-format.rst: cpio, "newc").

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A file system image for a kernel to unpack. Directories above an entry appear by themselves.
#[derive(Debug, Default)]
pub struct Initramfs {
    archive: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

impl Initramfs {
    /// An image with nothing but `/dev/console`, which the kernel opens for the first process.
    #[must_use]
    pub fn new() -> Self {
        let mut image = Self::default();
        image.directories_above("dev/console");
        image.entry("dev/console", CHARACTER_DEVICE | 0o600, (5, 1), &[]);
        image
    }

    /// Adds a directory.
    pub fn directory(&mut self, path: &str) -> &mut Self {
        let path = path.trim_matches('/');
        self.directories_above(path);
        if self.directories.insert(path.to_owned()) {
            self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
        }
        self
    }

    /// Adds a file with that content and these permission bits.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> &mut Self {
        let path = path.trim_matches('/');
        self.directories_above(path);
        self.entry(path, REGULAR | permissions, (0, 0), content);
        self
    }

    /// Adds a copy of `source`, a file of this machine, as an executable.
    ///
    /// # Errors
    /// It can't be read.
    pub fn program(&mut self, path: &str, source: &Path) -> io::Result<&mut Self> {
        let content = fs::read(source)?;
        Ok(self.file(path, 0o755, &content))
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> &mut Self {
        let path = path.trim_matches('/');
        self.directories_above(path);
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes());
        self
    }

    /// The whole image.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.archive
    }

    /// Writes the whole image to `path`.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(self, path: PathBuf) -> io::Result<PathBuf> {
        fs::write(&path, self.finish())?;
        Ok(path)
    }

    fn directories_above(&mut self, path: &str) {
        let above: Vec<String> = path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect();
        for directory in above {
            if self.directories.insert(directory.clone()) {
                self.entry(&directory, DIRECTORY | 0o755, (0, 0), &[]);
            }
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        // Files of 4 GiB and more don't exist in this format.
        let size = u32::try_from(content.len()).expect("an initramfs file is below 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("paths are short");
        let links = 1;
        let fields = [
            self.entries,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime: the same input gives the same image
            size,
            0, // major and minor of the containing device
            0,
            device.0,
            device.1,
            name_size,
            0, // check, unused in this variant
        ];
        self.archive.extend_from_slice(b"070701");
        for field in fields {
            self.archive.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.archive.extend_from_slice(path.as_bytes());
        self.archive.push(0);
        self.pad();
        self.archive.extend_from_slice(content);
        self.pad();
    }

    /// Names and contents end on a multiple of four.
    fn pad(&mut self) {
        self.archive.resize(self.archive.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    #[test]
    fn a_header_is_as_the_format_says() {
        let mut image = Initramfs::default();
        image.file("a", 0o644, b"xyz");
        let bytes = image.finish();
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[14..22], b"000081A4");
        assert_eq!(&bytes[54..62], b"00000003");
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..116], b"xyz\0");
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn cpio_unpacks_it() {
        if !crate::machines_or_skip("initramfs::cpio_unpacks_it") {
            return;
        }
        let busybox = crate::fetch::qemu().unwrap().busybox();
        let dir = tempfile::tempdir().unwrap();
        let mut image = Initramfs::default();
        image.file("/bin/one", 0o755, b"#!/bin/sh\n").link("/bin/two", "one").directory("/proc");
        let mut cpio = Command::new(busybox);
        let mut cpio = cpio.args(["cpio", "-id"]).current_dir(dir.path()).stdin(Stdio::piped()).spawn().unwrap();
        cpio.stdin.take().unwrap().write_all(&image.finish()).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(fs::read_to_string(dir.path().join("bin/two")).unwrap(), "#!/bin/sh\n");
        assert!(dir.path().join("proc").is_dir());
    }
}
