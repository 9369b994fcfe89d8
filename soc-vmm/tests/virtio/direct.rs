//! Devices over vhost-user whose back ends work on the guest's own queues.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::fcntl::{FallocateFlags, fallocate};
use pcie_function::MemoryFile;
use soc_vmm::memory::{Borrower, GuestLog, GuestMemory, Lender, MemoryError, RamFile, RamFiles};
use soc_vmm::virtio::RingLayout;
use soc_vmm::virtio::vhost::VhostKind;

use crate::rig::{Board, EVENT_INDEX, Guest, INDIRECT, NEEDS_RESET, RAM, Ram, VERSION_1, eventually};
use crate::vhost::{
    self, BLOCK, BLOCKS, Backend, FLUSH, Load, MAC, Place, QUEUES, READ, SLOTS, WRITE, do_one, frame, request, send,
};

/// Features of a disk: SIZE_MAX, SEG_MAX, FLUSH, MQ.
const SIZE_MAX: u64 = 1 << 1;
const SEG_MAX: u64 = 1 << 2;
const HAS_FLUSH: u64 = 1 << 9;
const MQ: u64 = 1 << 12;
const ORDER: u64 = 1 << 36;

/// RAM that is so many pieces of its file.
struct Shared {
    ram: Arc<Ram>,
    lender: Arc<Lender>,
    pieces: u64,
}

impl GuestMemory for Shared {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.ram.read(addr, data)
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.ram.write(addr, data)
    }

    fn files(&self, borrower: &Arc<Borrower>) -> Option<RamFiles> {
        let file: Arc<OwnedFd> = Arc::new(self.ram.file.try_clone().unwrap().into());
        let len = RAM as u64 / self.pieces;
        let piece = |base: u64| RamFile { base, len, file: MemoryFile { file: file.clone(), offset: base, len } };
        Some(self.lender.lend((0..self.pieces).map(|index| piece(index * len)).collect(), borrower))
    }
}

/// A board whose RAM is in so many pieces, and who has them.
pub(crate) fn board(pieces: u64) -> (Board, Arc<Lender>) {
    let board = Board::default();
    let lender = Arc::<Lender>::default();
    let shared = Shared { ram: board.ram.clone(), lender: lender.clone(), pieces };
    (Board { memory: Arc::new(shared), ..board }, lender)
}

fn plug(kind: &VhostKind, queues: u16, socket: &Path) -> (Guest, Arc<Lender>) {
    let device = vhost::open(kind, queues, socket);
    let (board, lender) = board(2);
    (Guest::on(board, |plumbing| device.plug("v0", MAC, plumbing)), lender)
}

#[test]
fn a_disk_whose_back_end_is_killed_a_hundred_times_loses_nothing_and_does_nothing_twice_for_the_guest() {
    let place = Place::new();
    let disk = place.disk(BLOCKS * SLOTS);
    let plug = |socket: &Path| plug(&VhostKind::Block, QUEUES as u16, socket).0;
    vhost::kill_a_hundred_times(&disk, plug, &place, |death| place.backend("recorded", death));
}

#[test]
fn a_guest_is_offered_what_its_back_end_has_where_that_works_on_its_queues() {
    let place = Place::new();
    place.disk(64);
    let offered = |kind, pieces| {
        let _backend = place.backend(kind, None);
        let device = vhost::open(&VhostKind::Block, 2, &place.path("socket"));
        let mut guest = Guest::on(board(pieces).0, |plumbing| device.plug("v0", MAC, plumbing));
        (guest.offered() & !ORDER, guest.get(0x2000 + 12, 4))
    };
    // Its rings have no tables and no event index, and it says itself how many segments a request may have.
    assert_eq!(offered("recorded", 8), (VERSION_1 | HAS_FLUSH | MQ | SEG_MAX, 30));
    // In more pieces than it takes, or without a record of what is in flight: shadow queues.
    let shadow = VERSION_1 | HAS_FLUSH | MQ | SEG_MAX | SIZE_MAX | INDIRECT | EVENT_INDEX;
    assert_eq!(offered("recorded", 16), (shadow, 126));
    assert_eq!(offered("block", 1), (shadow, 126));
}

