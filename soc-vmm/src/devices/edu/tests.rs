use std::sync::{Mutex, mpsc};

use proptest::prelude::*;

use super::*;
use crate::bus::{RequestId, Wake};
use crate::interrupt::{LineSink, Message};
use crate::memory::test_ram::Ram;
use crate::pci::test_sink::TestSink;

#[derive(Debug)]
struct Quiet;

impl Wake for Quiet {
    fn wake(&self) {}
}

#[derive(Default)]
struct Level(Mutex<bool>);

impl LineSink for Level {
    fn set_level(&self, _: u32, high: bool) {
        *self.0.lock().unwrap() = high;
    }
}

struct Rig {
    edu: Edu,
    ram: Arc<Ram>,
    line: Arc<Level>,
    sink: TestSink,
}

impl Rig {
    fn new() -> Self {
        let (ram, line, sink) = (Arc::new(Ram::new(0x1_0000)), Arc::<Level>::default(), TestSink::default());
        let mut edu = Edu::new(ram.clone(), &sink, InterruptLine::new(16, line.clone()));
        edu.write_config(4, 2, 6);
        Self { edu, ram, line, sink }
    }

    fn access(&mut self, offset: u64, len: u8, data: Option<u64>) -> u64 {
        let (late, _answers) = mpsc::channel();
        let wake: Arc<dyn Wake> = Arc::new(Quiet);
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &late, &wake);
        let access = Access { vcpu: 0, host_tsc: 0, len };
        let answer = match data {
            None => self.edu.read(0, offset, &access, reply),
            Some(data) => self.edu.write(0, offset, data, &access, reply),
        };
        match answer {
            Answer::Done(value) => value,
            other => panic!("{other:?}"),
        }
    }

    fn write(&mut self, offset: u64, value: u64) {
        self.access(offset, if offset < SOURCE { 4 } else { 8 }, Some(value));
    }

    fn read(&mut self, offset: u64) -> u64 {
        self.access(offset, 4, None)
    }

    fn transfer(&mut self, source: u64, destination: u64, count: u64, command: u64) {
        for (register, value) in [(SOURCE, source), (DESTINATION, destination), (COUNT, count), (COMMAND, command)] {
            self.write(register, value);
        }
        assert_eq!(self.read(COMMAND) & START, 0, "it is done");
    }

    fn is_high(&self) -> bool {
        *self.line.0.lock().unwrap()
    }
}

#[test]
fn it_is_alive_and_counts() {
    let mut rig = Rig::new();
    assert_eq!((rig.edu.config.read(0, 4), rig.read(IDENTIFICATION)), (0x11e8_1234, 0x0100_00ed));
    rig.write(LIVENESS, 0x1234_5678);
    assert_eq!(rig.read(LIVENESS), 0xedcb_a987);
    for (n, expected) in
        [(0, 1), (5, 120), (12, 479_001_600), (13, 1_932_053_504), (33, 1 << 31), (34, 0), (u32::MAX, 0)]
    {
        rig.write(FACTORIAL, n.into());
        assert_eq!(rig.read(FACTORIAL), expected, "{n}!");
    }
    assert_eq!((rig.read(REASONS), rig.is_high()), (0, false));
    rig.write(STATUS, 0x81);
    assert_eq!(rig.read(STATUS), 0x80);
    rig.write(FACTORIAL, 3);
    assert_eq!((rig.read(REASONS), rig.is_high()), (1, true));
}

#[test]
fn its_pin_is_high_until_all_reasons_are_acknowledged() {
    let mut rig = Rig::new();
    rig.write(RAISE, 5);
    rig.write(RAISE, 8);
    rig.write(ACKNOWLEDGE, 5);
    assert_eq!((rig.read(REASONS), rig.is_high()), (8, true));
    rig.edu.write_config(4, 2, 0x406);
    assert!(!rig.is_high());
    rig.edu.write_config(4, 2, 6);
    assert!(rig.is_high());
    rig.write(ACKNOWLEDGE, 8);
    assert!(!rig.is_high());
}

#[test]
fn a_message_is_sent_for_each_interrupt() {
    let mut rig = Rig::new();
    rig.edu.write_config(0x44, 4, 0xfee0_0000);
    rig.edu.write_config(0x4c, 2, 0x41);
    rig.edu.write_config(0x42, 2, 1);
    rig.write(RAISE, 1);
    rig.write(RAISE, 1);
    assert_eq!(rig.sink.raised(), [Message { address: 0xfee0_0000, data: 0x41 }; 2]);
    assert!(!rig.is_high());
    rig.edu.write_config(4, 2, 2);
    rig.write(RAISE, 1);
    assert_eq!(rig.sink.raised().len(), 2, "not without bus mastering");
}

#[test]
fn dma_goes_both_ways_within_the_buffer() {
    let mut rig = Rig::new();
    let data: Vec<u8> = (1..=100).collect();
    rig.ram.write(0x1000, &data).unwrap();
    rig.transfer(0x1000, BUFFER + 0xf00, 100, START);
    // Of the address 28 bits count.
    rig.transfer(BUFFER + 0xf00, 0xf000_2000, 100, START | TO_MEMORY | INTERRUPT);
    assert_eq!(rig.ram.0.lock().unwrap()[0x2000..0x2064], data);
    assert_eq!((rig.read(REASONS), rig.is_high()), (0x100, true));
    for (source, count) in [(BUFFER + 0xfff, 2), (BUFFER - 1, 1), (0, 1), (u64::MAX, 1), (BUFFER, u64::MAX)] {
        rig.transfer(source, 0x3000, count, START | TO_MEMORY);
    }
    rig.transfer(BUFFER, 0x1_0000, 4, START | TO_MEMORY);
    rig.edu.write_config(4, 2, 2);
    rig.transfer(BUFFER + 0xf00, 0x3000, 4, START | TO_MEMORY);
    assert_eq!(rig.ram.0.lock().unwrap()[0x3000..0x3004], [0; 4]);
}

#[test]
fn registers_have_their_widths() {
    let mut rig = Rig::new();
    rig.access(LIVENESS, 8, Some(5));
    rig.access(LIVENESS, 2, Some(5));
    assert_eq!(rig.read(LIVENESS), u64::from(u32::MAX));
    assert_eq!((rig.access(LIVENESS, 1, None), rig.access(0x2c, 4, None)), (u64::MAX, u64::MAX));
    rig.access(SOURCE, 4, Some(u64::MAX));
    assert_eq!(rig.access(SOURCE, 8, None), u64::from(u32::MAX));
}

proptest! {
    /// Any accesses: what is saved is what was there, and a reset undoes all.
    #[test]
    fn any_guest_is_answered(accesses in proptest::collection::vec((0u64..0xa0, 1u8..=8, proptest::option::of(any::<u64>())), 0..60)) {
        let mut rig = Rig::new();
        for (offset, len, data) in accesses {
            rig.access(offset & !3, len, data);
            prop_assert_eq!(rig.is_high(), rig.read(REASONS) != 0);
        }
        let saved = rig.edu.save();
        let mut other = Rig::new();
        other.edu.restore(&saved).unwrap();
        prop_assert_eq!(&other.edu.save(), &saved);
        prop_assert_eq!(other.is_high(), rig.is_high());
        other.edu.restore(&EduState { buffer: Hex(vec![0; BUFFER_LEN + 1]), ..saved.clone() }).unwrap_err();
        other.edu.restore(&EduState { registers: Registers { status: 1, ..saved.registers.clone() }, ..saved }).unwrap_err();
        rig.edu.reset();
        prop_assert!(!rig.is_high() && rig.read(REASONS) == 0);
    }
}
