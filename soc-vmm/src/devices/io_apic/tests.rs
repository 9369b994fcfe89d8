use std::sync::mpsc;

use proptest::prelude::*;

use super::*;
use crate::bus::{LateAnswer, RequestId, Wake};
use crate::interrupt::MessageSink;
use crate::pci::test_sink::TestSink;

#[derive(Debug)]
struct Quiet;

impl Wake for Quiet {
    fn wake(&self) {}
}

struct Rig {
    chip: IoApic,
    sink: TestSink,
    late: mpsc::Sender<LateAnswer>,
    answers: mpsc::Receiver<LateAnswer>,
    wake: Arc<dyn Wake>,
}

impl Rig {
    fn new() -> Self {
        let sink = TestSink::default();
        let chip = IoApic::new((0..IO_APIC_PINS).map(|_| sink.route()).collect(), Arc::default());
        Self::of(chip, sink)
    }

    fn of(chip: IoApic, sink: TestSink) -> Self {
        let (late, answers) = mpsc::channel();
        Self { chip, sink, late, answers, wake: Arc::new(Quiet) }
    }

    fn access(&mut self, offset: u64, len: u8, data: Option<u64>) -> Answer {
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &self.late, &self.wake);
        let access = Access { vcpu: 0, host_tsc: 0, len };
        match data {
            None => self.chip.read(&access, offset, reply),
            Some(data) => self.chip.write(&access, offset, data, reply),
        }
    }

    fn write(&mut self, register: u8, value: u32) {
        for (offset, value) in [(SELECT, register.into()), (WINDOW, value)] {
            let answer = self.access(offset, 4, Some(value.into()));
            assert!(matches!(answer, Answer::Done(0)), "{answer:?}");
        }
    }

    fn read(&mut self, register: u8) -> u32 {
        let _ = self.access(SELECT, 4, Some(register.into()));
        match self.access(WINDOW, 4, None) {
            Answer::Done(value) => value as u32,
            other => panic!("{other:?}"),
        }
    }

    /// The lower half of a pin's entry.
    fn entry(&mut self, pin: u8) -> u32 {
        self.read(ENTRIES + 2 * pin)
    }

    fn set_entry(&mut self, pin: u8, entry: u32) {
        self.write(ENTRIES + 2 * pin, entry);
    }

    /// The data of what was sent so far.
    fn sent(&self) -> Vec<u32> {
        self.sink.raised().iter().map(|message| message.data).collect()
    }
}

const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;
const REMOTE_IRR: u32 = 1 << 14;

#[test]
fn it_is_the_chip_that_guests_know() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(VERSION), 0x17_0020);
    rig.write(ID, u32::MAX);
    assert_eq!((rig.read(ID), rig.read(ARBITRATION)), (0x0f00_0000, 0x0f00_0000));
    assert!((0..24).all(|pin| rig.entry(pin) == MASKED));
    for register in [ENTRIES, ENTRIES + 1] {
        rig.write(register, u32::MAX);
    }
    assert_eq!((rig.read(ENTRIES), rig.read(ENTRIES + 1)), (0x1_afff, 0xffff_0000));
    rig.write(ENTRIES + 48, 0);
    assert_eq!(rig.read(ENTRIES + 48), 0);
}

#[test]
fn an_entry_becomes_a_message() {
    let mut rig = Rig::new();
    // Lowest priority, logical, to 0x80; then one that names an entry of an interrupt remapping table: 0x8001.
    for (upper, lower, address, data) in
        [(0x8000_0000, 0x941, 0xfee8_0004, 0x141), (0x0003_0000, 0x841, 0xfee0_0034, 0x41)]
    {
        rig.write(ENTRIES + 9, upper);
        rig.set_entry(4, lower);
        rig.chip.set_level(4, true);
        rig.chip.set_level(4, false);
        assert_eq!(rig.sink.raised().last(), Some(&Message { address, data }));
    }
}