#[test]
fn a_disk_starts_over_with_each_reset_and_its_memory_is_its_guests_again_after_it() {
    let place = Place::new();
    place.disk(64);
    let backend = place.backend("recorded", None);
    let (mut guest, lender) = plug(&VhostKind::Block, 2, &place.path("socket"));
    for round in 0..3u8 {
        guest.negotiate(VERSION_1 | HAS_FLUSH);
        let mut queue = guest.queue(0, 64);
        guest.go();
        guest.board.ram.set(request(0)[1], &vec![round; BLOCK]);
        do_one(&mut guest, &mut queue, WRITE, 3);
        do_one(&mut guest, &mut queue, FLUSH, 0);
        assert_eq!(do_one(&mut guest, &mut queue, READ, 3), vec![round; BLOCK]);
        assert_eq!(lender.debtors(), ["vhost-blk v0"]);
        // One that doesn't stop may still write: the reset is not over.
        backend.stop();
        guest.put(0x14, 1, 0);
        assert_eq!((guest.status(), lender.debtors().len()), (0xf, 1));
        // Whatever it says before.
        guest.put(0x14, 1, 0);
        assert_eq!(guest.status(), 0xf);
        backend.go_on();
        eventually(|| (guest.status() == 0).then_some(()));
        assert_eq!(lender.debtors(), [""; 0]);
    }
}

#[test]
fn a_reset_ends_with_a_back_end_that_is_killed_before_it_stops() {
    let place = Place::new();
    place.disk(64);
    let backend = place.backend("recorded", None);
    let (mut guest, lender) = plug(&VhostKind::Block, 1, &place.path("socket"));
    guest.negotiate(VERSION_1);
    let mut queue = guest.queue(0, 64);
    guest.go();
    do_one(&mut guest, &mut queue, READ, 3);
    backend.stop();
    guest.put(0x14, 1, 0);
    assert_eq!(guest.status(), 0xf);
    drop(backend);
    eventually(|| (guest.status() == 0).then_some(()));
    assert_eq!(lender.debtors(), [""; 0]);
    let _backend = place.backend("recorded", None);
    guest.negotiate(VERSION_1);
    let mut queue = guest.queue(0, 64);
    guest.go();
    do_one(&mut guest, &mut queue, READ, 3);
}

#[test]
fn a_queue_that_is_not_in_one_piece_of_ram_needs_a_reset_and_its_back_end_hears_nothing_of_it() {
    let place = Place::new();
    place.disk(64);
    let _backend = place.backend("recorded", None);
    let (mut guest, lender) = plug(&VhostKind::Block, 2, &place.path("socket"));
    let (ram, half) = (RAM as u64, RAM as u64 / 2);
    let right = RingLayout { size: 64, descriptors: 0x1_0000, available: 0x1_1000, used: 0x1_2000 };
    for wrong in [
        RingLayout { descriptors: ram, ..right },
        RingLayout { available: 0xfee0_0000, ..right },
        RingLayout { used: 1 << 52, ..right },
        RingLayout { used: ram - 64, ..right },
        RingLayout { descriptors: half - 16, ..right },
        RingLayout { used: half - 8, ..right },
        RingLayout { available: u64::MAX - 0xfff, ..right },
    ] {
        guest.negotiate(VERSION_1);
        let mut good = guest.queue(1, 64);
        guest.set_queue(0, &wrong);
        guest.go();
        eventually(|| (guest.status() & NEEDS_RESET != 0).then_some(()));
        let before = good.used_index();
        send(&guest, &mut good, 0, READ, 1);
        guest.kick(1);
        guest.put(0x14, 1, 0);
        eventually(|| (guest.status() == 0).then_some(()));
        assert_eq!((good.used_index(), lender.debtors().len()), (before, 0));
    }
    guest.negotiate(VERSION_1);
    let mut queue = guest.queue(0, 64);
    guest.go();
    do_one(&mut guest, &mut queue, READ, 3);
}

