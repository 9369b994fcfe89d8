use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::test_guest::{Guest, Ram};
use super::*;

const SELECT: u32 = 1 << 3;
const READ: u32 = 1 << 1;
const SKIP: u32 = 1 << 2;
const WRITE: u32 = 1 << 4;

#[test]
fn the_data_port_gives_items_byte_by_byte() {
    let mut guest = Guest::new(|builder| builder);
    guest.select(key::SIGNATURE);
    assert_eq!(guest.read(6), *b"QEMU\0\0");
    guest.select(key::ID | WRITE_CHANNEL);
    assert_eq!(guest.read(4), [3, 0, 0, 0]);
    guest.select(0x3eff);
    assert_eq!(guest.read(2), [0, 0]);
    guest.select(key::IRQ0_OVERRIDE);
    assert_eq!(guest.read(4), [1, 0, 0, 0]);
    // Only a word selects, and only a byte is read.
    guest.access(0, 1, Some(0));
    guest.access(0, 4, Some(0));
    assert_eq!(guest.access(0, 2, None), 0xffff);
    guest.select(key::SIGNATURE);
    assert_eq!(guest.read(1), *b"Q");
}

#[test]
fn the_dma_port_tells_that_it_is_there() {
    let mut guest = Guest::new(|builder| builder);
    let word = guest.access(2, 4, None).to_le_bytes();
    assert_eq!((&word[..4], guest.access(6, 4, None)), (&b"QEMU"[..], u64::from(u32::from_le_bytes(*b" CFG"))));
    assert_eq!(guest.access(9, 2, None), 0xff00 | u64::from(b'G'));
}

#[test]
fn the_directory_is_sorted_and_big_endian() {
    let mut guest = Guest::new(|builder| builder.file("opt/x", [1, 2, 3]).boot_order(["/rom@a", "/b"]));
    let names: Vec<_> = guest.files().into_iter().map(|file| file.0).collect();
    assert_eq!(names, ["bootorder", "etc/e820", "etc/system-states", "opt/x"]);
    let (key, len) = guest.file("bootorder");
    guest.select(key);
    assert_eq!(guest.read(len as usize), *b"/rom@a\n/b\0");
    let (key, len) = guest.file("etc/system-states");
    guest.select(key);
    assert_eq!(guest.read(len as usize), [0x80, 0, 0, 0, 0, 0x80]);
}

#[test]
fn encodings_are_those_that_firmware_reads() {
    let map = [
        E820Entry { start: 0, len: 0x8000_0000, kind: E820Kind::Ram },
        E820Entry { start: 0xfeff_c000, len: 0x4000, kind: E820Kind::Reserved },
    ];
    let bytes = items::e820(&map);
    assert_eq!(bytes.len(), 40);
    assert_eq!(bytes[20..], [0, 0xc0, 0xff, 0xfe, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    let words: Vec<u64> =
        items::numa(&[0, 1], &[5, 6]).chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words, [2, 0, 1, 5, 6]);
}

#[test]
fn dma_selects_reads_skips_and_writes() {
    let mut guest = Guest::new(|builder| builder.file("a", *b"0123456789").writable("w", [0; 4]));
    let (a, w) = (guest.file("a").0, guest.file("w").0);
    assert_eq!(guest.dma(u32::from(a) << 16 | SELECT | READ, 4, 0x1000), 0);
    assert_eq!(guest.ram.bytes(0x1000, 5), *b"0123\xa5");
    assert_eq!(guest.dma(SKIP, 3, 0), 0);
    // Behind the end there are zeros.
    assert_eq!(guest.dma(READ, 5, 0x1000), 0);
    assert_eq!(guest.ram.bytes(0x1000, 6), *b"789\0\0\xa5");
    // A selection alone is a transfer too; an item that is not there reads as zeros.
    assert_eq!(guest.dma(0x3fff << 16 | SELECT, 0, 0), 0);
    assert_eq!(guest.dma(READ, 2, 0x1000), 0);
    assert_eq!(guest.ram.bytes(0x1000, 3), *b"\0\09");
    guest.ram.write(0x2000, b"wxyz!").unwrap();
    assert_eq!(guest.dma(u32::from(w) << 16 | SELECT | WRITE, 4, 0x2000), 0);
    assert_eq!(guest.device.item(w).unwrap(), b"wxyz");
    // More than fits, or an item that is not to be written.
    for key in [w, a, 0x3fff] {
        assert_eq!(guest.dma(u32::from(key) << 16 | SELECT | WRITE, 5, 0x2000), 1);
    }
    assert_eq!(guest.device.item(w).unwrap(), b"wxyz");
    guest.device.reset();
    assert_eq!(guest.device.item(w).unwrap(), [0; 4]);
}

#[test]
fn dma_to_nowhere_is_an_error_and_endless_zeros_are_refused() {
    let mut guest = Guest::new(|builder| builder.writable("w", [7; 4]));
    let w = guest.file("w").0;
    assert_eq!(guest.dma(SELECT | READ, 4, 0xffff_ffff_ffff_fffe), 1);
    assert_eq!(guest.dma(READ, 4, 0xff_ffff), 1);
    assert_eq!(guest.dma(READ, u32::MAX, 0), 1);
    assert_eq!(guest.dma(u32::from(w) << 16 | SELECT | WRITE, 4, 0xff_ffff_ffff), 1);
    assert_eq!(guest.device.item(w).unwrap(), [7; 4]);
    // A descriptor that is nowhere changes nothing.
    guest.access(2, 4, Some(u64::from(u32::MAX)));
    guest.access(6, 4, Some(0x100u32.swap_bytes().into()));
    assert_eq!(guest.ram.bytes(0x100, 4), [0, 0, 0, 1]);
}

#[test]
fn a_made_file_is_made_once_between_resets_and_keeps_its_length() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let make = move || vec![counted.fetch_add(1, Ordering::Relaxed) as u8 + 1; 9];
    let mut guest = Guest::new(|builder| builder.made("m", 4, make));
    let (m, len) = guest.file("m");
    assert_eq!((len, calls.load(Ordering::Relaxed)), (4, 0));
    for _ in 0..2 {
        guest.select(m);
        assert_eq!(guest.read(5), [1, 1, 1, 1, 0]);
    }
    let saved = guest.device.save();
    guest.device.reset();
    guest.select(m);
    assert_eq!(guest.read(5), [2, 2, 2, 2, 0]);
    guest.device.restore(&saved).unwrap();
    assert_eq!(guest.device.save(), saved);
    guest.select(m);
    assert_eq!(guest.read(4), [1; 4]);
}

