//! 16550A: what Linux' and SeaBIOS' drivers do with it.

use soc_vmm::bus::Device;
use soc_vmm::devices::Persist;

use crate::rig::{ROOM, Rig};

const COM1: u64 = 0x3f8;
const DATA: u64 = COM1;
const IER: u64 = COM1 + 1;
const IIR: u64 = COM1 + 2;
const FCR: u64 = COM1 + 2;
const LCR: u64 = COM1 + 3;
const MCR: u64 = COM1 + 4;
const LSR: u64 = COM1 + 5;
const MSR: u64 = COM1 + 6;
const SCR: u64 = COM1 + 7;
const GSI: u32 = 4;

const NO_INTERRUPT: u8 = 0x01;

/// The probe of Linux' 8250 driver ends with "16550A".
#[test]
fn linux_finds_a_16550a() {
    let mut rig = Rig::new();
    let (ier, mcr, lcr) = (rig.inb(IER), rig.inb(MCR), rig.inb(LCR));
    // Is there an IER? Only its low four bits.
    rig.outb(IER, 0);
    assert_eq!(rig.inb(IER), 0);
    rig.outb(IER, 0x0f);
    assert_eq!(rig.inb(IER), 0x0f);
    rig.outb(IER, ier);
    // Loopback: RTS and OUT2 come back as CTS and DCD.
    rig.outb(MCR, 0x1a);
    assert_eq!(rig.inb(MSR) & 0xf0, 0x90);
    rig.outb(MCR, mcr);
    // No extended feature register behind LCR 0xbf.
    rig.outb(LCR, 0xbf);
    rig.outb(FCR, 0);
    rig.outb(LCR, 0);
    rig.outb(FCR, 0x01);
    assert_eq!(rig.inb(IIR) >> 6, 3, "16550A: FIFOs on");
    rig.outb(LCR, lcr);
    // No 64-byte FIFO.
    rig.outb(LCR, 0x80);
    rig.outb(FCR, 0x21);
    assert_eq!(rig.inb(IIR) >> 5, 6);
    rig.outb(LCR, 0);
    // No sleep bit in IER.
    rig.outb(IER, 0x10);
    assert_eq!(rig.inb(IER), 0);
    rig.outb(SCR, 0xa5);
    assert_eq!(rig.inb(SCR), 0xa5);
    assert_eq!(rig.inb(LSR), 0x60);
    assert_eq!(rig.inb(MSR), 0xb0, "a cable is plugged in");
}

/// Linux' test for UARTs that forget the THRE interrupt when it is enabled again.
#[test]
fn enabling_the_thre_interrupt_tells_each_time() {
    let mut rig = Rig::new();
    for _ in 0..2 {
        rig.outb(IER, 0x02);
        assert!(rig.lines.high(GSI));
        assert_eq!(rig.inb(IIR), 0x02);
        assert!(!rig.lines.high(GSI), "IIR told it");
        assert_eq!(rig.inb(IIR), NO_INTERRUPT);
        rig.outb(IER, 0);
    }
}

#[test]
fn a_string_goes_out_by_interrupts() {
    let mut rig = Rig::new();
    let text = b"Outboard says hello to its serial port.\n";
    rig.outb(FCR, 0x81);
    rig.outb(IER, 0x02);
    let mut left = text.as_slice();
    let mut interrupts = 0;
    while !left.is_empty() {
        assert!(rig.lines.high(GSI));
        assert_eq!(rig.inb(IIR), 0xc2);
        interrupts += 1;
        let (now, later) = left.split_at(left.len().min(16));
        left = later;
        for byte in now {
            assert_ne!(rig.inb(LSR) & 0x20, 0);
            rig.outb(DATA, *byte);
        }
    }
    assert_eq!(rig.sent(), text);
    assert_eq!(interrupts, 3);
    assert_eq!(rig.lines.rises(), 4, "one rise a burst: each is a message to the host");
}

