//! A disk.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use soc_vmm::virtio::block::{self, BlockConfig};

use super::rig::{Driver, EVENT_INDEX, Guest, HeapDisk, INDIRECT, NEEDS_RESET, VERSION_1, eventually};

const FLUSH: u64 = 1 << 9;
/// Where requests are: header, data, status.
const HEADER: u64 = 0x8_0000;
const DATA: u64 = 0x8_1000;
const STATUS: u64 = 0x8_0100;

fn plug(disk: &Arc<HeapDisk>) -> Guest {
    let config = BlockConfig::new("disk0", disk.clone(), "serial-number-of-a-disk");
    Guest::new(|plumbing| block::new(config, plumbing))
}

/// A guest whose driver is up.
fn start(disk: HeapDisk, features: u64) -> (Arc<HeapDisk>, Guest, Driver) {
    let disk = Arc::new(disk);
    let mut guest = plug(&disk);
    guest.negotiate(VERSION_1 | features);
    let queue = guest.queue(0, 16);
    guest.go();
    (disk, guest, queue)
}

fn header(guest: &Guest, kind: u32, sector: u64) {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    guest.board.ram.set(HEADER, &bytes);
    guest.board.ram.set(STATUS, &[0xee]);
}

/// Makes one request with `len` bytes of data: its status, and the bytes used.
fn request(guest: &mut Guest, queue: &mut Driver, kind: u32, sector: u64, len: u32, to_guest: bool) -> (u8, u32) {
    header(guest, kind, sector);
    let head = queue.add(&[(HEADER, 16, false), (DATA, len, to_guest), (STATUS, 1, true)]);
    guest.kick(0);
    let (id, used) = queue.wait_used();
    assert_eq!(id, u32::from(head));
    (guest.board.ram.get(STATUS, 1)[0], used)
}

#[test]
fn what_is_written_is_read() {
    let (disk, mut guest, mut queue) = start(HeapDisk::new(2048), FLUSH);
    let data: Vec<u8> = (0..4096u32).map(|i| (i * 7) as u8).collect();
    guest.board.ram.set(DATA, &data);
    assert_eq!(request(&mut guest, &mut queue, 1, 3, 4096, false), (0, 1));
    assert_eq!(disk.bytes.lock().unwrap()[3 * 512..][..4096], data);
    guest.board.ram.set(DATA, &[0; 4096]);
    assert_eq!(request(&mut guest, &mut queue, 0, 3, 4096, true), (0, 4097));
    assert_eq!(guest.board.ram.get(DATA, 4096), data);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 0);
    assert_eq!(request(&mut guest, &mut queue, 4, 0, 0, false), (0, 1));
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn large_requests_go_in_parts() {
    let (disk, mut guest, mut queue) = start(HeapDisk::new(2048), FLUSH);
    let pattern: Vec<u8> = (0..300u32 << 10).map(|i| (i / 512) as u8 ^ i as u8).collect();
    disk.bytes.lock().unwrap()[..300 << 10].copy_from_slice(&pattern);
    assert_eq!(request(&mut guest, &mut queue, 0, 0, 300 << 10, true), (0, (300 << 10) + 1));
    assert_eq!(guest.board.ram.get(DATA, 300 << 10), pattern);
    assert_eq!(request(&mut guest, &mut queue, 1, 700, 300 << 10, false), (0, 1));
    assert_eq!(disk.bytes.lock().unwrap()[700 * 512..][..300 << 10], pattern);
}

