//! Each format: what lies where after loading, and how the first vCPU starts.

use std::path::Path;

use super::images::*;
use crate::acpi::AcpiConfig;
use crate::boot::test_memory::TestMemory;
use crate::boot::*;
use crate::layout::boot_data;

const RAM: u64 = 64 << 20;
const CMDLINE: &str = "console=ttyS0 quiet";

/// A loaded guest.
struct Booted {
    plan: BootPlan,
    memory: TestMemory,
}

impl Booted {
    fn u32_at(&self, addr: u64) -> u64 {
        u32::from_le_bytes(self.memory.bytes(addr, 4).try_into().unwrap()).into()
    }

    fn u64_at(&self, addr: u64) -> u64 {
        u64::from_le_bytes(self.memory.bytes(addr, 8).try_into().unwrap())
    }

    fn assert_zeros(&self, addr: u64, len: usize) {
        assert!(self.memory.bytes(addr, len).iter().all(|byte| *byte == 0));
    }

    fn assert_cmdline(&self, addr: u64) {
        assert_eq!(self.memory.bytes(addr, CMDLINE.len() + 1), [CMDLINE.as_bytes(), b"\0"].concat());
    }
}

fn plan(dir: &Path, kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<BootPlan, BootError> {
    let kernel_path = dir.join("kernel");
    std::fs::write(&kernel_path, kernel).unwrap();
    let initrd = initrd.map(|bytes| {
        std::fs::write(dir.join("initrd"), bytes).unwrap();
        dir.join("initrd")
    });
    let source = BootSource::Kernel { kernel: kernel_path, initrd, cmdline: cmdline.into() };
    let acpi = AcpiConfig { apic_ids: vec![0, 1], serial_ports: 1, keyboard: true, ..AcpiConfig::default() };
    BootPlan::new(&source, &MemoryLayout::new(RAM).unwrap(), &acpi)
}

fn boot(kernel: &[u8], initrd: Option<&[u8]>) -> Booted {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan(dir.path(), kernel, initrd, CMDLINE).unwrap();
    let memory = TestMemory::new(RAM);
    memory.load(&plan).unwrap();
    assert!(plan.roms().is_empty());
    assert_eq!(memory.bytes(0xe_0000, 8), b"RSD PTR ");
    Booted { plan, memory }
}

/// The whole chain of an error, as it is shown.
fn refusal(kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let error = plan(dir.path(), kernel, initrd, cmdline).unwrap_err();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text.replace(&format!("{}/", dir.path().display()), "")
}

#[test]
fn bzimage_starts_in_long_mode_with_a_zero_page() {
    let payload = pattern(0x21_0003);
    let initrd = pattern(0x1_2345);
    let booted = boot(&bzimage(&payload), Some(&initrd));
    assert_eq!(booted.memory.bytes(LOAD_AT, payload.len()), payload);

    let entry = booted.plan.entry();
    assert_eq!(entry.regs.rip, LOAD_AT + 0x200);
    assert_eq!((entry.cr0 & 1 << 31, entry.cr4, entry.efer), (1 << 31, 1 << 5, 0x500));
    assert!(entry.segments.cs.long && !entry.segments.cs.default_big);
    assert_eq!(entry.start, entry::Start::Running);

    let page = entry.regs.rsi;
    assert_eq!(booted.memory.bytes(page + 0x202, 4), b"HdrS");
    assert_eq!(booted.memory.bytes(page + 0x210, 1), [0xff]);
    assert_eq!(booted.u32_at(page + 0x214), LOAD_AT);
    assert_eq!(booted.u64_at(page + 0x070), 0xe_0000);
    booted.assert_cmdline(booted.u32_at(page + 0x228));
    let (start, len) = (booted.u32_at(page + 0x218), booted.u32_at(page + 0x21c));
    assert_eq!(booted.memory.bytes(start, len as usize), initrd);
    assert_eq!(start % 4096, 0);
    assert!(start >= LOAD_AT + u64::from(INIT_SIZE));

    // The map: RAM up to the ACPI tables, which hold what the RSDP points to.
    let entries = booted.memory.bytes(page + 0x1e8, 1)[0];
    let map: Vec<_> = (0..entries.into())
        .map(|index| page + 0x2d0 + 20 * index)
        .map(|at| (booted.u64_at(at), booted.u64_at(at + 8), booted.u32_at(at + 16)))
        .collect();
    assert_eq!(map[0], (0, 0x9_fc00, 1));
    let acpi = map.iter().find(|entry| entry.2 == 3).unwrap();
    assert_eq!(acpi.0 + acpi.1, RAM);
    assert!((acpi.0..RAM).contains(&booted.u64_at(0xe_0000 + 24)));
    assert!(start + len <= acpi.0 - 4096);

    // Page tables and descriptors are where the registers say.
    assert_eq!(booted.u64_at(entry.cr3) & 1, 1);
    assert_ne!(booted.u64_at(entry.gdt.base + u64::from(entry.segments.cs.selector)), 0);
}

#[test]
fn an_initrd_stays_below_the_limit_of_old_kernels() {
    let mut image = bzimage(&pattern(64));
    put(&mut image, 0x22c, &0x17f_ffffu32.to_le_bytes());
    let booted = boot(&image, Some(&[1; 4096]));
    let page = booted.plan.entry().regs.rsi;
    assert_eq!(booted.u32_at(page + 0x218), 0x17f_f000);

    // … which is void where a kernel takes any address.
    put(&mut image, 0x236, &3u16.to_le_bytes());
    let booted = boot(&image, Some(&[1; 4096]));
    assert!(booted.u32_at(page + 0x218) > 0x180_0000);
}

#[test]
fn a_pvh_elf_starts_at_its_note() {
    let (text, data, initrd) = (pattern(5000), pattern(100), pattern(9000));
    let notes_bytes = pvh_notes(LOAD_AT + 0x40);
    let segments = [load(LOAD_AT, &text, 0), load(LOAD_AT + 0x10_0000, &data, 0x12_3456), notes(&notes_bytes)];
    let image = elf64(0xffff_ffff_8100_0000, &segments);
    let booted = boot(&image, Some(&initrd));
    assert_eq!(booted.memory.bytes(LOAD_AT, text.len()), text);
    assert_eq!(booted.memory.bytes(LOAD_AT + 0x10_0000, data.len()), data);
    booted.assert_zeros(LOAD_AT + 0x10_0000 + 100, 0x12_3456);

    let entry = booted.plan.entry();
    assert_eq!((entry.regs.rip, entry.cr0, entry.cr4, entry.efer), (LOAD_AT + 0x40, 0x11, 0, 0));
    assert!(entry.segments.cs.default_big && !entry.segments.cs.long);
    assert_eq!((entry.segments.cs.limit, entry.segments.tr.limit), (u32::MAX, 0x67));
    let info = entry.regs.rbx;
    assert_eq!((booted.u32_at(info), booted.u32_at(info + 4)), (0x336e_c578, 1));
    booted.assert_cmdline(booted.u64_at(info + 24));
    assert_eq!(booted.u64_at(info + 32), 0xe_0000);
    assert_eq!(booted.u32_at(info + 12), 1);
    let module = booted.u64_at(info + 16);
    let (start, len) = (booted.u64_at(module), booted.u64_at(module + 8));
    assert_eq!(booted.memory.bytes(start, len as usize), initrd);
    let map = booted.u64_at(info + 40);
    let last = map + 24 * (booted.u32_at(info + 48) - 1);
    assert_eq!((booted.u64_at(map), booted.u64_at(map + 8), booted.u32_at(map + 16)), (0, 0x9_fc00, 1));
    assert_eq!((booted.u64_at(last), booted.u32_at(last + 16)), (0xfeff_c000, 2));
}

#[test]
fn the_pvh_note_is_found_in_elf32_and_with_a_short_entry() {
    let note = note(b"Xen\0", 18, &0x20_0010u32.to_le_bytes());
    let text = pattern(64);
    let booted = boot(&elf32(0, &[load(0x20_0000, &text, 0), notes(&note)]), None);
    assert_eq!(booted.plan.entry().regs.rip, 0x20_0010);
    assert_eq!(booted.u32_at(booted.plan.entry().regs.rbx + 12), 0);
}

#[test]
fn a_multiboot_elf_gets_its_information() {
    let mut text = multiboot_header(3, &[]);
    text.extend(pattern(3000));
    // Linked high: the entry is a virtual address.
    let segment = Segment { virt: 0xc040_0000, ..load(0x40_0000, &text, 8192) };
    let booted = boot(&elf32(0xc040_0020, &[segment]), Some(b"NR_CPUS=2"));
    assert_eq!(booted.memory.bytes(0x40_0000, text.len()), text);
    booted.assert_zeros(0x40_0000 + text.len() as u64, 8192);

    let regs = booted.plan.entry().regs;
    assert_eq!((regs.rip, regs.rax), (0x40_0020, 0x2bad_b002));
    let info = regs.rbx;
    assert_eq!(booted.u32_at(info) & 0x4d, 0x4d);
    assert_eq!(booted.u32_at(info + 4), 639);
    let upper = booted.u32_at(info + 8);
    assert!(upper > 62 << 10 && upper < 63 << 10, "{upper}");
    booted.assert_cmdline(booted.u32_at(info + 16));
    assert_eq!(booted.u32_at(info + 20), 1);
    let module = booted.u32_at(info + 24);
    let (start, end) = (booted.u32_at(module), booted.u32_at(module + 4));
    assert_eq!(booted.memory.bytes(start, (end - start) as usize), b"NR_CPUS=2");
    let (len, map) = (booted.u32_at(info + 44), booted.u32_at(info + 48));
    assert_eq!((len % 24, booted.u32_at(map)), (0, 20));
    assert_eq!((booted.u64_at(map + 4), booted.u64_at(map + 12), booted.u32_at(map + 20)), (0, 0x9_fc00, 1));
    assert_eq!(booted.memory.bytes(booted.u32_at(info + 64), 9), b"outboard\0");
}

#[test]
fn a_flat_multiboot_image_goes_where_its_header_says() {
    // 16 bytes that are not loaded, then code that begins 32 bytes before the header.
    let mut image = pattern(48);
    image.extend(multiboot_header(1 << 16, &[0x20_0020, 0x20_0000, 0x20_0100, 0x20_1000, 0x20_0044]));
    image.extend(pattern(1000));
    let booted = boot(&image, None);
    assert_eq!(booted.memory.bytes(0x20_0000, 0x100), image[16..][..0x100]);
    booted.assert_zeros(0x20_0100, 0xf00);
    assert_eq!(booted.memory.bytes(0x20_1000, 1), [0xa5]);
    assert_eq!(booted.plan.entry().regs.rip, 0x20_0044);

    // No ends: all of the file, no zeros.
    put(&mut image, 48 + 20, &[0; 8]);
    let booted = boot(&image, None);
    assert_eq!(booted.memory.bytes(0x20_0000, image.len() - 16), image[16..]);
}

#[test]
fn firmware_lies_below_four_gib() {
    for len in [64usize << 10, 128 << 10, 256 << 10, 4 << 20] {
        let dir = tempfile::tempdir().unwrap();
        let code = dir.path().join("bios.bin");
        let bytes = pattern(len);
        std::fs::write(&code, &bytes).unwrap();
        let acpi = AcpiConfig { apic_ids: vec![0], serial_ports: 1, keyboard: true, ..AcpiConfig::default() };
        let plan = BootPlan::new(&BootSource::Firmware { code, nvram: None }, &MemoryLayout::new(RAM).unwrap(), &acpi)
            .unwrap();
        let [rom] = *plan.roms() else { panic!("{:?}", plan.roms()) };
        assert_eq!((rom.start + rom.len, rom.len), (1 << 32, len as u64));
        let memory = TestMemory::with_rom(RAM, Some(rom));
        memory.load(&plan).unwrap();
        assert_eq!(memory.bytes(rom.start, len), bytes);
        let entry = plan.entry();
        assert_eq!(entry.segments.cs.base + entry.regs.rip, 0xffff_fff0);
        assert_eq!((entry.segments.cs.selector, entry.cr0 & 1), (0xf000, 0));
    }
}

#[test]
fn loading_again_restores_what_the_guest_overwrote() {
    let text = pattern(100);
    let note = pvh_notes(LOAD_AT);
    let dir = tempfile::tempdir().unwrap();
    let image = elf64(0, &[load(LOAD_AT, &text, 5000), notes(&note)]);
    let plan = plan(dir.path(), &image, None, CMDLINE).unwrap();
    let memory = TestMemory::new(RAM);
    memory.load(&plan).unwrap();
    // A new kernel is installed by rename, and the guest runs.
    std::fs::write(dir.path().join("new"), b"x").unwrap();
    std::fs::rename(dir.path().join("new"), dir.path().join("kernel")).unwrap();
    memory.write(LOAD_AT, &[0xee; 4096]).unwrap();
    memory.load(&plan).unwrap();
    assert_eq!(memory.bytes(LOAD_AT, 100), text);
    assert!(memory.bytes(LOAD_AT + 100, 5000).iter().all(|byte| *byte == 0));
}

#[test]
fn images_are_loaded_a_bounded_step_at_a_time() {
    let text = pattern(0x10_0000 * 2 + 4097);
    let note = pvh_notes(LOAD_AT);
    let dir = tempfile::tempdir().unwrap();
    let image = elf64(0, &[load(LOAD_AT, &text, 0x10_0000 + 5), notes(&note)]);
    let plan = plan(dir.path(), &image, None, CMDLINE).unwrap();
    let memory = TestMemory::new(RAM);
    memory.load(&plan).unwrap();
    assert_eq!(memory.writes()[..5], [0x10_0000, 0x10_0000, 4097, 0x10_0000, 5]);
    assert_eq!(memory.bytes(LOAD_AT, text.len()), text);
    plan.check().unwrap();
    std::fs::File::options().write(true).open(dir.path().join("kernel")).unwrap().set_len(100).unwrap();
    assert!(plan.check().unwrap_err().to_string().contains("kernel"));
}

#[test]
fn application_processors_wait() {
    let entry = Entry::application_processor(0x806f8);
    assert_eq!(entry.start, entry::Start::WaitForSipi);
    assert_eq!((entry.regs.rdx, entry.cr0), (0x806f8, 0x6000_0010));
}

#[test]
fn refusals_name_the_file_the_reason_and_the_remedy() {
    let good = bzimage(&pattern(4096));
    let with = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        put(&mut image, at, bytes);
        image
    };
    let note = pvh_notes(LOAD_AT);
    let text = pattern(64);
    let elf_at = |phys| elf64(0, &[load(phys, &text, 0), notes(&note)]);
    let multiboot = |flags, addresses: &[u32]| [multiboot_header(flags, addresses), vec![0; 64]].concat();
    type Case<'a> = (&'a str, &'a [u8], Option<&'a [u8]>, &'a str);
    let cases: &[Case<'_>] = &[
        ("kernel: it is no bzImage, no ELF", b"#!/bin/sh\n", None, ""),
        ("kernel: it is truncated: its protected-mode code", &good[..good.len() - 17], None, ""),
        ("kernel: its boot protocol 2.11 has no 64-bit entry", &with(0x206, &[0x0b, 2]), None, ""),
        ("kernel: its boot protocol 2.15 has no 64-bit entry", &with(0x236, &[0, 0]), None, ""),
        ("kernel: its setup header is damaged (syssize is 0x0)", &with(0x1f4, &[0; 4]), None, ""),
        ("kernel: its setup header is damaged (jump is 0x2)", &with(0x201, &[2]), None, ""),
        ("kernel: its code with its working space needs guest memory", &with(0x260, &[0, 0, 0, 4]), None, ""),
        ("kernel: its code with its working space needs guest memory", &with(0x258, &[0xff; 8]), None, ""),
        ("kernel: its command line has 256 bytes and it takes at most 255", &good, None, &"x".repeat(256)),
        ("kernel: its command line has a character", &good, None, "a\nb"),
        ("initrd: it is empty", &good, Some(b""), ""),
        ("initrd: it needs 50331648 bytes of free guest memory", &good, Some(&vec![0; 48 << 20]), ""),
        ("kernel: it is an ELF image without a PVH note", &elf64(0, &[load(LOAD_AT, &text, 0)]), None, ""),
        ("which is taken by the loader's own tables", &elf_at(boot_data::INFO), None, ""),
        ("which is reserved by the platform", &elf_at(0xf_0000), None, ""),
        ("which is not all RAM", &elf_at(0xa_0000), None, ""),
        ("which is not all RAM", &elf_at(1 << 32), None, ""),
        ("which is not all RAM", &elf_at(u64::MAX), None, ""),
        ("kernel: its multiboot header demands features 0x4", &multiboot(4, &[]), None, ""),
        ("it has a multiboot 1 header, but is no ELF", &multiboot(0, &[]), None, ""),
        ("the addresses in its multiboot header", &multiboot(1 << 16, &[0, 0x10_0000, 0, 0, 0]), None, ""),
        ("kernel: it is truncated: its code", &multiboot(1 << 16, &[0x10_0000, 0x10_0000, 0x10_1000, 0, 0]), None, ""),
    ];
    for (expected, kernel, initrd, cmdline) in cases {
        let text = refusal(kernel, *initrd, cmdline);
        assert!(text.starts_with("can't boot with ") && text.contains(expected), "{text:?} lacks {expected:?}");
        assert!(!text.contains('\n') && text.rsplit(':').next().is_some_and(|remedy| remedy.len() > 8), "{text:?}");
    }
}

