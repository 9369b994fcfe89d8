//! Both sides of a card at once: the host side by a plain vfio-user client, the SoC side by `CardFunction`.

mod side;

use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use card::{Card, Dma, Doorbell, Stats};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pcie_function::card::{self as profile, bar, id, register};
use pcie_function::{BusError, BusMemory, Doorbell as Bell, SocFunction, Windowed};
use pcie_function_card::{CardFunction, CardRemote};

use crate::side::{RAM, RAM_SIZE, Side, eventually, pattern, readable};

const SOON: Duration = Duration::from_secs(60);
const NOT: Duration = Duration::from_millis(50);
const VECTORS: u32 = profile::HOST_VECTORS_MIN;

struct Bed {
    card: Card,
    _directory: tempfile::TempDir,
}

impl Bed {
    fn new(vms: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { card: Card::start(directory.path(), vms).unwrap(), _directory: directory }
    }

    fn host(&self, function: u32) -> Side {
        let side = Side::plug(&self.card.host_socket(function), VECTORS);
        eventually("the link comes up", || self.card.stats(function).link);
        side
    }

    fn soc(&self, function: u32) -> CardFunction {
        pcie_function_card::open(&self.card.soc_socket(function)).unwrap()
    }

    fn both(&self, function: u32) -> (Side, CardFunction) {
        (self.host(function), self.soc(function))
    }
}

fn ram(soc: &CardFunction) -> CardRemote {
    soc.remote(RAM, RAM_SIZE)
}

#[test]
fn each_side_finds_what_it_is() {
    let bed = Bed::new(2);
    for (number, role, host_id, soc_id) in [
        (0, profile::ROLE_VM, id::HOST_VM, id::SOC_VM),
        (1, profile::ROLE_VM, id::HOST_VM, id::SOC_VM),
        (2, profile::ROLE_HOST, id::HOST_HOST, id::SOC_HOST),
    ] {
        let mut host = bed.host(number);
        let mut soc = Side::plug(&bed.card.soc_socket(number), 8);
        for (side, device) in [(&mut host, host_id), (&mut soc, soc_id)] {
            assert_eq!(side.config(0), u32::from(device) << 16 | u32::from(id::VENDOR));
            assert_eq!(side.read(register::MAGIC).to_le_bytes(), *b"OBRD");
            assert_eq!(side.read(register::VERSION), 0x1_0001);
            assert_eq!(side.read_wide(register::FEATURES), 0);
            assert_eq!(side.read(register::FUNCTION), number);
            assert_eq!(side.read(register::ROLE), role);
            assert_eq!(side.read_wide(register::MEMORY_SIZE), 16 << 20);
            assert_eq!(side.read(register::VECTORS), VECTORS);
            assert_eq!(side.read(register::NOTIFY_PAGES), if role == profile::ROLE_VM { 32 } else { 0 });
            let state = side.read_wide(register::STATUS);
            assert_eq!((state as u32, (state >> 32) as u32), (profile::STATUS_LINK, side.read(register::GENERATION)));
        }
        assert_eq!(host.read_wide(register::CARD_ID), soc.read_wide(register::CARD_ID));
        assert_eq!(host.client.get_irq_info(2).unwrap().count, VECTORS);
        // Not a register, and not a register's width.
        assert_eq!(host.read(register::DMA_ENTRIES), 0);
        let mut two = [0xaa; 2];
        host.client.region_read(bar::REGISTERS, register::MAGIC, &mut two).unwrap();
        assert_eq!(two, [0, 0]);
        // Card memory is one memory.
        host.card.store(0x10_0000, 0x1234);
        assert_eq!(soc.card.load(0x10_0000), 0x1234);
    }
}

#[test]
fn doorbells_ring_where_they_should() {
    let bed = Bed::new(1);
    let (mut host, soc) = bed.both(0);
    host.ring(Bell::Channel as u32);
    assert!(readable(soc.doorbell(Bell::Channel), SOON));
    assert!(!readable(soc.doorbell(Bell::Lanes), Duration::ZERO));
    host.ring(Bell::Lanes as u32);
    assert!(readable(soc.doorbell(Bell::Lanes), SOON));
    host.ring(99);
    assert_eq!(bed.card.stats(0).doorbells, 2);
}

