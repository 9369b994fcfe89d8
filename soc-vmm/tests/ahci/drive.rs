//! The CD-ROM drive: packet commands, the tray, and media that come and go.

use std::sync::{Arc, Mutex};

use soc_vmm::ahci::{CdDrive, Tray, TrayListener, TrayLocked};
use soc_vmm::block::{self, ImageSpec};

use crate::rig::*;

#[derive(Default)]
struct Moves(Mutex<Vec<bool>>);

impl TrayListener for Moves {
    fn tray_moved(&self, open: bool) {
        self.0.lock().unwrap().push(open);
    }
}

struct Bench {
    dir: tempfile::TempDir,
    rig: Rig,
    moves: Arc<Moves>,
}

/// A drive with a disc of 64 sectors.
fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let moves = Arc::new(Moves::default());
    let mut rig =
        Rig::new(CdDrive { medium: Some(disc(dir.path(), 64)), listener: Some(moves.clone()), ..CdDrive::default() });
    rig.start();
    Bench { dir, rig, moves }
}

const READY: [u8; 6] = [0; 6];
const CAPACITY: [u8; 10] = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const EVENTS: [u8; 10] = [0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0];

fn read(first: u32, count: u16) -> [u8; 10] {
    let ([a, b, c, d], [e, f]) = (first.to_be_bytes(), count.to_be_bytes());
    [0x28, 0, a, b, c, d, 0, e, f, 0]
}

#[test]
fn a_disc_is_read() {
    let mut bench = bench();
    assert_eq!(bench.rig.packet(&READY, 0).task_file, 0x50);
    assert_eq!(bench.rig.data(&CAPACITY), [0, 0, 0, 63, 0, 0, 8, 0]);
    assert_eq!(bench.rig.data(&read(5, 2)), [[5; 2048], [6; 2048]].concat());
    assert_eq!(bench.rig.data(&[0xa8, 0, 0, 0, 0, 63, 0, 0, 0, 1, 0, 0]), [63; 2048]);
    assert_eq!(bench.rig.data(&[0xbe, 0, 0, 0, 0, 7, 0, 0, 1, 0x10, 0, 0]), [7; 2048]);
    assert_eq!(bench.rig.packet(&read(64, 0), 0), Ended { task_file: 0x50, interrupts: 1, moved: 0 });
    // More than is read at once.
    let ended = bench.rig.packet(&read(0, 64), 64 * 2048);
    assert_eq!(ended.moved, 64 * 2048);
    assert_eq!(bench.rig.memory.bytes(DATA + 63 * 2048, 2048), [63; 2048]);
    for behind in [read(64, 1), read(63, 2), read(u32::MAX, 1), read(1, u16::MAX)] {
        assert_eq!(bench.rig.sense(&behind), [5, 0x21, 0]);
    }
    assert_eq!(bench.rig.sense(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0]), [5, 0x20, 0]);
}

#[test]
fn data_by_pio_is_announced() {
    let mut bench = bench();
    let ended = bench.rig.packet_to(&CAPACITY, 0, &[(DATA, 8)]);
    assert_eq!(ended, Ended { task_file: 0x50, interrupts: 3, moved: 8 });
    assert_eq!(bench.rig.received(0x20)[..3], [0x5f, 0x60, 0x58]);
    assert_eq!(bench.rig.received(0x20)[16..18], [8, 0]);
    let done = bench.rig.received(0x40);
    assert_eq!((done[0], done[1], done[2], done[12]), (0x34, 0x40, 0x50, 3));
}

#[test]
fn the_last_sector_may_not_be_whole() {
    let mut bench = bench();
    let path = bench.dir.path().join("odd.iso");
    std::fs::write(&path, [1; 2048 + 512]).unwrap();
    let odd = block::open(&ImageSpec::read_only(&path)).unwrap();
    bench.rig.drive().change(odd, false).unwrap();
    assert_eq!(bench.rig.sense(&READY), [6, 0x28, 0]);
    assert_eq!(bench.rig.data(&read(0, 2)), [[1; 2560].as_slice(), &[0; 1536]].concat());
}

