//! Multiboot 1 (Multiboot Specification version 0.6.96): ELF images, or flat ones that carry their addresses in the header.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::elf::Elf;
use super::entry::{Entry, Regs};
use super::error::{ImageError, Role};
use super::image::ReadAt;
use super::memory_map::{Kind, MapEntry};
use super::plan::{Fault, Handover, Load, Plan, cmdline_bytes};
use super::space::Space;
use super::tables;
use crate::layout::{EBDA, FOUR_GIB, ONE_MIB, boot_data};

/// The header lies in the first 8 KiB of the file, on a 4-byte boundary (§3.1).
const SEARCHED: usize = 8192;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What EAX holds at entry.
const BOOT_MAGIC: u32 = 0x2bad_b002;
/// Header flags 0–15 are demands; we meet page-aligned modules (0) and memory information (1).
const DEMANDS: u32 = 0xffff;
const DEMANDS_MET: u32 = 0b11;
/// Header flag: the address fields are valid.
const HAS_ADDRESSES: u32 = 1 << 16;
/// Information flags: `mem_*`, command line, modules, `mmap_*`, loader name.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
const LOADER_NAME: &[u8] = b"outboard\0";

/// A multiboot header and where it stands.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    offset: u64,
    flags: u32,
    addresses: Addresses,
}

/// The address fields of the header (§3.1.3).
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Addresses {
    header: U32,
    load: U32,
    load_end: U32,
    bss_end: U32,
    entry: U32,
}

impl Header {
    /// Looks for the header of `image`.
    ///
    /// # Errors
    /// Reading failed.
    pub fn find(image: &(impl ReadAt + ?Sized)) -> Result<Option<Self>, ImageError> {
        let mut start = vec![0; usize::try_from(image.size()).map_or(SEARCHED, |size| size.min(SEARCHED))];
        image.read_exact_at(&mut start, 0, "multiboot header")?;
        let found = (0..start.len()).step_by(4).find_map(|offset| {
            let (words, rest) = <[U32; 3]>::read_from_prefix(&start[offset..]).ok()?;
            let [magic, flags, checksum] = words.map(U32::get);
            let sum = magic.wrapping_add(flags).wrapping_add(checksum);
            (magic == HEADER_MAGIC && sum == 0).then_some((offset, flags, rest))
        });
        let Some((offset, flags, rest)) = found else { return Ok(None) };
        let addresses = match Addresses::read_from_prefix(rest) {
            Ok((addresses, _)) => addresses,
            Err(_) if flags & HAS_ADDRESSES == 0 => {
                Addresses { header: 0.into(), load: 0.into(), load_end: 0.into(), bss_end: 0.into(), entry: 0.into() }
            }
            Err(_) => return Err(MultibootError::Addresses.into()),
        };
        Ok(Some(Self { offset: offset as u64, flags, addresses }))
    }

    /// The one piece of a file of `size` bytes that the address fields describe.
    fn flat(&self, size: u64) -> Result<Load, ImageError> {
        let addresses = &self.addresses;
        let load = u64::from(addresses.load.get());
        let before_header = u64::from(addresses.header.get()).checked_sub(load);
        let offset = before_header.and_then(|before| self.offset.checked_sub(before));
        let offset = offset.ok_or(MultibootError::Addresses)?;
        let file_len = match u64::from(addresses.load_end.get()) {
            0 => size - offset,
            end => end.checked_sub(load).ok_or(MultibootError::Addresses)?,
        };
        if offset + file_len > size {
            return Err(ImageError::Truncated { part: "code", need: offset + file_len, size });
        }
        let mem_len = match u64::from(addresses.bss_end.get()) {
            0 => file_len,
            end => end.checked_sub(load).filter(|len| *len >= file_len).ok_or(MultibootError::Addresses)?,
        };
        Ok(Load { from: Role::Kernel, offset, file_len, to: load, mem_len })
    }
}

