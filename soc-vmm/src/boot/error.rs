//! Why a guest can't be booted: which file, why, what to do.

use std::{fmt, io, path::PathBuf};

use super::elf::ElfError;
use super::multiboot::MultibootError;
use crate::acpi::AcpiError;
use crate::flash::FlashError;
use crate::memory::MemoryError;

/// What the user meant a file to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `--kernel`
    Kernel,
    /// `--initrd`
    Initrd,
    /// `--firmware`
    Firmware,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::Firmware => "firmware",
        })
    }
}

/// Why a guest can't be booted. Its source, where it has one, goes on where its text ends.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file is at fault.
    #[error("can't boot with {role} {}", path.display())]
    File {
        /// What it was meant to be.
        role: Role,
        /// Where it lies.
        path: PathBuf,
        /// What is wrong with it.
        source: ImageError,
    },
    /// The guest's ACPI tables can't be made.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// Firmware and its variable store can't be flash chips.
    #[error(transparent)]
    Flash(#[from] FlashError),
    /// Guest memory was not reached.
    #[error("can't write the boot images to guest memory")]
    Memory(#[from] MemoryError),
}

impl BootError {
    /// Whether nothing is wrong with any file: guest memory is out of reach, or this machine has no memory left.
    pub fn is_of_the_machine(&self) -> bool {
        match self {
            Self::Memory(_) => true,
            Self::File { source: ImageError::Io { source, .. }, .. } => source.kind() == io::ErrorKind::OutOfMemory,
            _ => false,
        }
    }
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The system refused.
    #[error("can't {action}")]
    Io {
        /// What was tried, and what to look at.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Not a file with a size.
    #[error("it is {kind}, not a regular file: give the path of an image")]
    NotRegular {
        /// What it is, with its article.
        kind: &'static str,
    },
    /// No bytes.
    #[error("it is empty: give a complete image")]
    Empty,
    /// It ends before what it promises.
    #[error("it is truncated: its {part} ends at byte {need}, the file at byte {size}: get a complete copy")]
    Truncated {
        /// What is cut off.
        part: &'static str,
        /// Bytes promised.
        need: u64,
        /// Bytes there.
        size: u64,
    },
    /// Someone cut it off since it was examined.
    #[error("it is shorter than when it was opened: restore it, and install a new one by rename")]
    Shrunk,
    /// None of the formats.
    #[error("it is no bzImage, no ELF with a PVH note, and has no multiboot 1 header: give one of these")]
    UnknownFormat,
    /// An ELF that says nowhere how to start it.
    #[error(
        "it is an ELF image without a PVH note or a multiboot 1 header: build it with CONFIG_PVH, or give the bzImage"
    )]
    NoEntryNote,
    /// A zImage, or without the 64-bit entry.
    #[error(
        "its boot protocol {}.{:02} has no 64-bit entry below 4 GiB: give an x86-64 kernel, Linux 3.8 or later",
        version >> 8, version & 0xff
    )]
    No64BitEntry {
        /// Boot protocol version, as in its header.
        version: u16,
    },
    /// A bzImage header that contradicts itself.
    #[error("its setup header is damaged ({field} is {value:#x}): get a good copy")]
    BadSetupHeader {
        /// Field of the setup header.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A damaged or unsupported ELF.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// A damaged or unsupported multiboot image.
    #[error(transparent)]
    Multiboot(#[from] MultibootError),
    /// It would not fit.
    #[error(
        "it needs {need} bytes of free guest memory between {from:#x} and {to:#x}, and there are not that many: \
         give the guest more memory, or a smaller image"
    )]
    NoRoom {
        /// Bytes needed in one piece.
        need: u64,
        /// First address it may have.
        from: u64,
        /// First address behind.
        to: u64,
    },
    /// It wants addresses that are not free RAM.
    #[error(
        "its {part} needs guest memory {start:#x}..{end:#x}, which is {why} (RAM below 4 GiB ends at {low_end:#x}): \
         give the guest more memory, or an image linked elsewhere"
    )]
    BadPlace {
        /// What is to lie there.
        part: &'static str,
        /// First byte.
        start: u64,
        /// First byte behind.
        end: u128,
        /// Why it can't.
        why: &'static str,
        /// End of low RAM.
        low_end: u64,
    },
    /// The command line can't be handed over.
    #[error("its command line has a character that is not printable ASCII: remove it")]
    CmdlineCharacter,
    /// The command line is longer than what the kernel takes.
    #[error("its command line has {len} bytes and it takes at most {max}: shorten the line")]
    CmdlineLength {
        /// Bytes without the NUL.
        len: usize,
        /// Most bytes without the NUL.
        max: usize,
    },
    /// Firmware for Secure Boot.
    #[error(
        "it is built for Secure Boot, which needs System Management Mode, and this machine has none: give OVMF_CODE_4M.fd"
    )]
    NeedsSmm,
    /// A firmware image has a wrong size.
    #[error(
        "its size of {size} bytes is no multiple of 4096 up to {} MiB: give a flat firmware image",
        crate::layout::FIRMWARE_MAX >> 20
    )]
    FirmwareSize {
        /// Bytes.
        size: u64,
    },
}
