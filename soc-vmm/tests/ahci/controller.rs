//! Registers, interrupts, resets and errors.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, Weak};

use soc_vmm::ahci::CdDrive;
use soc_vmm::block::{BlockBackend, BlockError};
use soc_vmm::pci::PciFunction;

use crate::rig::*;

const READ_FIRST: [u8; 10] = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];

fn rig() -> (tempfile::TempDir, Rig) {
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig::new(CdDrive { medium: Some(disc(dir.path(), 64)), ..CdDrive::default() });
    rig.start();
    (dir, rig)
}

#[test]
fn it_is_an_ich9() {
    let rig = Rig::new(CdDrive::default());
    let config = rig.ahci.config();
    assert_eq!((config.read(0, 4), config.read(8, 4)), (0x2922_8086, 0x0106_0102));
    assert_eq!(config.read(0x3c, 2), 0x100);
    let bars: Vec<_> = config.bars().map(|(index, bar, _)| (index, bar.size)).collect();
    assert_eq!(bars, [(4, 32), (5, 4096)]);
    let mut at = config.read(0x34, 1) as u16;
    let mut found = Vec::new();
    while at != 0 {
        found.push(config.read(at, 1));
        if config.read(at, 1) == 0x12 {
            assert_eq!((config.read(at + 2, 2), config.read(at + 4, 4)), (0x10, 0x48));
        }
        at = config.read(at + 1, 1) as u16;
    }
    assert_eq!(found, [5, 0x12]);
}

#[test]
fn registers_say_what_is_there() {
    let mut rig = Rig::new(CdDrive::default());
    assert_eq!(rig.get(0), 0x8114_1f05);
    assert_eq!((rig.get(GHC), rig.get(0x0c), rig.get(0x10)), (0x8000_0000, 0x3f, 0x1_0301));
    assert_eq!((rig.get(port(0, SSTS)), rig.get(port(0, SIG)), rig.get(port(0, TFD))), (0x113, 0xeb14_0101, 0x100));
    assert_eq!((rig.get(port(1, SSTS)), rig.get(port(1, SIG)), rig.get(port(1, TFD))), (0, u32::MAX, 0x7f));
    // Any width, over the edges of registers.
    assert_eq!(rig.access(REGISTERS, 0x0e, 8, None), 0x1_0301 << 16);
    assert_eq!(rig.access(REGISTERS, 0x01, 2, None), 0x141f);
    assert_eq!(rig.access(REGISTERS, 4095, 8, None), 0);
    rig.access(REGISTERS, port(0, CLB), 8, Some(0x1_2345_6789_abcd));
    assert_eq!(rig.access(REGISTERS, port(0, CLB), 8, None), 0x1_2345_6789_a800);
    rig.access(REGISTERS, port(0, CLB) + 3, 2, Some(0xeeff));
    assert_eq!(rig.access(REGISTERS, port(0, CLB), 8, None), 0x1_23ee_ff89_a800);
    // The pair of ports does the same.
    rig.access(4, 0x10, 4, Some(port(0, CLB) | 3));
    assert_eq!(rig.access(4, 0x10, 4, None), port(0, CLB));
    assert_eq!(rig.access(4, 0x14, 4, None), 0xff89_a800);
    rig.access(4, 0x14, 4, Some(0x1000));
    assert_eq!(rig.get(port(0, CLB)), 0x1000);
    rig.ahci.reset();
    assert_eq!((rig.get(port(0, CLB)), rig.access(4, 0x10, 4, None)), (0, 0));
}

#[test]
fn a_drive_sends_its_signature_once_there_is_a_place_for_it() {
    let (_dir, mut rig) = rig();
    rig.until(|rig| rig.received(0x40)[0] != 0);
    assert_eq!(rig.received(0x40)[..13], [0x34, 0, 0, 1, 1, 0x14, 0xeb, 0, 0, 0, 0, 0, 1]);
    assert_eq!(rig.get(port(0, PXIS)), 0);
}

