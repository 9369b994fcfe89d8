//! Keyboard controller: SeaBIOS' and Linux' sequences, with a keyboard and no mouse.

use soc_vmm::devices::Persist;
use soc_vmm::power::PowerEvent;

use crate::rig::Rig;

const DATA: u64 = 0x60;
const STATUS: u64 = 0x64;
const COMMAND: u64 = 0x64;

fn command(rig: &mut Rig, byte: u8) {
    assert_eq!(rig.inb(STATUS) & 0x02, 0, "input buffer is empty");
    rig.outb(COMMAND, byte);
}

fn reply(rig: &mut Rig) -> u8 {
    assert_eq!(rig.inb(STATUS) & 0x01, 0x01, "output buffer is full");
    rig.inb(DATA)
}

fn flush(rig: &mut Rig) {
    for _ in 0..32 {
        if rig.inb(STATUS) & 1 == 0 {
            return;
        }
        rig.inb(DATA);
    }
    panic!("never empty");
}

#[test]
fn seabios_sets_up_the_controller() {
    let mut rig = Rig::new();
    flush(&mut rig);
    command(&mut rig, 0xaa);
    assert_eq!(reply(&mut rig), 0x55);
    assert_eq!(rig.inb(STATUS) & 0x04, 0x04, "self-test passed");
    command(&mut rig, 0xab);
    assert_eq!(reply(&mut rig), 0x00);
    // Both devices off, no interrupts.
    command(&mut rig, 0x60);
    rig.outb(DATA, 0x30);
    // Keyboard reset: it answers, and has passed its test.
    rig.outb(DATA, 0xff);
    assert_eq!(rig.inb(STATUS) & 0x61, 0x01, "keyboard, no timeout");
    assert_eq!([reply(&mut rig), reply(&mut rig)], [0xfa, 0xaa]);
    assert!(rig.lines.all_high().is_empty());
}

#[test]
fn linux_probes_the_controller() {
    let mut rig = Rig::new();
    flush(&mut rig);
    command(&mut rig, 0x20);
    let ctr = reply(&mut rig);
    command(&mut rig, 0x60);
    rig.outb(DATA, ctr | 0x30);
    // AUX loop: the byte comes back as the mouse's.
    command(&mut rig, 0xd3);
    rig.outb(DATA, 0x5a);
    assert_eq!(rig.inb(STATUS) & 0x21, 0x21);
    assert_eq!(reply(&mut rig), 0x5a);
    // Disabling and enabling AUX shows in the mode.
    command(&mut rig, 0xa8);
    command(&mut rig, 0x20);
    assert_eq!(reply(&mut rig) & 0x20, 0);
    command(&mut rig, 0xa7);
    command(&mut rig, 0x20);
    assert_eq!(reply(&mut rig) & 0x20, 0x20);
    command(&mut rig, 0xa9);
    assert_eq!(reply(&mut rig), 0x00);
    // Interrupt test: only AUX may interrupt.
    command(&mut rig, 0x60);
    rig.outb(DATA, 0x02);
    command(&mut rig, 0xd3);
    rig.outb(DATA, 0xa5);
    assert_eq!(rig.lines.all_high(), [12]);
    assert_eq!(reply(&mut rig), 0xa5);
    assert!(rig.lines.all_high().is_empty());
    // The mouse is asked for its identity: nobody answers, at once and by interrupt.
    command(&mut rig, 0xd4);
    rig.outb(DATA, 0xf2);
    assert_eq!(rig.lines.all_high(), [12]);
    assert_eq!(rig.inb(STATUS) & 0x61, 0x61, "timeout, mouse");
    assert_eq!(reply(&mut rig), 0xfe);
    // The keyboard says what it is; where scan codes are translated, so is that.
    for (mode, last) in [(0x01, 0x83), (0x41, 0x41)] {
        command(&mut rig, 0x60);
        rig.outb(DATA, mode);
        rig.outb(DATA, 0xf2);
        assert_eq!(rig.lines.all_high(), [1]);
        assert_eq!([reply(&mut rig), reply(&mut rig), reply(&mut rig)], [0xfa, 0xab, last]);
    }
}

