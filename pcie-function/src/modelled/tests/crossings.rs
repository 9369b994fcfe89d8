//! What each crossing takes, by a clock that is moved by hand.

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::super::clock::Clock;
use super::super::link::Side;
use super::{Ends, Hands, INBOX, Latencies, Link, ns, signals};
use crate::local::sealed_memfd;
use crate::{Bell, BusError, BusMemory, Doorbell, HostFunction, Mapping, Reach, SocFunction, Windowed};

const LATENCIES: Latencies = Latencies {
    posted_write: ns(1000),
    read: ns(1500),
    dma_write: ns(700),
    dma_read: ns(1800),
    doorbell: ns(10),
    vector: ns(20),
};

#[test]
fn a_posted_write_is_there_after_its_latency_and_the_host_went_on() {
    let (ends, clock) = Ends::by_hand(LATENCIES);
    ends.bar.store(0, 1);
    clock.advance(400);
    ends.bar.cut(64, 64).unwrap().store_line(32, &[2, 3]);
    ends.bar.copy_in(128, b"nine byte");
    assert_eq!(clock.now(), ns(400), "nobody waited");

    clock.advance(599);
    assert_eq!((ends.card.load(0), ends.card_itself.load(0)), (0, 0));
    clock.advance(1);
    assert_eq!((ends.card.load(0), ends.card.load(96)), (1, 0));
    clock.advance(400);
    let line = ends.card.cut(96, 64).unwrap();
    let mut bytes = [0xee; 16];
    line.copy_out(32, &mut bytes);
    assert_eq!((line.load(0), line.load(8), &bytes), (2, 3, b"nine byte\0\0\0\0\0\0\0"));
}

#[test]
fn a_signal_is_sent_at_once_and_arrives_behind_the_data() {
    let (ends, clock) = Ends::by_hand(LATENCIES);
    let (doorbell, vector) = (ends.soc.doorbell(Doorbell::Channel), ends.host.vector(3).unwrap());
    ends.bar.store(0, 1);
    ends.host.bell().ring(Doorbell::Channel);
    ends.remote.store(0, 2);
    ends.soc.raise(3);
    assert_eq!(clock.now(), Duration::ZERO, "nobody waited");
    // Both sides look, at memory and signal.
    let seen = |at: u64| {
        clock.wait_until(ns(at));
        (ends.card.load(0), signals(doorbell), ends.inbox.load(0), signals(vector))
    };
    assert_eq!(seen(699), (0, 0, 0, 0));
    assert_eq!(seen(700), (0, 0, 2, 1));
    assert_eq!(seen(999), (0, 0, 2, 0));
    assert_eq!(seen(1000), (1, 1, 2, 0));

    ends.host.bell().ring(Doorbell::Channel);
    ends.soc.raise(3);
    assert_eq!(seen(1009), (1, 0, 2, 0));
    assert_eq!(seen(1020), (1, 1, 2, 1), "nothing lay before them");
}

#[test]
fn a_read_takes_there_and_back_and_pushes_what_was_posted_before() {
    let (ends, clock) = Ends::by_hand(LATENCIES);
    assert_eq!((ends.bar.load(0), clock.now()), (0, ns(1500)));
    assert_eq!((ends.remote.load(0), clock.now()), (0, ns(3300)));

    ends.bar.store(8, 5);
    assert_eq!((ends.bar.load(8), ends.card_itself.load(8)), (5, 5));
    assert_eq!(clock.now(), ns(3300 + 1000 + 750), "behind the store, and back");
    ends.remote.store(8, 6);
    assert_eq!((ends.remote.load(8), ends.inbox_itself.load(8)), (6, 6));
    assert_eq!(clock.now(), ns(5050 + 900 + 900), "the store was faster");

    let mut bytes = [0; 32];
    ends.bar.copy_out(0, &mut bytes);
    assert_eq!(clock.now(), ns(6850 + 4 * 1500), "a load a word");
    ends.remote.copy_out(0, &mut bytes);
    assert_eq!(clock.now(), ns(12850 + 1800), "one transfer");
    assert_eq!(bytes[8], 6);
    assert_eq!((ends.bar.flush(), clock.now()), (Ok(()), ns(14650 + 1500)), "a flush of a BAR is a load");
}

type Act = Box<dyn FnOnce() + Send>;

/// A clock by hand that does something where somebody starts to wait: another thread's part, at that very moment.
#[derive(Clone, Default)]
struct Interrupted {
    hands: Hands,
    meanwhile: Arc<Mutex<Option<Act>>>,
}