#[test]
fn what_the_directory_can_not_have_is_refused() {
    let build = |fill: fn(Builder) -> Builder| fill(FwCfg::builder(Ram::new(16))).build().unwrap_err().to_string();
    assert!(build(|b| b.file("a", []).file("a", [])).contains("two files"));
    assert!(build(|b| b.file(&"x".repeat(56), [])).contains("55 bytes"));
    assert!(build(|b| b.file("a\0b", [])).contains("NUL"));
    assert!(build(|b| (0..2000).fold(b, |b, n| b.file(&n.to_string(), []))).contains("more than"));
    assert!(FwCfg::builder(Ram::new(16)).file(&"x".repeat(55), []).build().is_ok());
}

#[test]
fn a_state_that_no_device_has_is_refused() {
    let mut guest = Guest::new(|builder| builder.file("a", [1]).writable("w", [2]));
    let (a, w) = (guest.file("a").0, guest.file("w").0);
    let state = |contents| FwCfgState { contents, ..FwCfgState::default() };
    assert!(guest.device.restore(&state(vec![(a, Hex(vec![1]))])).is_err());
    assert!(guest.device.restore(&state(vec![(w, Hex(vec![1, 2]))])).is_err());
    assert!(guest.device.restore(&state(vec![(0x3fff, Hex(vec![]))])).is_err());
    assert!(guest.device.restore(&state(vec![(w, Hex(vec![9]))])).is_ok());
    assert_eq!(guest.device.item(w).unwrap(), [9]);
}

proptest! {
    #[test]
    fn any_access_is_answered(
        accesses in prop::collection::vec((0..10u64, prop::sample::select(vec![1u8, 2, 4, 8]), any::<Option<u64>>()), 0..40),
        descriptor in any::<[u8; 16]>(),
        offset in any::<u32>(),
    ) {
        let mut guest = Guest::new(|builder| builder.writable("w", [0; 8]).made("m", 3, || vec![1; 100]));
        guest.ram.write(0x100, &descriptor).unwrap();
        guest.device.restore(&FwCfgState { offset, ..FwCfgState::default() }).unwrap();
        for (at, len, data) in accesses {
            guest.access(at, len, data);
            guest.access(6, 4, Some(0x100u32.swap_bytes().into()));
        }
        let state = guest.device.save();
        prop_assert!(guest.device.restore(&state).is_ok());
        guest.device.reset();
        guest.select(key::SIGNATURE);
        prop_assert_eq!(guest.read(4), b"QEMU".to_vec());
    }
}
