//! The forms a payload is loaded in, seen by readers of others.

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use payloads::{Image, Kernel, Privilege, pio, real};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

fn kernel() -> Kernel {
    match pio::pio(Privilege::Cpl0).unwrap().image {
        Image::Kernel(kernel) => kernel,
        Image::Firmware(_) => panic!("a firmware"),
    }
}

#[test]
fn pvh_elf() {
    let kernel = kernel();
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
    let mut file = std::io::Cursor::new(kernel.pvh_elf());
    let loaded = Elf::load(&memory, None, &mut file, None).unwrap();
    assert_eq!(loaded.pvh_boot_cap, PvhBootCapability::PvhEntryPresent(GuestAddress(kernel.entry().into())));
    let mut bytes = vec![0; kernel.bytes().len()];
    memory.read_slice(&mut bytes, GuestAddress(kernel.load_address().into())).unwrap();
    assert_eq!(bytes, kernel.bytes());
}

#[test]
fn multiboot() {
    let kernel = kernel();
    let file = kernel.multiboot();
    let word = |index: usize| u32::from_le_bytes(std::array::from_fn(|byte| file[4 * index + byte]));
    let [magic, flags, checksum, header, load, load_end, bss_end, entry] = std::array::from_fn(word);
    assert_eq!((magic, flags), (0x1bad_b002, 1 << 16));
    assert_eq!(magic.wrapping_add(flags).wrapping_add(checksum), 0);
    assert_eq!((header, load_end - load), (load, file.len() as u32));
    assert_eq!((bss_end, entry), (kernel.memory_end(), kernel.entry()));
    let offset = (kernel.load_address() - load) as usize;
    assert_eq!(&file[offset..], kernel.bytes());
}

#[test]
fn firmware_begins_at_the_reset_vector() {
    let (option, bytes) = real::real_mode().unwrap().file();
    assert_eq!((option, bytes.len()), ("--firmware", 0x1_0000));
    // jmp f000:0000
    assert_eq!(bytes[0xfff0..0xfff5], [0xea, 0, 0, 0, 0xf0]);
}

#[test]
fn names_are_one_each() {
    let mut names: Vec<_> = payloads::catalogue(2).unwrap().iter().map(|payload| payload.name).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
}
