//! Chips whose guest goes on elsewhere, and the file behind them, which may be the same on both sides.

use super::*;
use crate::persist::{Moves, StateError, States};

fn store(file: &Path) -> Option<(VariableStore, Vec<u8>)> {
    Some(VariableStore::open(file).unwrap())
}

fn halt(guest: &mut Guest) {
    guest.flash.halt();
    while !guest.flash.is_halted() {
        std::thread::yield_now();
    }
}

/// Guest memory and state of `from`, which is halted, go to `to`.
fn load(from: &Guest, to: &mut Guest) -> Result<(), StateError> {
    for (to, from) in to.arrays.0.lock().unwrap().iter_mut().zip(from.arrays.0.lock().unwrap().iter()) {
        // What it has at its place is its own size.
        let len = to.0.len().min(from.0.len());
        to.0[..len].copy_from_slice(&from.0[..len]);
    }
    let mut states = States::default();
    from.flash.save_into("", &mut states);
    to.flash.load("", &mut states)
}

fn program(guest: &mut Guest, at: u64, byte: u8) {
    guest.write(at, 0x10);
    guest.write(at, byte);
}

/// The file with these bytes programmed.
fn expected(bytes: &[(u64, u8)]) -> Vec<u8> {
    let mut image = template();
    bytes.iter().for_each(|(at, byte)| image[*at as usize] = *byte);
    image
}

#[test]
fn one_file_on_both_sides_is_never_written_by_two() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store");
    std::fs::write(&file, template()).unwrap();
    let mut from = Guest::new(store(&file));
    let mut to = Guest::new(Some(VariableStore::open_for_arrival(&file).unwrap()));
    // Amid a command: the array is not shown, and has no byte of it yet.
    program(&mut from, SECTOR, 1);
    halt(&mut from);
    assert_eq!(std::fs::read(&file).unwrap(), expected(&[(SECTOR, 1)]));
    load(&from, &mut to).unwrap();
    // It failed at the last moment: the source has its file again.
    from.flash.go_on();
    program(&mut from, SECTOR + 1, 2);
    from.write(0, 0xff);
    halt(&mut from);
    assert_eq!(std::fs::read(&file).unwrap(), expected(&[(SECTOR, 1), (SECTOR + 1, 2)]));
    // The next attempt succeeds.
    drop(to);
    let mut to = Guest::new(Some(VariableStore::open_for_arrival(&file).unwrap()));
    load(&from, &mut to).unwrap();
    to.flash.go_on();
    program(&mut to, SECTOR + 2, 3);
    to.write(0, 0xff);
    assert_eq!([0, 1, 2].map(|at| to.read(SECTOR + at)), [1, 2, 3]);
    drop(from);
    drop(to);
    assert_eq!(std::fs::read(&file).unwrap(), expected(&[(SECTOR, 1), (SECTOR + 1, 2), (SECTOR + 2, 3)]));
}

#[test]
fn a_file_of_its_own_gets_what_the_guest_brings_when_it_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let [here, there, other] = ["here", "there", "other"].map(|name| dir.path().join(name));
    [&here, &there, &other].iter().for_each(|file| std::fs::write(file, template()).unwrap());
    let mut from = Guest::new(store(&here));
    program(&mut from, 7, 9);
    halt(&mut from);
    // A destination that never goes on leaves its file alone.
    let mut given_up = Guest::new(store(&other));
    load(&from, &mut given_up).unwrap();
    drop(given_up);
    assert_eq!(std::fs::read(&other).unwrap(), template());
    let mut to = Guest::new(store(&there));
    load(&from, &mut to).unwrap();
    assert_eq!(to.read(0), 0x80, "the status of what it was at");
    to.flash.go_on();
    drop(to);
    assert_eq!(std::fs::read(&there).unwrap(), expected(&[(7, 9)]));
}

#[test]
fn a_file_that_is_anothers_by_then_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store");
    std::fs::write(&file, template()).unwrap();
    let mut guest = Guest::new(store(&file));
    halt(&mut guest);
    let other = Guest::new(store(&file));
    guest.flash.go_on();
    program(&mut guest, 0, 7);
    guest.write(0, 0xff);
    assert_eq!(guest.read(0), 7);
    drop(guest);
    assert_eq!(std::fs::read(&file).unwrap(), template());
    drop(other);
}

#[test]
fn other_chips_are_refused() {
    let from = Guest::new(None);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store");
    std::fs::write(&file, template()).unwrap();
    let mut large = Guest::new(Some((VariableStore::open(&file).unwrap().0, vec![0xff; 2 * LEN])));
    let refused = load(&from, &mut large).unwrap_err().to_string();
    assert!(refused.contains("chip 0 has 16384 bytes at the source and 32768 here"), "{refused}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Wherever a guest is with its commands, other chips go on as its own would have.
    #[test]
    fn chips_go_on_elsewhere_as_they_would_have_here(
        before in prop::collection::vec(step(), 0..60),
        after in prop::collection::vec(step(), 0..60),
    ) {
        let (mut one, mut two) = (Guest::new(None), Guest::new(None));
        for (at, len, data) in before {
            one.write_wide(at, len, data);
        }
        one.flash.halt();
        load(&one, &mut two).unwrap();
        one.flash.go_on();
        two.flash.go_on();
        for (at, len, data) in after {
            one.write_wide(at, len, data);
            two.write_wide(at, len, data);
            prop_assert_eq!(one.read(at), two.read(at));
        }
        [&mut one, &mut two].iter_mut().for_each(|guest| guest.flash.reset());
        prop_assert!(*one.arrays.0.lock().unwrap() == *two.arrays.0.lock().unwrap());
    }

    /// A state of any numbers is refused, or as good as any other.
    #[test]
    fn any_state_is_survived(
        mode in prop::sample::select(vec!["Array", "Id", "Query", "Command", "Data", "BufferConfirm", "Buffer"]),
        left in 0..300usize,
        status in any::<u8>(),
        cycles in prop::collection::vec((0..2 * LEN as u64, 0..10usize), 0..3),
        steps in prop::collection::vec(step(), 0..20),
    ) {
        let mode = match mode {
            "Array" | "Id" | "Query" => format!("\"{mode}\""),
            "Buffer" => format!("{{\"Status\":{{\"Buffer\":{left}}}}}"),
            cycle => format!("{{\"Status\":\"{cycle}\"}}"),
        };
        let cycles: Vec<_> = cycles.iter().map(|(at, len)| format!("[{at},\"{}\"]", "5a".repeat(*len))).collect();
        let buffer = cycles.join(",");
        let chip = |len, buffer: &str| format!(r#"{{"len":{len},"mode":{mode},"status":{status},"buffer":[{buffer}]}}"#);
        let state = format!(r#"{{"chips":[{},{}]}}"#, chip(LEN, &buffer), chip(2 * SECTOR as usize, ""));
        let mut states = States::default();
        states.add("flash", crate::persist::Saved { version: 1, state: state.into_bytes() }).unwrap();
        let mut guest = Guest::new(None);
        let _ = guest.flash.load("", &mut states);
        for (at, len, data) in steps {
            guest.write_wide(at, len, data);
            guest.read(at);
        }
    }
}

fn step() -> impl Strategy<Value = (u64, u8, u64)> {
    let commands = vec![0x01, 0x03, 0x10, 0x20, 0x60, 0x70, 0x90, 0x98, 0xd0, 0xe8, 0xff, 0x1234_5678_9abc_def0u64];
    (0..6 * SECTOR, 1u8..=8, prop::sample::select(commands))
}