#[test]
fn intx_lasts_until_both_registers_are_cleared() {
    let (_dir, mut rig) = rig();
    rig.prepare(3, &[0x27, 0x80, 0xa0, 1], &[0], &[]);
    rig.set(port(0, CI), 1 << 3);
    rig.until(|rig| rig.get(port(0, CI)) == 0);
    assert!(rig.line.is_high());
    assert_eq!((rig.get(IS), rig.get(port(0, PXIS))), (1, 1));
    rig.set(IS, 1);
    assert!(rig.line.is_high(), "its cause is still there");
    rig.set(port(0, PXIS), 1);
    assert!(rig.line.is_high());
    rig.ahci.write_config(4, 2, 0b100_0000_0111);
    assert!(!rig.line.is_high());
    rig.ahci.write_config(4, 2, 0b111);
    rig.set(IS, 1);
    assert!(!rig.line.is_high());
    assert_eq!(rig.messages(), 0);
}

#[test]
fn a_message_is_sent_for_each_interrupt() {
    let (_dir, mut rig) = rig();
    let msi = rig.ahci.config().read(0x34, 1) as u16;
    rig.ahci.write_config(msi + 4, 4, 0xfee0_0000);
    rig.ahci.write_config(msi + 12, 2, 0x31);
    rig.ahci.write_config(msi + 2, 2, 1);
    for n in 1..4 {
        assert_eq!(rig.packet(&[0], 0).task_file, 0x50);
        assert_eq!(rig.messages(), n);
    }
    assert!(!rig.line.is_high());
    // What is not cleared before the acknowledgement is told again.
    rig.prepare(0, &[0x27, 0x80, 0xa0, 1], &[0], &[]);
    rig.set(port(0, CI), 1);
    rig.until(|rig| rig.get(port(0, CI)) == 0);
    rig.set(IS, 1);
    assert_eq!(rig.messages(), 5);
}

#[test]
fn slots_are_served_in_turn() {
    let (_dir, mut rig) = rig();
    for slot in [31, 0, 7] {
        rig.prepare(slot, &[0x27, 0x80, 0xa0, 1], &[0], &[]);
    }
    rig.set(port(0, CI), 1 << 31 | 1 | 1 << 7);
    rig.until(|rig| rig.get(port(0, CI)) == 0);
    assert_eq!(rig.get(port(0, CMD)) >> 8 & 31, 31);
}