#[test]
fn a_notify_page_signals_its_own_eventfd_and_does_nothing_else() {
    let bed = Bed::new(1);
    let (mut host, soc) = bed.both(0);
    assert_eq!(soc.notify_pages(), 32);
    assert_eq!(host.client.region(bar::NOTIFY).unwrap().size, 32 * bar::NOTIFY_PAGE);
    let events: Vec<_> = (0..32).map(|_| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap()).collect();
    for (page, event) in (0..).zip(&events) {
        soc.set_notify(page, event.as_fd()).unwrap();
    }
    let before = bed.card.stats(0);
    // Of every length, at the page's start and at its end.
    for page in [0, 1, 17, 31] {
        for len in 1..=8 {
            for at in [0, bar::NOTIFY_PAGE - len as u64] {
                let offset = page * bar::NOTIFY_PAGE + at;
                host.client.region_write(bar::NOTIFY, offset, &vec![0xa5; len]).unwrap();
                // The write was answered, so it has happened: here, and nowhere else.
                let rung: Vec<u64> = events.iter().map(|event| event.read().unwrap_or(0)).collect();
                let alone: Vec<u64> = (0..32).map(|other| u64::from(other == page)).collect();
                assert_eq!(rung, alone, "{len} bytes at {offset:#x}");
                let mut back = vec![0xff; len];
                host.client.region_read(bar::NOTIFY, offset, &mut back).unwrap();
                assert_eq!(back, vec![0; len]);
            }
        }
    }
    let after = bed.card.stats(0);
    assert_eq!(Stats { notifications: 64, ..before }, after);
    // They count what nobody has looked at yet.
    (0..3).for_each(|_| host.client.region_write(bar::NOTIFY, 0, &[0; 4]).unwrap());
    assert_eq!(events[0].read(), Ok(3));
    // Another event takes the place of the one before.
    soc.set_notify(0, events[1].as_fd()).unwrap();
    host.client.region_write(bar::NOTIFY, 0, &[0; 4]).unwrap();
    assert_eq!((events[0].read().is_err(), events[1].read()), (true, Ok(1)));
    assert!(soc.set_notify(32, events[0].as_fd()).is_err());
}

#[test]
fn a_host_that_is_not_there_notifies_nobody() {
    let bed = Bed::new(1);
    let (mut host, soc) = bed.both(0);
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    soc.set_notify(5, event.as_fd()).unwrap();
    bed.card.set_link(0, false);
    host.client.region_write(bar::NOTIFY, 5 * bar::NOTIFY_PAGE, &[1]).unwrap();
    let mut ones = [0; 4];
    host.client.region_read(bar::NOTIFY, 5 * bar::NOTIFY_PAGE, &mut ones).unwrap();
    assert_eq!((ones, event.read().is_err()), ([0xff; 4], true));
    bed.card.set_link(0, true);
    host.client.region_write(bar::NOTIFY, 5 * bar::NOTIFY_PAGE, &[1]).unwrap();
    assert_eq!(event.read(), Ok(1));
    // The server's own function runs no VM that could use any.
    let server = bed.host(1);
    assert_eq!(server.client.region(bar::NOTIFY).map(|region| region.size).unwrap_or(0), 0);
    assert_eq!(bed.soc(1).notify_pages(), 0);
}

#[test]
fn bytes_go_both_ways_at_every_length_and_alignment() {
    let bed = Bed::new(1);
    let (host, soc) = bed.both(0);
    let lengths = [1, 7, 8, 9, 63, 64, 65, 4096, 0xffff, 0x1_0000, 0x1_0001, 3 << 20];
    for (seed, (length, at)) in
        lengths.into_iter().flat_map(|length| [0, 1, 3, 8, 60].map(|at| (length, at))).enumerate()
    {
        host.ram.copy_in(0, &vec![0xcc; length + 128]);
        let data = pattern(seed as u64, length);
        soc.write(RAM + at as u64, &data).unwrap();
        let mut found = vec![0; length + 128];
        host.ram.copy_out(0, &mut found);
        assert!(found[at..at + length] == data, "{length} bytes at {at}");
        assert!(found[..at].iter().chain(&found[at + length..]).all(|byte| *byte == 0xcc), "around {length} at {at}");
        let mut back = vec![0; length];
        soc.read(RAM + at as u64, &mut back).unwrap();
        assert!(back == data, "{length} bytes back from {at}");
    }
    let stats = bed.card.stats(0);
    assert_eq!(stats.to_host_bytes, stats.from_host_bytes);
    assert_eq!((stats.faults, stats.refused, stats.stale), (0, 0, 0));
}

