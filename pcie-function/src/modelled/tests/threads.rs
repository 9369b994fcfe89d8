//! By the machine's clock, with a thread at each end.

use std::os::fd::BorrowedFd;
use std::sync::Barrier;
use std::thread::scope;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Ends, Latencies, Link, signals};
use crate::{Bell, BusMemory, Doorbell, HostFunction, SocFunction};

/// A hang is a failure, not a wait.
const PATIENCE: Duration = Duration::from_secs(60);

fn of(micros: u64) -> Latencies {
    let all = Duration::from_micros(micros);
    Latencies { posted_write: all, read: all, dma_write: all, dma_read: all, doorbell: all, vector: all }
}

/// Sleeps until an eventfd is signalled.
fn await_signal(event: BorrowedFd<'_>) {
    let mut one = [PollFd::new(event, PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut one, patience), Ok(1), "no signal comes");
    assert_eq!(signals(event), 1);
}

#[test]
fn who_sleeps_is_signalled_and_finds_what_was_sent_before() {
    // Below and above what a thread sleeps at the least.
    for micros in [1, 1000] {
        let ends = Ends::on(&Link::new(of(micros)).unwrap());
        scope(|scope| {
            scope.spawn(|| {
                for round in 1..=200 {
                    ends.bar.store(0, round);
                    ends.host.bell().ring(Doorbell::Lanes);
                    await_signal(ends.host.vector(0).unwrap());
                    assert_eq!(ends.inbox_itself.load(0), round);
                }
            });
            for round in 1..=200 {
                await_signal(ends.soc.doorbell(Doorbell::Lanes));
                assert_eq!(ends.card_itself.load(0), round);
                ends.remote.store(0, round);
                ends.soc.raise(0);
            }
        });
    }
}

#[test]
fn of_two_that_store_then_look_one_sees_the_other() {
    // The SoC goes to sleep while the host sends: SocIdle::about_to_sleep and HostLane::submit; then the other way round.
    let ends = Ends::on(&Link::new(of(3)).unwrap());
    let start = Barrier::new(2);
    scope(|scope| {
        let host = scope.spawn(|| {
            let mut saw = Vec::new();
            for round in 1..=2000 {
                start.wait();
                ends.bar.store(0, round);
                ends.bar.fence();
                saw.push(ends.inbox.load(0) == round);
                start.wait();
                ends.bar.store(8, round);
                let _ = ends.bar.load(8);
                saw.push(ends.inbox.load(8) == round);
            }
            saw
        });
        let mut saw = Vec::new();
        for round in 1..=2000 {
            start.wait();
            ends.remote.store(0, round);
            let _ = ends.remote.load(0);
            saw.push(ends.card.load(0) == round);
            start.wait();
            ends.remote.store(8, round);
            ends.remote.flush().unwrap();
            saw.push(ends.card.load(8) == round);
        }
        let host = host.join().unwrap();
        let missed = host.iter().zip(&saw).filter(|(host, soc)| !**host && !**soc).count();
        assert_eq!(missed, 0, "rounds in which both looked and neither saw");
    });
}

#[test]
fn stores_arrive_in_order_for_who_polls() {
    const STORES: u64 = 20_000;
    let ends = Ends::on(&Link::new(of(1)).unwrap());
    scope(|scope| {
        scope.spawn(|| {
            for n in 1..=STORES {
                ends.bar.copy_in(128, &n.to_le_bytes());
                ends.bar.store_line(64, &[n; 4]);
            }
        });
        let (start, mut last) = (Instant::now(), 0);
        while last < STORES {
            assert!(start.elapsed() < PATIENCE, "the last store does not arrive: {last} did");
            let seen = ends.card.load(64 + 24);
            let earlier = [ends.card.load(64), ends.card.load(128)];
            assert!(last <= seen && earlier.iter().all(|word| *word >= seen), "{last}, {seen}, {earlier:?}");
            last = seen;
        }
    });
}