#[test]
fn a_kernel_that_is_loaded_again_finds_the_processors_that_are_there_by_then() {
    let dir = tempfile::tempdir().unwrap();
    let layout = MemoryLayout::new(RAM).unwrap();
    let mut plan = plan(dir.path(), &bzimage(&pattern(0x1000)), None, CMDLINE).unwrap();
    let memory = TestMemory::new(RAM);
    let mut flags = |absent: &[usize]| {
        let absent = absent.iter().copied().collect();
        let acpi =
            AcpiConfig { apic_ids: vec![0, 1], absent, serial_ports: 1, keyboard: true, ..AcpiConfig::default() };
        plan.describe(&layout, &acpi).unwrap();
        memory.load(&plan).unwrap();
        let facs = plan.waking_vector().unwrap() & !0xfff;
        let tables = memory.bytes(facs, (layout.low_end() - facs) as usize);
        let madt = tables.windows(4).position(|window| window == b"APIC").unwrap();
        assert_eq!(tables[madt..madt + 64].iter().filter(|byte| **byte == 0xa5).count(), 0);
        let local = |n: usize| u32::from_le_bytes(tables[madt + 44 + 8 * n + 4..][..4].try_into().unwrap());
        (local(0), local(1))
    };
    assert_eq!((flags(&[]), flags(&[1]), flags(&[])), ((1, 1), (1, 2), (1, 1)));
}

#[test]
fn firmware_of_a_wrong_size_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let code = dir.path().join("bios.bin");
    let acpi = AcpiConfig { apic_ids: vec![0], serial_ports: 1, keyboard: true, ..AcpiConfig::default() };
    for len in [1, 4097, (16 << 20) + 4096] {
        std::fs::File::create(&code).unwrap().set_len(len).unwrap();
        let source = BootSource::Firmware { code: code.clone(), nvram: None };
        let error = BootPlan::new(&source, &MemoryLayout::new(RAM).unwrap(), &acpi).unwrap_err();
        assert!(matches!(
            error,
            BootError::File { role: Role::Firmware, source: ImageError::FirmwareSize { size }, .. } if size == len
        ));
    }
}

#[test]
fn more_processors_than_acpi_describes_are_refused() {
    let source = BootSource::Kernel { kernel: "/nonexistent".into(), initrd: None, cmdline: String::new() };
    let acpi = AcpiConfig { apic_ids: (0..2000).collect(), serial_ports: 1, keyboard: true, ..AcpiConfig::default() };
    let error = BootPlan::new(&source, &MemoryLayout::new(RAM).unwrap(), &acpi).unwrap_err();
    assert!(error.to_string().contains("2000 vCPUs"), "{error}");
}