#[test]
fn a_line_is_never_seen_half() {
    let bed = Bed::new(1);
    let (host, soc) = bed.both(0);
    const ROUNDS: u64 = 3000;
    std::thread::scope(|scope| {
        let line = host.ram.cut(0x1000, 64).unwrap();
        scope.spawn(move || {
            let since = Instant::now();
            let mut seen = 0;
            while seen < ROUNDS {
                assert!(since.elapsed() < Duration::from_secs(60), "stuck at {seen}");
                let sequence = line.load(56);
                assert!(sequence >= seen, "went back from {seen} to {sequence}");
                seen = sequence;
                for word in 0..7 {
                    let found = line.load(word * 8);
                    assert!(found >= sequence, "word {word} is {found}, its sequence {sequence}");
                }
            }
        });
        let line = soc.remote(RAM + 0x1000, 64);
        (1..=ROUNDS).for_each(|round| line.store_line(0, &[round; 8]));
        line.flush().unwrap();
    });
}

#[test]
fn a_vector_comes_after_what_was_stored_before_it() {
    let bed = Bed::new(1);
    let (host, soc) = bed.both(0);
    let window = ram(&soc);
    for round in 1..300u64 {
        let data = pattern(round, 200 << 10);
        window.copy_in(0x1_0000, &data);
        window.store(0x100, round);
        soc.raise(127);
        assert!(readable(&host.vectors[127], SOON));
        assert_eq!(host.raised(127), 1);
        assert_eq!(host.ram.load(0x100), round);
        let mut found = vec![0; data.len()];
        host.ram.copy_out(0x1_0000, &mut found);
        assert!(found == data, "round {round}");
    }
    // The card counts a vector behind raising it, but before the done record.
    window.flush().unwrap();
    assert_eq!(bed.card.stats(0).vectors, 299);
}

#[test]
fn a_load_sees_every_earlier_store() {
    let bed = Bed::new(1);
    let (host, soc) = bed.both(0);
    let window = ram(&soc);
    for round in 0..200 {
        window.store(0x40, round);
        assert_eq!(window.load(0x40), round);
        assert_eq!(host.ram.load(0x40), round);
    }
}

#[test]
fn what_is_not_mapped_faults_and_nothing_else_suffers() {
    let bed = Bed::new(1);
    let (host, soc) = bed.both(0);
    let mut some = [0; 100];
    for iova in [0, RAM - 8, RAM + RAM_SIZE as u64, RAM + RAM_SIZE as u64 - 50, u64::MAX - 99] {
        assert_eq!(soc.read(iova, &mut some), Err(BusError::Dma), "{iova:#x}");
        assert_eq!(soc.write(iova, &some), Err(BusError::Dma), "{iova:#x}");
    }
    // Waited work fails for its caller alone.
    let window = ram(&soc);
    window.store(0, 5);
    assert_eq!(window.flush(), Ok(()));
    assert_eq!(host.ram.load(0), 5);
    assert_eq!(soc.check(), Ok(()));
    assert_eq!(bed.card.stats(0).faults, 10);

    // A store that got lost can't be made good: nothing that was behind it arrives.
    soc.remote(0x10_0000, 64).store(0, 1);
    window.store(8, 6);
    assert_eq!(window.flush(), Err(BusError::Dma));
    assert_eq!(host.ram.load(8), 0);
    assert_eq!(soc.check(), Err(BusError::Dma));
    window.store(16, 7);
    assert_eq!(window.flush(), Err(BusError::Dma));
    assert_eq!(host.ram.load(16), 0);
    // Opened anew, it carries again.
    drop((window, soc));
    let soc = bed.soc(0);
    ram(&soc).store(16, 8);
    assert_eq!(ram(&soc).flush(), Ok(()));
    assert_eq!(host.ram.load(16), 8);
}

#[test]
fn an_answered_unmap_is_a_fence() {
    let bed = Bed::new(1);
    let (mut host, soc) = bed.both(0);
    for round in 0..20u64 {
        let at = RAM + 0x10_0000_0000;
        host.client.dma_map(0x20_0000, at, 0x20_0000, host.file.as_raw_fd()).unwrap();
        let started = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for value in 0u8.. {
                    if let Err(error) = soc.write(at, &vec![value; 0x20_0000]) {
                        return error;
                    }
                    started.store(true, Ordering::Release);
                }
                unreachable!("256 writes of 2 MiB before the unmap");
            });
            eventually("the writer starts", || started.load(Ordering::Acquire));
            std::thread::sleep(Duration::from_micros(300 * round));
            host.client.dma_unmap(at, 0x20_0000).unwrap();
            let mut then = vec![0; 0x20_0000];
            host.ram.copy_out(0x20_0000, &mut then);
            assert_eq!(writer.join().unwrap(), BusError::Dma);
            let mut now = vec![0; 0x20_0000];
            host.ram.copy_out(0x20_0000, &mut now);
            assert!(then == now, "written after the unmap was answered");
        });
    }
}

