//! The function: what its configuration space says, its registers, its interrupts.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use soc_vmm::interrupt::Message;
use soc_vmm::virtio::block::{self, BlockConfig};

use super::rig::{Driver, EVENT_INDEX, Guest, HeapDisk, INDIRECT, NEEDS_RESET, RAM, VERSION_1, eventually};

const FLUSH: u64 = 1 << 9;
const ORDER_PLATFORM: u64 = 1 << 36;
const REQUEST: u64 = 0x8_0000;

fn plug() -> Guest {
    let config = BlockConfig::new("d", Arc::new(HeapDisk::new(64)), "");
    Guest::new(|plumbing| block::new(config, plumbing))
}

/// Reads the first sector.
fn read_sector(guest: &mut Guest, queue: &mut Driver) {
    guest.board.ram.set(REQUEST, &[0; 16]);
    queue.add(&[(REQUEST, 16, false), (REQUEST + 512, 512, true), (REQUEST + 16, 1, true)]);
    guest.kick(0);
}

#[test]
fn it_is_found_as_qemu_s_is() {
    let mut guest = plug();
    let config = |guest: &mut Guest, at| guest.function.read_config(at, 4);
    assert_eq!(config(&mut guest, 0), 0x1042_1af4);
    assert_eq!(config(&mut guest, 8), 0x0100_0001);
    assert_eq!(config(&mut guest, 0x2c), 0x1100_1af4);
    assert_eq!(config(&mut guest, 0x3c), 0x100);
    for bar in 0..6 {
        guest.function.write_config(0x10 + 4 * bar, 4, u32::MAX);
    }
    let bars: Vec<_> = (0..6).map(|bar| config(&mut guest, 0x10 + 4 * bar)).collect();
    assert_eq!(bars, [0, 0xffff_f000, 0, 0, 0xffff_c00c, 0xffff_ffff]);
    // Every structure: its page of BAR 4.
    for (kind, page) in [(1, 0), (3, 1), (4, 2), (2, 3)] {
        let at = guest.capability(0x09, |guest, at| guest.function.read_config(at + 3, 1) == kind);
        assert_eq!(guest.function.read_config(at + 4, 1), 4);
        assert_eq!(config(&mut guest, at + 8), page * 0x1000);
        assert_eq!(guest.function.read_config(at + 2, 1), if kind == 2 { 20 } else { 16 });
    }
    let notify = guest.capability(0x09, |guest, at| guest.function.read_config(at + 3, 1) == 2);
    assert_eq!((config(&mut guest, notify + 12), config(&mut guest, notify + 16)), (0x1000, 0x1000));
    let express = guest.capability(0x10, |_, _| true);
    assert_eq!(guest.function.read_config(express + 2, 2), 2);
    let msix = guest.capability(0x11, |_, _| true);
    assert_eq!((guest.function.read_config(msix + 2, 2), config(&mut guest, msix + 4)), (1, 1));
}

#[test]
fn features_are_negotiated_by_the_rules() {
    let mut guest = plug();
    let offered = guest.offered();
    assert_eq!(offered, 0x6644 | INDIRECT | EVENT_INDEX | VERSION_1 | ORDER_PLATFORM);
    // One that was not offered; the legacy interface.
    for features in [VERSION_1 | 1 << 40, FLUSH] {
        guest.put(0x14, 1, 0);
        guest.put(0x14, 1, 3);
        for half in [0, 1] {
            guest.put(8, 4, half);
            guest.put(0xc, 4, features >> (32 * half) & 0xffff_ffff);
        }
        guest.put(0x14, 1, 0xb);
        assert_eq!(guest.status(), 3);
        guest.put(0x14, 1, 0xf);
        assert_eq!(guest.status(), 3);
    }
    guest.negotiate(VERSION_1 | FLUSH);
    // Agreed is agreed, and a status bit is not taken back.
    guest.put(8, 4, 0);
    guest.put(0xc, 4, 0);
    assert_eq!(guest.get(0xc, 4), FLUSH);
    guest.put(0x14, 1, 1);
    assert_eq!(guest.status(), 0xb);
    guest.put(0, 4, 2);
    assert_eq!(guest.get(4, 4), 0);
    guest.put(0x14, 1, 0);
    assert_eq!((guest.status(), guest.get(0xc, 4)), (0, 0));
}