#[test]
fn of_32_requests_at_once_nothing_passes_here_but_one_interrupt() {
    const DEPTH: usize = 32;
    let place = Place::new();
    place.disk(64);
    let _backend = place.backend("recorded", None);
    let (mut guest, _) = plug(&VhostKind::Block, 1, &place.path("socket"));
    guest.enable_msix(2);
    guest.negotiate(VERSION_1);
    let mut queue = guest.queue(0, 128);
    guest.put(0x16, 2, 0);
    guest.put(0x1a, 2, 1);
    guest.go();
    // Which has its page behind the structures.
    guest.function.write_config(0x20, 4, 0xfe00_0000);
    guest.function.write_config(4, 2, 6);
    do_one(&mut guest, &mut queue, READ, 0);
    eventually(|| (!guest.board.messages.raised().is_empty()).then_some(()));
    for _ in 0..20 {
        let ram = guest.board.ram.clone();
        let (transfers, raised) = (ram.transfers.load(Ordering::Relaxed), guest.board.messages.raised().len());
        // All at once: its back end may look before it is kicked.
        queue.quiet = true;
        for slot in 0..DEPTH {
            send(&guest, &mut queue, slot, READ, slot);
        }
        queue.show();
        // As the host's KVM does it: not even its write passes here.
        guest.function.signals()[0].event.write(1).unwrap();
        for _ in 0..DEPTH {
            queue.wait_used();
        }
        eventually(|| (guest.board.messages.raised().len() > raised).then_some(()));
        assert_eq!(guest.board.messages.raised().len(), raised + 1);
        assert_eq!(ram.transfers.load(Ordering::Relaxed), transfers, "soc-vmm looked at guest memory");
    }
}

#[test]
fn frames_pass_both_ways_and_those_that_a_back_end_left_are_the_next_ones() {
    let place = Place::new();
    let network = UnixListener::bind(place.path("network")).unwrap();
    let words = ["net", &place.word("network"), &place.word("socket")];
    let mut backend = Backend::start(&words);
    let (mut stream, _) = network.accept().unwrap();
    let (mut guest, _) = plug(&VhostKind::Net, 1, &place.path("socket"));
    assert_eq!(guest.offered() & !ORDER, VERSION_1 | 1 << 5 | 1 << 16);
    guest.negotiate(VERSION_1 | 1 << 5 | 1 << 16);
    let (mut receive, mut transmit) = (guest.queue(0, 256), guest.queue(1, 256));
    guest.go();
    for buffer in 0..8 {
        receive.add(&[(0x8_0000 + 0x1000 * buffer, 2048, true)]);
    }
    guest.kick(0);
    let mut send = |guest: &mut Guest, byte: u8| {
        let addr = 0x9_8000 + 0x100 * u64::from(byte);
        guest.board.ram.set(addr, &[&[0; 12], &[byte; 60][..]].concat());
        transmit.add(&[(addr, 72, false)]);
        guest.kick(1);
    };
    for round in 0..4u8 {
        eventually(|| (guest.get(0x2006, 2) == 1).then_some(()));
        send(&mut guest, 2 * round);
        assert_eq!(frame(&mut stream), [2 * round; 60]);
        let answer = vec![0x80 + round; 100];
        stream.write_all(&[&100u32.to_be_bytes()[..], &answer].concat()).unwrap();
        assert_eq!(receive.wait_used().1, 112);
        assert_eq!(guest.board.ram.get(0x8_0000 + 0x1000 * u64::from(round) + 12, 100), answer);
        drop(backend);
        eventually(|| (guest.get(0x2006, 2) == 0).then_some(()));
        // Nobody carries it yet.
        send(&mut guest, 2 * round + 1);
        backend = Backend::start(&words);
        stream = network.accept().unwrap().0;
        // One that was sent, but not yet used, may come again.
        while frame(&mut stream) != [2 * round + 1; 60] {}
    }
}

#[test]
fn a_disk_is_the_same_through_eight_pieces_of_memory() {
    let place = Place::new();
    let disk = place.disk(BLOCKS * SLOTS);
    let _backend = place.backend("recorded", None);
    let device = vhost::open(&VhostKind::Block, QUEUES as u16, &place.path("socket"));
    let mut guest = Guest::on(board(8).0, |plumbing| device.plug("v0", MAC, plumbing));
    guest.negotiate(VERSION_1 | MQ);
    let queues = (0..QUEUES as u16).map(|index| guest.queue(index, 128)).collect();
    guest.go();
    let mut load = Load::new(guest, queues);
    eventually(|| {
        load.turn();
        (load.done > 500).then_some(())
    });
    load.finish();
    load.check(&disk);
}

