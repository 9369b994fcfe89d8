//! Damaged images: never a panic, no unbounded work, and whatever is still accepted lies in RAM.

use proptest::prelude::*;

use super::images::*;
use crate::acpi::{AcpiConfig, AcpiTables};
use crate::boot::*;

/// One image of each format.
fn images() -> Vec<Vec<u8>> {
    let text = pattern(600);
    let note = pvh_notes(LOAD_AT);
    let multiboot = [multiboot_header(3, &[]), pattern(200)].concat();
    let flat = [multiboot_header(1 << 16, &[0x20_0000, 0x20_0000, 0, 0x20_1000, 0x20_0040]), pattern(200)].concat();
    vec![
        bzimage(&text),
        elf64(LOAD_AT, &[load(LOAD_AT, &text, 100), notes(&note)]),
        elf32(0x20_0000, &[load(0x20_0000, &text, 100), notes(&note)]),
        elf32(0x20_0000, &[load(0x20_0000, &multiboot, 100)]),
        flat,
    ]
}

/// Places `image`; what comes out is checked against the layout.
fn place(image: &[u8], initrd: Option<u64>) -> Option<Plan> {
    let layout = MemoryLayout::new(48 << 20).unwrap();
    let config = AcpiConfig { apic_ids: vec![0], serial_ports: 1, keyboard: true, ..AcpiConfig::default() };
    let acpi = AcpiTables::new(&config, layout.low_end()).unwrap();
    let plan = Plan::for_kernel(image, initrd, "x", &layout, &acpi).ok()?;
    let mut pieces: Vec<_> = plan.pieces().filter(|(_, len)| *len != 0).collect();
    pieces.sort_unstable();
    for (to, len) in &pieces {
        assert!(layout.is_low_ram(*to, *len), "{to:#x}+{len:#x}");
    }
    for pair in pieces.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pieces:x?} overlap");
    }
    for load in plan.loads.iter().filter(|load| load.from == Role::Kernel) {
        assert!(load.file_len <= load.mem_len && load.offset + load.file_len <= image.len() as u64);
    }
    Some(plan)
}

#[test]
fn the_images_are_good_before_they_are_damaged() {
    assert!(images().iter().all(|image| place(image, Some(5000)).is_some()));
}

#[test]
fn every_truncation_is_survived() {
    for image in images() {
        for len in 0..image.len() {
            place(&image[..len], None);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_headers_are_survived(
        which in 0usize..5,
        damage in prop::collection::vec((0usize..0x2a0, prop_oneof![Just(0u8), Just(0xff), Just(0x80), any::<u8>()], 1usize..9), 1..6),
        initrd in prop::option::of(any::<u64>()),
    ) {
        let mut image = images().swap_remove(which);
        for (at, value, len) in damage {
            let start = at % image.len();
            let end = (start + len).min(image.len());
            image[start..end].fill(value);
        }
        place(&image, initrd);
    }

    #[test]
    fn arbitrary_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..2000), magic in 0usize..4) {
        let mut image = bytes;
        let magic: &[u8] = [&b""[..], b"\x7fELF\x01\x01\x01", b"\x7fELF\x02\x01\x01", b"\x02\xb0\xad\x1b"][magic];
        if image.len() >= magic.len() {
            put(&mut image, 0, magic);
        }
        place(&image, None);
    }
}
