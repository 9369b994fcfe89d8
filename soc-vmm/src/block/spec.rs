//! Which image, and how it is to be read.

use std::path::PathBuf;

/// How an image's bytes are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// The disk's bytes, one after the other.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

/// An image to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    /// Where it lies: a file or a block device.
    pub path: PathBuf,
    /// Its format; none: see [`super::open`].
    pub format: Option<ImageFormat>,
    /// It is not written.
    pub read_only: bool,
    /// It is read and written past the page cache (O_DIRECT), and so are the files that it stands on.
    pub direct: bool,
    /// Somebody else has it until [`super::BlockBackend::claim`]: it is not locked.
    pub unclaimed: bool,
}

impl ImageSpec {
    /// An image that is written, its format told by its name.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), format: None, read_only: false, direct: false, unclaimed: false }
    }

    /// The same, only read: a CD-ROM.
    pub fn read_only(path: impl Into<PathBuf>) -> Self {
        Self { read_only: true, ..Self::new(path) }
    }
}
