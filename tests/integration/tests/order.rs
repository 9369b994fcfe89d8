//! Writes of two vCPUs under a guest's lock arrive in the order of the lock, posted or not.

use std::collections::BTreeSet;

use api_channel::call::{Call, PostedRange, VmCreated};
use integration::soc::{Board, Shape, Soc};
use integration::{Vm, kvm, test_name};
use payloads::{EXIT_PASS, order};

const VCPUS: u8 = 2;

#[test]
fn posted_and_synchronous_writes_arrive_in_the_order_of_the_lock() {
    if !kvm(&test_name()) {
        return;
    }
    let payload = order::order(VCPUS).unwrap();
    let mut soc = Soc::start(&[]);
    let created = soc.create(&Shape::of(&payload));
    if created.features & VmCreated::POSTING == 0 {
        testbed::skip(&test_name(), "this host's TSCs are not known to be synchronised: it posts no writes");
        return;
    }
    soc.ok(&Call::PostedRanges(vec![PostedRange { base: order::POSTED, len: 4, ports: 0 }]));
    soc.load(&payload);
    soc.run();
    let mut board = Board::default();
    let (mut arrived, mut vcpus) = (Vec::new(), BTreeSet::new());
    let mut posted = 0;
    while board.exit.is_none() {
        let seen = soc.take();
        if seen.request.direction == ioreq_ring::Direction::Write {
            let step = match seen.request.address {
                order::POSTED => Some(order::Step::Posted),
                port if port == u64::from(order::SYNCHRONOUS) => Some(order::Step::Synchronous),
                _ => None,
            };
            if let Some(step) = step {
                arrived.push((step, seen.request.data as u32));
                vcpus.insert(seen.lane);
                posted += usize::from(seen.posted);
                assert!(!seen.posted || step == order::Step::Posted, "{seen:?}");
            }
        }
        let answer = board.serve(&seen);
        soc.answer(&seen, answer);
    }
    assert_eq!(board.exit, Some(EXIT_PASS), "{}", board.console);
    let expected: Vec<_> = order::writes(VCPUS).collect();
    assert_eq!(arrived, expected);
    assert_eq!(vcpus, BTreeSet::from([0, 1]));
    // A full ring sends a write the synchronous way: some may, not most.
    let postable = expected.iter().filter(|(step, _)| *step == order::Step::Posted).count();
    assert!(posted > postable / 2, "{posted} of {postable} were posted");
    assert!(soc.shut_down().unwrap().success());
}

#[test]
fn soc_vmm_serves_them_in_that_order_too() {
    if !kvm(&test_name()) {
        return;
    }
    // Reads of the payload see what was written last, by whomever.
    let ended = Vm::payload(&order::order(VCPUS).unwrap(), &[]).wait();
    assert_eq!(ended.status.code(), Some(i32::from(EXIT_PASS) << 1 | 1), "{}{}", ended.debugcon, ended.stderr);
    assert_eq!(ended.debugcon, "pass\n");
}