#[test]
fn a_disabled_keyboard_does_not_interrupt() {
    let mut rig = Rig::new();
    command(&mut rig, 0xad);
    command(&mut rig, 0xd2);
    rig.outb(DATA, 0x1c);
    assert!(rig.lines.all_high().is_empty());
    command(&mut rig, 0xae);
    assert_eq!(rig.lines.all_high(), [1]);
}

#[test]
fn a_command_ends_the_wait_for_the_last_ones_data() {
    let mut rig = Rig::new();
    command(&mut rig, 0xd1);
    command(&mut rig, 0xab);
    assert_eq!(reply(&mut rig), 0x00);
    rig.outb(DATA, 0x00);
    assert_eq!(rig.power.take(), [], "no output port: a byte for the keyboard");
    assert_eq!(reply(&mut rig), 0xfe, "which doesn't know it");
}

#[test]
fn an_awaited_byte_moves_with_the_state() {
    let mut from = Rig::new();
    from.outb(DATA, 0xf0);
    assert_eq!(reply(&mut from), 0xfa);
    command(&mut from, 0xd3);
    let state = from.i8042.lock().unwrap().save();
    let mut to = Rig::new();
    to.i8042.lock().unwrap().restore(&state).unwrap();
    to.outb(DATA, 0x77);
    assert_eq!(to.inb(STATUS) & 0x21, 0x21);
    assert_eq!(reply(&mut to), 0x77);
    to.outb(DATA, 0x00);
    assert_eq!([reply(&mut to), reply(&mut to)], [0xfa, 0x02], "the keyboard's scan code set");
}

#[test]
fn a_queued_byte_is_an_interrupt_of_its_own() {
    let mut rig = Rig::new();
    for byte in 1..=3 {
        command(&mut rig, 0xd2);
        rig.outb(DATA, byte);
    }
    assert_eq!(rig.lines.rises(), 1);
    for byte in 1..=3 {
        assert_eq!(reply(&mut rig), byte);
    }
    assert_eq!(rig.lines.rises(), 3);
    assert!(rig.lines.all_high().is_empty());
    assert_eq!(rig.inb(DATA), 0);
}

#[test]
fn resets() {
    let mut rig = Rig::new();
    // The pulse that Linux and SeaBIOS use.
    command(&mut rig, 0xfe);
    assert_eq!(rig.power.take(), [PowerEvent::Reset]);
    command(&mut rig, 0xff);
    assert_eq!(rig.power.take(), [], "pulses nothing");
    command(&mut rig, 0xf0);
    assert_eq!(rig.power.take(), [PowerEvent::Reset], "pulses everything");
    command(&mut rig, 0xd1);
    rig.outb(DATA, 0xde);
    assert_eq!(rig.power.take(), [PowerEvent::Reset], "bit 0 of the output port low");
}

#[test]
fn a20_by_the_output_port() {
    let mut rig = Rig::new();
    command(&mut rig, 0xd0);
    assert_eq!(reply(&mut rig) & 0x03, 0x03);
    command(&mut rig, 0xdd);
    command(&mut rig, 0xd0);
    assert_eq!(reply(&mut rig) & 0x03, 0x01);
    command(&mut rig, 0xd1);
    rig.outb(DATA, 0xdf);
    command(&mut rig, 0xff);
    command(&mut rig, 0xd0);
    assert_eq!(reply(&mut rig) & 0x03, 0x03);
    assert_eq!(rig.power.take(), []);
    assert_eq!(rig.inp(DATA, 4) >> 8, 0xff_ffff, "port 0x64 is no neighbour of 0x60");
}

#[test]
fn floods_are_bounded() {
    let mut rig = Rig::new();
    for _ in 0..10_000 {
        rig.outb(COMMAND, 0xaa);
    }
    let state = rig.i8042.lock().unwrap().save();
    assert_eq!(state.output.len(), 16);
    let mut bad = state.clone();
    bad.output.extend(state.output);
    assert!(rig.i8042.lock().unwrap().restore(&bad).is_err());
}
