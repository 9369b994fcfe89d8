//! Loops to measure with, on this machine's /dev/kvm.

mod run;

use std::time::Duration;

use bench::bare::{Machine, Options, Silent};
use payloads::{Privilege, hot, ports};
use run::run;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn reads_of_a_port() {
    if !run::kvm_or_skip() {
        return;
    }
    for privilege in [Privilege::Cpl0, Privilege::Cpl3] {
        let outcome = run(&hot::read_port(privilege, ports::ECHO, 500, 3).unwrap(), Options::default());
        assert_eq!(outcome.events.len(), 1500);
        let rounds: Vec<_> = outcome.console.lines().filter_map(hot::parse_round).collect();
        assert_eq!(rounds.len(), 3);
        assert!(rounds.iter().all(|&(reads, ticks)| reads == 500 && ticks > 0), "{rounds:?}");
    }
}

#[test]
fn busy() {
    if !run::kvm_or_skip() {
        return;
    }
    for privilege in [Privilege::Cpl0, Privilege::Cpl3] {
        let mut machine = Machine::new(&hot::busy(privilege).unwrap(), Options::default()).unwrap();
        let outcome = machine.run(Silent, Duration::from_secs(1)).unwrap();
        assert_eq!(outcome.console, "busy\n");
        let count: u64 = machine.memory().read_obj(GuestAddress(hot::BUSY_COUNT)).unwrap();
        assert!(count > 1000, "{privilege:?}: {count}, {:?}", outcome.ends);
    }
}

#[test]
fn floor() {
    if !run::kvm_or_skip() {
        return;
    }
    let payload = hot::read_port(Privilege::Cpl0, ports::DEBUG_CONSOLE, 500, 3).unwrap();
    let console = Machine::new(&payload, Options::default()).unwrap().run_floor(run::LIMIT).unwrap();
    assert_eq!(console.lines().filter_map(hot::parse_round).count(), 3);
    assert!(console.ends_with("pass\n"), "{console}");
}
