use super::*;

fn config(sockets: u16, ram: u64) -> SmbiosConfig {
    SmbiosConfig {
        uuid: *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff",
        system: SystemNames { serial: "a\0b\n".into(), ..SystemNames::default() },
        processors: Processors {
            sockets,
            cores: 2,
            threads: 300,
            signature: [0x806f8, 0x1f8b_fbff],
            manufacturer: "GenuineIntel".into(),
            version: "A processor".into(),
        },
        memory: MemoryLayout::new(ram).unwrap(),
    }
}

/// The structures: type, handle, fields from the header on, strings.
fn parse(mut rest: &[u8]) -> Vec<(u8, u16, Vec<u8>, Vec<String>)> {
    let mut all = Vec::new();
    while !rest.is_empty() {
        let (fields, after) = rest.split_at(rest[1].into());
        let end = after.windows(2).position(|pair| pair == [0, 0]).unwrap();
        let strings = after[..end].split(|byte| *byte == 0).filter(|text| !text.is_empty());
        let strings = strings.map(|text| String::from_utf8(text.to_vec()).unwrap()).collect();
        all.push((fields[0], u16::from_le_bytes([fields[2], fields[3]]), fields.to_vec(), strings));
        rest = &after[end + 2..];
    }
    all
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn a_kernel_finds_the_structures_by_the_entry_point() {
    let placed = Smbios::for_kernel(&config(2, 1 << 30)).unwrap().placed();
    assert!(placed.starts_with(b"_SM3_"));
    assert_eq!(placed[..24].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    let len = u32::from_le_bytes(placed[12..16].try_into().unwrap()) as usize;
    let at = usize::try_from(u64_at(&placed, 16) - SMBIOS_START).unwrap();
    assert_eq!(at + len, placed.len());
    let all = parse(&placed[at..]);
    let kinds: Vec<_> = all.iter().map(|(kind, ..)| *kind).collect();
    assert_eq!(kinds, [0, 1, 3, 4, 4, 16, 17, 19, 32, 127]);
    let mut handles: Vec<_> = all.iter().map(|(_, handle, ..)| *handle).collect();
    handles.dedup();
    assert_eq!(handles.len(), all.len());
    // The lengths of version 3.0 of the specification.
    let lengths: Vec<_> = all.iter().map(|(_, _, fields, _)| fields.len()).collect();
    assert_eq!(lengths, [0x1a, 0x1b, 0x16, 0x30, 0x30, 0x17, 0x28, 0x1f, 0x0b, 4]);
}

#[test]
fn firmware_tells_of_itself() {
    let smbios = Smbios::for_firmware(&config(1, 1 << 30)).unwrap();
    assert_eq!(parse(&smbios.structures)[0].0, 1);
    let mut guest = crate::devices::fw_cfg::test_guest::Guest::new(|builder| smbios.add_files(builder));
    assert_eq!(guest.file("etc/smbios/smbios-anchor").1, 24);
    assert_eq!(guest.file("etc/smbios/smbios-tables").1 as usize, smbios.structures.len());
}

#[test]
fn names_and_numbers_are_where_readers_look() {
    let smbios = Smbios::for_kernel(&config(1, 1 << 30)).unwrap();
    let all = parse(&smbios.structures);
    let of = |kind: u8| all.iter().find(|structure| structure.0 == kind).unwrap();
    let (_, _, system, strings) = of(1);
    assert_eq!(strings[..], ["Outboard", "Outboard VM", "q35", "ab"]);
    assert_eq!(system[4..8], [1, 2, 3, 4]);
    assert_eq!(system[8..24], *b"\x33\x22\x11\x00\x55\x44\x77\x66\x88\x99\xaa\xbb\xcc\xdd\xee\xff");
    let processor = &of(4).2;
    assert_eq!(u64_at(processor, 8), 0x1f8b_fbff_0008_06f8);
    // Cores and threads: more than 255 are in the wider field.
    assert_eq!((&processor[0x23..0x26], &processor[0x2a..0x30]), (&[2, 2, 255][..], &[2, 0, 2, 0, 44, 1][..]));
}

#[test]
fn memory_is_told_once_and_wholly() {
    for (ram, devices, ranges) in [(256 << 20, 1, 1), (0xb000_0000, 1, 2), (100 << 30, 7, 2), (40 << 40, 16, 2)] {
        let smbios = Smbios::for_kernel(&config(1, ram)).unwrap();
        let all = parse(&smbios.structures);
        let of = |kind: u8| all.iter().filter(move |structure| structure.0 == kind).map(|structure| &structure.2);
        let sizes = of(17).map(|device| match u16::from_le_bytes([device[12], device[13]]) {
            0x7fff => u64::from(u32::from_le_bytes(device[28..32].try_into().unwrap())) << 20,
            mib => u64::from(mib) << 20,
        });
        assert_eq!((of(17).count(), sizes.sum::<u64>()), (devices, ram));
        let array = of(16).next().unwrap();
        let narrow = u32::from_le_bytes(array[7..11].try_into().unwrap());
        let told = if narrow == 1 << 31 { u64_at(array, 15) } else { u64::from(narrow) << 10 };
        assert_eq!((told, usize::from(array[13])), (ram, devices));
        let lens = of(19).map(|range| {
            let [start, end] = [4, 8].map(|at| u32::from_le_bytes(range[at..at + 4].try_into().unwrap()));
            match start {
                u32::MAX => u64_at(range, 23) + 1 - u64_at(range, 15),
                _ => (u64::from(end) + 1 - u64::from(start)) << 10,
            }
        });
        assert_eq!((of(19).count(), lens.sum::<u64>()), (ranges, ram));
    }
}

#[test]
fn more_sockets_than_fit_are_refused() {
    assert!(Smbios::for_kernel(&config(64, 1 << 30)).is_ok());
    let error = Smbios::for_kernel(&config(1024, 1 << 30)).unwrap_err();
    assert!(error.to_string().contains("fewer sockets"));
}