#[test]
fn a_page_that_went_back_to_the_host_is_the_same_new_one_for_guest_and_back_end() {
    let place = Place::new();
    let disk = place.disk(64);
    disk.write_all_at(&[7; BLOCK], 3 * BLOCK as u64).unwrap();
    let _backend = place.backend("recorded", None);
    let (mut guest, _) = plug(&VhostKind::Block, 1, &place.path("socket"));
    guest.negotiate(VERSION_1);
    let mut queue = guest.queue(0, 64);
    guest.go();
    let data = request(0)[1];
    for _ in 0..3 {
        assert_eq!(do_one(&mut guest, &mut queue, READ, 3), [7; BLOCK]);
        // What MADV_REMOVE does in the host.
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&guest.board.ram.file, hole, data as i64, BLOCK as i64).unwrap();
        assert_eq!(guest.board.ram.get(data, BLOCK), [0; BLOCK]);
        // Zeros for the back end too, which writes them.
        do_one(&mut guest, &mut queue, WRITE, 4);
        let mut found = [1; BLOCK];
        disk.read_exact_at(&mut found, 4 * BLOCK as u64).unwrap();
        assert_eq!(found, [0; BLOCK]);
    }
}

/// Pages of RAM that a log has.
fn written(log: &GuestLog) -> Vec<u64> {
    log.take(0, RAM as u64).map(|addr| addr >> 12).collect()
}

#[tokio::test]
async fn what_a_back_end_writes_while_that_is_asked_for_is_in_the_log() {
    let place = Place::new();
    place.disk(64);
    let backend = place.backend("recorded", None);
    let (mut guest, lender) = plug(&VhostKind::Block, 2, &place.path("socket"));
    guest.negotiate(VERSION_1);
    let mut queue = guest.queue(0, 64);
    guest.go();
    do_one(&mut guest, &mut queue, READ, 3);
    let log = Arc::new(GuestLog::new(RAM as u64).unwrap());
    lender.set_log(Some(log.clone()));
    lender.caught_up().await;
    assert_eq!((written(&log), lender.silent()), (vec![], vec![]));
    // Status, data, and the used ring behind 64 descriptors.
    let [status, data, used] = [request(0)[2] >> 12, request(0)[1] >> 12, queue.at.used >> 12];
    for _ in 0..3 {
        do_one(&mut guest, &mut queue, READ, 3);
        // Its mark follows the end that the guest has seen.
        let mut seen = Vec::new();
        eventually(|| {
            seen.extend(written(&log));
            (seen.len() == 3).then_some(())
        });
        seen.sort_unstable();
        assert_eq!(seen, [used, status, data]);
    }
    // So it is with the next one, and with the device's next driver.
    drop(backend);
    let _backend = place.backend("recorded", None);
    do_one(&mut guest, &mut queue, READ, 3);
    eventually(|| (!written(&log).is_empty()).then_some(()));
    guest.put(0x14, 1, 0);
    eventually(|| (guest.status() == 0).then_some(()));
    guest.negotiate(VERSION_1);
    let mut queue = guest.queue(0, 64);
    guest.go();
    do_one(&mut guest, &mut queue, READ, 3);
    eventually(|| (!written(&log).is_empty()).then_some(()));
    lender.set_log(None);
    lender.caught_up().await;
    written(&log);
    do_one(&mut guest, &mut queue, READ, 3);
    guest.put(0x14, 1, 0);
    eventually(|| (guest.status() == 0).then_some(()));
    assert_eq!(written(&log), [0; 0]);
}

#[tokio::test]
async fn a_device_whose_back_end_keeps_no_log_is_named() {
    let place = Place::new();
    let network = UnixListener::bind(place.path("network")).unwrap();
    let _backend = Backend::start(&["net", &place.word("network"), &place.word("socket")]);
    let (_stream, _) = network.accept().unwrap();
    let (mut guest, lender) = plug(&VhostKind::Net, 1, &place.path("socket"));
    guest.negotiate(VERSION_1 | 1 << 5 | 1 << 16);
    let _queues = (guest.queue(0, 256), guest.queue(1, 256));
    guest.go();
    eventually(|| (lender.debtors().len() == 1).then_some(()));
    lender.set_log(Some(Arc::new(GuestLog::new(RAM as u64).unwrap())));
    lender.caught_up().await;
    assert_eq!(lender.silent(), ["vhost-net v0"]);
}