#[test]
fn an_edge_is_delivered_once_and_lost_at_a_masked_pin() {
    let mut rig = Rig::new();
    rig.set_entry(4, MASKED | 0x41);
    rig.chip.set_level(4, true);
    rig.set_entry(4, 0x41);
    assert_eq!(rig.sent(), [0; 0]);
    rig.chip.set_level(4, true);
    rig.chip.set_level(4, false);
    rig.chip.set_level(4, true);
    rig.chip.end(0x41);
    assert_eq!(rig.sent(), [0x41]);
    rig.chip.set_level(24, true);
    rig.chip.set_level(u32::MAX, true);
}

#[test]
fn a_level_is_delivered_again_at_its_end_for_as_long_as_it_is_high() {
    for by_register in [false, true] {
        let mut rig = Rig::new();
        rig.set_entry(20, LEVEL | 0x51);
        let end = |rig: &mut Rig, vector: u8| match by_register {
            true => drop(rig.access(EOI, 4, Some(u64::from(vector)))),
            false => rig.chip.end(vector),
        };
        rig.chip.set_level(20, true);
        rig.chip.set_level(20, true);
        assert_eq!((rig.sent(), rig.entry(20)), (vec![0xc051], LEVEL | REMOTE_IRR | 0x51));
        end(&mut rig, 0x52);
        assert_eq!(rig.sent().len(), 1);
        end(&mut rig, 0x51);
        assert_eq!(rig.sent().len(), 2);
        rig.chip.set_level(20, false);
        end(&mut rig, 0x51);
        assert_eq!((rig.sent().len(), rig.entry(20)), (2, LEVEL | 0x51));
        rig.chip.set_level(20, true);
        assert_eq!(rig.sent().len(), 3);
    }
}

#[test]
fn a_masked_level_is_delivered_when_it_is_unmasked() {
    let mut rig = Rig::new();
    rig.set_entry(20, MASKED | LEVEL | 0x51);
    rig.chip.set_level(20, true);
    assert_eq!(rig.sent(), [0; 0]);
    rig.set_entry(20, LEVEL | 0x51);
    assert_eq!(rig.sent(), [0xc051]);
    // Masked while it is served, it comes no more.
    rig.set_entry(20, MASKED | LEVEL | 0x51);
    rig.chip.end(0x51);
    assert_eq!((rig.sent().len(), rig.entry(20)), (1, MASKED | LEVEL | 0x51));
    rig.set_entry(20, LEVEL | 0x51);
    assert_eq!(rig.sent().len(), 2);
    // An edge for a moment: then it waits for no end.
    rig.set_entry(20, MASKED | 0x51);
    assert_eq!(rig.entry(20), MASKED | 0x51);
}

#[test]
fn after_a_reset_pins_are_masked_and_lines_are_what_they_are() {
    let mut rig = Rig::new();
    rig.set_entry(20, LEVEL | 0x51);
    rig.chip.set_level(20, true);
    rig.chip.reset();
    assert_eq!(rig.entry(20), MASKED);
    rig.set_entry(20, LEVEL | 0x61);
    assert_eq!(rig.sent(), [0xc051, 0xc061]);
}

/// Counts changes that the host has when it is told.
struct Slow(Arc<Settling>);

impl MessageRoute for Slow {
    fn set(&self, _: Option<Message>) {
        self.0.change();
    }

    fn raise(&self) {}
}

