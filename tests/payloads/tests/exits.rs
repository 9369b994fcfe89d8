//! Ports, memory-mapped registers and strings on this machine's /dev/kvm.

mod run;

use std::collections::BTreeSet;

use bench::bare::{Access, Options};
use payloads::{Privilege, mmio, pio, real, string_io};
use run::run;

#[test]
fn pio_of_every_width() {
    if !run::kvm_or_skip() {
        return;
    }
    run(&pio::pio(Privilege::Cpl0).unwrap(), Options::default());
}

#[test]
fn pio_of_every_width_at_cpl3() {
    if !run::kvm_or_skip() {
        return;
    }
    run(&pio::pio(Privilege::Cpl3).unwrap(), Options::default());
}

#[test]
fn real_mode_string_io() {
    if !run::kvm_or_skip() {
        return;
    }
    let outcome = run(&real::real_mode().unwrap(), Options::default());
    assert!(outcome.console.starts_with(real::TEXT));
}

#[test]
fn mmio_of_every_length() {
    if !run::kvm_or_skip() {
        return;
    }
    let outcome = run(&mmio::mmio().unwrap(), Options::default());
    let mut exits = outcome.events.iter().map(|event| match event.access {
        Access::Memory(address) => (address, event.data.len() as u8, event.write),
        Access::Port(..) => panic!("{event:?}"),
    });
    for access in mmio::accesses() {
        let fragments = |write| access.fragments().into_iter().map(move |(address, length)| (address, length, write));
        let bytes = (0..access.width.into()).map(|byte| (access.address + byte, 1, false));
        let expected = fragments(true).chain(fragments(false)).chain(bytes);
        // The addition reads and writes, then comes the last look.
        let expected = expected.chain(fragments(false)).chain(fragments(true)).chain(fragments(false));
        for exit in expected {
            assert_eq!(exits.next(), Some(exit), "{access:x?}");
        }
    }
    assert_eq!(exits.next(), None);
}

#[test]
fn every_mmio_length_is_among_the_accesses() {
    let lengths: BTreeSet<u8> =
        mmio::accesses().iter().flat_map(mmio::Access::fragments).map(|(_, length)| length).collect();
    assert_eq!(lengths, (1..=8).collect());
}

#[test]
fn string_io() {
    if !run::kvm_or_skip() {
        return;
    }
    let outcome = run(&string_io::string_io().unwrap(), Options::default());
    assert!(outcome.console.starts_with(&string_io::text()));
}