#[test]
fn a_request_may_be_laid_out_in_any_way() {
    let (disk, mut guest, mut queue) = start(HeapDisk::new(64), FLUSH | INDIRECT | EVENT_INDEX);
    disk.bytes.lock().unwrap()[512..1536].fill(0xa7);
    header(&guest, 0, 1);
    // The header in two pieces with an empty one between; the status behind the data, in the same buffer.
    let buffers =
        [(HEADER, 5, false), (HEADER, 0, false), (HEADER + 5, 11, false), (DATA, 1000, true), (DATA + 1000, 25, true)];
    let head = queue.add_indirect(0x9_0000, &buffers);
    guest.kick(0);
    assert_eq!(queue.wait_used(), (head.into(), 1025));
    assert_eq!(guest.board.ram.get(DATA, 1025), [vec![0xa7; 1024], vec![0]].concat());
    // Descriptors of the queue before the indirect one.
    guest.board.ram.set(DATA, &[0; 1024]);
    queue.descriptor(0x9_1000, 0, DATA, 1024, 1 | 2, 1);
    queue.descriptor(0x9_1000, 1, STATUS, 1, 2, 0);
    queue.descriptor(queue.at.descriptors, 9, HEADER, 16, 1, 10);
    queue.descriptor(queue.at.descriptors, 10, 0x9_1000, 32, 4, 0);
    queue.offer(9);
    guest.kick(0);
    assert_eq!(queue.wait_used(), (9, 1025));
    assert_eq!(guest.board.ram.get(DATA, 1024), [0xa7; 1024]);
}

#[test]
fn the_disk_says_who_it_is() {
    let (_, mut guest, mut queue) = start(HeapDisk::new(77), FLUSH);
    assert_eq!(guest.get(0x2000, 8), 77);
    assert_eq!(guest.get(0x2014, 4), 512);
    assert_eq!(guest.get(0x2fff, 8), 0);
    assert_eq!(request(&mut guest, &mut queue, 8, 0, 20, true), (0, 21));
    assert_eq!(guest.board.ram.get(DATA, 20), b"serial-number-of-a-d");
    assert_eq!(request(&mut guest, &mut queue, 8, 0, 40, true), (0, 20));
    assert_eq!(request(&mut guest, &mut queue, 8, 0, 3, true), (0, 4));
}

#[test]
fn what_can_not_be_done_is_refused() {
    let (disk, mut guest, mut queue) = start(HeapDisk::new(64), FLUSH);
    for (kind, sector, len) in [(0, 63, 1024), (0, 1 << 55, 512), (0, u64::MAX, 512), (0, 0, 100)] {
        assert_eq!(request(&mut guest, &mut queue, kind, sector, len, true), (1, 0), "{sector:#x}");
    }
    assert_eq!(request(&mut guest, &mut queue, 1, 64, 512, false), (1, 1));
    assert_eq!(request(&mut guest, &mut queue, 0x99, 0, 512, true), (2, 0));
    disk.fails.store(true, Ordering::SeqCst);
    assert_eq!(request(&mut guest, &mut queue, 0, 0, 512, true), (1, 0));
    assert_eq!(request(&mut guest, &mut queue, 1, 0, 512, false), (1, 1));
    assert_eq!(request(&mut guest, &mut queue, 4, 0, 0, false), (1, 1));
    disk.fails.store(false, Ordering::SeqCst);
    assert_eq!(request(&mut guest, &mut queue, 0, 0, 512, true), (0, 513));
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut disk = HeapDisk::new(64);
    disk.read_only = true;
    let (_, mut guest, mut queue) = start(disk, FLUSH);
    let offered = guest.offered();
    assert_eq!((offered >> 5 & 1, offered >> 13 & 3), (1, 0));
    guest.board.ram.set(DATA, &[0; 16]);
    for kind in [1, 11, 13] {
        assert_eq!(request(&mut guest, &mut queue, kind, 0, 512, false), (1, 1));
    }
    assert_eq!(request(&mut guest, &mut queue, 0, 0, 512, true), (0, 513));
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let (disk, mut guest, mut queue) = start(HeapDisk::new(64), FLUSH);
    disk.bytes.lock().unwrap().fill(1);
    let ranges = |list: &[(u64, u32, u32)]| -> Vec<u8> {
        let bytes = |(sector, sectors, flags): &(u64, u32, u32)| {
            [sector.to_le_bytes().to_vec(), sectors.to_le_bytes().to_vec(), flags.to_le_bytes().to_vec()].concat()
        };
        list.iter().flat_map(bytes).collect()
    };
    guest.board.ram.set(DATA, &ranges(&[(4, 2, 1), (60, 4, 0)]));
    assert_eq!(request(&mut guest, &mut queue, 13, 0, 32, false), (0, 1));
    let zeros: Vec<_> = (0..64).filter(|i| disk.bytes.lock().unwrap()[i * 512] == 0).collect();
    assert_eq!(zeros, [4, 5, 60, 61, 62, 63]);
    assert_eq!(request(&mut guest, &mut queue, 11, 0, 32, false), (2, 1));
    guest.board.ram.set(DATA, &ranges(&[(4, 2, 0)]));
    assert_eq!(request(&mut guest, &mut queue, 11, 0, 16, false), (0, 1));
    assert_eq!(disk.discards.load(Ordering::SeqCst), 1);
    // One that is wrong keeps the others from being done.
    for bad in [(63, 2, 0), (0, u32::MAX, 0), (u64::MAX, 1, 0)] {
        guest.board.ram.set(DATA, &ranges(&[(0, 1, 0), bad]));
        assert_eq!(request(&mut guest, &mut queue, 13, 0, 32, false), (1, 1));
        assert_eq!(request(&mut guest, &mut queue, 11, 0, 32, false), (1, 1));
    }
    for len in [0, 15, 17, 16 * 33] {
        assert_eq!(request(&mut guest, &mut queue, 13, 0, len, false), (1, 1));
    }
    assert_eq!((disk.bytes.lock().unwrap()[0], disk.discards.load(Ordering::SeqCst)), (1, 1));
}

