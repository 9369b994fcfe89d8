//! ELF images for x86, as far as a loader reads them: program headers and the PVH note. A reader of our own: those of the field
//! are built on x86 alone.

use std::mem::size_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::error::{ImageError, Role};
use super::image::ReadAt;
use super::plan::Load;
use super::space::Space;

/// More program headers than any kernel has.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// More bytes than any kernel's notes have.
const MAX_NOTES: u64 = 64 << 10;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Note type of the 32-bit physical entry point (Xen public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// What a loader needs to know of an ELF image.
#[derive(Clone, Debug)]
pub struct Elf {
    segments: Vec<Segment>,
    entry: u64,
    pvh_entry: Option<u32>,
}

/// A PT_LOAD segment.
#[derive(Clone, Copy, Debug)]
struct Segment {
    offset: u64,
    virt: u64,
    phys: u64,
    file_len: u64,
    mem_len: u64,
}

impl Elf {
    /// Reads the headers and notes of `image`; `None` if it is no ELF file.
    ///
    /// # Errors
    /// It is one, and is truncated, damaged or not for x86.
    pub fn parse(image: &(impl ReadAt + ?Sized)) -> Result<Option<Self>, ImageError> {
        let mut ident = [0; 16];
        if image.size() < ident.len() as u64 {
            return Ok(None);
        }
        image.read_exact_at(&mut ident, 0, "ELF header")?;
        if !ident.starts_with(b"\x7fELF") {
            return Ok(None);
        }
        // EI_CLASS, EI_DATA (1 is little-endian), EI_VERSION
        let (header, programs) = match ident[4..7] {
            [1, 1, 1] => Self::headers::<Header32, Program32>(image)?,
            [2, 1, 1] => Self::headers::<Header64, Program64>(image)?,
            _ => return Err(ElfError::Unsupported { what: "class, byte order or version" }.into()),
        };

        let mut segments = Vec::new();
        let mut pvh_entry = None;
        for program in &programs {
            let end = program.offset.checked_add(program.file_len);
            match program.kind {
                PT_LOAD if program.mem_len != 0 => {
                    let need = end.ok_or(ElfError::Damaged { what: "a segment's offset and size" })?;
                    if need > image.size() {
                        return Err(ImageError::Truncated { part: "segments", need, size: image.size() });
                    }
                    if program.file_len > program.mem_len {
                        return Err(ElfError::Damaged { what: "a segment's sizes" }.into());
                    }
                    segments.push(Segment {
                        offset: program.offset,
                        virt: program.virt,
                        phys: program.phys,
                        file_len: program.file_len,
                        mem_len: program.mem_len,
                    });
                }
                PT_NOTE if pvh_entry.is_none() => {
                    if program.file_len > MAX_NOTES {
                        return Err(ElfError::Damaged { what: "the size of its notes" }.into());
                    }
                    let mut notes = vec![0; program.file_len as usize];
                    image.read_exact_at(&mut notes, program.offset, "notes")?;
                    pvh_entry = phys32_entry(&notes, program.align);
                }
                _ => {}
            }
        }
        if segments.is_empty() {
            return Err(ElfError::Damaged { what: "its program headers: none is loaded" }.into());
        }
        Ok(Some(Self { segments, entry: header.entry, pvh_entry }))
    }

    /// Header and program headers of one class.
    fn headers<H, P>(image: &(impl ReadAt + ?Sized)) -> Result<(Header, Vec<Program>), ImageError>
    where
        H: FromBytes + Into<Header>,
        P: FromBytes + Unaligned + KnownLayout + Immutable + Copy + Into<Program>,
    {
        let mut bytes = vec![0; size_of::<H>()];
        image.read_exact_at(&mut bytes, 0, "ELF header")?;
        let header: Header = H::read_from_bytes(&bytes).map_err(|_| ElfError::Damaged { what: "its header" })?.into();
        if !matches!(header.machine, EM_386 | EM_X86_64) {
            return Err(ElfError::Unsupported { what: "machine" }.into());
        }
        if usize::from(header.program_len) != size_of::<P>() || header.program_count > MAX_PROGRAM_HEADERS {
            return Err(ElfError::Damaged { what: "the size or count of its program headers" }.into());
        }
        let mut bytes = vec![0; size_of::<P>() * usize::from(header.program_count)];
        image.read_exact_at(&mut bytes, header.program_offset, "program headers")?;
        let programs = bytes
            .chunks_exact(size_of::<P>())
            .filter_map(|bytes| P::read_from_bytes(bytes).ok())
            .map(Into::into)
            .collect();
        Ok((header, programs))
    }

    /// Physical address of the 32-bit entry that the PVH note names.
    pub fn pvh_entry(&self) -> Option<u32> {
        self.pvh_entry
    }

    /// Physical address of the ELF entry, which is a virtual one in the file.
    pub(super) fn entry(&self) -> u64 {
        self.segments
            .iter()
            .find(|segment| self.entry.wrapping_sub(segment.virt) < segment.mem_len)
            .map_or(self.entry, |segment| segment.phys.wrapping_add(self.entry.wrapping_sub(segment.virt)))
    }

    /// Takes the segments' places and gives them as pieces to load.
    pub(super) fn place(&self, space: &mut Space) -> Result<Vec<Load>, ImageError> {
        self.segments
            .iter()
            .map(|segment| {
                space.claim(segment.phys, segment.mem_len, "ELF segment")?;
                Ok(Load {
                    from: Role::Kernel,
                    offset: segment.offset,
                    file_len: segment.file_len,
                    to: segment.phys,
                    mem_len: segment.mem_len,
                })
            })
            .collect()
    }
}

/// The entry of the PVH note among `notes`, which are aligned to 8 or, as nearly always, 4 bytes. Notes that contradict themselves
/// end the search.
fn phys32_entry(notes: &[u8], align: u64) -> Option<u32> {
    let align = if align == 8 { 8 } else { 4 };
    let padded = |len: U32| usize::try_from(len.get()).ok()?.checked_next_multiple_of(align);
    let mut rest = notes;
    while let Ok((note, after)) = NoteHeader::read_from_prefix(rest) {
        // With an alignment of 8 the header's 12 bytes and the name are padded together.
        let header_len = size_of::<NoteHeader>();
        let name_len = usize::try_from(note.name_len.get()).ok()?;
        let name_end = header_len.checked_add(name_len)?.checked_next_multiple_of(align)? - header_len;
        let desc_len = usize::try_from(note.desc_len.get()).ok()?;
        let name = after.get(..name_len)?;
        let desc = after.get(name_end..)?.get(..desc_len)?;
        if note.kind.get() == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return match desc_len {
                4 => Some(u32::from_le_bytes(desc.try_into().ok()?)),
                8 => u32::try_from(u64::from_le_bytes(desc.try_into().ok()?)).ok(),
                _ => None,
            };
        }
        rest = after.get(name_end..)?.get(padded(note.desc_len)?..)?;
    }
    None
}

