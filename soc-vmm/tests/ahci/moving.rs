//! A controller whose guest goes on behind another one.

use std::sync::Arc;

use soc_vmm::ahci::{CdDrive, Tray};
use soc_vmm::block::BlockBackend;
use soc_vmm::pci::PciFunction;
use soc_vmm::persist::{Moves, StateError, States};

use crate::controller::reading;
use crate::rig::*;

const READY: [u8; 6] = [0; 6];
const READ_SECOND: [u8; 10] = [0x28, 0, 0, 0, 0, 1, 0, 0, 1, 0];

fn drive(medium: Option<Arc<dyn BlockBackend>>) -> CdDrive {
    CdDrive { name: "cd7".into(), medium, ..CdDrive::default() }
}

fn halt(rig: &mut Rig) {
    rig.ahci.halt();
    rig.until(|rig| rig.ahci.is_halted());
}

fn states(rig: &Rig) -> States {
    let mut states = States::default();
    rig.ahci.save_into("1f.2", &mut states);
    states
}

/// Memory and state go to `to`, which goes on.
fn transfer(from: &mut Rig, to: &mut Rig) -> Result<(), StateError> {
    halt(from);
    to.memory.put(0, &from.memory.bytes(0, RAM));
    to.ahci.load("1f.2", &mut states(from))?;
    to.ahci.go_on();
    to.ahci.poll();
    Ok(())
}

#[test]
fn a_command_under_way_ends_before_and_its_interrupt_is_not_lost() {
    for by_message in [false, true] {
        let (mut from, go, _) = reading();
        if by_message {
            from.ahci.write_config(0x44, 4, 0xfee0_0000);
            from.ahci.write_config(0x42, 2, 1);
        }
        from.set(IS, u32::MAX);
        from.set(port(0, PXIS), u32::MAX);
        from.set(port(0, PXIS), u32::MAX);
        from.ahci.halt();
        assert!(!from.ahci.is_halted(), "it waits for its disc");
        go.send(()).unwrap();
        // Nobody polls the controller at the source any more.
        while !from.ahci.is_halted() {
            std::thread::yield_now();
        }
        assert_eq!(from.memory.bytes(DATA, 2048), [0xee; 2048]);
        assert!(!from.line.is_high() && from.messages() == 0);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("same.iso");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let medium = soc_vmm::block::open(&soc_vmm::block::ImageSpec::read_only(&path)).unwrap();
        let mut to = Rig::new(drive(Some(medium)));
        to.memory.put(0, &from.memory.bytes(0, RAM));
        to.ahci.load("1f.2", &mut states(&from)).unwrap();
        assert!(!to.line.is_high() && to.messages() == 0, "nothing new before it goes on");
        to.ahci.go_on();
        to.ahci.poll();
        assert_eq!((to.line.is_high(), to.messages()), (!by_message, usize::from(by_message)));
        assert_eq!((to.get(port(0, CI)), to.get(port(0, TFD))), (0, 0x50));
        to.set(port(0, PXIS), u32::MAX);
        to.set(IS, 1);
        assert!(!to.line.is_high());
        assert_eq!(to.data(&READ_SECOND), [1; 2048]);
    }
}

#[test]
fn what_is_issued_meanwhile_is_begun_afterwards_here_or_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut from = Rig::new(drive(Some(disc(dir.path(), 64))));
    from.start();
    from.until(|rig| rig.received(0x40)[0] != 0);
    halt(&mut from);
    from.prepare(3, &[0x27, 0x80, 0xa0, 1], &READ_SECOND, &[(DATA, 2048)]);
    from.set(port(0, CI), 1 << 3);
    let mut to = Rig::new(drive(Some(disc(dir.path(), 64))));
    to.memory.put(0, &from.memory.bytes(0, RAM));
    to.ahci.load("1f.2", &mut states(&from)).unwrap();
    assert_eq!((states(&to), from.memory.bytes(DATA, 2048)), (states(&from), vec![0; 2048]));
    to.ahci.go_on();
    from.ahci.go_on();
    for mut rig in [from, to] {
        rig.until(|rig| rig.get(port(0, CI)) == 0);
        assert_eq!(rig.memory.bytes(DATA, 2048), [1; 2048]);
    }
}

#[test]
fn the_drive_is_as_the_guest_left_it() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (disc(dir.path(), 64), disc(dir.path(), 3));
    let mut from = Rig::new(drive(Some(one.clone())));
    from.start();
    from.drive().change(other.clone(), false).unwrap();
    // The attention for a new medium waits, and the guest holds the tray.
    let mut to = Rig::new(drive(Some(other.clone())));
    transfer(&mut from, &mut to).unwrap();
    assert_eq!(to.sense(&READY), [6, 0x28, 0]);
    assert_eq!(to.packet(&[0x1e, 0, 0, 0, 1, 0], 0).task_file, 0x50);
    assert_eq!(to.packet(&[0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0], 2048).task_file & 1, 1);
    let mut third = Rig::new(drive(Some(other.clone())));
    transfer(&mut to, &mut third).unwrap();
    assert_eq!(third.drive().tray(), Tray { open: false, locked: true, medium: true });
    let sense = third.data(&[3, 0, 0, 0, 18]);
    assert_eq!((sense[2], sense[12]), (5, 0x21), "what failed is told there");
    // An open tray may have anything in it.
    third.drive().eject(true).unwrap();
    let mut last = Rig::new(drive(Some(one)));
    transfer(&mut third, &mut last).unwrap();
    assert_eq!(last.drive().tray(), Tray { open: true, locked: true, medium: true });
    assert_eq!(last.sense(&READY), [2, 0x3a, 2]);
}

#[test]
fn another_medium_is_refused_by_the_drives_name() {
    let dir = tempfile::tempdir().unwrap();
    let disc = |sectors| Some(disc(dir.path(), sectors));
    for (there, here, words) in [
        (disc(3), None, "'cd7' has a medium of 6144 bytes at the source, and no medium here"),
        (None, disc(3), "'cd7' has no medium at the source, and a medium of 6144 bytes here"),
        (disc(3), disc(4), "and a medium of 8192 bytes here"),
    ] {
        let (mut from, mut to) = (Rig::new(drive(there)), Rig::new(drive(here)));
        let refused = transfer(&mut from, &mut to).unwrap_err().to_string();
        assert!(refused.contains(words), "{refused}");
    }
}