#[test]
fn without_flushes_a_write_is_durable_when_it_is_done() {
    let (disk, mut guest, mut queue) = start(HeapDisk::new(64), 0);
    assert_eq!(request(&mut guest, &mut queue, 1, 0, 512, false), (0, 1));
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(request(&mut guest, &mut queue, 0, 0, 512, true), (0, 513));
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_broken_request_stops_the_device_until_it_is_reset() {
    let broken: [&[(u64, u32, bool)]; 6] = [
        &[(HEADER, 15, false), (STATUS, 1, true)],
        &[(HEADER, 16, false)],
        &[(HEADER, 16, false), (DATA, 0, true)],
        &[(DATA, 512, true), (HEADER, 16, false)],
        &[(HEADER, 16, false), (u64::MAX - 8, 512, true)],
        &[(HEADER, 16, false), (super::rig::RAM as u64 - 256, 512, true), (STATUS, 1, true)],
    ];
    let (_, mut guest, mut queue) = start(HeapDisk::new(64), FLUSH);
    for buffers in broken {
        header(&guest, 0, 0);
        queue.add(buffers);
        guest.kick(0);
        eventually(|| (guest.get(0x1000, 1) == 2).then_some(()));
        assert_eq!((guest.status() & NEEDS_RESET, queue.take_used()), (NEEDS_RESET, None));
        guest.negotiate(VERSION_1 | FLUSH);
        queue = guest.queue(0, 16);
        guest.go();
        assert_eq!(request(&mut guest, &mut queue, 0, 0, 512, true), (0, 513));
        eventually(|| (guest.get(0x1000, 4) == 1).then_some(()));
    }
}

#[test]
fn requests_that_come_together_share_interrupts() {
    let (_, mut guest, mut queue) = start(HeapDisk::new(64), FLUSH | EVENT_INDEX);
    queue.set_used_event(7);
    header(&guest, 0, 0);
    for i in 0..4u64 {
        queue.add(&[(HEADER, 16, false), (DATA + 512 * i, 512, true), (STATUS, 1, true)]);
    }
    guest.kick(0);
    for _ in 0..4 {
        queue.wait_used();
    }
    assert!(!guest.board.pin.is_high(), "no interrupt before the one that was asked for");
    for i in 0..4u64 {
        queue.add(&[(HEADER, 16, false), (DATA + 512 * i, 512, true), (STATUS, 1, true)]);
    }
    eventually(|| (queue.available_event() == 4).then_some(()));
    guest.kick(0);
    for _ in 0..4 {
        queue.wait_used();
    }
    eventually(|| guest.board.pin.is_high().then_some(()));
}

#[test]
fn the_ring_goes_round() {
    let (_, mut guest, mut queue) = start(HeapDisk::new(64), FLUSH | EVENT_INDEX);
    for i in 0..300u64 {
        assert_eq!(request(&mut guest, &mut queue, 0, i % 64, 512, true), (0, 513));
    }
    assert_eq!(queue.used_index(), 300);
}
