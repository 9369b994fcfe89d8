//! A guest of several vCPUs goes on in a new VM of another shim, stopped at no particular place: locks held, interrupts under way,
//! vCPUs halted.

use std::time::{Duration, Instant};

use integration::soc::{Board, Shape, Soc};
use integration::{kvm, test_name};
use payloads::{EXIT_PASS, Payload, order, smp};

const MOVES: u32 = 5;

fn new_vm(payload: &Payload) -> Soc {
    let mut soc = Soc::start(&[]);
    soc.create(&Shape { memory: 4 << 20, ..Shape::of(payload) });
    soc
}

/// Moves the guest again and again while it runs; how often before it had passed.
fn moved_while_it_runs(payload: &Payload) -> u32 {
    let mut board = Board::default();
    let mut soc = new_vm(payload);
    soc.load(payload);
    soc.run();
    let mut moves = 0;
    while moves < MOVES {
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(700 + 900 * u64::from(moves)) {
            if let Some(seen) = soc.try_take() {
                let answer = board.serve(&seen);
                soc.answer(&seen, answer);
            }
        }
        soc.pause(|seen| board.serve(seen));
        if board.exit.is_some() {
            break;
        }
        let mut next = new_vm(payload);
        soc.copy_memory_to(&next);
        next.set_records(soc.records());
        assert!(soc.shut_down().unwrap().success());
        next.run();
        (soc, moves) = (next, moves + 1);
    }
    assert_eq!(soc.run_to_exit(&mut board), EXIT_PASS, "{} after {moves} moves: {}", payload.name, board.console);
    assert_eq!(board.console.lines().last(), Some("pass"), "{}: {}", payload.name, board.console);
    assert!(soc.shut_down().unwrap().success());
    moves
}

#[test]
fn a_guest_whose_vcpus_share_a_lock() {
    if kvm(&test_name()) {
        assert_eq!(moved_while_it_runs(&order::order(2).unwrap()), MOVES);
    }
}

#[test]
fn a_guest_whose_vcpus_interrupt_each_other() {
    if kvm(&test_name()) {
        // How far it came is this machine's: some of them move at least once.
        let moves: u32 = (0..4).map(|_| moved_while_it_runs(&smp::ipi(3).unwrap())).sum();
        assert!(moves > 0);
    }
}
