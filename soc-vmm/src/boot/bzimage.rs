//! Linux bzImage by the 64-bit boot protocol (Linux Documentation/arch/x86/boot.rst). A reader of our own: those of the field are
//! built on x86 alone.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::entry::Entry;
use super::error::{ImageError, Role};
use super::image::ReadAt;
use super::memory_map::MapEntry;
use super::plan::{Fault, Handover, Load, Plan, cmdline_bytes};
use super::space::Space;
use super::tables;
use crate::layout::{FOUR_GIB, boot_data};

/// Offset of the setup header, in the file and in the zero page.
const HEADER_OFFSET: usize = 0x1f1;
/// The zero page has this much room for the setup header; what is longer in the file is not for the loader.
const HEADER_END: usize = 0x290;
/// Boot protocol 2.12 brought `xloadflags`, and with it the promise of a 64-bit entry.
const VERSION_XLOADFLAGS: u16 = 0x020c;
/// `loadflags`: the protected-mode code goes to 1 MiB or above (bzImage, not zImage).
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: has the 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1 << 0;
/// `xloadflags`: kernel, zero page, command line and initrd may lie above 4 GiB; 32 bits of initrd address are all valid then.
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// Offset of the 64-bit entry in the protected-mode code.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader` of one without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// The setup header up to protocol 2.15, little-endian, at 0x1f1 of file and zero page.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SetupHeader {
    setup_sects: u8,
    root_flags: U16,
    syssize: U32,
    ram_size: U16,
    vid_mode: U16,
    root_dev: U16,
    boot_flag: U16,
    jump: [u8; 2],
    header: [u8; 4],
    version: U16,
    realmode_swtch: U32,
    start_sys_seg: U16,
    kernel_version: U16,
    type_of_loader: u8,
    loadflags: u8,
    setup_move_size: U16,
    code32_start: U32,
    ramdisk_image: U32,
    ramdisk_size: U32,
    bootsect_kludge: U32,
    heap_end_ptr: U16,
    ext_loader_ver: u8,
    ext_loader_type: u8,
    cmd_line_ptr: U32,
    initrd_addr_max: U32,
    kernel_alignment: U32,
    relocatable_kernel: u8,
    min_alignment: u8,
    xloadflags: U16,
    cmdline_size: U32,
    hardware_subarch: U32,
    hardware_subarch_data: U64,
    payload_offset: U32,
    payload_length: U32,
    setup_data: U64,
    pref_address: U64,
    init_size: U32,
    handover_offset: U32,
    kernel_info_offset: U32,
}

const _: () = {
    assert!(size_of::<SetupHeader>() == 0x26c - HEADER_OFFSET);
    assert!(offset_of!(SetupHeader, header) == 0x202 - HEADER_OFFSET);
    assert!(offset_of!(SetupHeader, code32_start) == 0x214 - HEADER_OFFSET);
    assert!(offset_of!(SetupHeader, cmd_line_ptr) == 0x228 - HEADER_OFFSET);
    assert!(offset_of!(SetupHeader, xloadflags) == 0x236 - HEADER_OFFSET);
    assert!(offset_of!(SetupHeader, pref_address) == 0x258 - HEADER_OFFSET);
};

/// What a loader needs to know of a bzImage.
#[derive(Clone, Debug)]
pub struct BzImage {
    /// The bytes from 0x1f1 on, as the zero page takes them.
    raw: Vec<u8>,
    header: SetupHeader,
    payload_offset: u64,
    payload_len: u64,
}

impl BzImage {
    /// Reads the setup header of `image`; `None` if it has none.
    ///
    /// # Errors
    /// It has one, and the image is truncated, damaged, or a kernel without the 64-bit entry.
    pub fn parse(image: &(impl ReadAt + ?Sized)) -> Result<Option<Self>, ImageError> {
        let mut start = [0; HEADER_END];
        if image.size() < start.len() as u64 {
            return Ok(None);
        }
        image.read_exact_at(&mut start, 0, "setup header")?;
        let raw = &start[HEADER_OFFSET..];
        let Ok((header, _)) = SetupHeader::read_from_prefix(raw) else { return Ok(None) };
        if header.boot_flag.get() != 0xaa55 || header.header != *b"HdrS" {
            return Ok(None);
        }
        let version = header.version.get();
        let is_64_bit = version >= VERSION_XLOADFLAGS && header.xloadflags.get() & XLF_KERNEL_64 != 0;
        if !is_64_bit || header.loadflags & LOADED_HIGH == 0 {
            return Err(ImageError::No64BitEntry { version });
        }
        // The header ends where its first jump instruction goes: 0x202 plus the instruction's displacement.
        let len = (0x202 - HEADER_OFFSET + usize::from(header.jump[1])).min(raw.len());
        if len < size_of::<SetupHeader>() - 8 {
            return Err(ImageError::BadSetupHeader { field: "jump", value: header.jump[1].into() });
        }

        // 0 stands for 4, for kernels older than the field.
        let setup_sects = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
        let payload_offset = (setup_sects + 1) * 512;
        let need = payload_offset + (u64::from(header.syssize.get()) * 16).saturating_sub(15);
        if header.syssize.get() == 0 {
            return Err(ImageError::BadSetupHeader { field: "syssize", value: 0 });
        }
        if image.size() < need {
            return Err(ImageError::Truncated { part: "protected-mode code", need, size: image.size() });
        }
        Ok(Some(Self { raw: raw[..len].to_vec(), header, payload_offset, payload_len: image.size() - payload_offset }))
    }

