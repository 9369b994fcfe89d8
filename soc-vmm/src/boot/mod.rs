//! Boot: from image files to guest memory and the first vCPU's state.
//!
//! [`BootPlan::new`] opens the files, recognises what they are, and decides where everything goes; no guest is needed for it, so
//! that a wrong file is refused before the function is touched. [`BootPlan::load`] then copies the bytes by DMA, and does so again
//! at every reset. The formats: bzImage ([`BzImage`]), ELF with a PVH note ([`Elf`]), multiboot 1 ([`MultibootHeader`]), and flat
//! firmware.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use crate::acpi::{AcpiConfig, AcpiError, AcpiTables};
use crate::flash;
use crate::layout::{FIRMWARE_MAX, FOUR_GIB, MemoryLayout, PAGE_SIZE};
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
        /// Its variable store: with one, both are flash.
        nvram: Option<PathBuf>,
    },
}

/// Opened images, and where each byte of them goes.
#[derive(Debug)]
pub struct BootPlan {
    first: ImageFile,
    initrd: Option<ImageFile>,
    plan: Plan,
    roms: Vec<Rom>,
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
        Self::open(source, layout, || AcpiTables::new(acpi, layout.low_end()))
    }

    /// The same without ACPI tables.
    ///
    /// # Errors
    /// As [`BootPlan::new`].
    pub fn without_acpi(source: &BootSource, layout: &MemoryLayout) -> Result<Self, BootError> {
        Self::open(source, layout, || Ok(AcpiTables::none(layout.low_end())))
    }

    fn open(
        source: &BootSource,
        layout: &MemoryLayout,
        tables: impl FnOnce() -> Result<AcpiTables, AcpiError>,
    ) -> Result<Self, BootError> {
        match source {
            BootSource::Kernel { kernel, initrd, cmdline } => {
                let tables = tables()?;
                let kernel = ImageFile::open(Role::Kernel, kernel)?;
                let initrd = initrd.as_ref().map(|path| ImageFile::open(Role::Initrd, path)).transpose()?;
                let initrd_len = initrd.as_ref().map(ReadAt::size);
                let plan = Plan::for_kernel(&kernel, initrd_len, cmdline, layout, &tables).map_err(|fault| {
                    initrd.as_ref().filter(|_| fault.role == Role::Initrd).unwrap_or(&kernel).blame(fault.problem)
                })?;
                Ok(Self { first: kernel, initrd, plan, roms: Vec::new() })
            }
            BootSource::Firmware { code, .. } => {
                let code = ImageFile::open(Role::Firmware, code)?;
                let (plan, rom) = place_firmware(code.size()).map_err(|problem| code.blame(problem))?;
                Ok(Self { first: code, initrd: None, plan, roms: vec![rom] })
            }
        }
    }

    /// Opens firmware that lies in flash above its variable store of `variables` bytes. The flash's device brings the contents.
    ///
    /// # Errors
    /// The file is missing, unreadable or wrong, or the chips don't fit.
    pub fn in_flash(code: &Path, variables: u64) -> Result<Self, BootError> {
        // The link OVMF_CODE_4M.ms.fd leads to one too.
        if std::fs::canonicalize(code).is_ok_and(|path| path.to_string_lossy().ends_with(".secboot.fd")) {
            let source = ImageError::NeedsSmm;
            return Err(BootError::File { role: Role::Firmware, path: code.into(), source });
        }
        let code = ImageFile::open(Role::Firmware, code)?;
        let (low, high) = flash::place(variables, code.size())?;
        let roms = vec![Rom { start: high, len: code.size() }, Rom { start: low, len: variables }];
        let plan = Plan { loads: Vec::new(), blobs: Vec::new(), entry: Entry::reset(0), facs: None };
        Ok(Self { first: code, initrd: None, plan, roms })
    }

    /// All bytes of the kernel or the firmware.
    ///
    /// # Errors
    /// It can't be read any more, or became shorter.
    pub fn first_image(&self) -> Result<Vec<u8>, BootError> {
        // Flash is never larger than what there is below 4 GiB.
        let mut bytes = vec![0; usize::try_from(self.first.size()).unwrap_or(usize::MAX)];
        self.first.read_exact_at(&mut bytes, 0, "content").map_err(|problem| self.first.blame(problem))?;
        Ok(bytes)
    }

    /// Has `bytes` written at guest-physical `to` too, at every load.
    pub fn place(&mut self, to: u64, bytes: Vec<u8>) {
        self.plan.blobs.push((to, bytes));
    }

    /// Has a kernel find these ACPI tables from the next load on, where the first ones were: each is as long as it was.
    ///
    /// # Errors
    /// As [`AcpiTables::new`].
    pub fn describe(&mut self, layout: &MemoryLayout, acpi: &AcpiConfig) -> Result<(), BootError> {
        if self.plan.facs.is_none() {
            return Ok(());
        }
        let tables = AcpiTables::new(acpi, layout.low_end())?;
        for (to, bytes) in tables.pieces() {
            if let Some((_, blob)) =
                self.plan.blobs.iter_mut().find(|(at, blob)| *at == to && blob.len() == bytes.len())
            {
                *blob = bytes.to_vec();
            }
        }
        Ok(())
    }

    /// The state in which the boot processor starts. The others start as [`Entry::application_processor`].
    pub fn entry(&self) -> &Entry {
        &self.plan.entry
    }

    /// Where the guest leaves its waking vector (ACPI 6.5 §5.2.10): a physical address of 4 bytes; none where firmware has it.
    pub fn waking_vector(&self) -> Option<u64> {
        const IN_FACS: u64 = 12;
        Some(self.plan.facs? + IN_FACS)
    }

    /// Read-only memory that the images need beside RAM: first what ends at 4 GiB. None: no firmware starts.
    pub fn roms(&self) -> &[Rom] {
        &self.roms
    }

    /// Whether the files are still as long as they were: a reset looks before it touches the guest.
    ///
    /// # Errors
    /// One can't be examined any more, or became shorter.
    pub fn check(&self) -> Result<(), BootError> {
        self.images().try_for_each(ImageFile::check)
    }

    /// What a file is if it is one of the images.
    pub fn role_of(&self, file: &std::fs::Metadata) -> Option<Role> {
        self.images().find(|image| image.is(file)).map(ImageFile::role)
    }

    /// Starts to copy everything to guest memory, as the files are now.
    pub fn load(&self) -> Loading<'_> {
        let image =
            |load: &plan::Load| self.initrd.as_ref().filter(|_| load.from == Role::Initrd).unwrap_or(&self.first);
        let pieces = self.plan.loads.iter().map(|load| Piece { image: image(load), load: *load, done: 0 }).collect();
        Loading { plan: self, pieces, buffer: Vec::new() }
    }

    fn images(&self) -> impl Iterator<Item = &ImageFile> {
        std::iter::once(&self.first).chain(&self.initrd)
    }
}