#[test]
fn a_slow_reader_holds_the_guest_back_and_loses_nothing() {
    let mut rig = Rig::new();
    rig.outb(FCR, 0x01);
    rig.outb(IER, 0x02);
    let mut written = Vec::new();
    let mut next = 0u8;
    for _ in 0..10 {
        // As a driver without interrupts does: write while THRE is set.
        while rig.inb(LSR) & 0x20 != 0 {
            rig.outb(DATA, next);
            written.push(next);
            next = next.wrapping_add(1);
        }
        rig.outb(IER, 0);
        rig.outb(IER, 0x02);
        assert!(!rig.lines.high(GSI), "nothing to tell while the line is blocked");
        assert_eq!(rig.inb(LSR), 0, "THR and shift register hold something");
        let read = rig.sent();
        assert_eq!(read.len(), ROOM);
        rig.settle();
        assert_eq!(rig.inb(LSR), 0x60);
        assert!(rig.lines.high(GSI), "room again");
        assert_eq!(read, written[..ROOM]);
        written.drain(..ROOM);
    }
    assert_eq!(rig.sent(), written);
}

#[test]
fn a_driver_that_ignores_thre_overwrites_the_oldest_bytes() {
    let mut rig = Rig::new();
    rig.outb(FCR, 0x01);
    for byte in 0..ROOM as u8 + 20 {
        rig.outb(DATA, byte);
    }
    let first: Vec<u8> = (0..ROOM as u8).collect();
    assert_eq!(rig.sent(), first);
    rig.settle();
    let last: Vec<u8> = (ROOM as u8 + 4..ROOM as u8 + 20).collect();
    assert_eq!(rig.sent(), last, "the FIFO's sixteen newest");
}

#[test]
fn with_no_reader_the_guest_runs_on() {
    let mut rig = Rig::new();
    for byte in 0..=ROOM as u8 {
        rig.outb(DATA, byte);
    }
    assert_eq!(rig.inb(LSR), 0);
    let (_, none) = soc_vmm::devices::output_pipe(1, rig.wakes.clone());
    drop(std::mem::replace(&mut rig.serial_out, none));
    rig.settle();
    assert_eq!(rig.inb(LSR), 0x60);
    for _ in 0..1000 {
        rig.outb(DATA, b'x');
        assert_eq!(rig.inb(LSR), 0x60);
    }
}

#[test]
fn input_comes_by_trigger_level_and_timeout() {
    let mut rig = Rig::new();
    // FIFOs on, trigger at 8, as Linux sets a 16550A.
    rig.outb(FCR, 0x81);
    rig.outb(IER, 0x05);
    let text = b"a line of twenty-four b\n";
    assert_eq!(rig.serial_in.try_write(text), Ok(text.len()));
    assert!(!rig.lines.high(GSI), "nothing before the device is polled");
    rig.settle();
    assert!(rig.lines.high(GSI));
    assert_eq!(rig.inb(IIR), 0xc4);
    let mut got = Vec::new();
    while rig.inb(LSR) & 1 != 0 {
        let left = text.len() - got.len();
        let in_fifo = if left > 8 { left - 8 } else { left };
        assert_eq!(rig.inb(IIR), if in_fifo >= 8 { 0xc4 } else { 0xcc }, "{in_fifo} in the FIFO");
        got.push(rig.inb(DATA));
    }
    assert_eq!(got, text);
    assert!(!rig.lines.high(GSI));
    assert_eq!(rig.inb(IIR), 0xc1);
    assert_eq!(rig.inb(DATA), 0, "empty");
}

#[test]
fn every_trigger_level() {
    for (fcr, trigger) in [(0x01, 1), (0x41, 4), (0x81, 8), (0xc1, 14)] {
        let mut rig = Rig::new();
        rig.outb(FCR, fcr);
        rig.outb(IER, 0x01);
        for count in 1..=16 {
            rig.serial_in.try_write(b"a").unwrap();
            rig.settle();
            assert_eq!(rig.inb(IIR), if count < trigger { 0xcc } else { 0xc4 }, "{count} of {trigger}");
        }
    }
}

#[test]
fn input_waits_in_its_queue_while_the_guest_does_not_read() {
    let mut rig = Rig::new();
    let flood = [b'z'; 200];
    assert_eq!(rig.serial_in.try_write(&flood), Ok(ROOM));
    rig.settle();
    assert_eq!(rig.serial_in.try_write(&flood), Ok(1), "without FIFOs one byte moved on");
    rig.outb(FCR, 0x01);
    assert_eq!(rig.serial_in.try_write(&flood), Ok(16), "the FIFO took its share at once");
    rig.settle();
    assert_eq!(rig.serial_in.try_write(&flood), Ok(0));
    assert_eq!(rig.inb(LSR) & 0x02, 0, "no overrun");
}

