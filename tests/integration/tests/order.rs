//! Writes of two vCPUs under a guest's lock arrive in the order of the lock, posted or not.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use api_channel::call::{Call, PostedRange, VmCreated};
use integration::soc::{Board, PATIENCE, Seen, Shape, Soc};
use integration::{Vm, kvm, test_name};
use ioreq_ring::wire::HEADER;
use ioreq_ring::{BusMemory, Direction};
use payloads::order::Step;
use payloads::{EXIT_PASS, PASSED, order};
use pcie_function::regions::Type;

const VCPUS: u8 = 2;

#[test]
fn posted_and_synchronous_writes_arrive_in_the_order_of_the_lock() {
    if !kvm(&test_name()) {
        return;
    }
    // How often the vCPUs take turns between two looks is theirs.
    const ENOUGH: usize = 10;
    const MOST_RUNS: usize = 12;
    let mut both = 0;
    for _ in 0..MOST_RUNS {
        match run() {
            Some(times) => both += times,
            None => {
                testbed::skip(&test_name(), "this host's TSCs are not known to be synchronised: it posts no writes");
                return;
            }
        }
        if both >= ENOUGH {
            break;
        }
    }
    assert!(both > 0, "both vCPUs had posted, and their order was to be found");
}

/// Runs the payload; how often both vCPUs had posted since this side looked last. `None` where nothing is posted.
fn run() -> Option<usize> {
    let payload = order::order(VCPUS).unwrap();
    let mut soc = Soc::start(&[]);
    let created = soc.create(&Shape::of(&payload));
    if created.features & VmCreated::POSTING == 0 {
        return None;
    }
    soc.ok(&Call::PostedRanges(vec![PostedRange { base: order::POSTED, len: 4, ports: 0 }]));
    soc.load(&payload);
    soc.run();
    let mut board = Board::default();
    let (mut arrived, mut posted, mut both) = (Vec::new(), 0, 0);
    let requests = [0, 1].map(|lane| soc.lane_window(Type::LANE_REQUESTS, lane));
    let mut answered = [0; 2];
    while board.exit.is_none() {
        // This side sleeps until a vCPU waits, so that both run: what they have posted until then lies in two rings.
        let start = Instant::now();
        while requests.iter().zip(&answered).all(|(line, last)| line.load(HEADER) as u32 == *last) {
            assert!(start.elapsed() < PATIENCE, "no vCPU waits; {}", board.console);
            std::thread::sleep(Duration::from_micros(200));
        }
        let mut vcpus = BTreeSet::new();
        loop {
            let seen = soc.take();
            if let Some(step) = step(&seen) {
                arrived.push((step, seen.request.data as u32));
                assert!(!seen.posted || step == Step::Posted, "{seen:?}");
            }
            if !seen.posted {
                answered[seen.lane] += 1;
            }
            let answer = board.serve(&seen);
            soc.answer(&seen, answer);
            if !seen.posted {
                break;
            }
            posted += 1;
            vcpus.insert(seen.lane);
        }
        both += usize::from(vcpus.len() == 2);
    }
    assert_eq!(board.exit, Some(EXIT_PASS), "{}", board.console);
    let expected: Vec<_> = order::writes(VCPUS).collect();
    assert_eq!(arrived, expected);
    // A full ring sends a write the synchronous way: some may, not most.
    let postable = expected.iter().filter(|(step, _)| *step == Step::Posted).count();
    assert!(posted > postable / 2, "{posted} of {postable} were posted");
    assert!(soc.shut_down().unwrap().success());
    Some(both)
}

/// Which of the payload's writes it is, if it is one.
fn step(seen: &Seen) -> Option<Step> {
    let write = seen.request.direction == Direction::Write;
    match seen.request.address {
        order::POSTED if write => Some(Step::Posted),
        _ if seen.writes(order::SYNCHRONOUS) => Some(Step::Synchronous),
        _ => None,
    }
}

#[test]
fn soc_vmm_serves_them_in_that_order_too() {
    if !kvm(&test_name()) {
        return;
    }
    // Reads of the payload see what was written last, by whomever.
    let ended = Vm::payload(&order::order(VCPUS).unwrap(), &[]).wait();
    assert_eq!(ended.status.code(), Some(PASSED), "{}{}", ended.debugcon, ended.stderr);
    assert_eq!(ended.debugcon, "pass\n");
}
