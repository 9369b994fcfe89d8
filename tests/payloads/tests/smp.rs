//! Several vCPUs on this machine's /dev/kvm.

mod run;

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::Duration;

use bench::bare::{Access, Driver, End, Machine, Options, Silent};
use kvm_ioctls::VmFd;
use payloads::{Privilege, dirty, order, smp};
use run::{drive, run};

#[test]
fn bring_up() {
    if !run::kvm_or_skip() {
        return;
    }
    for vcpus in [2, 8, payloads::MAX_VCPUS] {
        let outcome = run(&smp::bring_up(vcpus).unwrap(), Options::default());
        let mut lines: Vec<_> = outcome.console.lines().collect();
        assert_eq!(lines.pop(), Some("pass"));
        assert_eq!(lines.last(), Some(&"vcpu 0000000000000000"));
        lines.sort_unstable();
        let expected: Vec<_> = (0..vcpus).map(|vcpu| format!("vcpu {vcpu:016x}")).collect();
        assert_eq!(lines, expected);
    }
}

#[test]
fn writes_under_a_lock_arrive_in_order() {
    if !run::kvm_or_skip() {
        return;
    }
    let outcome = run(&order::order(2).unwrap(), Options::default());
    let arrived: Vec<_> = outcome
        .events
        .iter()
        .filter(|event| event.write)
        .map(|event| {
            let step = match event.access {
                Access::Memory(order::POSTED) => order::Step::Posted,
                Access::Port(order::SYNCHRONOUS, 4) => order::Step::Synchronous,
                other => panic!("{other:?}"),
            };
            (step, u32::from_le_bytes(event.data.as_slice().try_into().unwrap()))
        })
        .collect();
    assert_eq!(arrived, order::writes(2).collect::<Vec<_>>());
    let vcpus: BTreeSet<_> = outcome.events.iter().map(|event| event.vcpu).collect();
    assert_eq!(vcpus, BTreeSet::from([0, 1]));
}

#[test]
fn halted() {
    if !run::kvm_or_skip() {
        return;
    }
    let mut machine = Machine::new(&smp::halted(3).unwrap(), Options::default()).unwrap();
    // They come up in a moment, but for a busy machine.
    let outcome = machine.run(Silent, Duration::from_secs(2)).unwrap();
    assert_eq!(outcome.console, "halted\n");
    assert!(outcome.ends.iter().all(|end| *end == End::Stopped), "{:?}", outcome.ends);
}

const ROUNDS: u32 = 5;

/// Begins a round when all vCPUs wait for it, and reads the dirty log in between.
struct Rounds {
    vcpus: u8,
    round: u32,
    waiting: BTreeSet<u8>,
    dirty: mpsc::Sender<BTreeSet<u64>>,
}

impl Driver for Rounds {
    fn command(&mut self, vcpu: u8, vm: &VmFd) -> u32 {
        if self.round == 0 {
            self.waiting.insert(vcpu);
        }
        if self.waiting.len() == usize::from(self.vcpus) {
            self.waiting.clear();
            // What came before the first round is the start's.
            let frames = frames(vm, self.vcpus);
            if self.round > 0 {
                self.dirty.send(frames).unwrap();
            }
            self.round += 1;
        }
        match self.round {
            0 => u32::MAX,
            1..=ROUNDS => self.round,
            _ => dirty::STOP,
        }
    }

    fn answer(&mut self, vcpu: u8, round: u32, _vm: &VmFd) {
        assert_eq!(round, self.round);
        assert!(self.waiting.insert(vcpu));
    }
}

fn frames(vm: &VmFd, vcpus: u8) -> BTreeSet<u64> {
    let bitmap = vm.get_dirty_log(0, dirty::memory(vcpus) as usize).unwrap();
    let bits = (0u64..)
        .zip(bitmap)
        .flat_map(|(word, bits)| (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| word * 64 + bit));
    bits.collect()
}

#[test]
fn dirty_log_shows_exactly_what_was_written() {
    if !run::kvm_or_skip() {
        return;
    }
    for (vcpus, privilege) in [(1, Privilege::Cpl0), (2, Privilege::Cpl0), (2, Privilege::Cpl3)] {
        let (sender, rounds) = mpsc::channel();
        let options = Options { memory: dirty::memory(vcpus), dirty_log: true, ..Options::default() };
        let driver = Rounds { vcpus, round: 0, waiting: BTreeSet::new(), dirty: sender };
        drive(&dirty::dirty(vcpus, privilege).unwrap(), options, driver);
        for round in 1..=ROUNDS {
            let expected: BTreeSet<_> = (0..vcpus).flat_map(|vcpu| dirty::frames(vcpu, round)).collect();
            assert_eq!(rounds.recv().unwrap(), expected, "{vcpus} vCPUs at {privilege:?}, round {round}");
        }
    }
}
