//! The DMA queue as docs/card.md has it, by descriptors written by hand; and the control socket.

mod side;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use card::{Card, Dma};
use pcie_function::BusMemory;
use pcie_function::card::queue::{Descriptor, Done, LENGTH_MAX, Operation, Transfer, flag, status};
use pcie_function::card::{DMA_ENABLE, event, queue_error, register, soc_vector};
use zerocopy::{FromZeros, IntoBytes};

use crate::side::{RAM, RAM_SIZE, Side, eventually, readable};

/// Longer than what is to come may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);
const ENTRIES: u32 = 8;
const SUBMISSION: u64 = RAM;
const DONE: usize = 0x1000;
const SOC_DATA: u64 = RAM + 0x10_0000;
const HOST_DATA: u64 = RAM + 0x20_0000;

/// A driver that checks nothing.
struct Driver {
    card: Card,
    host: Side,
    soc: Side,
    tail: u32,
    _directory: tempfile::TempDir,
}

impl Driver {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let card = Card::start(directory.path(), 1).unwrap();
        let host = Side::plug(&card.host_socket(0), 128);
        let soc = Side::plug(&card.soc_socket(0), soc_vector::COUNT);
        let mut driver = Self { card, host, soc, tail: 0, _directory: directory };
        driver.start(SUBMISSION, ENTRIES);
        assert_eq!(driver.soc.read(register::DMA_STATUS), DMA_ENABLE);
        driver
    }

    fn start(&mut self, submission: u64, entries: u32) {
        self.soc.write_wide(register::DMA_SUBMISSION, submission);
        self.soc.write_wide(register::DMA_DONE, RAM + DONE as u64);
        self.soc.write(register::DMA_ENTRIES, entries);
        self.soc.write(register::DMA_CONTROL, DMA_ENABLE);
        self.tail = 0;
    }

    fn generation(&mut self) -> u32 {
        self.soc.read(register::GENERATION)
    }

    /// Puts descriptors into the ring and rings for all at once.
    fn submit(&mut self, descriptors: &[Descriptor]) {
        for descriptor in descriptors {
            let slot = (self.tail % ENTRIES) as usize;
            self.soc.ram.copy_in(slot * size_of::<Descriptor>(), descriptor.as_bytes());
            self.tail = self.tail.wrapping_add(1);
        }
        self.soc.write(register::DMA_TAIL, self.tail);
    }

    /// The record in the slot of descriptor `number`, once it is `sequence`'s.
    fn done(&self, number: u32, sequence: u64) -> Done {
        let at = DONE + (number % ENTRIES) as usize * size_of::<Done>();
        eventually("a done record", || self.soc.ram.load(at + 24) == sequence);
        let mut done = Done::new_zeroed();
        self.soc.ram.copy_out(at, done.as_mut_bytes());
        done
    }

    /// Carries out one descriptor.
    fn one(&mut self, descriptor: &Descriptor) -> Done {
        let number = self.tail;
        self.submit(&[*descriptor]);
        self.done(number, descriptor.sequence())
    }

    fn error(&mut self) -> u32 {
        self.soc.read(register::DMA_STATUS) >> 8
    }
}

fn transfer(length: u32) -> Transfer {
    Transfer { host: HOST_DATA, soc: SOC_DATA, length }
}