#[test]
fn a_reset_makes_the_old_generation_stale() {
    let bed = Bed::new(1);
    let (mut host, soc) = bed.both(0);
    host.card.copy_in(0, &[0x77; 128]);
    let before = soc.generation();
    assert!(!readable(soc.lost_event(), NOT));
    host.client.reset().unwrap();
    assert!(readable(soc.lost_event(), SOON));
    assert_eq!(soc.check(), Err(BusError::Stale));
    assert!(!readable(soc.lost_event(), Duration::ZERO), "said once");
    assert_eq!(host.card.load(56), 0, "the header line is cleared");
    assert_eq!(host.card.load(64), 0x7777_7777_7777_7777, "what is behind it is not");

    host.master(true);
    assert_eq!(soc.write(RAM, &[1]), Err(BusError::Stale));
    ram(&soc).store(0, 1);
    assert_eq!(ram(&soc).flush(), Err(BusError::Stale));
    soc.raise(3);
    assert_eq!(host.ram.load(0), 0);
    assert_eq!(host.raised(3), 0);
    assert_eq!(bed.card.stats(0).stale, 2);
    drop(soc);

    let soc = bed.soc(0);
    assert_eq!(soc.generation(), before + 1);
    soc.write(RAM, &[1]).unwrap();
    assert_eq!(soc.check(), Ok(()));
    // The reset that configuration space offers is the same.
    let flr = 0x8000u16.to_le_bytes();
    host.client.region_write(7, 0x48, &flr).unwrap();
    assert_eq!(soc.check(), Err(BusError::Stale));
}

#[test]
fn a_host_that_may_not_master_the_bus_is_not_reached() {
    let bed = Bed::new(1);
    let (mut host, soc) = bed.both(0);
    host.master(false);
    assert_eq!(soc.write(RAM, &[1]), Err(BusError::Dma));
    host.master(true);
    assert_eq!(soc.write(RAM, &[1]), Ok(()));
}

#[test]
fn a_link_goes_down_and_comes_back() {
    let bed = Bed::new(1);
    let (mut host, soc) = bed.both(0);
    bed.card.set_link(0, false);
    assert!(readable(soc.lost_event(), SOON));
    assert_eq!(soc.check(), Err(BusError::Gone));
    assert_eq!(soc.read(RAM, &mut [0; 8]), Err(BusError::Stale));
    assert_eq!(ram(&soc).load(0), u64::MAX);
    assert_eq!(host.read(register::MAGIC), u32::MAX);
    assert_eq!(host.config(0), u32::MAX);
    host.ring(0);
    assert!(!readable(soc.doorbell(Bell::Lanes), NOT));
    drop(soc);

    // A SoC that comes meanwhile waits for the host.
    let soc = bed.soc(0);
    assert_eq!(soc.check(), Err(BusError::Gone));
    bed.card.set_link(0, true);
    assert!(readable(soc.lost_event(), SOON));
    assert_eq!(soc.check(), Ok(()));
    assert_eq!(host.read(register::MAGIC), profile::MAGIC);
    assert_eq!(soc.write(RAM, &[9]), Err(BusError::Dma), "the link's loss ended bus mastering");
    host.master(true);
    assert_eq!(soc.write(RAM, &[9]), Ok(()));
}

#[test]
fn a_host_that_hangs_up_takes_its_memory_along() {
    let bed = Bed::new(1);
    let (host, soc) = bed.both(0);
    soc.write(RAM, &[1]).unwrap();
    let generation = soc.generation();
    drop(host);
    assert!(readable(soc.lost_event(), SOON));
    assert_eq!(soc.check(), Err(BusError::Gone));
    assert_eq!(soc.write(RAM, &[1]), Err(BusError::Stale));
    assert_eq!(bed.card.stats(0).host_mapped_bytes, 0);
    drop(soc);
    let (_host, soc) = bed.both(0);
    assert_eq!(soc.generation(), generation + 1);
    soc.write(RAM, &[1]).unwrap();
}

