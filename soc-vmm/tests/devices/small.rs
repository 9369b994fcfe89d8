//! The devices of one register: reset ports, debug console, debug exit, delay port, pc-testdev.

use soc_vmm::bus::Device;
use soc_vmm::devices::{Com, DebugConsole, DelayPort, Persist, RESET_PORT, RESET_VALUE, Rtc};
use soc_vmm::interrupt::{LineSink, WiredOr};
use soc_vmm::power::PowerEvent;

use crate::rig::{Lines, ROOM, Rig};

#[test]
fn fast_reset_and_a20() {
    let mut rig = Rig::new();
    assert_eq!(rig.inb(0x92) & 0x02, 0x02, "A20 is open");
    // SeaBIOS and Linux: set A20, don't reset.
    rig.outb(0x92, 0x02);
    assert_eq!(rig.power.take(), []);
    rig.outb(0x92, 0x03);
    assert_eq!(rig.power.take(), [PowerEvent::Reset]);
    rig.outb(0x92, 0x03);
    assert_eq!(rig.power.take(), [], "only the rising edge");
    rig.ports.reset();
    assert_eq!(rig.inb(0x92), 0x02);
}

#[test]
fn reset_control() {
    let mut rig = Rig::new();
    // Linux' reboot=pci: set the kind first, then pull the trigger.
    let kind = rig.inb(0xcf9) & !0x06;
    rig.outb(0xcf9, kind | 0x02);
    assert_eq!(rig.power.take(), []);
    assert_eq!(rig.inb(0xcf9), 0x02);
    rig.outb(0xcf9, kind | 0x06);
    assert_eq!(rig.power.take(), [PowerEvent::Reset]);
    rig.outb(RESET_PORT.into(), RESET_VALUE);
    assert_eq!(rig.power.take(), [PowerEvent::Reset]);
    rig.ports.reset();
    assert_eq!(rig.inb(0xcf9), 0);
}

#[test]
fn debug_console_says_that_it_is_there_and_counts_what_it_loses() {
    let mut rig = Rig::new();
    assert_eq!(rig.inb(0x402), 0xe9);
    assert_eq!(rig.inp(0x402, 2), 0xffe9);
    for byte in b"SeaBIOS (version" {
        rig.outb(0x402, *byte);
    }
    let mut out = Vec::new();
    rig.debug_out.try_read(&mut out);
    assert_eq!(out, b"SeaBIOS (version");
    for _ in 0..ROOM + 7 {
        rig.outb(0x402, b'.');
    }
    assert_eq!(rig.debug_console.lock().unwrap().lost(), 7);
}

#[test]
fn debug_exit_takes_every_width() {
    let mut rig = Rig::new();
    for len in [1, 2, 4] {
        rig.out(0xf4, len, 0x2a);
        assert_eq!(rig.power.take(), [PowerEvent::DebugExit(0x2a)]);
    }
    assert_eq!(rig.inp(0xf4, 4), 0);
}

#[test]
fn test_ports_keep_a_word() {
    let mut rig = Rig::new();
    rig.out(0xe0, 4, 0x1234_5678);
    assert_eq!(rig.inp(0xe0, 4), 0x1234_5678);
    assert_eq!(rig.inp(0xe2, 2), 0x1234);
    assert_eq!(rig.inp(0xe8, 4), 0x1234_5678, "the same word, byte by byte");
    rig.outb(0xe9, 0xff);
    assert_eq!(rig.inp(0xe0, 4), 0x1234_ff78);
    rig.out(0xe4, 4, 0x10_0000);
    assert_eq!(rig.inp(0xe0, 4), 0x1234_ff78, "flushing a page is not seen");
}

#[test]
fn test_ports_drive_lines() {
    let mut rig = Rig::new();
    rig.outb(0x2000 + 11, 1);
    rig.outb(0x2000 + 23, 0x80);
    assert_eq!(rig.lines.all_high(), [11, 23]);
    let state = rig.test_ports.lock().unwrap().save();
    assert_eq!(state.lines, 1 << 11 | 1 << 23);
    rig.outb(0x2000 + 11, 0);
    assert_eq!(rig.lines.all_high(), [23]);
    rig.ports.reset();
    assert!(rig.lines.all_high().is_empty());
    rig.test_ports.lock().unwrap().restore(&state).unwrap();
    assert_eq!(rig.lines.all_high(), [11, 23]);
}

#[test]
fn test_memory_is_memory() {
    let mut rig = Rig::new();
    for len in 1..=8 {
        let value = 0x1122_3344_5566_7788 & (u64::MAX >> (64 - 8 * u32::from(len)));
        rig.access(true, 0xff00_1001, len, Some(value));
        assert_eq!(rig.access(true, 0xff00_1001, len, None), value);
    }
    rig.access(true, 0xff00_ffff, 4, Some(0xaabb_ccdd));
    assert_eq!(rig.access(true, 0xff00_ffff, 4, None), 0xffff_ffdd, "nothing behind the window");
    let state = rig.test_memory.lock().unwrap().save();
    rig.test_memory.lock().unwrap().reset();
    assert_eq!(rig.access(true, 0xff00_ffff, 1, None), 0);
    rig.test_memory.lock().unwrap().restore(&state).unwrap();
    assert_eq!(rig.access(true, 0xff00_ffff, 1, None), 0xdd);
}

#[test]
fn what_is_postable() {
    assert_eq!(DebugConsole::RANGES.posted_ports, DebugConsole::RANGES.ports);
    assert_eq!(DelayPort::RANGES.posted_ports, DelayPort::RANGES.ports);
    assert!(Com::Com1.ranges().posted_ports.is_empty());
    assert!(Rtc::RANGES.posted_ports.is_empty());
}

#[test]
fn a_shared_line_is_high_while_anyone_holds_it() {
    let lines = std::sync::Arc::new(Lines::default());
    let sink: std::sync::Arc<dyn LineSink> = lines.clone();
    let shared = WiredOr::new(4, sink);
    let (one, two) = (shared.input(), shared.input());
    one.set(true);
    two.set(true);
    one.set(true);
    one.set(false);
    assert!(lines.high(4));
    two.set(false);
    assert!(!lines.high(4));
    assert_eq!(lines.said(), 3, "up, again as one says it again, down");
}

#[test]
fn what_comes_while_all_stand_still_waits() {
    let mut rig = Rig::new();
    rig.outb(0x3f9, 0x01);
    rig.ports.halt();
    assert!(rig.ports.is_halted());
    rig.serial_in.try_write(b"x").unwrap();
    rig.settle();
    assert!(rig.lines.all_high().is_empty());
    assert_eq!(rig.ports.deadline(), None);
    rig.ports.go_on();
    assert_eq!((rig.lines.all_high(), rig.inb(0x3f8)), (vec![4], b'x'));
}