#[test]
fn who_it_is() {
    let mut bench = bench();
    let inquiry = bench.rig.data(&[0x12, 0, 0, 0, 96, 0]);
    assert_eq!((inquiry.len(), inquiry[0], inquiry[1], inquiry[4]), (36, 5, 0x80, 31));
    assert_eq!(inquiry[8..], *b"OUTBOARDCD-ROM          1.0 ");
    assert_eq!(bench.rig.data(&[0x12, 0, 0, 0, 5, 0]).len(), 5);
    assert_eq!(bench.rig.data(&[0x12, 1, 0, 0, 96, 0]), [5, 0, 0, 2, 0, 0x80]);
    assert_eq!(bench.rig.data(&[0x12, 1, 0x80, 0, 96, 0])[4..], *b"OB00001");
    assert_eq!(bench.rig.sense(&[0x12, 1, 0x83, 0, 96, 0]), [5, 0x24, 0]);
}

#[test]
fn what_it_can() {
    let mut bench = bench();
    let page = bench.rig.data(&[0x5a, 0, 0x2a, 0, 0, 0, 0, 1, 0, 0]);
    assert_eq!((page.len(), page[..2].to_vec(), page[8], page[9]), (30, vec![0, 28], 0x2a, 20));
    assert_eq!(page[14], 0x29);
    assert_eq!(bench.rig.data(&[0x5a, 0, 0x3f, 0, 0, 0, 0, 1, 0, 0]).len(), 38);
    assert_eq!(bench.rig.data(&[0x5a, 0, 0x6a, 0, 0, 0, 0, 1, 0, 0])[10..], [0; 20]);
    assert_eq!(bench.rig.sense(&[0x5a, 0, 0xea, 0, 0, 0, 0, 1, 0, 0]), [5, 0x39, 0]);
    assert_eq!(bench.rig.sense(&[0x5a, 0, 0x0d, 0, 0, 0, 0, 1, 0, 0]), [5, 0x24, 0]);

    let configuration = bench.rig.data(&[0x46, 0, 0, 0, 0, 0, 0, 1, 0, 0]);
    assert_eq!(configuration[..8], [0, 0, 0, configuration.len() as u8 - 4, 0, 0, 0, 8]);
    assert_eq!(configuration[8..20], [0, 0, 3, 8, 0, 0x10, 0, 0, 0, 8, 1, 0]);
    let cd_read = bench.rig.data(&[0x46, 2, 0, 0x1e, 0, 0, 0, 1, 0, 0]);
    assert_eq!(cd_read, [0, 0, 0, 12, 0, 0, 0, 8, 0, 0x1e, 9, 4, 0, 0, 0, 0]);
    assert_eq!(bench.rig.data(&[0x46, 1, 0, 0x1f, 0, 0, 0, 1, 0, 0]), [0, 0, 0, 4, 0, 0, 0, 8]);
}