#[test]
fn each_ends_with_its_own_status() {
    let mut driver = Driver::new();
    let generation = driver.generation();
    let to_host = |transfer| Descriptor::new(Operation::ToHost(transfer), 0, generation, 77);
    let past_host = Transfer { host: RAM + RAM_SIZE as u64 - 100, ..transfer(0x2_0000) };
    let past_soc = Transfer { soc: RAM + RAM_SIZE as u64 - 40, ..transfer(64) };
    let both = Transfer { host: 0, soc: 0, length: 8 };
    let cases = [
        (to_host(transfer(5)), status::OK, 5, 0),
        (to_host(transfer(4 << 20)), status::OK, 4 << 20, 0),
        (to_host(transfer(LENGTH_MAX)), status::HOST_FAULT, 6 << 20, RAM + RAM_SIZE as u64),
        (to_host(transfer(LENGTH_MAX + 1)), status::MALFORMED, 0, 0),
        (Descriptor::new(Operation::ToHost(transfer(8)), 1 << 7, generation, 77), status::MALFORMED, 0, 0),
        (Descriptor::new(Operation::RaiseVector(128), 0, generation, 77), status::MALFORMED, 0, 0),
        (Descriptor::new(Operation::RaiseVector(127), 0, generation, 77), status::OK, 0, 0),
        (Descriptor::new(Operation::ToHost(transfer(8)), 0, generation + 1, 77), status::STALE, 0, 0),
        (Descriptor::new(Operation::RaiseVector(0), 0, generation - 1, 77), status::STALE, 0, 0),
        (to_host(past_host), status::HOST_FAULT, 100, RAM + RAM_SIZE as u64),
        (to_host(past_soc), status::SOC_FAULT, 40, RAM + RAM_SIZE as u64),
        (to_host(both), status::SOC_FAULT, 0, 0),
        (Descriptor::new(Operation::FromHost(both), 0, generation, 77), status::HOST_FAULT, 0, 0),
    ];
    for (sequence, (descriptor, status, transferred, fault)) in (1..).zip(cases) {
        // Each its own sequence.
        let mut bytes = descriptor;
        bytes.as_mut_bytes()[56..].copy_from_slice(&u64::to_le_bytes(sequence));
        let expected = Done::new(status, transferred, fault, sequence);
        assert_eq!(driver.one(&bytes), expected, "{descriptor:x?}");
    }
    assert_eq!(driver.soc.read(register::DMA_HEAD), 13);
    assert_eq!(driver.host.raised(127), 1);
    driver.host.master(false);
    let refused = driver.one(&Descriptor::new(Operation::RaiseVector(1), 0, generation, 50));
    assert_eq!(refused.status(), status::NOT_MASTER);
    driver.card.set_link(0, false);
    let generation = driver.generation();
    let refused = driver.one(&Descriptor::new(Operation::RaiseVector(1), 0, generation, 51));
    assert_eq!(refused.status(), status::LINK_DOWN);
}

#[test]
fn what_is_linked_to_a_failure_is_skipped() {
    let mut driver = Driver::new();
    let generation = driver.generation();
    driver.soc.ram.store(0x10_0000, 0xabcd);
    let bad = Operation::ToHost(Transfer { host: 0, ..transfer(8) });
    let good = Operation::ToHost(transfer(8));
    let vector = Operation::RaiseVector(9);
    driver.submit(&[
        Descriptor::new(bad, flag::LINKED, generation, 1),
        Descriptor::new(good, flag::LINKED, generation, 2),
        Descriptor::new(vector, flag::LINKED | flag::INTERRUPT, generation, 3),
        Descriptor::new(vector, 0, generation, 4),
        Descriptor::new(good, flag::LINKED, generation, 5),
    ]);
    let found: Vec<u32> = (0..5).map(|number| driver.done(number, u64::from(number) + 1).status()).collect();
    assert_eq!(found, [status::HOST_FAULT, status::SKIPPED, status::SKIPPED, status::OK, status::OK]);
    assert_eq!(driver.host.raised(9), 1);
    assert_eq!(driver.host.ram.load(0x20_0000), 0xabcd);
    assert!(readable(&driver.soc.vectors[soc_vector::DMA_DONE as usize], SOON));
    assert_eq!(driver.soc.raised(soc_vector::DMA_DONE), 1, "one asked for it");
}