#[test]
fn a_queue_is_set_up_by_its_registers() {
    let mut guest = plug();
    assert_eq!((guest.get(0x12, 2), guest.get(0x18, 2), guest.get(0x1e, 2)), (1, 256, 0));
    for bad in [0, 3, 512, 0xffff] {
        guest.put(0x18, 2, bad);
        assert_eq!(guest.get(0x18, 2), 256);
    }
    guest.put(0x18, 2, 64);
    guest.put(0x20, 8, 0x1_2345_6780);
    guest.put(0x28, 4, 0x1000);
    guest.put(0x2c, 4, 2);
    assert_eq!((guest.get(0x20, 8), guest.get(0x24, 4), guest.get(0x28, 8)), (0x1_2345_6780, 1, 0x2_0000_1000));
    // Writes of other widths do nothing.
    for (offset, len) in [(0x20, 2), (0x22, 4), (0x18, 4), (0x1c, 1), (0x14, 4), (0x30, 1)] {
        guest.put(offset, len, u64::MAX);
    }
    assert_eq!((guest.get(0x20, 8), guest.get(0x18, 2), guest.get(0x1c, 2)), (0x1_2345_6780, 64, 0));
    guest.put(0x1c, 2, 1);
    guest.put(0x18, 2, 32);
    guest.put(0x20, 4, 0);
    assert_eq!((guest.get(0x1c, 2), guest.get(0x18, 2), guest.get(0x20, 4)), (1, 64, 0x2345_6780));
    guest.put(0x16, 2, 1);
    assert_eq!((guest.get(0x18, 2), guest.get(0x1a, 2), guest.get(0x20, 8)), (0, 0xffff, 0));
    guest.put(0x18, 2, 8);
    guest.put(0x1c, 2, 1);
    guest.put(0x14, 1, 0);
    assert_eq!(guest.get(0x16, 2), 0);
    assert_eq!((guest.get(0x18, 2), guest.get(0x1c, 2), guest.get(0x20, 8)), (256, 0, 0));
}

#[test]
fn the_pin_is_high_until_its_status_is_read() {
    let mut guest = plug();
    guest.negotiate(VERSION_1);
    let mut queue = guest.queue(0, 16);
    guest.go();
    read_sector(&mut guest, &mut queue);
    eventually(|| guest.board.pin.is_high().then_some(()));
    assert_eq!(guest.function.read_config(6, 1) & 8, 8);
    guest.function.write_config(4, 2, 0x400);
    assert!(!guest.board.pin.is_high());
    assert_eq!(guest.function.read_config(6, 1) & 8, 8);
    guest.function.write_config(4, 2, 0);
    assert!(guest.board.pin.is_high());
    assert_eq!(guest.get(0x1000, 1), 1);
    assert!(!guest.board.pin.is_high());
    assert_eq!((guest.get(0x1000, 1), guest.function.read_config(6, 1) & 8), (0, 0));
    // A driver that wants none gets none.
    queue.wait_used();
    guest.board.ram.set(queue.at.available, &1u16.to_le_bytes());
    for _ in 0..2 {
        // Once the second is done the first has not interrupted.
        read_sector(&mut guest, &mut queue);
        queue.wait_used();
    }
    assert_eq!((guest.board.pin.is_high(), guest.get(0x1000, 1)), (false, 0));
}

#[test]
fn msix_vectors_are_those_of_the_registers() {
    let mut guest = plug();
    guest.enable_msix(2);
    guest.negotiate(VERSION_1);
    let mut queue = guest.queue(0, 16);
    guest.put(0x10, 2, 2);
    assert_eq!(guest.get(0x10, 2), 0xffff);
    guest.put(0x10, 2, 0);
    guest.put(0x1a, 2, 1);
    assert_eq!((guest.get(0x10, 2), guest.get(0x1a, 2)), (0, 1));
    guest.go();
    read_sector(&mut guest, &mut queue);
    let message = |data| Message { address: 0xfee0_0000, data };
    eventually(|| (guest.board.messages.raised() == [message(0x41)]).then_some(()));
    queue.wait_used();
    // A broken ring is told by the vector of the configuration.
    guest.board.ram.set(queue.at.available + 2, &99u16.to_le_bytes());
    guest.kick(0);
    eventually(|| (guest.board.messages.raised() == [message(0x41), message(0x40)]).then_some(()));
    assert_eq!(guest.status(), 0xf | NEEDS_RESET);
    assert!(!guest.board.pin.is_high());
}

#[test]
fn queues_that_are_nowhere_ask_for_a_reset() {
    let mut guest = plug();
    let good = guest.queue(0, 16).at;
    let mut bad = vec![good; 8];
    bad[0].descriptors += 8;
    bad[1].available += 1;
    bad[2].used += 2;
    bad[3].descriptors = !15;
    bad[4].available = RAM as u64;
    bad[5].used = RAM as u64 - 4;
    bad[6].used = 1 << 40;
    bad[7].descriptors = RAM as u64 - 16;
    for at in bad {
        guest.negotiate(VERSION_1);
        guest.board.ram.set(0x1_0000, &[0; 0x1_0000]);
        guest.set_queue(0, &at);
        guest.go();
        // A descriptor that is taken for the request's second one.
        guest.board.ram.set(good.available + 4, &1u16.to_le_bytes());
        guest.board.ram.set(good.available + 2, &1u16.to_le_bytes());
        guest.kick(0);
        eventually(|| (guest.status() == 0xf | NEEDS_RESET).then_some(()));
    }
}

