//! A ring without a device around it: what is taken, what is refused, how many transfers it takes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use soc_vmm::memory::GuestMemory;
use soc_vmm::virtio::{Chain, Lease, QueueError, Ring, RingFeatures, RingPosition};

use super::rig::{Board, Driver, NEXT, TABLE, WRITE};

struct Rig {
    board: Board,
    driver: Driver,
    ring: Ring,
    chain: Chain,
}

impl Rig {
    fn new(size: u16, features: RingFeatures) -> Self {
        Self::at(size, features, 0)
    }

    /// A queue whose indices begin at `start`.
    fn at(size: u16, features: RingFeatures, start: u16) -> Self {
        let board = Board::default();
        let mut driver = Driver::new(&board.ram, 0x1_0000, size);
        (driver.available, driver.seen) = (start, start);
        board.ram.set(driver.at.available + 2, &start.to_le_bytes());
        board.ram.set(driver.at.used + 2, &start.to_le_bytes());
        let lease = Arc::new(Lease::new(board.ram.clone() as Arc<dyn GuestMemory>));
        let position = RingPosition { available: start, used: start };
        let mut ring = Ring::new(driver.at, features, position, lease).unwrap();
        ring.start().unwrap();
        Self { board, driver, ring, chain: Chain::default() }
    }

    fn pop(&mut self) -> Result<bool, QueueError> {
        self.ring.pop(&mut self.chain)
    }

    fn transfers(&self) -> usize {
        self.board.ram.transfers.load(Ordering::Relaxed)
    }
}

const ALL: RingFeatures = RingFeatures { indirect: true, event_index: true };
const NONE: RingFeatures = RingFeatures { indirect: false, event_index: false };

fn is_broken(result: Result<bool, QueueError>) -> bool {
    matches!(result, Err(QueueError::Broken(_)))
}

#[test]
fn a_request_takes_few_transfers() {
    let mut rig = Rig::new(256, ALL);
    for i in 0..32 {
        rig.driver.add_indirect(0x2_0000 + 0x100 * i, &[(0, 16, false), (0x100, 512, true), (0x400, 1, true)]);
    }
    let before = rig.transfers();
    for _ in 0..32 {
        assert!(rig.pop().unwrap());
        let head = rig.chain.head();
        rig.ring.push(head, 513).unwrap();
    }
    assert!(!rig.pop().unwrap());
    rig.ring.publish().unwrap();
    // Index twice, heads once; descriptors in runs of 8, 16 and 32, a table for each chain; the used elements, their index, what the
    // driver wants.
    assert_eq!(rig.transfers() - before, 3 + 3 + 32 + 3);
    assert_eq!(rig.driver.used_index(), 32);
}

#[test]
fn neighbours_are_read_ahead_in_either_direction() {
    for upwards in [true, false] {
        let mut rig = Rig::new(64, NONE);
        let index = |n: u16| if upwards { n } else { 63 - n };
        for n in 0..64u16 {
            rig.driver.descriptor(rig.driver.at.descriptors, index(n), 0x1000 + 8 * u64::from(n), 8, WRITE, 0);
            rig.driver.offer(index(n));
        }
        let before = rig.transfers();
        for n in 0..64u16 {
            assert!(rig.pop().unwrap());
            assert_eq!(rig.chain.writable_pieces().next(), Some((0x1000 + 8 * u64::from(n), 8)));
        }
        // Index, heads, descriptors in runs of 8, 16, 32 and the rest; downwards the first run is the table's last alone.
        assert_eq!(rig.transfers() - before, 2 + if upwards { 4 } else { 5 });
    }
}

#[test]
fn what_was_read_ahead_holds_only_for_chains_that_were_there() {
    let mut rig = Rig::new(16, NONE);
    let table = rig.driver.at.descriptors;
    let place = |rig: &mut Rig| rig.chain.writable_pieces().next();
    for round in 0..40 {
        // The chain behind the one that is there changes before the driver makes it available.
        let addr = 0x1000 + 0x100 * round;
        rig.driver.descriptor(table, 4, addr, 8, WRITE, 0);
        rig.driver.descriptor(table, 5, 0xdead_0000, 8, WRITE, 0);
        rig.driver.offer(4);
        assert!(rig.pop().unwrap());
        assert_eq!(place(&mut rig), Some((addr, 8)));
        rig.driver.descriptor(table, 5, addr + 8, 8, WRITE, 0);
        rig.driver.offer(5);
        assert!(rig.pop().unwrap());
        assert_eq!(place(&mut rig), Some((addr + 8, 8)));
        // Taken again they are what they were.
        rig.ring.put_back(1);
        assert!(rig.pop().unwrap());
        assert_eq!(place(&mut rig), Some((addr + 8, 8)));
        for head in [4, 5] {
            rig.ring.push(head, 8).unwrap();
        }
    }
}