#[test]
fn what_is_on_the_disc() {
    let mut bench = bench();
    let track = [0, 0x14, 1, 0, 0, 0, 0, 0];
    let lead_out = [0, 0x14, 0xaa, 0, 0, 0, 0, 64];
    let toc = [&[0, 18, 1, 1], &track[..], &lead_out].concat();
    assert_eq!(bench.rig.data(&[0x43, 0, 0, 0, 0, 0, 0, 0, 64, 0]), toc);
    assert_eq!(bench.rig.data(&[0x43, 0, 0, 0, 0, 0, 0xaa, 0, 64, 0])[4..], lead_out);
    // 150 + 64 frames are 2 seconds and 64 frames.
    assert_eq!(bench.rig.data(&[0x43, 2, 0, 0, 0, 0, 0xaa, 0, 64, 0])[8..], [0, 0, 2, 64]);
    assert_eq!(bench.rig.data(&[0x43, 0, 1, 0, 0, 0, 0, 0, 64, 0]), [&[0, 10, 1, 1], &track[..]].concat());
    assert_eq!(bench.rig.data(&[0x43, 0, 0, 0, 0, 0, 0, 0, 64, 0x40]), [&[0, 10, 1, 1], &track[..]].concat());
    let raw = bench.rig.data(&[0x43, 2, 2, 0, 0, 0, 0, 0, 64, 0]);
    assert_eq!((raw.len(), raw[4..15].to_vec()), (48, vec![1, 0x14, 0, 0xa0, 0, 0, 0, 0, 1, 0, 0]));
    assert_eq!(bench.rig.sense(&[0x43, 0, 0, 0, 0, 0, 2, 0, 64, 0]), [5, 0x24, 0]);
    assert_eq!(bench.rig.sense(&[0x43, 0, 5, 0, 0, 0, 0, 0, 64, 0]), [5, 0x24, 0]);
    let info = bench.rig.data(&[0x51, 0, 0, 0, 0, 0, 0, 0, 64, 0]);
    assert_eq!((info.len(), info[..8].to_vec()), (34, vec![0, 32, 0xe, 1, 1, 1, 1, 0x20]));
    assert_eq!(bench.rig.data(&[0xbd, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0]), [0; 8]);
    assert_eq!(bench.rig.sense(&[0xad, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0]), [5, 0x24, 0]);
}

#[test]
fn a_large_disc_is_a_dvd() {
    let mut bench = bench();
    let path = bench.dir.path().join("dvd.iso");
    std::fs::File::create(&path).unwrap().set_len(4 << 30).unwrap();
    bench.rig.drive().change(block::open(&ImageSpec::read_only(&path)).unwrap(), false).unwrap();
    assert_eq!(bench.rig.sense(&READY), [6, 0x28, 0]);
    let configuration = bench.rig.data(&[0x46, 1, 0, 0x1d, 0, 0, 0, 1, 0, 0]);
    assert_eq!(configuration[4..], [0, 0, 0, 0x10, 0, 0x1f, 1, 0]);
    let structure = bench.rig.data(&[0xad, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0]);
    assert_eq!((structure.len(), structure[..2].to_vec()), (2052, vec![8, 2]));
    assert_eq!(structure[12..16], (0x3_0000 + (1 << 21) - 1u32).to_be_bytes());
    assert_eq!(bench.rig.data(&[0x43, 2, 0, 0, 0, 0, 0xaa, 0, 64, 0])[8..], [0, 255, 4, 2]);
}

#[test]
fn an_empty_drive_is_not_ready() {
    let mut rig = Rig::new(CdDrive::default());
    rig.start();
    for packet in [&READY[..], &CAPACITY, &read(0, 1), &[0x43, 0, 0, 0, 0, 0, 0, 0, 64, 0]] {
        assert_eq!(rig.sense(packet), [2, 0x3a, 1]);
    }
    assert_eq!(rig.data(&EVENTS), [0, 6, 4, 0x10, 0, 0, 0, 0]);
    assert_eq!(rig.data(&[0x46, 0, 0, 0, 0, 0, 0, 0, 8, 0])[4..], [0; 4]);
    assert_eq!(rig.data(&[3, 0, 0, 0, 18, 0])[2], 0, "sense is told once");
}