impl Interrupted {
    fn ends(latencies: Latencies) -> (Ends, Self) {
        let clock = Self::default();
        (Ends::on(&Link::with_clock(latencies, Box::new(clock.clone()))), clock)
    }

    fn next_wait(&self, act: impl FnOnce() + Send + 'static) {
        *self.meanwhile.lock().unwrap() = Some(Box::new(act));
    }
}

impl Clock for Interrupted {
    fn now(&self) -> Duration {
        self.hands.now()
    }

    fn wait_until(&self, moment: Duration) {
        let meanwhile = self.meanwhile.lock().unwrap().take();
        if let Some(act) = meanwhile {
            act();
        }
        self.hands.wait_until(moment);
    }
}

#[test]
fn what_is_posted_while_a_read_is_on_its_way_may_pass_it() {
    let (ends, clock) = Interrupted::ends(Latencies { read: ns(100_000), ..LATENCIES });
    let (bar, card, by) = (ends.bar.clone(), ends.card.clone(), clock.hands.clone());
    clock.next_wait(move || {
        bar.store(0, 1);
        by.advance(1000);
        assert_eq!(card.load(0), 1, "the read would hold it back for 50 µs");
    });
    assert_eq!((ends.bar.load(0), clock.now()), (1, ns(100_000)));
}

#[test]
fn a_vector_raised_while_a_transfer_is_on_its_way_stays_behind_it() {
    let (ends, clock) = Interrupted::ends(LATENCIES);
    let soc = Arc::new(ends.soc);
    let (raises, by, inbox) = (soc.clone(), clock.hands.clone(), ends.inbox.clone());
    clock.next_wait(move || {
        raises.raise(1);
        by.advance(699);
        assert_eq!(inbox.load(0), 0);
    });
    soc.write(ends.iova, &[1; 8]).unwrap();
    assert_eq!(
        (signals(ends.host.vector(1).unwrap()), clock.now()),
        (1, ns(700)),
        "with it, not 20 ns after its raise"
    );
}

#[test]
fn an_answer_pushes_what_was_posted_until_the_look() {
    // The host posts just before its flag is looked at, so it may not have seen what pushed the look.
    let link = Link::with_clock(LATENCIES, Box::new(Hands::default()));
    let ends = Ends::on(&link);
    let soc = link.end(Side::Soc).unwrap();
    soc.read(1, || ends.bar.store(0, 1));
    assert_eq!(ends.card_itself.load(0), 1);
}

#[test]
fn an_answer_pushes_what_the_other_side_posted_before_it() {
    // Else a side that goes to sleep would not see what was sent while its flag was on its way.
    let (ends, clock) = Ends::by_hand(Latencies { posted_write: ns(9000), dma_write: ns(9000), ..LATENCIES });
    ends.bar.store(0, 1);
    assert_eq!(ends.remote.load(0), 0);
    assert_eq!((ends.card_itself.load(0), clock.now()), (1, ns(9000)));
    ends.remote.store(0, 2);
    assert_eq!(ends.bar.load(0), 1);
    assert_eq!((ends.inbox_itself.load(0), clock.now()), (2, ns(18000)));
}

#[test]
fn a_flush_waits_until_all_has_arrived_and_says_what_faulted() {
    let (mut ends, clock) = Ends::by_hand(LATENCIES);
    ends.remote.store(0, 1);
    assert_eq!((ends.remote.flush(), clock.now(), ends.inbox_itself.load(0)), (Ok(()), ns(700), 1));
    assert_eq!((ends.remote.flush(), clock.now()), (Ok(()), ns(700)), "nothing is under way");
    assert_eq!((ends.inbox.flush(), ends.card.flush(), clock.now()), (Ok(()), Ok(()), ns(700)), "local");

    ends.remote.store(0, 2);
    ends.host.unmap(ends.iova).unwrap();
    assert_eq!((ends.inbox.load(0), clock.now()), (2, ns(1400)), "the unmap waited for it");
    ends.remote.store(0, 3);
    assert_eq!(ends.remote.flush(), Err(BusError::Dma));
    assert_eq!(ends.inbox.load(0), 2);
}