#[test]
fn a_removed_function_is_gone_for_good() {
    let bed = Bed::new(1);
    let (mut host, soc) = bed.both(0);
    bed.card.remove(0);
    assert!(readable(soc.lost_event(), SOON));
    assert_eq!(soc.check(), Err(BusError::Gone));
    assert_eq!(soc.write(RAM, &[1]), Err(BusError::Stale));
    assert_eq!(host.read_wide(register::STATUS), u64::MAX);
    assert_eq!(host.card.load(0), u64::MAX);
    assert_eq!(host.card.load((16 << 20) - 8), u64::MAX);
    bed.card.set_link(0, true);
    assert_eq!(soc.check(), Err(BusError::Gone));
}

#[test]
fn a_soc_that_comes_again_keeps_generation_and_memory() {
    let bed = Bed::new(1);
    let (host, soc) = bed.both(0);
    host.card.store(0, 0x5555);
    let generation = soc.generation();
    ram(&soc).store(0, 1);
    drop(soc);
    let soc = bed.soc(0);
    assert_eq!(soc.generation(), generation);
    assert_eq!(soc.card_memory().load(0), 0x5555);
    assert_eq!(ram(&soc).load(0), 1);
}

#[test]
fn transfers_go_wrong_on_demand() {
    let bed = Bed::new(1);
    let (host, soc) = bed.both(0);
    let dma = |how| bed.card.set_dma(0, how);

    dma(Dma::Fault);
    assert_eq!(soc.read(RAM, &mut [0; 8]), Err(BusError::Dma));
    dma(Dma::Torn);
    assert_eq!(soc.write(RAM, &[0x11; 4096]), Err(BusError::Dma));
    let mut found = [0; 4096];
    host.ram.copy_out(0, &mut found);
    assert!(found[..2048] == [0x11; 2048] && found[2048..] == [0; 2048], "a prefix, and no more");

    dma(Dma::Slow(Duration::from_millis(30)));
    let since = Instant::now();
    soc.write(RAM, &[0x22; 4096]).unwrap();
    assert!(since.elapsed() >= Duration::from_millis(30));

    // A line that pauses midway is legal, and its sequence still comes last.
    // Long enough to be looked at in between, on a busy machine too.
    dma(Dma::Split(Duration::from_secs(2)));
    ram(&soc).store_line(0x1000, &[3; 8]);
    eventually("the first half", || host.ram.load(0x1000) == 3);
    assert_eq!(host.ram.load(0x1038), 0);
    ram(&soc).flush().unwrap();
    assert_eq!(host.ram.load(0x1038), 3);

    dma(Dma::Torn);
    ram(&soc).store_line(0x2000, &[4; 8]);
    assert_eq!(ram(&soc).flush(), Err(BusError::Dma));
    assert_eq!((host.ram.load(0x2000), host.ram.load(0x2038)), (4, 0), "no line with its sequence, but half");
}