#[test]
fn the_guest_ejects_and_loads() {
    let mut bench = bench();
    let start_stop = |how| [0x1b, 0, 0, 0, how, 0];
    assert_eq!(bench.rig.packet(&start_stop(2), 0).task_file, 0x50);
    assert_eq!(bench.rig.drive().tray(), Tray { open: true, locked: false, medium: true });
    assert_eq!(bench.rig.sense(&READY), [2, 0x3a, 2]);
    assert_eq!(bench.rig.data(&EVENTS), [0, 6, 4, 0x10, 3, 1, 0, 0]);
    assert_eq!(bench.rig.packet(&start_stop(2), 0).task_file, 0x50);
    assert_eq!(bench.rig.packet(&start_stop(3), 0).task_file, 0x50);
    assert_eq!(bench.rig.sense(&READY), [6, 0x28, 0]);
    assert_eq!(bench.rig.packet(&READY, 0).task_file, 0x50);
    assert_eq!(bench.rig.data(&EVENTS), [0, 6, 4, 0x10, 2, 2, 0, 0]);
    assert_eq!(bench.rig.data(&EVENTS), [0, 6, 4, 0x10, 0, 2, 0, 0]);
    assert_eq!(*bench.moves.0.lock().unwrap(), [true, false]);
    assert_eq!(bench.rig.data(&[0x4a, 1, 0, 0, 2, 0, 0, 0, 8, 0]), [0, 2, 0x80, 0x10]);
    assert_eq!(bench.rig.sense(&[0x4a, 0, 0, 0, 0x10, 0, 0, 0, 8, 0]), [5, 0x24, 0]);
}

#[test]
fn a_locked_tray_is_asked_for_and_can_be_forced() {
    let mut bench = bench();
    assert_eq!(bench.rig.packet(&[0x1e, 0, 0, 0, 1, 0], 0).task_file, 0x50);
    assert_eq!(bench.rig.sense(&[0x1b, 0, 0, 0, 2, 0]), [5, 0x53, 2]);
    assert!(matches!(bench.rig.drive().eject(false), Err(TrayLocked)));
    assert_eq!(bench.rig.drive().tray(), Tray { open: false, locked: true, medium: true });
    assert_eq!(bench.rig.data(&EVENTS), [0, 6, 4, 0x10, 1, 2, 0, 0]);
    assert!(bench.moves.0.lock().unwrap().is_empty());
    assert!(bench.rig.drive().eject(true).unwrap().is_some());
    assert_eq!(bench.rig.drive().tray(), Tray { open: true, locked: true, medium: false });
    assert_eq!(*bench.moves.0.lock().unwrap(), [true]);
    // A reset lets go of it.
    bench.rig.set(GHC, 1);
    assert!(!bench.rig.drive().tray().locked);
}

#[test]
fn a_disc_is_changed() {
    let mut bench = bench();
    let other = disc(bench.dir.path(), 32);
    assert!(bench.rig.drive().change(other, false).unwrap().is_some());
    assert_eq!(*bench.moves.0.lock().unwrap(), [true, false]);
    assert_eq!(bench.rig.data(&[0x12, 0, 0, 0, 36, 0]).len(), 36, "it says who it is, whatever happened");
    assert_eq!(bench.rig.sense(&CAPACITY), [6, 0x28, 0]);
    assert_eq!(bench.rig.data(&CAPACITY), [0, 0, 0, 31, 0, 0, 8, 0]);
    bench.rig.drive().eject(false).unwrap();
    bench.rig.drive().close_tray();
    assert_eq!(bench.rig.sense(&READY), [2, 0x3a, 1]);
    bench.rig.drive().open_tray(false).unwrap();
    assert_eq!(bench.rig.sense(&READY), [2, 0x3a, 2]);
}

#[test]
fn a_disc_that_shrinks_or_fails_is_a_medium_error() {
    let mut bench = bench();
    let path = bench.dir.path().join("64.iso");
    std::fs::File::options().write(true).open(&path).unwrap().set_len(10 * 2048).unwrap();
    assert_eq!(bench.rig.data(&read(9, 1)), [9; 2048]);
    assert_eq!(bench.rig.sense(&read(9, 2)), [3, 0x11, 0]);
    assert_eq!(bench.rig.data(&read(9, 1)), [9; 2048]);
    // Gone by name only: it stays open.
    std::fs::remove_file(path).unwrap();
    assert_eq!(bench.rig.data(&read(0, 1)), [0; 2048]);
}
