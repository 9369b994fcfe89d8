//! PVH direct boot (Xen docs/misc/pvh.pandoc, public/arch-x86/hvm/start_info.h): 32-bit flat protected mode, `hvm_start_info` in EBX.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::elf::Elf;
use super::entry::{Entry, Regs};
use super::error::{ImageError, Role};
use super::plan::{Fault, Handover, Load, Plan, cmdline_bytes};
use super::space::Space;
use super::tables;
use crate::layout::{FOUR_GIB, boot_data};

/// "xEn3" with the high bit of the "E" set.
const MAGIC: u32 = 0x336e_c578;

/// `hvm_start_info`, version 1.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: U32,
    version: U32,
    flags: U32,
    module_count: U32,
    modules: U64,
    cmdline: U64,
    rsdp: U64,
    memory_map: U64,
    memory_map_entries: U32,
    reserved: U32,
}

/// `hvm_modlist_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    start: U64,
    len: U64,
    cmdline: U64,
    reserved: U64,
}

/// `hvm_memmap_table_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MemoryMapEntry {
    start: U64,
    len: U64,
    kind: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<StartInfo>() == 56 && size_of::<Module>() == 32 && size_of::<MemoryMapEntry>() == 24);

/// Places an ELF image that has a PVH note.
pub(super) fn plan(elf: &Elf, handover: &Handover<'_>, mut space: Space) -> Result<Plan, Fault> {
    let mut loads = elf.place(&mut space)?;
    let start = elf.pvh_entry().ok_or(ImageError::NoEntryNote)?;

    let mut modules = Vec::new();
    if let Some(len) = handover.initrd {
        let start = handover.place_initrd(&mut space, len, 0, FOUR_GIB)?;
        loads.push(Load { from: Role::Initrd, offset: 0, file_len: len, to: start, mem_len: len });
        modules.push(Module { start: start.into(), len: len.into(), cmdline: 0.into(), reserved: 0.into() });
    }
    let map: Vec<_> = handover
        .map
        .iter()
        .map(|entry| MemoryMapEntry {
            start: entry.start.into(),
            len: entry.len.into(),
            kind: (entry.kind as u32).into(),
            reserved: 0.into(),
        })
        .collect();

    let modules_at = boot_data::INFO + size_of::<StartInfo>() as u64;
    let map_at = modules_at + size_of_val(&modules[..]) as u64;
    let info = StartInfo {
        magic: MAGIC.into(),
        version: 1.into(),
        flags: 0.into(),
        module_count: (modules.len() as u32).into(),
        modules: if modules.is_empty() { 0 } else { modules_at }.into(),
        cmdline: boot_data::CMDLINE.into(),
        rsdp: handover.rsdp.into(),
        memory_map: map_at.into(),
        memory_map_entries: (map.len() as u32).into(),
        reserved: 0.into(),
    };
    let bytes = [info.as_bytes(), modules.as_bytes(), map.as_bytes()].concat();

    let entry = Entry::protected(start, tables::GDT_REGISTER);
    let entry = Entry { regs: Regs { rbx: boot_data::INFO, ..entry.regs }, ..entry };
    let blobs = vec![
        (boot_data::GDT, tables::gdt(&entry.segments).to_vec()),
        (boot_data::INFO, bytes),
        (boot_data::CMDLINE, cmdline_bytes(handover.cmdline, usize::MAX)?),
    ];
    Ok(Plan { loads, blobs, entry, facs: None })
}