#[test]
fn indices_wrap() {
    for features in [ALL, NONE] {
        let mut rig = Rig::at(8, features, 0xfffb);
        for i in 0..20u16 {
            let head = rig.driver.add(&[(0x100, 8, false), (0x200, 8, true)]);
            assert!(rig.pop().unwrap());
            assert_eq!((rig.chain.head(), rig.chain.readable(), rig.chain.writable()), (head, 8, 8));
            rig.ring.push(head, i.into()).unwrap();
            if i % 3 == 2 {
                rig.ring.publish().unwrap();
                for used in i - 2..=i {
                    assert_eq!(rig.driver.take_used().unwrap().1, u32::from(used));
                }
            }
        }
        assert_eq!(rig.ring.position(), RingPosition { available: 15, used: 13 });
    }
}

#[test]
fn chains_that_break_the_rules_are_refused() {
    type Case = (&'static str, fn(&Driver, u64));
    let cases: [Case; 12] = [
        ("a head past the table", |driver, _| {
            let head = driver.at.available + 4;
            driver.ram.set(head, &8u16.to_le_bytes());
        }),
        ("a next past the table", |driver, at| driver.descriptor(at, 0, 0, 8, NEXT, 8)),
        ("a loop of one", |driver, at| driver.descriptor(at, 0, 0, 8, NEXT, 0)),
        ("a loop of two", |driver, at| {
            driver.descriptor(at, 0, 0, 8, NEXT, 1);
            driver.descriptor(at, 1, 0, 8, NEXT, 0);
        }),
        ("more than 4 GiB", |driver, at| {
            driver.descriptor(at, 0, 0, u32::MAX, NEXT, 1);
            driver.descriptor(at, 1, 0, 1, 0, 0);
        }),
        ("past the end of memory", |driver, at| driver.descriptor(at, 0, u64::MAX - 3, 8, 0, 0)),
        ("a table within a table", |driver, at| {
            driver.descriptor(at, 0, 0x3_0000, 32, TABLE, 0);
            driver.descriptor(0x3_0000, 0, 0, 8, NEXT, 1);
            driver.descriptor(0x3_0000, 1, 0x3_1000, 32, TABLE, 0);
        }),
        ("a table of no size", |driver, at| driver.descriptor(at, 0, 0x3_0000, 0, TABLE, 0)),
        ("a table of an odd size", |driver, at| driver.descriptor(at, 0, 0x3_0000, 24, TABLE, 0)),
        ("a table too large", |driver, at| driver.descriptor(at, 0, 0x3_0000, 16 * 1025, TABLE, 0)),
        ("a loop in a table", |driver, at| {
            driver.descriptor(at, 0, 0x3_0000, 32, TABLE, 0);
            driver.descriptor(0x3_0000, 0, 0, 8, NEXT, 1);
            driver.descriptor(0x3_0000, 1, 0, 8, NEXT, 0);
        }),
        ("read behind write", |driver, at| {
            driver.descriptor(at, 0, 0, 8, NEXT | WRITE, 1);
            driver.descriptor(at, 1, 0, 8, 0, 0);
        }),
    ];
    for (what, breaks) in cases {
        let mut rig = Rig::new(8, ALL);
        rig.driver.offer(0);
        breaks(&rig.driver, rig.driver.at.descriptors);
        assert!(is_broken(rig.pop()), "{what}");
    }
    let mut rig = Rig::new(8, NONE);
    rig.driver.add_indirect(0x3_0000, &[(0, 8, false)]);
    assert!(is_broken(rig.pop()), "indirect without the feature");
    // Tables that are not in RAM are no broken chains, but they are no chains either.
    let mut rig = Rig::new(8, ALL);
    rig.driver.descriptor(rig.driver.at.descriptors, 0, 1 << 40, 32, TABLE, 0);
    rig.driver.offer(0);
    assert!(matches!(rig.pop(), Err(QueueError::Memory(_))));
}

#[test]
fn an_available_index_moves_forward_and_not_too_far() {
    let mut rig = Rig::new(8, NONE);
    for _ in 0..8 {
        rig.driver.add(&[(0, 8, false)]);
    }
    assert!(rig.pop().unwrap());
    let mut rig = Rig::new(8, NONE);
    rig.driver.available = 9;
    rig.driver.offer(0);
    assert!(is_broken(rig.pop()));
    // Taken back while the ring looks again.
    let mut rig = Rig::new(8, ALL);
    for _ in 0..3 {
        rig.driver.add(&[(0, 8, false)]);
    }
    assert!(rig.pop().unwrap() && rig.ring.allow_kicks() == Ok(false));
    rig.board.ram.set(rig.driver.at.available + 2, &2u16.to_le_bytes());
    assert!(is_broken(rig.ring.allow_kicks()));
}

#[test]
fn a_chain_is_consumed_from_its_front() {
    let mut rig = Rig::new(8, ALL);
    rig.board.ram.set(0x100, b"abcdefgh");
    rig.driver.add(&[(0x100, 3, false), (0x104, 4, false), (0x200, 2, true), (0x300, 0, true), (0x208, 5, true)]);
    assert!(rig.pop().unwrap());
    let lease = rig.ring.lease().clone();
    let mut bytes = [0; 5];
    rig.chain.read(&lease, &mut bytes).unwrap();
    assert_eq!((&bytes, rig.chain.readable()), (b"abcef", 2));
    assert!(rig.chain.read(&lease, &mut [0; 3]).is_err());
    assert_eq!(rig.chain.take_last_byte(), Some(0x20c));
    rig.chain.write(&lease, b"1").unwrap();
    rig.chain.write(&lease, b"2345").unwrap();
    assert_eq!(rig.board.ram.get(0x200, 2), b"12");
    assert_eq!(rig.board.ram.get(0x208, 5), b"345\0\0");
    assert_eq!((rig.chain.writable(), rig.chain.take_last_byte()), (1, Some(0x20b)));
    assert_eq!(rig.chain.take_last_byte(), None);
    assert!(rig.chain.write(&lease, b"1").is_err());
}

#[test]
fn chains_are_put_back() {
    let mut rig = Rig::new(8, ALL);
    let heads = [0, 1, 2].map(|_| rig.driver.add(&[(0, 8, false)]));
    for take in [3, 2, 1] {
        for head in &heads[..take] {
            assert!(rig.pop().unwrap());
            assert_eq!(rig.chain.head(), *head);
        }
        rig.ring.put_back(take as u16);
    }
    // A kick is wanted for the fourth, not for those that are there.
    assert_eq!(rig.ring.allow_kicks(), Ok(false));
    assert_eq!(rig.driver.available_event(), 3);
    rig.driver.add(&[(0, 8, false)]);
    assert_eq!(rig.ring.allow_kicks(), Ok(true));
    assert_eq!((0..5).map(|_| rig.pop().unwrap()).collect::<Vec<_>>(), [true, true, true, true, false]);
}

#[test]
fn the_driver_says_when_it_wants_to_be_interrupted() {
    let mut rig = Rig::new(8, NONE);
    let used = |rig: &mut Rig| {
        rig.driver.add(&[(0, 8, true)]);
        assert!(rig.pop().unwrap());
        rig.ring.push(rig.chain.head(), 0).unwrap();
        rig.ring.publish().unwrap()
    };
    assert!(used(&mut rig));
    rig.board.ram.set(rig.driver.at.available, &[1, 0]);
    assert!(!used(&mut rig));
    assert_eq!(rig.ring.publish(), Ok(false));
    let mut rig = Rig::new(8, ALL);
    rig.driver.set_used_event(2);
    let wanted: Vec<_> = (0..5).map(|_| used(&mut rig)).collect();
    assert_eq!(wanted, [false, false, true, false, false]);
}

#[test]
fn the_driver_is_told_whether_to_kick() {
    let mut rig = Rig::new(8, NONE);
    let flags = |rig: &Rig| rig.board.ram.u16(rig.driver.at.used);
    rig.ring.hold_kicks().unwrap();
    assert_eq!(flags(&rig), 1);
    rig.driver.add(&[(0, 8, true)]);
    assert!(rig.pop().unwrap());
    rig.ring.push(0, 0).unwrap();
    rig.ring.publish().unwrap();
    assert_eq!((flags(&rig), rig.driver.used_index()), (1, 1));
    assert_eq!(rig.ring.allow_kicks(), Ok(false));
    assert_eq!((flags(&rig), rig.driver.used_index(), rig.driver.take_used()), (0, 1, Some((0, 0))));
    rig.driver.add(&[(0, 8, true)]);
    assert_eq!(rig.ring.allow_kicks(), Ok(true));
}

#[test]
fn a_lease_that_is_over_gives_nothing() {
    let mut rig = Rig::new(8, NONE);
    rig.driver.add(&[(0x100, 8, true)]);
    assert!(rig.pop().unwrap());
    rig.ring.lease().revoke();
    let lease = rig.ring.lease().clone();
    let before = rig.transfers();
    assert_eq!(rig.chain.write(&lease, b"x"), Err(QueueError::Revoked));
    rig.ring.push(0, 0).unwrap();
    assert_eq!(rig.ring.publish(), Err(QueueError::Revoked));
    assert_eq!(rig.ring.allow_kicks(), Err(QueueError::Revoked));
    assert_eq!(rig.transfers(), before);
}