#[test]
fn transfers_that_are_waited_for_take_their_time_and_change_ram_that_nobody_looks_at() {
    let (mut ends, clock) = Ends::by_hand(LATENCIES);
    let ram = sealed_memfd("ram", 4096).unwrap();
    let guest = Mapping::new(ram.as_fd(), 0, 4096, Reach::Local).unwrap().window();
    ends.host.map_ram(ram.as_fd(), 0, 0, 4096, true).unwrap();
    assert_eq!(ends.soc.write(3, b"outboard"), Ok(()));
    let mut there = [0; 8];
    guest.read_bytes(3, &mut there);
    assert_eq!((&there, clock.now()), (b"outboard", ns(700)));
    ends.remote.store(0, 1);
    let mut back = [0; 8];
    assert_eq!(ends.soc.read(3, &mut back), Ok(()));
    assert_eq!((&back, clock.now()), (b"outboard", ns(700 + 1800)));
    assert_eq!(ends.inbox_itself.load(0), 1, "a DMA read pushes DMA writes");
    assert_eq!(ends.soc.write(4096, &[1]), Err(BusError::Dma));
}

#[test]
fn who_closes_its_end_has_sent_what_it_sent() {
    let (Ends { host, bar, card_itself, soc, remote, inbox_itself, .. }, _) = Ends::by_hand(LATENCIES);
    bar.store(0, 1);
    drop(host);
    assert_eq!(card_itself.load(0), 1);
    drop((remote, inbox_itself));
    drop(soc);

    let (Ends { soc, host, inbox, remote, .. }, _) = Ends::by_hand(LATENCIES);
    remote.store(0, 2);
    soc.raise(1);
    drop(soc);
    assert_eq!((inbox.load(0), signals(host.vector(1).unwrap())), (2, 1));
}

#[test]
fn who_stores_outside_its_window_is_told_and_the_link_goes_on() {
    let (ends, clock) = Ends::by_hand(LATENCIES);
    let line = ends.remote.cut(64, 64).unwrap();
    let fails = |store: &dyn Fn()| assert!(catch_unwind(AssertUnwindSafe(store)).is_err());
    fails(&|| line.store(64, 1));
    fails(&|| line.store(4, 1));
    fails(&|| line.store_line(40, &[1; 4]));
    fails(&|| line.copy_in(56, &[1; 9]));
    fails(&|| ends.remote.store(INBOX, 1));
    line.store(56, 1);
    clock.advance(700);
    assert_eq!(ends.inbox.load(120), 1);
}

#[test]
fn the_counts_are_those_of_a_link_that_takes_no_time() {
    let counts = |ends: &Ends| {
        let mut bytes = [0; 20];
        ends.bar.store(0, 1);
        ends.bar.store_line(0, &[1; 4]);
        ends.bar.copy_in(64, &[1; 20]);
        ends.bar.load(0);
        ends.bar.copy_out(64, &mut bytes);
        ends.bar.flush().unwrap();
        ends.host.bell().ring(Doorbell::Lanes);
        ends.remote.store(0, 1);
        ends.remote.store_line(0, &[1; 4]);
        ends.remote.copy_in(64, &[1; 20]);
        ends.remote.load(0);
        ends.remote.copy_out(64, &mut bytes);
        ends.remote.flush().unwrap();
        ends.soc.write(ends.iova, &[1; 3]).unwrap();
        ends.soc.read(ends.iova, &mut bytes).unwrap();
        ends.soc.raise(0);
        // Of what is local nothing is counted.
        ends.card.store(0, 1);
        ends.card.load(0);
        ends.inbox.copy_in(0, &[1; 20]);
        ends.inbox.copy_out(0, &mut bytes);
        (ends.host_crossings.counts(), ends.soc_crossings.counts())
    };
    let link = Link::new(Latencies::default()).unwrap();
    assert!(link.end(Side::Host).is_none(), "what takes no time goes the direct way");
    let ideal = counts(&Ends::on(&link));
    let (host, soc) = ideal;
    assert_eq!((host.posted, host.posted_bytes, host.reads, host.doorbells), (1 + 4 + 3, 8 + 32 + 20, 1 + 3 + 1, 1));
    assert_eq!((host.dma_writes, host.dma_reads, host.vectors), (0, 0, 0));
    assert_eq!((soc.dma_writes, soc.dma_write_bytes), (4, 8 + 32 + 20 + 3));
    assert_eq!((soc.dma_reads, soc.dma_read_bytes, soc.vectors), (3, 8 + 20 + 20, 1));
    assert_eq!((soc.posted, soc.reads, soc.doorbells), (0, 0, 0));
    assert_eq!(counts(&Ends::by_hand(LATENCIES).0), ideal);
}