/// Places a multiboot image of `size` bytes.
pub(super) fn plan(
    header: &Header,
    elf: Option<&Elf>,
    size: u64,
    handover: &Handover<'_>,
    mut space: Space,
) -> Result<Plan, Fault> {
    let unmet = header.flags & DEMANDS & !DEMANDS_MET;
    if unmet != 0 {
        return Err(ImageError::from(MultibootError::Demands { unmet }).into());
    }
    let (mut loads, start) = match elf {
        _ if header.flags & HAS_ADDRESSES != 0 => {
            let load = header.flat(size)?;
            space.claim(load.to, load.mem_len, "code")?;
            (vec![load], header.addresses.entry.get())
        }
        Some(elf) => {
            let loads = elf.place(&mut space)?;
            let entry = u32::try_from(elf.entry()).map_err(|_| ImageError::from(MultibootError::Entry))?;
            (loads, entry)
        }
        None => return Err(ImageError::from(MultibootError::NeitherElfNorAddresses).into()),
    };

    let mut module = None;
    if let Some(len) = handover.initrd {
        let start = handover.place_initrd(&mut space, len, 0, FOUR_GIB)?;
        loads.push(Load { from: Role::Initrd, offset: 0, file_len: len, to: start, mem_len: len });
        module = Some((start, start + len));
    }

    let entry = Entry::protected(start, tables::GDT_REGISTER);
    let regs = Regs { rax: BOOT_MAGIC.into(), rbx: boot_data::INFO, ..entry.regs };
    let entry = Entry { regs, ..entry };
    let blobs = vec![
        (boot_data::GDT, tables::gdt(&entry.segments).to_vec()),
        (boot_data::INFO, information(handover.map, module)),
        (boot_data::CMDLINE, cmdline_bytes(handover.cmdline, usize::MAX)?),
    ];
    Ok(Plan { loads, blobs, entry, facs: None })
}

/// The information structure (§3.3) with its lists behind it.
fn information(map: &[MapEntry], module: Option<(u64, u64)>) -> Vec<u8> {
    let modules: Vec<_> = module
        .iter()
        .map(|&(start, end)| Module { start: word(start), end: word(end), string: 0.into(), reserved: 0.into() })
        .collect();
    let map_entries: Vec<_> = map
        .iter()
        .map(|entry| MemoryMapEntry {
            // Not counting the size field itself.
            size: (size_of::<MemoryMapEntry>() as u32 - 4).into(),
            start: entry.start.to_le_bytes(),
            len: entry.len.to_le_bytes(),
            kind: (entry.kind as u32).into(),
        })
        .collect();
    let modules_at = boot_data::INFO + size_of::<Information>() as u64;
    let map_at = modules_at + size_of_val(&modules[..]) as u64;
    let name_at = map_at + size_of_val(&map_entries[..]) as u64;
    let upper = map.iter().find(|entry| entry.start == ONE_MIB && entry.kind == Kind::Ram).map_or(0, |entry| entry.len);
    let information = Information {
        flags: INFO_FLAGS.into(),
        mem_lower: word(EBDA >> 10),
        mem_upper: word(upper >> 10),
        boot_device: 0.into(),
        cmdline: word(boot_data::CMDLINE),
        module_count: (modules.len() as u32).into(),
        modules: word(modules_at),
        symbols: [0.into(); 4],
        map_len: (size_of_val(&map_entries[..]) as u32).into(),
        map: word(map_at),
        drives_len: 0.into(),
        drives: 0.into(),
        config_table: 0.into(),
        loader_name: word(name_at),
    };
    [information.as_bytes(), modules.as_bytes(), map_entries.as_bytes(), LOADER_NAME].concat()
}

/// An address or size below 4 GiB.
fn word(value: u64) -> U32 {
    debug_assert!(value < FOUR_GIB);
    (value as u32).into()
}

/// The information structure up to `boot_loader_name`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Information {
    flags: U32,
    mem_lower: U32,
    mem_upper: U32,
    boot_device: U32,
    cmdline: U32,
    module_count: U32,
    modules: U32,
    symbols: [U32; 4],
    map_len: U32,
    map: U32,
    drives_len: U32,
    drives: U32,
    config_table: U32,
    loader_name: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    start: U32,
    end: U32,
    string: U32,
    reserved: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MemoryMapEntry {
    size: U32,
    start: [u8; 8],
    len: [u8; 8],
    kind: U32,
}

const _: () = assert!(size_of::<Information>() == 68 && size_of::<Module>() == 16 && size_of::<MemoryMapEntry>() == 24);

/// What is wrong with a multiboot image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MultibootError {
    /// It must not be started without what we don't have.
    #[error(
        "its multiboot header demands features {unmet:#x} (4 is a video mode), which are not there: build it without"
    )]
    Demands {
        /// Flags of the header.
        unmet: u32,
    },
    /// The address fields contradict each other.
    #[error("the addresses in its multiboot header contradict each other: get a good copy")]
    Addresses,
    /// No way to know its segments.
    #[error("it has a multiboot 1 header, but is no ELF image and its header has no addresses: build it as ELF")]
    NeitherElfNorAddresses,
    /// The entry is out of reach.
    #[error("its entry lies above 4 GiB, where multiboot 1 can't start it: link it lower")]
    Entry,
}