#[test]
fn identify_tells_a_packet_device() {
    let (_dir, mut rig) = rig();
    let ended = rig.ata(0xa1, 0, 0);
    assert_eq!(ended, Ended { task_file: 0x50, interrupts: 2, moved: 512 });
    let data = rig.memory.bytes(DATA, 512);
    assert_eq!(data[..2], [0xc0, 0x85]);
    assert_eq!(data.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    assert_eq!(data[54..70], *b"uObtaodrC -DOR M");
    // Status with data, to the host, then status without.
    assert_eq!(rig.received(0x20)[..4], [0x5f, 0x60, 0x58, 0]);
    assert_eq!(rig.received(0x20)[15..18], [0x50, 0, 2]);
}

#[test]
fn what_is_no_command_of_a_packet_device_is_aborted() {
    let (_dir, mut rig) = rig();
    for command in [0xec, 0x20, 0x25, 0x60, 0xca, 0xff] {
        let ended = rig.ata(command, 0, 0);
        assert_eq!((ended.task_file, ended.interrupts), (0x441, 1 << 30 | 1), "{command:#x}");
        assert_eq!(rig.get(port(0, CI)), 1, "a failed command stays issued");
        if command == 0xec {
            assert_eq!(rig.received(0x40)[4..7], [1, 0x14, 0xeb]);
        }
        // Nothing is begun until the port was stopped.
        rig.set(port(0, CMD), 0x10);
        assert_eq!(rig.get(port(0, CI)), 0);
        rig.set(port(0, CMD), 0x11);
    }
    for (command, features, count) in [(0xef, 3, 0x45), (0xe5, 0, 0), (0xe1, 0, 0)] {
        assert_eq!(rig.ata(command, features, count).task_file, 0x50);
    }
}

#[test]
fn a_software_reset_takes_two_frames() {
    let (_dir, mut rig) = rig();
    assert_eq!(rig.packet(&[0x1e, 0, 0, 0, 1], 0).task_file, 0x50);
    assert!(rig.drive().tray().locked);
    let mut fis = [0; 20];
    (fis[0], fis[15]) = (0x27, 4);
    rig.prepare(0, &fis, &[], &[]);
    assert_eq!(rig.issue(0).interrupts, 0);
    fis[15] = 0;
    rig.prepare(0, &fis, &[], &[]);
    assert_eq!(rig.issue(0), Ended { task_file: 0x100, interrupts: 0, moved: 0 });
    assert_eq!(rig.received(0x40)[..13], [0x34, 0, 0, 1, 1, 0x14, 0xeb, 0, 0, 0, 0, 0, 1]);
    assert!(!rig.drive().tray().locked);
    assert_eq!(rig.packet(&[0], 0).task_file, 0x50);
}

#[test]
fn a_link_reset_brings_the_drive_back() {
    let (_dir, mut rig) = rig();
    rig.set(port(0, CMD), 0x10);
    rig.set(port(0, SCTL), 0x301);
    assert_eq!((rig.get(port(0, SSTS)), rig.get(port(0, SIG))), (0, u32::MAX));
    rig.set(port(0, SCTL), 0x300);
    assert_eq!((rig.get(port(0, SSTS)), rig.get(port(0, SIG)), rig.get(port(0, TFD))), (0x113, 0xeb14_0101, 0x100));
    assert_eq!((rig.get(port(0, SERR)), rig.get(port(0, PXIS))), (1 << 26, 1 << 6));
    rig.set(port(0, SERR), 1 << 26);
    assert_eq!(rig.get(port(0, PXIS)), 0);
    rig.set(port(0, CMD), 0x11);
    assert_eq!(rig.packet(&[0], 0).task_file, 0x50);
}

#[test]
fn a_controller_reset_leaves_where_lists_are() {
    let (_dir, mut rig) = rig();
    assert_eq!(rig.packet(&[0], 0).task_file, 0x50);
    let before = (rig.get(port(0, CLB)), rig.get(port(0, FB)));
    rig.set(GHC, 1);
    assert_eq!((rig.get(GHC), rig.get(IS), rig.get(port(0, CMD)), rig.get(port(0, PXIE))), (0x8000_0000, 0, 6, 0));
    assert_eq!((rig.get(port(0, CLB)), rig.get(port(0, FB))), before);
    rig.start();
    assert_eq!(rig.packet(&[0], 0).task_file, 0x50);
}

#[test]
fn regions_are_filled_one_after_the_other() {
    let (_dir, mut rig) = rig();
    // 200 regions of 10 bytes do not fit into one batch, and 48 bytes of the sector are left for the last.
    let mut regions: Vec<_> = (0..200u64).map(|n| (DATA + 16 * n, 10)).collect();
    regions.push((DATA + 0x2000, 4096));
    let packet = [0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0];
    let ended = rig.packet_to(&packet, 1, &regions);
    assert_eq!(ended, Ended { task_file: 0x50, interrupts: 1, moved: 2048 });
    for (addr, _) in &regions[..200] {
        assert_eq!(rig.memory.bytes(*addr, 16), [[9; 10].as_slice(), &[0; 6]].concat());
    }
    assert_eq!(rig.memory.bytes(DATA + 0x2000, 50), [[9; 48].as_slice(), &[0; 2]].concat());
}

#[test]
fn too_little_room_is_an_overflow() {
    let (_dir, mut rig) = rig();
    let ended = rig.packet_to(&READ_FIRST, 1, &[(DATA, 1000)]);
    assert_eq!(ended, Ended { task_file: 0x50, interrupts: 1 | 1 << 24, moved: 1000 });
    let ended = rig.packet_to(&READ_FIRST, 1, &[]);
    assert_eq!(ended, Ended { task_file: 0x50, interrupts: 1 | 1 << 24, moved: 0 });
}

#[test]
fn addresses_that_are_no_memory_stop_the_port_until_it_is_restarted() {
    let (_dir, mut rig) = rig();
    let host_bus = 1 << 29;
    // A region.
    let ended = rig.packet_to(&READ_FIRST, 1, &[(RAM as u64 - 1024, 2048)]);
    assert_eq!(ended.interrupts, host_bus);
    // Nothing more happens.
    rig.set(port(0, CI), 2);
    assert_eq!(rig.get(port(0, CI)), 3);
    // The list; the place for FISes.
    for register in [CLB, FB] {
        rig.stop_port(0);
        rig.start_port(0);
        rig.set(port(0, register), 0xffff_fc00);
        rig.prepare(0, &[0x27, 0x80, 0xa0, 1], &[0], &[]);
        rig.set(port(0, CI), 1);
        rig.until(|rig| rig.get(port(0, PXIS)) == host_bus);
        assert_eq!(rig.get(port(0, CI)), 1);
    }
    // What is no register FIS.
    rig.stop_port(0);
    rig.start_port(0);
    rig.prepare(0, &[0x46], &[], &[]);
    assert_eq!(rig.issue(0).interrupts, 1 << 27);
    rig.stop_port(0);
    rig.start_port(0);
    assert_eq!(rig.packet(&[0], 0).task_file, 0x50);
}

#[test]
fn without_bus_mastering_nothing_is_begun() {
    let (_dir, mut rig) = rig();
    assert_eq!(rig.packet(&[0], 0).task_file, 0x50);
    rig.ahci.write_config(4, 2, 0b011);
    rig.prepare(0, &[0x27, 0x80, 0xa0, 1], &[0], &[]);
    rig.set(port(0, CI), 1);
    assert_eq!(rig.get(port(0, TFD)), 0x50);
    rig.ahci.write_config(4, 2, 0b111);
    rig.until(|rig| rig.get(port(0, CI)) == 0);
}

/// A disc that can't be read before it is let.
pub(crate) struct Slow {
    began: Mutex<Sender<()>>,
    goes: Mutex<Receiver<()>>,
}

impl BlockBackend for Slow {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], _: u64) -> Result<(), BlockError> {
        self.began.lock().unwrap().send(()).unwrap();
        self.goes.lock().unwrap().recv().unwrap();
        buf.fill(0xee);
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }
}