#[test]
fn after_a_reset_memory_is_left_alone() {
    let mut guest = plug();
    for machine in [false, true] {
        guest.negotiate(VERSION_1 | EVENT_INDEX);
        let mut queue = guest.queue(0, 128);
        guest.go();
        for _ in 0..40 {
            read_sector(&mut guest, &mut queue);
        }
        if machine {
            guest.function.reset();
        } else {
            guest.put(0x14, 1, 0);
        }
        let transfers = guest.board.ram.transfers.load(Ordering::SeqCst);
        assert_eq!((guest.status(), guest.board.pin.is_high()), (0, false));
        guest.kick(0);
        // The next session, whose queue is elsewhere, works; what the last one left undone is not done.
        guest.negotiate(VERSION_1);
        let used = queue.used_index();
        let mut other = Driver::new(&guest.board.ram, 0x4_0000, 16);
        guest.board.ram.set(0x4_0000, &[0; 0x1000]);
        guest.set_queue(0, &other.at);
        assert_eq!(guest.board.ram.transfers.load(Ordering::SeqCst), transfers);
        guest.go();
        read_sector(&mut guest, &mut other);
        other.wait_used();
        assert_eq!(queue.used_index(), used);
        guest.put(0x14, 1, 0);
    }
}

#[test]
fn a_reset_waits_for_no_disk_and_many_leave_nothing_behind() {
    // The disk is slow until it is told to go on.
    let (go_on, waits) = mpsc::channel();
    let (is_busy, waits) = (Arc::new(AtomicBool::new(false)), Mutex::new(waits));
    let busy = is_busy.clone();
    let disk = HeapDisk::hooked(64, move |_, _| {
        busy.store(true, Ordering::SeqCst);
        // Told, or never told again.
        let _ = waits.lock().unwrap().recv();
        Ok(())
    });
    let config = BlockConfig::new("d", Arc::new(disk), "");
    let mut guest = Guest::new(|plumbing| block::new(config, plumbing));
    guest.negotiate(VERSION_1);
    let mut old = guest.queue(0, 16);
    guest.go();
    read_sector(&mut guest, &mut old);
    eventually(|| is_busy.load(Ordering::SeqCst).then_some(()));
    let writes = guest.board.ram.writes.load(Ordering::SeqCst);
    let mut queue = Driver::new(&guest.board.ram, 0x4_0000, 16);
    for _ in 0..1000 {
        guest.negotiate(VERSION_1);
        guest.set_queue(0, &queue.at);
        guest.go();
    }
    // The sessions that never began hold nothing: the guest's memory is the board's twice, the driver's two, the function's, and that of
    // the two sessions that are left.
    assert!(Arc::strong_count(&guest.board.ram) <= 7);
    // What the disk gave after the reset never reaches memory; what was asked for since does.
    read_sector(&mut guest, &mut queue);
    assert_eq!(guest.board.ram.writes.load(Ordering::SeqCst), writes);
    go_on.send(()).unwrap();
    go_on.send(()).unwrap();
    assert_eq!((queue.wait_used(), old.take_used()), ((0, 513), None));
}

#[test]
fn registers_are_reached_through_configuration_space_too() {
    let mut guest = plug();
    let at = guest.capability(0x09, |guest, at| guest.function.read_config(at + 3, 1) == 5);
    let aim = |guest: &mut Guest, bar, offset, len| {
        guest.function.write_config(at + 4, 1, bar);
        guest.function.write_config(at + 8, 4, offset);
        guest.function.write_config(at + 12, 4, len);
    };
    aim(&mut guest, 4, 0x14, 1);
    guest.function.write_config(at + 16, 1, 3);
    assert_eq!((guest.status(), guest.function.read_config(at + 16, 1)), (3, 3));
    aim(&mut guest, 4, 0x18, 2);
    assert_eq!(guest.function.read_config(at + 16, 2), 256);
    aim(&mut guest, 1, 12, 4);
    assert_eq!(guest.function.read_config(at + 16, 4), 1);
    // Nothing there, or no such access.
    for (bar, offset, len) in [(0, 0, 4), (9, 0, 4), (4, 0x4000, 4), (4, 2, 4), (4, 0x14, 3), (4, u32::MAX, 1)] {
        aim(&mut guest, bar, offset, len);
        guest.function.write_config(at + 16, 4, 0);
        assert_eq!((guest.status(), guest.function.read_config(at + 16, 4)), (3, 0));
    }
}

#[test]
fn kicks_are_what_may_be_posted() {
    let mut guest = plug();
    assert!(guest.function.posted().is_empty());
    guest.function.write_config(0x20, 4, 0xc000_0000);
    guest.function.write_config(0x24, 4, 8);
    guest.function.write_config(4, 2, 6);
    let posted = guest.function.posted();
    assert_eq!(posted.len(), 1);
    assert_eq!((posted[0].io, posted[0].base, posted[0].len), (false, 0x8_c000_3000, 0x1000));
}

#[test]
fn a_function_that_is_taken_out_ends_its_thread() {
    let disk = Arc::new(HeapDisk::new(64));
    let config = BlockConfig::new("d", disk.clone(), "");
    let mut guest = Guest::new(|plumbing| block::new(config, plumbing));
    guest.negotiate(VERSION_1);
    let mut queue = guest.queue(0, 16);
    guest.go();
    read_sector(&mut guest, &mut queue);
    drop(guest);
    assert_eq!(Arc::strong_count(&disk), 1);
}
