//! An ELF64 file with one segment and a PVH note (System V gABI; Xen `public/elfnote.h`).

use super::Kernel;

const HEADER_SIZE: u16 = 64;
const PROGRAM_HEADER_SIZE: u16 = 56;
const NOTE_AT: u64 = HEADER_SIZE as u64 + 2 * PROGRAM_HEADER_SIZE as u64;
const SEGMENT_AT: u64 = 0x1000;

pub(super) fn pvh(kernel: &Kernel) -> Vec<u8> {
    let note = note(kernel.entry());
    let mut file = Vec::new();

    let executable = 2u16;
    let x86_64 = 62u16;
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend(executable.to_le_bytes());
    file.extend(x86_64.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    file.extend(u64::from(kernel.entry()).to_le_bytes());
    file.extend(u64::from(HEADER_SIZE).to_le_bytes()); // program headers
    file.extend(0u64.to_le_bytes()); // no section headers
    file.extend(0u32.to_le_bytes());
    for half in [HEADER_SIZE, PROGRAM_HEADER_SIZE, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }

    let address = u64::from(kernel.load_address());
    let loaded = kernel.bytes().len() as u64;
    let in_memory = u64::from(kernel.memory_end()) - address;
    let length = note.len() as u64;
    program_header(&mut file, 1, 7, [SEGMENT_AT, address, address, loaded, in_memory, 0x1000]);
    program_header(&mut file, 4, 4, [NOTE_AT, 0, 0, length, length, 4]);

    file.extend(note);
    file.resize(SEGMENT_AT as usize, 0);
    file.extend(kernel.bytes());
    file
}

fn program_header(file: &mut Vec<u8>, kind: u32, flags: u32, rest: [u64; 6]) {
    file.extend(kind.to_le_bytes());
    file.extend(flags.to_le_bytes());
    file.extend(rest.iter().flat_map(|word| word.to_le_bytes()));
}

/// XEN_ELFNOTE_PHYS32_ENTRY.
fn note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 8, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(u64::from(entry).to_le_bytes());
    note
}