    /// The longest command line that it takes, without the NUL.
    fn cmdline_max(&self) -> usize {
        self.header.cmdline_size.get().try_into().unwrap_or(usize::MAX)
    }

    /// Places the kernel, its initrd and its zero page.
    pub(super) fn plan(&self, handover: &Handover<'_>, mut space: Space) -> Result<Plan, Fault> {
        // A relocatable kernel that is loaded lower moves itself to this address anyway, so that it is as good as fixed.
        let at = self.header.pref_address.get();
        let need = self.payload_len.max(self.header.init_size.get().into());
        space.claim(at, need, "code with its working space")?;
        let mut loads = vec![Load {
            from: Role::Kernel,
            offset: self.payload_offset,
            file_len: self.payload_len,
            to: at,
            mem_len: self.payload_len,
        }];

        let mut initrd = (0, 0);
        if let Some(len) = handover.initrd {
            let above = self.header.xloadflags.get() & XLF_CAN_BE_LOADED_ABOVE_4G != 0;
            let to = if above { FOUR_GIB } else { u64::from(self.header.initrd_addr_max.get()) + 1 };
            let start = handover.place_initrd(&mut space, len, at + need, to)?;
            loads.push(Load { from: Role::Initrd, offset: 0, file_len: len, to: start, mem_len: len });
            initrd = (low_word(start), low_word(len));
        }

        let cmdline = cmdline_bytes(handover.cmdline, self.cmdline_max())?;
        let entry = Entry::long(at + ENTRY_64, boot_data::PAGE_TABLES, tables::GDT_REGISTER);
        let entry = Entry { regs: super::entry::Regs { rsi: boot_data::INFO, ..entry.regs }, ..entry };
        let blobs = vec![
            (boot_data::GDT, tables::gdt(&entry.segments).to_vec()),
            (boot_data::PAGE_TABLES, tables::page_tables()),
            (boot_data::CMDLINE, cmdline),
            (boot_data::INFO, self.zero_page(low_word(at), initrd, handover.map, handover.rsdp)),
        ];
        Ok(Plan { loads, blobs, entry, facs: None })
    }

    /// `struct boot_params` (Linux Documentation/arch/x86/zero-page.rst).
    fn zero_page(&self, at: u32, initrd: (u32, u32), map: &[MapEntry], rsdp: u64) -> Vec<u8> {
        const ACPI_RSDP_ADDR: usize = 0x070;
        const E820_ENTRIES: usize = 0x1e8;
        const E820_TABLE: usize = 0x2d0;
        const E820_ENTRY_LEN: usize = 20;
        let mut page = vec![0; 4096];
        page[HEADER_OFFSET..HEADER_OFFSET + self.raw.len()].copy_from_slice(&self.raw);
        let header = SetupHeader {
            type_of_loader: LOADER_UNDEFINED,
            code32_start: at.into(),
            ramdisk_image: initrd.0.into(),
            ramdisk_size: initrd.1.into(),
            cmd_line_ptr: low_word(boot_data::CMDLINE).into(),
            setup_data: 0.into(),
            ..self.header
        };
        let known = size_of::<SetupHeader>().min(self.raw.len());
        page[HEADER_OFFSET..HEADER_OFFSET + known].copy_from_slice(&header.as_bytes()[..known]);
        page[ACPI_RSDP_ADDR..ACPI_RSDP_ADDR + 8].copy_from_slice(&rsdp.to_le_bytes());
        page[E820_ENTRIES] = map.len() as u8;
        for (slot, entry) in page[E820_TABLE..].chunks_exact_mut(E820_ENTRY_LEN).zip(map) {
            slot[..8].copy_from_slice(&entry.start.to_le_bytes());
            slot[8..16].copy_from_slice(&entry.len.to_le_bytes());
            slot[16..].copy_from_slice(&(entry.kind as u32).to_le_bytes());
        }
        page
    }
}

/// The low half of an address or size that was placed below 4 GiB.
fn low_word(value: u64) -> u32 {
    debug_assert!(value < FOUR_GIB);
    value as u32
}