#[test]
fn loopback_returns_bytes_and_overruns() {
    let mut rig = Rig::new();
    rig.outb(FCR, 0x01);
    rig.outb(MCR, 0x1f);
    assert_eq!(rig.inb(MSR), 0xf0);
    rig.outb(IER, 0x04);
    for byte in 1..=16 {
        rig.outb(DATA, byte);
    }
    assert!(!rig.lines.high(GSI));
    rig.outb(DATA, 17);
    assert!(rig.lines.high(GSI));
    assert_eq!(rig.inb(IIR), 0xc6);
    assert_eq!(rig.inb(LSR), 0x63);
    assert!(!rig.lines.high(GSI), "LSR told it");
    for byte in 1..=16 {
        assert_eq!(rig.inb(DATA), byte);
    }
    assert_eq!(rig.inb(LSR), 0x60);
    assert!(rig.sent().is_empty(), "nothing left the machine");
}

#[test]
fn entering_and_leaving_loopback() {
    let mut rig = Rig::new();
    rig.outb(FCR, 0x01);
    for byte in 0..ROOM as u8 + 3 {
        rig.outb(DATA, byte);
    }
    assert_eq!(rig.inb(LSR), 0);
    rig.outb(MCR, 0x10);
    assert_eq!(rig.inb(LSR), 0x61, "what waited came back");
    for byte in ROOM as u8..ROOM as u8 + 3 {
        assert_eq!(rig.inb(DATA), byte);
    }
    rig.serial_in.try_write(b"!").unwrap();
    rig.settle();
    assert_eq!(rig.inb(LSR), 0x60, "the line is off");
    rig.outb(MCR, 0x0b);
    assert_eq!(rig.inb(DATA), b'!');
}

#[test]
fn divisor_latch_and_wide_accesses() {
    let mut rig = Rig::new();
    rig.outb(LCR, 0x83);
    rig.out(DATA, 2, 0x1234);
    assert_eq!(rig.inb(DATA), 0x34);
    assert_eq!(rig.inb(IER), 0x12);
    rig.outb(LCR, 0x03);
    assert_eq!(rig.inb(IER), 0, "the latch covered it");
    assert_eq!(rig.inp(SCR, 4) >> 8, 0xff_ffff, "past the last register");
}

#[test]
fn turning_the_fifos_on_or_off_empties_them() {
    let mut rig = Rig::new();
    rig.outb(FCR, 0x01);
    rig.outb(MCR, 0x10);
    rig.outb(DATA, 1);
    rig.outb(DATA, 2);
    rig.outb(FCR, 0x00);
    assert_eq!(rig.inb(LSR), 0x60);
    rig.outb(DATA, 3);
    rig.outb(FCR, 0x00);
    assert_eq!(rig.inb(DATA), 3, "no change, nothing lost");
}

#[test]
fn bytes_in_the_fifos_move_with_the_state() {
    let mut from = Rig::new();
    from.outb(FCR, 0x01);
    from.outb(IER, 0x03);
    for byte in 0..ROOM as u8 + 5 {
        from.outb(DATA, byte);
    }
    from.serial_in.try_write(b"abc").unwrap();
    from.settle();
    let state = from.serial.lock().unwrap().save();
    let mut to = Rig::new();
    to.serial.lock().unwrap().restore(&state).unwrap();
    to.ports.poll();
    assert_eq!(to.sent(), (ROOM as u8..ROOM as u8 + 5).collect::<Vec<_>>());
    assert!(to.lines.high(GSI));
    assert_eq!([to.inb(DATA), to.inb(DATA), to.inb(DATA)], *b"abc");
    assert_eq!(to.inb(IIR), 0xc2);
}

#[test]
fn reset_and_refused_state() {
    let mut rig = Rig::new();
    let fresh = rig.serial.lock().unwrap().save();
    rig.outb(FCR, 0xc1);
    rig.outb(IER, 0x0f);
    rig.outb(LCR, 0x83);
    assert!(rig.lines.high(GSI));
    rig.serial.lock().unwrap().reset();
    assert!(!rig.lines.high(GSI));
    assert_eq!(rig.serial.lock().unwrap().save(), fresh);
    let mut bad = fresh.clone();
    bad.rx = (0..2).collect();
    let error = rig.serial.lock().unwrap().restore(&bad).unwrap_err();
    assert_eq!(error.to_string(), "saved state of serial: a FIFO has too many bytes");
    assert_eq!(rig.serial.lock().unwrap().save(), fresh);
}