/// Images on their way to guest memory, a bounded step at a time: between two of them the VM can be given up.
#[derive(Debug)]
pub struct Loading<'a> {
    plan: &'a BootPlan,
    pieces: VecDeque<Piece<'a>>,
    buffer: Vec<u8>,
}

/// A piece of an image, of which `done` bytes are in guest memory.
#[derive(Debug)]
struct Piece<'a> {
    image: &'a ImageFile,
    load: plan::Load,
    done: u64,
}

impl Loading<'_> {
    /// Copies at most 1 MiB; whether there is more to do. `memory` is the loader's view: ROM can be written. The vCPUs are out of the
    /// guest.
    ///
    /// # Errors
    /// A file can't be read any more or became shorter, or guest memory was not reached.
    pub fn step(&mut self, memory: &dyn GuestMemory) -> Result<bool, BootError> {
        let Some(Piece { image, load, done }) = self.pieces.front_mut() else {
            for (to, bytes) in &self.plan.plan.blobs {
                memory.write(*to, bytes)?;
            }
            return Ok(false);
        };
        // The file's bytes first, then zeros.
        let end = if *done < load.file_len { load.file_len } else { load.mem_len };
        let count = usize::try_from(end - *done).map_or(image::CHUNK, |rest| rest.min(image::CHUNK));
        self.buffer.clear();
        image.room(&mut self.buffer, count)?;
        self.buffer.resize(count, 0);
        if *done < load.file_len {
            image.copy_to(memory, load.offset + *done, &mut self.buffer, load.to + *done)?;
        } else {
            memory.write(load.to + *done, &self.buffer)?;
        }
        *done += count as u64;
        if *done == load.mem_len {
            self.pieces.pop_front();
        }
        Ok(true)
    }
}

/// Places a flat firmware image of `size` bytes: all of it below 4 GiB, where the processor starts. The chipset shows its end below
/// 1 MiB too, until the firmware says otherwise.
fn place_firmware(size: u64) -> Result<(Plan, Rom), ImageError> {
    if size > FIRMWARE_MAX || !size.is_multiple_of(PAGE_SIZE) {
        return Err(ImageError::FirmwareSize { size });
    }
    let rom = Rom { start: FOUR_GIB - size, len: size };
    let loads = vec![plan::Load { from: Role::Firmware, offset: 0, file_len: size, to: rom.start, mem_len: size }];
    Ok((Plan { loads, blobs: Vec::new(), entry: Entry::reset(0), facs: None }, rom))
}