/// What is wrong with an ELF image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Not for this machine.
    #[error("it is an ELF image of another {what}: give one for x86")]
    Unsupported {
        /// What differs.
        what: &'static str,
    },
    /// It contradicts itself.
    #[error("it is a damaged ELF image ({what}): get a good copy")]
    Damaged {
        /// What is wrong.
        what: &'static str,
    },
}

/// The fields of an ELF header that matter here.
struct Header {
    machine: u16,
    entry: u64,
    program_offset: u64,
    program_len: u16,
    program_count: u16,
}

/// A program header.
struct Program {
    kind: u32,
    offset: u64,
    virt: u64,
    phys: u64,
    file_len: u64,
    mem_len: u64,
    align: u64,
}

/// `Elf32_Ehdr` up to `e_phnum`.
#[derive(FromBytes)]
#[repr(C)]
struct Header32 {
    ident: [u8; 16],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U32,
    program_offset: U32,
    section_offset: U32,
    flags: U32,
    header_len: U16,
    program_len: U16,
    program_count: U16,
}

/// `Elf64_Ehdr` up to `e_phnum`.
#[derive(FromBytes)]
#[repr(C)]
struct Header64 {
    ident: [u8; 16],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U64,
    program_offset: U64,
    section_offset: U64,
    flags: U32,
    header_len: U16,
    program_len: U16,
    program_count: U16,
}

/// `Elf32_Phdr`.
#[derive(Clone, Copy, FromBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
struct Program32 {
    kind: U32,
    offset: U32,
    virt: U32,
    phys: U32,
    file_len: U32,
    mem_len: U32,
    flags: U32,
    align: U32,
}

/// `Elf64_Phdr`.
#[derive(Clone, Copy, FromBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
struct Program64 {
    kind: U32,
    flags: U32,
    offset: U64,
    virt: U64,
    phys: U64,
    file_len: U64,
    mem_len: U64,
    align: U64,
}

/// `Elf_Nhdr`, the same for both classes.
#[derive(FromBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
struct NoteHeader {
    name_len: U32,
    desc_len: U32,
    kind: U32,
}

const _: () = {
    assert!(size_of::<Header32>() == 46 && size_of::<Header64>() == 58);
    assert!(size_of::<Program32>() == 32 && size_of::<Program64>() == 56);
};

impl From<Header32> for Header {
    fn from(header: Header32) -> Self {
        Self {
            machine: header.machine.get(),
            entry: header.entry.get().into(),
            program_offset: header.program_offset.get().into(),
            program_len: header.program_len.get(),
            program_count: header.program_count.get(),
        }
    }
}

impl From<Header64> for Header {
    fn from(header: Header64) -> Self {
        Self {
            machine: header.machine.get(),
            entry: header.entry.get(),
            program_offset: header.program_offset.get(),
            program_len: header.program_len.get(),
            program_count: header.program_count.get(),
        }
    }
}

impl From<Program32> for Program {
    fn from(program: Program32) -> Self {
        Self {
            kind: program.kind.get(),
            offset: program.offset.get().into(),
            virt: program.virt.get().into(),
            phys: program.phys.get().into(),
            file_len: program.file_len.get().into(),
            mem_len: program.mem_len.get().into(),
            align: program.align.get().into(),
        }
    }
}

impl From<Program64> for Program {
    fn from(program: Program64) -> Self {
        Self {
            kind: program.kind.get(),
            offset: program.offset.get(),
            virt: program.virt.get(),
            phys: program.phys.get(),
            file_len: program.file_len.get(),
            mem_len: program.mem_len.get(),
            align: program.align.get(),
        }
    }
}
