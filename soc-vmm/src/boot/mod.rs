//! Boot: from image files to guest memory and the first vCPU's state.
//!
//! [`BootPlan::new`] opens the files, recognises what they are, and decides where everything goes; no guest is needed for it, so
//! that a wrong file is refused before the function is touched. [`BootPlan::load`] then copies the bytes by DMA, and does so again
//! at every reset. The formats: bzImage ([`BzImage`]), ELF with a PVH note ([`Elf`]), multiboot 1 ([`MultibootHeader`]), and flat
//! firmware.

use std::path::PathBuf;

use crate::acpi::{AcpiConfig, AcpiTables};
use crate::layout::{FIRMWARE_MAX, FOUR_GIB, MemoryLayout, ONE_MIB, PAGE_SIZE, VGA_WINDOW_END};
use crate::memory::GuestMemory;

pub use bzimage::BzImage;
pub use elf::{Elf, ElfError};
pub use entry::Entry;
pub use error::{BootError, ImageError, Role};
pub use image::{ImageFile, ReadAt};
pub use multiboot::{Header as MultibootHeader, MultibootError};
pub use plan::{Fault, Plan};

mod bzimage;
mod elf;
pub mod entry;
mod error;
mod image;
mod memory_map;
mod multiboot;
mod plan;
mod pvh;
mod space;
mod tables;
#[cfg(test)]
mod test_memory;
#[cfg(test)]
mod tests;

/// What the user wants booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootSource {
    /// `--kernel` and what goes with it.
    Kernel {
        /// bzImage, PVH ELF or multiboot 1 image.
        kernel: PathBuf,
        /// Initial RAM disk, or the module of a multiboot image.
        initrd: Option<PathBuf>,
        /// Command line, complete.
        cmdline: String,
    },
    /// `--firmware`: a flat image that ends at 4 GiB.
    Firmware {
        /// The image.
        code: PathBuf,
    },
}

/// Opened images, and where each byte of them goes.
#[derive(Debug)]
pub struct BootPlan {
    first: ImageFile,
    initrd: Option<ImageFile>,
    plan: Plan,
    rom: Option<Rom>,
}

/// Guest-physical addresses that are read-only memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rom {
    /// First address.
    pub start: u64,
    /// Bytes, whole pages.
    pub len: u64,
}

impl BootPlan {
    /// Opens and examines the files of `source` and places them in `layout`. A kernel is handed the ACPI tables of `acpi`; firmware
    /// gets none.
    ///
    /// # Errors
    /// A file is missing, unreadable, wrong, damaged or too large for the guest.
    pub fn new(source: &BootSource, layout: &MemoryLayout, acpi: &AcpiConfig) -> Result<Self, BootError> {
        match source {
            BootSource::Kernel { kernel, initrd, cmdline } => {
                let tables = AcpiTables::new(acpi, layout.low_end())?;
                let kernel = ImageFile::open(Role::Kernel, kernel)?;
                let initrd = initrd.as_ref().map(|path| ImageFile::open(Role::Initrd, path)).transpose()?;
                let initrd_len = initrd.as_ref().map(ReadAt::size);
                let plan = Plan::for_kernel(&kernel, initrd_len, cmdline, layout, &tables).map_err(|fault| {
                    initrd.as_ref().filter(|_| fault.role == Role::Initrd).unwrap_or(&kernel).blame(fault.problem)
                })?;
                Ok(Self { first: kernel, initrd, plan, rom: None })
            }
            BootSource::Firmware { code } => {
                let code = ImageFile::open(Role::Firmware, code)?;
                let (plan, rom) = place_firmware(code.size()).map_err(|problem| code.blame(problem))?;
                Ok(Self { first: code, initrd: None, plan, rom: Some(rom) })
            }
        }
    }

    /// The state in which the boot processor starts. The others start as [`Entry::application_processor`].
    pub fn entry(&self) -> &Entry {
        &self.plan.entry
    }

    /// Read-only memory that the images need beside RAM.
    pub fn rom(&self) -> Option<Rom> {
        self.rom
    }

    /// Copies everything to guest memory. `memory` is the loader's view: ROM can be written. The vCPUs are out of the guest.
    ///
    /// # Errors
    /// A file can't be read any more or was changed, or guest memory was not reached.
    pub fn load(&self, memory: &dyn GuestMemory) -> Result<(), BootError> {
        for load in &self.plan.loads {
            let image = self.initrd.as_ref().filter(|_| load.from == Role::Initrd).unwrap_or(&self.first);
            image.copy_to(memory, load.offset, load.file_len, load.to)?;
            image::write_zeros(memory, load.to + load.file_len, load.mem_len - load.file_len)?;
        }
        for (to, bytes) in &self.plan.blobs {
            memory.write(*to, bytes)?;
        }
        // Looked at last: what was read before the files changed may not fit what was read after.
        self.first.check_unchanged()?;
        self.initrd.as_ref().map_or(Ok(()), ImageFile::check_unchanged)
    }
}

/// Places a flat firmware image of `size` bytes: all of it below 4 GiB, where the processor starts, and its end below 1 MiB too, where
/// its real-mode code runs, as a copy in RAM. QEMU shows 128 KiB there and leaves it to firmware to copy what it has below 0xe0000
/// once it found the chipset's shadowing registers; SeaBIOS of 256 KiB runs that code also where it found none, so that all of its
/// window is filled here.
fn place_firmware(size: u64) -> Result<(Plan, Rom), ImageError> {
    const SHADOW_MAX: u64 = ONE_MIB - VGA_WINDOW_END;
    if size > FIRMWARE_MAX || !size.is_multiple_of(PAGE_SIZE) {
        return Err(ImageError::FirmwareSize { size });
    }
    let shadow = size.min(SHADOW_MAX);
    let rom = Rom { start: FOUR_GIB - size, len: size };
    let piece = |offset, len, to| plan::Load { from: Role::Firmware, offset, file_len: len, to, mem_len: len };
    let loads = vec![piece(0, size, rom.start), piece(size - shadow, shadow, ONE_MIB - shadow)];
    Ok((Plan { loads, blobs: Vec::new(), entry: Entry::reset(0) }, rom))
}