/// A controller in the middle of a read; its disc gives the data when told to go.
pub(crate) fn reading() -> (Rig, Sender<()>, Weak<Slow>) {
    let ((began, begins), (go, goes)) = (channel(), channel());
    let slow = Arc::new(Slow { began: Mutex::new(began), goes: Mutex::new(goes) });
    let medium = Arc::downgrade(&slow);
    let mut rig = Rig::new(CdDrive { medium: Some(slow), ..CdDrive::default() });
    rig.start();
    rig.until(|rig| rig.received(0x40)[0] != 0);
    rig.prepare(0, &[0x27, 0x80, 0xa0, 1], &READ_FIRST, &[(DATA, 2048)]);
    rig.set(port(0, CI), 1);
    begins.recv().unwrap();
    (rig, go, medium)
}

#[test]
fn after_a_reset_no_byte_of_an_old_command_arrives() {
    let resets: [fn(&mut Rig); 4] = [
        |rig| rig.set(port(0, CMD), 0x10),
        |rig| rig.set(port(0, SCTL), 1),
        |rig| rig.set(GHC, 1),
        |rig| rig.ahci.reset(),
    ];
    for reset in resets {
        let (mut rig, go, _) = reading();
        assert_eq!(rig.get(port(0, TFD)) & 0x80, 0x80);
        // The disc is slow; the reset isn't.
        reset(&mut rig);
        rig.memory.put(0x1_0000, &[0; 0x3_0000]);
        go.send(()).unwrap();
        rig.set(port(0, SCTL), 0);
        rig.stop_port(0);
        rig.start();
        let ended = rig.packet(&[0], 0);
        assert_eq!(ended.task_file, 0x50);
        assert_eq!(rig.memory.bytes(DATA, 2048), [0; 2048]);
    }
}

#[test]
fn a_command_that_loses_the_bus_fails() {
    let (mut rig, go, _) = reading();
    rig.ahci.write_config(4, 2, 0b011);
    go.send(()).unwrap();
    rig.until(|rig| rig.get(port(0, PXIS)) == 1 << 29);
    assert_eq!(rig.memory.bytes(DATA, 2048), [0; 2048]);
}

#[test]
fn a_controller_that_is_gone_reaches_no_memory() {
    let (rig, go, medium) = reading();
    let Rig { ahci, drives, memory, .. } = rig;
    drop((ahci, drives));
    go.send(()).unwrap();
    // The thread lets go of the disc when it ends.
    while medium.strong_count() > 0 {
        std::thread::yield_now();
    }
    assert_eq!(memory.bytes(DATA, 2048), [0; 2048]);
}
