//! What every image format is turned into: pieces of files and tables with their places, and the boot processor's state. Made from
//! bytes alone, so that anything may be thrown at it.

use linux_loader::cmdline::{Cmdline, Error as CmdlineError};

use super::bzimage::BzImage;
use super::elf::Elf;
use super::entry::Entry;
use super::error::{ImageError, Role};
use super::image::ReadAt;
use super::memory_map::{MapEntry, memory_map};
use super::space::Space;
use super::{multiboot, pvh};
use crate::acpi::AcpiTables;
use crate::layout::{MemoryLayout, boot_data};

/// Everything that goes to guest memory, and where the boot processor starts.
#[derive(Debug)]
pub struct Plan {
    /// Pieces of files.
    pub(super) loads: Vec<Load>,
    /// Tables and strings of the loader, at their guest-physical addresses.
    pub(super) blobs: Vec<(u64, Vec<u8>)>,
    /// State of the boot processor.
    pub(super) entry: Entry,
    /// Where the FACS is, if the loader placed one.
    pub(super) facs: Option<u64>,
}

/// A piece of a file and its place in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Load {
    /// Which file.
    pub(super) from: Role,
    /// Its first byte there.
    pub(super) offset: u64,
    /// Bytes of the file.
    pub(super) file_len: u64,
    /// Guest-physical address.
    pub(super) to: u64,
    /// Bytes in memory; those beyond `file_len` are zero.
    pub(super) mem_len: u64,
}

/// Which file is at fault, and why.
#[derive(Debug)]
pub struct Fault {
    /// The file.
    pub role: Role,
    /// What is wrong.
    pub problem: ImageError,
}

impl From<ImageError> for Fault {
    fn from(problem: ImageError) -> Self {
        Self { role: Role::Kernel, problem }
    }
}

/// What a kernel is told.
pub(super) struct Handover<'a> {
    pub(super) cmdline: &'a str,
    /// Bytes of the initrd.
    pub(super) initrd: Option<u64>,
    pub(super) map: &'a [MapEntry],
    /// Address of the RSDP.
    pub(super) rsdp: u64,
}

impl Handover<'_> {
    /// A place for the initrd, as high as possible: kernels grow upwards.
    pub(super) fn place_initrd(&self, space: &mut Space, len: u64, from: u64, to: u64) -> Result<u64, Fault> {
        let to = to.min(space.layout().low_end());
        space
            .place_high(len, from, to)
            .ok_or(Fault { role: Role::Initrd, problem: ImageError::NoRoom { need: len, from, to } })
    }
}

impl Plan {
    /// Recognises the format of `kernel` and places it. An ELF with both a PVH note and a multiboot header is taken by its note, which
    /// tells the kernel more.
    ///
    /// # Errors
    /// No known format, or it doesn't fit.
    pub fn for_kernel(
        kernel: &(impl ReadAt + ?Sized),
        initrd: Option<u64>,
        cmdline: &str,
        layout: &MemoryLayout,
        acpi: &AcpiTables,
    ) -> Result<Self, Fault> {
        let map = memory_map(layout, acpi.nvs(), acpi.start());
        let handover = Handover { cmdline, initrd, map: &map, rsdp: acpi.rsdp() };
        let mut space = Space::new(*layout);
        if !acpi.is_none() {
            space.claim(acpi.nvs(), layout.low_end() - acpi.nvs(), "ACPI tables")?;
        }

        let mut plan = if let Some(image) = BzImage::parse(kernel)? {
            image.plan(&handover, space)?
        } else {
            let elf = Elf::parse(kernel)?;
            let header = multiboot::Header::find(kernel)?;
            match (elf, header) {
                (Some(elf), _) if elf.pvh_entry().is_some() => pvh::plan(&elf, &handover, space)?,
                (elf, Some(header)) => multiboot::plan(&header, elf.as_ref(), kernel.size(), &handover, space)?,
                (Some(_), None) => return Err(ImageError::NoEntryNote.into()),
                (None, None) => return Err(ImageError::UnknownFormat.into()),
            }
        };
        plan.facs = Some(acpi.nvs()).filter(|_| !acpi.is_none());
        plan.blobs.extend(acpi.pieces().map(|(to, bytes)| (to, bytes.to_vec())));
        Ok(plan)
    }

    /// Guest-physical address and bytes of everything that goes to guest memory, zeros behind a file's bytes included.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u64)> {
        let loads = self.loads.iter().map(|load| (load.to, load.mem_len));
        loads.chain(self.blobs.iter().map(|(to, bytes)| (*to, bytes.len() as u64)))
    }
}

/// `cmdline` with its NUL, if the kernel takes `max` bytes and the loader has room.
pub(super) fn cmdline_bytes(cmdline: &str, max: usize) -> Result<Vec<u8>, ImageError> {
    const ROOM: usize = (boot_data::END - boot_data::CMDLINE) as usize - 1;
    let max = max.min(ROOM);
    let build = || {
        let mut line = Cmdline::new(max + 1)?;
        line.insert_str(cmdline)?;
        line.as_cstring()
    };
    match build() {
        Ok(line) => Ok(line.into_bytes_with_nul()),
        Err(CmdlineError::InvalidAscii | CmdlineError::NullTerminator) => Err(ImageError::CmdlineCharacter),
        Err(_) => Err(ImageError::CmdlineLength { len: cmdline.len(), max }),
    }
}
