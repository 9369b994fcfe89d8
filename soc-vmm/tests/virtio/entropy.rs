//! A source of entropy.

use std::time::{Duration, Instant};

use soc_vmm::virtio::entropy::{self, EntropyConfig, EntropyEngine, RateLimit};
use soc_vmm::virtio::{Engine, QueueError};

use super::rig::{Board, Driver, EVENT_INDEX, Guest, INDIRECT, NEEDS_RESET, VERSION_1, eventually};

const BUFFER: u64 = 0x8_0000;
const QUEUE: u64 = 0x1_0000;

fn source(limit: Option<RateLimit>) -> EntropyConfig {
    EntropyConfig { name: "rng0".into(), limit }
}

#[test]
fn buffers_are_filled_with_bytes_of_which_none_comes_twice() {
    for features in [0, EVENT_INDEX, INDIRECT] {
        let mut guest = Guest::new(|plumbing| entropy::new(source(None), plumbing));
        assert_eq!(guest.function.read_config(0, 4), 0x1044_1af4);
        guest.negotiate(VERSION_1 | features);
        let mut queue = guest.queue(0, 8);
        guest.go();
        let mut seen = Vec::new();
        for round in 0..20 {
            let buffers = [(BUFFER, 10, true), (BUFFER + 0x100, 22, true)];
            if features & INDIRECT != 0 {
                queue.add_indirect(0x7_0000, &buffers)
            } else {
                queue.add(&buffers)
            };
            guest.kick(0);
            assert_eq!(queue.wait_used().1, 32, "round {round}");
            let bytes = [guest.board.ram.get(BUFFER, 10), guest.board.ram.get(BUFFER + 0x100, 22)].concat();
            assert!(!seen.contains(&bytes));
            seen.push(bytes);
        }
    }
}

#[test]
fn a_buffer_without_end_is_filled_in_part() {
    let board = Board::default();
    let mut queue = Driver::new(&board.ram, QUEUE, 8);
    let mut session = board.session(VERSION_1, &[queue.at]);
    queue.add(&[(BUFFER, 0x2_0000, true)]);
    assert!(EntropyEngine::new(source(None)).serve(&mut session).is_ok());
    assert_eq!(queue.take_used(), Some((0, 0x1_0000)));
    // One that leaves memory behind the part that is filled is no reason to fail; one whose first byte isn't memory is.
    queue.add(&[(BUFFER, u32::MAX, true)]);
    assert!(EntropyEngine::new(source(None)).serve(&mut session).is_ok());
    queue.add(&[(u64::MAX >> 1, 1, true)]);
    assert!(matches!(EntropyEngine::new(source(None)).serve(&mut session), Err(QueueError::Memory(_))));
}

#[test]
fn a_limit_holds_over_each_period() {
    let board = Board::default();
    let mut queue = Driver::new(&board.ram, QUEUE, 64);
    let mut session = board.session(VERSION_1, &[queue.at]);
    // A period that doesn't end while the test runs.
    let limit = RateLimit { bytes: 100, period: Duration::from_secs(1000) };
    let mut engine = EntropyEngine::new(source(Some(limit)));
    for _ in 0..4 {
        queue.add(&[(BUFFER, 60, true)]);
    }
    let wait = engine.serve(&mut session).unwrap();
    assert_eq!((queue.take_used(), queue.take_used(), queue.take_used()), (Some((0, 60)), Some((1, 40)), None));
    assert!(wait.source.is_empty() && wait.timeout.is_some_and(|time| time > Duration::from_secs(900)));
    // Asking again costs nothing, and gives nothing.
    let transfers = board.ram.transfers.load(std::sync::atomic::Ordering::Relaxed);
    assert!(engine.serve(&mut session).is_ok());
    assert!(board.ram.transfers.load(std::sync::atomic::Ordering::Relaxed) <= transfers + 1);
    assert_eq!(queue.take_used(), None);

    let mut guest = Guest::new(|plumbing| {
        entropy::new(source(Some(RateLimit { bytes: 10, period: Duration::from_millis(20) })), plumbing)
    });
    guest.negotiate(VERSION_1);
    let mut queue = guest.queue(0, 64);
    guest.go();
    let start = Instant::now();
    for _ in 0..5 {
        queue.add(&[(BUFFER, 10, true)]);
    }
    guest.kick(0);
    let used: Vec<_> = (0..5).map(|_| queue.wait_used().1).collect();
    // No sooner than the limit allows; a slow machine may take longer.
    assert!(used == [10; 5] && start.elapsed() >= Duration::from_millis(80));
}

#[test]
fn what_is_no_buffer_is_an_error() {
    for buffers in [&[(BUFFER, 16, false)][..], &[(BUFFER, 1, false), (BUFFER, 16, true)], &[(BUFFER, 0, true)]] {
        let mut guest = Guest::new(|plumbing| entropy::new(source(None), plumbing));
        guest.negotiate(VERSION_1);
        let mut queue = guest.queue(0, 8);
        guest.go();
        queue.add(buffers);
        guest.kick(0);
        eventually(|| (guest.status() & NEEDS_RESET != 0).then_some(()));
    }
}