#[test]
fn a_broken_queue_stops_and_says_why() {
    let mut driver = Driver::new();
    let generation = driver.generation();
    let vector = |sequence| Descriptor::new(Operation::RaiseVector(0), 0, generation, sequence);
    driver.soc.write(register::DMA_TAIL, ENTRIES + 1);
    eventually("the overrun", || driver.error() == queue_error::OVERRUN);
    assert!(readable(&driver.soc.vectors[soc_vector::EVENT as usize], SOON));
    assert_eq!(driver.soc.read(register::EVENTS) & event::QUEUE_ERROR, event::QUEUE_ERROR);
    driver.soc.write(register::EVENTS, event::QUEUE_ERROR);
    assert_eq!(driver.soc.read(register::EVENTS) & event::QUEUE_ERROR, 0);

    for (submission, entries, error) in [
        (SUBMISSION, 0, queue_error::CONFIGURATION),
        (SUBMISSION, 3, queue_error::CONFIGURATION),
        (SUBMISSION, 8192, queue_error::CONFIGURATION),
        (SUBMISSION + 8, ENTRIES, queue_error::CONFIGURATION),
        (u64::MAX - 63, ENTRIES, queue_error::CONFIGURATION),
    ] {
        driver.start(submission, entries);
        assert_eq!(driver.error(), error, "{submission:#x}, {entries} entries");
        assert_eq!(driver.soc.read(register::DMA_CONTROL), 0);
    }

    driver.start(0x4000, ENTRIES);
    assert_eq!(driver.soc.read(register::DMA_STATUS), DMA_ENABLE, "a new start clears the error");
    driver.submit(&[vector(1)]);
    eventually("the fault", || driver.error() == queue_error::RING_FAULT);

    driver.start(SUBMISSION, ENTRIES);
    driver.soc.master(false);
    driver.submit(&[vector(1)]);
    eventually("the fault", || driver.error() == queue_error::RING_FAULT);
    driver.soc.master(true);
    driver.start(SUBMISSION, ENTRIES);
    assert_eq!(driver.one(&vector(1)).status(), status::OK);

    // Stopped, it does nothing; a reset forgets where the rings were.
    driver.soc.write(register::DMA_CONTROL, 0);
    driver.submit(&[vector(2)]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.host.raised(0), 1);
    driver.soc.client.reset().unwrap();
    assert_eq!(driver.soc.read_wide(register::DMA_SUBMISSION), 0);
    assert_eq!(driver.generation(), generation, "the SoC's reset is not the host's");
}

#[test]
fn the_ring_goes_round_and_stops_in_the_middle_of_a_slow_one() {
    let mut driver = Driver::new();
    let generation = driver.generation();
    for sequence in 1..=100 {
        let descriptor = Descriptor::new(Operation::RaiseVector(2), 0, generation, sequence);
        assert_eq!(driver.one(&descriptor).status(), status::OK);
    }
    assert_eq!(driver.host.raised(2), 100);
    driver.soc.ram.store(0x10_0000, 0xabcd);
    driver.card.set_dma(0, Dma::Split(Duration::from_secs(60)));
    let slow = Operation::ToHost(transfer(1 << 20));
    driver.submit(&[Descriptor::new(slow, 0, generation, 101), Descriptor::new(slow, 0, generation, 102)]);
    eventually("the first half", || driver.host.ram.load(0x20_0000) == 0xabcd);
    // Registers answer meanwhile.
    assert_eq!(driver.soc.read(register::DMA_HEAD), 100);
    driver.soc.write(register::DMA_CONTROL, 0);
    assert_eq!(driver.soc.read(register::DMA_STATUS), 0);
    assert_eq!(driver.done(100, 101).status(), status::ABORTED);
    assert_eq!(driver.soc.read(register::DMA_HEAD), 101, "the second was never begun");
}

#[test]
fn the_card_takes_orders_by_line() {
    let driver = Driver::new();
    let stream = UnixStream::connect(driver.card.control_socket()).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut answers = BufReader::new(stream.try_clone().unwrap());
    let mut say = |line: &str| {
        writeln!(&stream, "{line}").unwrap();
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    };
    assert_eq!(say("link 0 down"), "ok");
    assert!(!driver.card.stats(0).link);
    assert_eq!(say("link 0 up"), "ok");
    assert!(say("stats 0").starts_with("{\"function\":0,\"link\":true,\"generation\":"));
    assert_eq!(say("stats 0"), driver.card.stats(0).to_string());
    assert_eq!(say("reset 7"), "error there is no function 7");
    assert!(say("dance 0").starts_with("error "));
}
