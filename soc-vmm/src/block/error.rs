//! Why an image can't be used: which file, why, what to do.

use std::io;
use std::path::PathBuf;

use crate::nbd::NbdError;
use crate::nbd::wire::error::NOSPC;

/// Why an image could not be opened, read or written. Its source, where it has one, goes on where its text ends.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The image is at fault, or what it lies on.
    #[error("can't use disk image {}", path.display())]
    Image {
        /// Where it lies, as it was given.
        path: PathBuf,
        /// What is wrong with it.
        source: ImageProblem,
    },
    /// It is another process's, by NBD.
    #[error("can't use disk {disk}")]
    Nbd {
        /// Where it is, and its name there.
        disk: String,
        /// What is wrong with it.
        source: NbdError,
    },
    /// A job copies it.
    #[error("the disk is being copied: wait for the job's end, or cancel it")]
    Copied,
    /// Asked for what is not there.
    #[error("{len:#x} bytes at {offset:#x} are not all within a disk of {size:#x} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// Asked to write.
    #[error("the disk is read-only")]
    ReadOnly,
    /// Asked to be smaller.
    #[error("the disk has {size} bytes and would lose what is behind byte {wanted}: a disk in use only grows")]
    Shrinks {
        /// Bytes of the disk.
        size: u64,
        /// Bytes asked for.
        wanted: u64,
    },
    /// Asked for a size that no disk has.
    #[error("a disk can't have {wanted} bytes: give a multiple of 512, below 8 EiB")]
    OddSize {
        /// Bytes asked for.
        wanted: u64,
    },
    /// Asked to grow, which this kind can't.
    #[error("a disk of this kind can't grow")]
    FixedSize,
}

impl BlockError {
    /// Whether the image, or the file system that it is on, is full: a retry may do better once there is room.
    pub fn is_no_space(&self) -> bool {
        let full = |error: &io::Error| {
            matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
            )
        };
        match self {
            Self::Image { source: ImageProblem::Io { source, .. }, .. } => full(source),
            Self::Nbd { source: NbdError::Failed(number), .. } => *number == NOSPC,
            _ => false,
        }
    }
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageProblem {
    /// The system refused, or a part of the image contradicts the rest.
    #[error("can't {action}")]
    Io {
        /// What was tried, and what to look at.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Nothing that holds a disk.
    #[error("it is {kind}: give a file or a block device")]
    NotADisk {
        /// What it is, with its article.
        kind: &'static str,
    },
    /// No bytes.
    #[error("it is empty: make it as large as the disk shall be (truncate -s 10G FILE)")]
    Empty,
    /// A block device that was to grow, and hasn't.
    #[error("it is a block device of {len} bytes, which are less than {size}: grow the device first")]
    SmallDevice {
        /// Bytes wanted.
        size: u64,
        /// Bytes there.
        len: u64,
    },
    /// Someone cut it off while it was used.
    #[error("it is shorter than when it was opened: restore it")]
    Shrunk,
    /// It and what else is done with it don't go together.
    #[error("it is in use: another program or disk {}", if *written {
        "writes it: stop that one, or give a copy"
    } else {
        "reads it and needs it unchanged: say readonly=on, give an overlay of it (qemu-img create -b), or stop that one"
    })]
    InUse {
        /// Someone writes it; else someone reads it, and this one would write it.
        written: bool,
    },
    /// Another process had it, and left another size.
    #[error(
        "it has {now} bytes and had {len} when this VM was started: see that nobody resizes it while its guest moves"
    )]
    OtherSize {
        /// Bytes now.
        now: u64,
        /// Bytes when it was opened.
        len: u64,
    },
    /// The format was not given, and a guess would be dangerous.
    #[error(
        "it begins like a qcow2 image and its format is not given: say format=qcow2, or format=raw if a guest wrote that"
    )]
    LooksLikeQcow2,
    /// No qcow2 header where one must be.
    #[error("it has no qcow2 header: give a qcow2 image, or say format=raw")]
    NotQcow2,
    /// Versions 2 and 3 are known.
    #[error("it is a qcow2 image of version {version}: convert it to version 3 (qemu-img convert -O qcow2)")]
    Qcow2Version {
        /// The one in its header.
        version: u32,
    },
    /// It ends before what its header promises.
    #[error("it is truncated: its {part} ends at byte {end}, the file at byte {size}: get a complete copy")]
    Truncated {
        /// What is cut off.
        part: &'static str,
        /// First byte behind it.
        end: u64,
        /// Bytes there.
        size: u64,
    },
    /// A header that can't be.
    #[error(
        "its qcow2 header is damaged ({field} is {value:#x}): repair it (qemu-img check -r all), or get a good copy"
    )]
    Damaged {
        /// Field of the header.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// Its clusters are encrypted.
    #[error("it is encrypted, which is not supported: convert it to an image that isn't (qemu-img convert)")]
    Encrypted,
    /// It needs something of its reader that this one hasn't.
    #[error("it {feature}: {remedy}")]
    Feature {
        /// What it needs, as what the image is or has.
        feature: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// The same, of a bit that has no name yet.
    #[error("it needs qcow2 features that are not known here (bits {bits:#x}): convert it (qemu-img convert)")]
    UnknownFeatures {
        /// The incompatible features left over.
        bits: u64,
    },
    /// A file that it stands on is at fault.
    #[error("its backing file {}", path.display())]
    Backing {
        /// Where that lies.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<ImageProblem>,
    },
    /// It stands on itself.
    #[error("it is also further up in the chain of backing files: break the loop (qemu-img rebase -u)")]
    BackingLoop,
    /// More files than anyone has.
    #[error("it is the {}th file of the chain: merge some of them (qemu-img rebase, qemu-img commit)", .0)]
    BackingDepth(usize),
    /// A format that is not read.
    #[error("its backing file has format '{0}': convert that to raw or qcow2 (qemu-img convert, qemu-img rebase -u)")]
    BackingFormat(String),
    /// A name that is none of a file.
    #[error("its backing file's name '{0}' is not a path: only files and block devices are supported")]
    BackingName(String),
}