#[test]
fn a_write_is_over_when_the_host_knows_the_route() {
    let settling = Arc::<Settling>::default();
    let routes = (0..IO_APIC_PINS).map(|_| Box::new(Slow(settling.clone())) as _).collect();
    let mut rig = Rig::of(IoApic::new(routes, settling.clone()), TestSink::default());
    let _ = rig.access(SELECT, 4, Some(0x10));
    assert!(matches!(rig.access(WINDOW, 4, Some(0x8041)), Answer::Deferred));
    rig.chip.poll();
    assert!(rig.answers.try_recv().is_err());
    settling.settle(settling.mark());
    rig.chip.poll();
    assert!(matches!(rig.answers.try_recv(), Ok(LateAnswer { answer: Answer::Done(0), .. })));
    // No route changes: no wait.
    for entry in [0x1_8041, 0x8041, 0x1_8042] {
        assert!(matches!(rig.access(WINDOW, 4, Some(entry)), Answer::Done(0)));
    }
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let mut rig = Rig::new();
    let good = rig.chip.save();
    for bad in [
        IoApicState { entries: vec![0; 23], ..good.clone() },
        IoApicState { entries: vec![REMOTE_IRR.into(); 24], ..good.clone() },
        IoApicState { entries: vec![1 << 12; 24], ..good.clone() },
        IoApicState { id: 1, ..good.clone() },
        IoApicState { levels: 1 << 24, ..good.clone() },
    ] {
        rig.chip.restore(&bad).unwrap_err();
    }
    assert_eq!(rig.chip.save(), good);
}

#[test]
fn a_pin_that_is_masked_amid_its_interrupt_is_known_to_the_host_after_a_move() {
    let mut rig = Rig::new();
    rig.set_entry(16, LEVEL | 0x41);
    rig.chip.set_level(16, true);
    rig.set_entry(16, LEVEL | MASKED | 0x41);
    rig.set_entry(17, LEVEL | MASKED | 0x42);
    let mut other = Rig::new();
    other.chip.restore(&rig.chip.save()).unwrap();
    assert_eq!(other.sink.routed(), rig.sink.routed());
    assert_eq!((other.sink.routed().len(), other.sent()), (1, vec![]));
    other.chip.end(0x41);
    other.set_entry(16, LEVEL | 0x41);
    assert_eq!(other.sent().len(), 1, "it is still high");
}

#[derive(Clone, Debug)]
enum Step {
    Write(u8, u32),
    Raw(u64, u8, u64),
    Line(u32, bool),
    End(u8),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    // Few vectors and pins, so that they meet.
    let entry = (0u32..4, any::<[bool; 3]>()).prop_map(|(vector, [level, masked, remote])| {
        vector | u32::from(remote) << 14 | u32::from(level) << 15 | u32::from(masked) << 16
    });
    prop_oneof![
        4 => (0u8..4, entry).prop_map(|(pin, entry)| Step::Write(ENTRIES + 2 * pin, entry)),
        1 => (any::<u8>(), any::<u32>()).prop_map(|(register, value)| Step::Write(register, value)),
        1 => (0u64..0x50, 1u8..=8, any::<u64>()).prop_map(|(at, len, value)| Step::Raw(at, len, value)),
        4 => (0u32..5, any::<bool>()).prop_map(|(pin, high)| Step::Line(pin, high)),
        3 => (0u8..4).prop_map(Step::End),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #[test]
    fn no_level_is_forgotten(steps in proptest::collection::vec(step(), 0..80)) {
        let mut rig = Rig::new();
        for step in steps {
            let before = rig.sent().len();
            match step {
                Step::Write(register, value) => rig.write(register, value),
                Step::Raw(at, len, value) => {
                    let _ = rig.access(at, len, None);
                    let _ = rig.access(at, len, Some(value));
                }
                Step::Line(pin, high) => rig.chip.set_level(pin, high),
                Step::End(vector) => rig.chip.end(vector),
                Step::Reset => rig.chip.reset(),
            }
            prop_assert!(rig.sent().len() - before <= IO_APIC_PINS);
            let state = rig.chip.save();
            for (pin, entry) in state.entries.iter().enumerate() {
                let entry = *entry as u32;
                let (level, masked, served) = (entry & LEVEL != 0, entry & MASKED != 0, entry & REMOTE_IRR != 0);
                prop_assert!(level || !served);
                let high = state.levels >> pin & 1 != 0;
                prop_assert!(!(level && high && !masked) || served, "pin {pin} waits");
            }
            let mut other = Rig::new();
            other.chip.restore(&state).unwrap();
            prop_assert_eq!(other.chip.save(), state);
            prop_assert_eq!(other.sent(), Vec::<u32>::new());
        }
    }
}
