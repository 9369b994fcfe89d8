//! A guest goes on in a new VM of another shim, stopped at no particular place: locks held, interrupts under way,
//! processors on their way up, vCPUs halted.

use std::time::{Duration, Instant};

use api_channel::call::{Call, Irqchip, Msi, VCPU_ALL};
use api_channel::state::{self, MpState, Regs, Sregs, Type};
use integration::soc::{Board, PATIENCE, Shape, Soc};
use integration::{kvm, test_name};
use payloads::{EXIT_PASS, Payload, interrupts, order, ports, smp};

const MOVES: u32 = 5;

fn new_vm(payload: &Payload, irqchip: Irqchip) -> Soc {
    let mut soc = Soc::start(&[]);
    soc.create(&Shape { memory: 4 << 20, irqchip, ..Shape::of(payload) });
    soc
}

/// Goes on in a VM of another shim. The guest is paused.
fn moved(mut soc: Soc, payload: &Payload, irqchip: Irqchip) -> Soc {
    let records = soc.records();
    moved_as(soc, records, payload, irqchip)
}

/// As [`moved`], with records that were read before.
fn moved_as(soc: Soc, records: Vec<(u32, Vec<u8>)>, payload: &Payload, irqchip: Irqchip) -> Soc {
    let mut next = new_vm(payload, irqchip);
    soc.copy_memory_to(&next);
    next.set_records(records);
    assert!(soc.shut_down().unwrap().success());
    next.run();
    next
}

/// Moves the guest again and again while it runs; how often before it had passed.
fn moved_while_it_runs(payload: &Payload) -> u32 {
    let mut board = Board::default();
    let mut soc = new_vm(payload, Irqchip::Full);
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
        soc = moved(soc, payload, Irqchip::Full);
        moves += 1;
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

#[test]
fn a_guest_with_an_interrupt_under_way() {
    if !kvm(&test_name()) {
        return;
    }
    const MESSAGE: Msi = Msi { address: interrupts::MSI_ADDRESS, data: interrupts::MSI_DATA, reserved: 0 };
    const EACH: u64 = 9;
    let payload = interrupts::msi().unwrap();
    for irqchip in [Irqchip::Full, Irqchip::Split] {
        let mut board = Board::default();
        let mut soc = new_vm(&payload, irqchip);
        soc.load(&payload);
        soc.run();
        let mut counts = 0;
        while board.exit.is_none() {
            let seen = soc.take();
            let counted = seen.writes(ports::COMMAND);
            if counted {
                assert_eq!(seen.request.data, counts, "each interrupt once");
                counts += 1;
            }
            let answer = board.serve(&seen);
            if !counted || counts > u64::from(interrupts::MSI_COUNT) || counts % EACH != 0 {
                soc.answer(&seen, answer);
                if counted {
                    soc.order(&Call::Msi(MESSAGE));
                }
                continue;
            }
            // The next one comes while the handler of the last still runs, and finds the guest on its way.
            soc.order(&Call::Msi(MESSAGE));
            let pause = soc.begin(&Call::Pause(VCPU_ALL));
            soc.ok(&Call::Ping);
            soc.answer(&seen, answer);
            let start = Instant::now();
            while soc.reply(pause).is_none() {
                assert_eq!(soc.try_take(), None, "it asks nothing more");
                assert!(start.elapsed() < PATIENCE, "the pause does not come");
            }
            soc = moved(soc, &payload, irqchip);
        }
        assert_eq!(board.exit, Some(EXIT_PASS), "{}", board.console);
        assert_eq!(counts, u64::from(interrupts::MSI_COUNT) + 1);
        assert!(soc.shut_down().unwrap().success());
    }
}

#[test]
fn a_start_up_ipi_that_waits_for_its_vcpu() {
    if !kvm(&test_name()) {
        return;
    }
    let payload = smp::bring_up(3).unwrap();
    let mut soc = new_vm(&payload, Irqchip::Full);
    soc.load(&payload);
    // The first vCPU alone runs: INIT and start-up IPI wait at the others.
    let start = Instant::now();
    let records = loop {
        assert!(start.elapsed() < PATIENCE, "no start-up IPI comes");
        soc.ok(&Call::Run(0));
        std::thread::sleep(Duration::from_millis(20));
        soc.ok(&Call::Pause(0));
        // The first read that finds them is the one that counts: it takes what waited.
        let records = soc.records();
        if records.iter().skip(2).all(|(_, records)| is_started(records)) {
            break records;
        }
    };
    let mut soc = moved_as(soc, records, &payload, Irqchip::Full);
    let mut board = Board::default();
    assert_eq!(soc.run_to_exit(&mut board), EXIT_PASS, "{}", board.console);
    assert_eq!(board.console.lines().count(), 4, "each vCPU says so once: {}", board.console);
    assert!(soc.shut_down().unwrap().success());
}

/// Whether a processor that was never entered runs: then it does so where the start-up IPI says, not where a reset leaves it.
fn is_started(records: &[u8]) -> bool {
    let list = state::records(records).unwrap();
    let find = |kind| list.iter().find(|record| record.kind == kind).unwrap();
    let runs = find(Type::MP_STATE).get::<MpState>().unwrap() == MpState::RUNNABLE;
    let (sregs, regs): (Sregs, Regs) = (find(Type::SREGS).get().unwrap(), find(Type::REGS).get().unwrap());
    if runs {
        assert_eq!((sregs.cs.base, regs.rip), (0x8000, 0));
    }
    runs
}