#[test]
fn doorbells_go_wrong_on_demand() {
    let bed = Bed::new(1);
    let (mut host, soc) = bed.both(0);
    let bell = || soc.doorbell(Bell::Lanes);
    let taken = || {
        let mut count = [0; 8];
        nix::unistd::read(bell(), &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    };
    bed.card.set_doorbell(0, Doorbell::Drop);
    host.ring(0);
    assert!(!readable(bell(), NOT));
    bed.card.set_doorbell(0, Doorbell::Double);
    host.ring(0);
    assert_eq!(taken(), 2);
    let delay = Duration::from_millis(100);
    bed.card.set_doorbell(0, Doorbell::Delay(delay));
    let since = Instant::now();
    host.ring(0);
    assert!(readable(bell(), SOON));
    assert!(since.elapsed() >= delay);
    assert_eq!(taken(), 1);
    bed.card.set_doorbell(0, Doorbell::Normal);
    host.ring(0);
    assert_eq!(taken(), 1);
    let stats = bed.card.stats(0);
    assert_eq!((stats.doorbells, stats.doorbells_dropped), (4, 1));
}

#[test]
fn vectors_are_lost_on_demand() {
    let bed = Bed::new(1);
    let (host, soc) = bed.both(0);
    for (lose, arrived) in [(true, 0), (false, 1)] {
        bed.card.lose_vectors(0, lose);
        soc.raise(5);
        // Behind the vector in the queue.
        soc.write(RAM, &[1; 8]).unwrap();
        assert_eq!(host.raised(5), arrived);
    }
    assert_eq!(bed.card.stats(0).vectors_lost, 1);
}

#[test]
fn a_reset_before_the_first_transfer_is_no_loss() {
    let bed = Bed::new(1);
    let (_host, soc) = bed.both(0);
    let lasts = soc.generation();
    bed.card.reset(0);
    assert_eq!(soc.check(), Err(BusError::Stale));
    soc.renew().unwrap();
    assert_ne!(soc.generation(), lasts);
    soc.check().unwrap();
    // Used: now its generation is its connection's.
    let _ = soc.write(RAM, &[1; 8]);
    bed.card.reset(0);
    assert_eq!(soc.renew(), Err(BusError::Stale));
}

#[test]
fn functions_know_nothing_of_each_other() {
    let bed = Bed::new(4);
    let mut pairs: Vec<(Side, CardFunction)> = (0..5).map(|function| bed.both(function)).collect();
    for (seed, (host, _)) in (1..).zip(&pairs) {
        host.ram.copy_in(0, &pattern(seed, RAM_SIZE));
    }
    // Function 0 maps at an address that no other has, function 1 one of its own; and 0's SoC side runs wild.
    let (zero, rest) = pairs.split_first_mut().unwrap();
    let elsewhere = 0x55_0000_0000;
    rest[0].0.client.dma_map(0, elsewhere, RAM_SIZE as u64, rest[0].0.file.as_raw_fd()).unwrap();
    assert_eq!(zero.1.write(elsewhere, &[0; 64]), Err(BusError::Dma));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..2000u64 {
                let iova = u64::from_le_bytes(pattern(round, 8).try_into().unwrap());
                let _ = zero.1.write(if round % 3 == 0 { iova } else { iova % (elsewhere * 2) }, &[0xff; 64]);
                soc_noise(&zero.1, round);
            }
        });
        for (function, (host, soc)) in (1..).zip(rest.iter_mut()) {
            scope.spawn(move || {
                let window = ram(soc);
                for round in 0..200u64 {
                    host.ring(0);
                    assert!(readable(soc.doorbell(Bell::Lanes), SOON), "function {function}, round {round}");
                    let mut count = [0; 8];
                    nix::unistd::read(soc.doorbell(Bell::Lanes), &mut count).unwrap();
                    window.store(RAM_SIZE - 8, round);
                    soc.raise(function);
                    assert!(readable(&host.vectors[function as usize], SOON));
                    assert_eq!(host.raised(function), 1);
                    assert_eq!(host.ram.load(RAM_SIZE - 8), round);
                }
                assert_eq!(window.flush(), Ok(()));
            });
        }
    });
    for (seed, (host, _)) in (2..).zip(rest.iter()) {
        let mut now = vec![0; RAM_SIZE];
        host.ram.copy_out(0, &mut now);
        assert!(now[..RAM_SIZE - 8] == pattern(seed, RAM_SIZE)[..RAM_SIZE - 8], "memory of function {}", seed - 1);
    }
    bed.card.remove(0);
    assert_eq!(rest[0].1.check(), Ok(()));
    assert_eq!(rest[0].1.write(RAM, &[1]), Ok(()));
}

fn soc_noise(soc: &CardFunction, round: u64) {
    soc.card_memory().store(0x1000 + (round as usize % 512) * 8, round.wrapping_mul(0x0123_4567_89ab_cdef));
    soc.raise(round as u32 % 256);
}

#[test]
fn a_card_that_dies_is_gone_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut process = Command::new(env!("CARGO_BIN_EXE_card"))
        .args(["--functions", "1", "--until-eof", "--directory"])
        .arg(directory.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let control = directory.path().join("control.sock");
    eventually("the card listens", || control.exists());
    let host = Side::plug(&directory.path().join("host-0.sock"), VECTORS);
    let soc = pcie_function_card::open(&directory.path().join("soc-0.sock")).unwrap();
    eventually("the function carries", || soc.write(RAM, &[1; 8]) == Ok(()));
    assert_eq!(host.ram.load(0), 0x0101_0101_0101_0101);
    ram(&soc).store(8, 1);
    process.kill().unwrap();
    process.wait().unwrap();

    let since = Instant::now();
    assert!(readable(soc.lost_event(), SOON));
    assert_eq!(soc.check(), Err(BusError::Gone));
    assert_eq!(soc.read(RAM, &mut [0; 8]), Err(BusError::Gone));
    ram(&soc).store(16, 1);
    assert_eq!(ram(&soc).flush(), Err(BusError::Gone));
    assert_eq!(ram(&soc).load(0), u64::MAX);
    soc.raise(0);
    soc.card_memory().store(0, 1);
    assert!(since.elapsed() < SOON, "somebody waits for a card that is gone");
    assert!(pcie_function_card::open(&directory.path().join("soc-0.sock")).is_err());
}
