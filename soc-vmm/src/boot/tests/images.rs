//! Small images with recognisable content.

/// Where the images below are loaded.
pub(super) const LOAD_AT: u64 = 0x100_0000;
/// Bytes that the bzImage asks for beyond its own.
pub(super) const INIT_SIZE: u32 = 0x30_0000;

/// `len` bytes that tell their place.
pub(super) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 7 % 253) as u8).collect()
}

/// A bzImage of boot protocol 2.15 with two setup sectors, whose protected-mode code is `payload`.
pub(super) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 3 * 512];
    put(&mut image, 0x1f1, &[2]);
    put(&mut image, 0x1f4, &(payload.len() as u32).div_ceil(16).to_le_bytes());
    put(&mut image, 0x1fe, &0xaa55u16.to_le_bytes());
    put(&mut image, 0x200, &[0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020fu16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &255u32.to_le_bytes());
    put(&mut image, 0x258, &LOAD_AT.to_le_bytes());
    put(&mut image, 0x260, &INIT_SIZE.to_le_bytes());
    image.extend(payload);
    image
}

/// A segment of an ELF image.
pub(super) struct Segment<'a> {
    pub(super) kind: u32,
    pub(super) virt: u64,
    pub(super) phys: u64,
    pub(super) bytes: &'a [u8],
    pub(super) mem_len: u64,
}

/// A loaded segment at its own address, with `zeros` bytes behind.
pub(super) fn load(phys: u64, bytes: &[u8], zeros: u64) -> Segment<'_> {
    Segment { kind: 1, virt: phys, phys, bytes, mem_len: bytes.len() as u64 + zeros }
}

/// A note segment.
pub(super) fn notes(bytes: &[u8]) -> Segment<'_> {
    Segment { kind: 4, virt: 0, phys: 0, bytes, mem_len: bytes.len() as u64 }
}

/// A note, padded to 4 bytes.
pub(super) fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    note.extend((name.len() as u32).to_le_bytes());
    note.extend((desc.len() as u32).to_le_bytes());
    note.extend(kind.to_le_bytes());
    for part in [name, desc] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// What the loader looks for: a note before, then Xen's.
pub(super) fn pvh_notes(entry: u64) -> Vec<u8> {
    [note(b"GNU\0", 3, &[1; 20]), note(b"Xen\0", 5, b"x"), note(b"Xen\0", 18, &entry.to_le_bytes())].concat()
}

/// An ELF64 image.
pub(super) fn elf64(entry: u64, segments: &[Segment<'_>]) -> Vec<u8> {
    let mut image = vec![0; 64 + 56 * segments.len()];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0, 1]);
    put(&mut image, 24, &entry.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &[56, 0, segments.len() as u8, 0]);
    for (index, segment) in segments.iter().enumerate() {
        let at = 64 + 56 * index;
        let offset = image.len() as u64;
        put(&mut image, at, &segment.kind.to_le_bytes());
        let fields = [offset, segment.virt, segment.phys, segment.bytes.len() as u64, segment.mem_len, 4];
        put(&mut image, at + 8, &fields.map(u64::to_le_bytes).concat());
        image.extend(segment.bytes);
    }
    image
}

/// An ELF32 image.
pub(super) fn elf32(entry: u32, segments: &[Segment<'_>]) -> Vec<u8> {
    let mut image = vec![0; 52 + 32 * segments.len()];
    put(&mut image, 0, b"\x7fELF\x01\x01\x01");
    put(&mut image, 16, &[2, 0, 3, 0, 1]);
    put(&mut image, 24, &entry.to_le_bytes());
    put(&mut image, 28, &52u32.to_le_bytes());
    put(&mut image, 42, &[32, 0, segments.len() as u8, 0]);
    for (index, segment) in segments.iter().enumerate() {
        let offset = image.len() as u32;
        let fields = [
            segment.kind,
            offset,
            segment.virt as u32,
            segment.phys as u32,
            segment.bytes.len() as u32,
            segment.mem_len as u32,
            0,
            4,
        ];
        put(&mut image, 52 + 32 * index, &fields.map(u32::to_le_bytes).concat());
        image.extend(segment.bytes);
    }
    image
}

/// A multiboot header with `flags`, and address fields behind.
pub(super) fn multiboot_header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let words = [magic, flags, 0u32.wrapping_sub(magic).wrapping_sub(flags)];
    words.iter().chain(addresses).flat_map(|word| word.to_le_bytes()).collect()
}

pub(super) fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}
