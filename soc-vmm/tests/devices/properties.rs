//! Whatever a guest does: no panic, bounded memory, and a restored machine that can't be told from the saved one.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use soc_vmm::devices::{Persist, PmTimerWidth};
use soc_vmm::power::PowerEvent;

use crate::rig::{HandClock, ROOM, Rig};

#[derive(Clone, Debug)]
enum Step {
    Read {
        memory: bool,
        at: u64,
        len: u8,
    },
    Write {
        memory: bool,
        at: u64,
        len: u8,
        data: u64,
    },
    /// ns.
    Pass(u64),
    Input(Vec<u8>),
    Drain,
    PowerButton,
    Gpe(u8),
    Reset,
}

/// Every port that a device claims, and its neighbours.
fn port() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0x3f6..0x402u64,
        4 => 0x70..0x72u64,
        3 => prop_oneof![Just(0x60u64), Just(0x61), Just(0x64)],
        3 => 0x5feu64..0x640,
        1 => 0x640u64..0x684,
        1 => 0xafu64..0xb6,
        1 => prop_oneof![Just(0x80u64), Just(0x92), Just(0x402), Just(0xcf8), Just(0xcf9)],
        1 => 0xdeu64..0xfa,
        // Lines 13 and up of pc-testdev: those below belong to other devices too, and the rig ORs nothing.
        1 => 0x200du64..0x201a,
    ]
}

fn place() -> impl Strategy<Value = (bool, u64, u8)> {
    prop_oneof![
        9 => (Just(false), port(), prop_oneof![6 => Just(1u8), 2 => Just(2), 2 => Just(4)]),
        1 => (Just(true), prop_oneof![0xff00_0000..0xff00_0040u64, 0xff00_fff0u64..0xff01_0004], 1..=8u8),
    ]
}

/// Values that mean something somewhere more often than chance would have it.
fn data() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => any::<u64>(),
        4 => 0..0x100u64,
        1 => prop_oneof![Just(0x80u64), Just(0x82), Just(0x20aa), Just(0x2600), Just(0xd4), Just(0xfe), Just(0x700b), Just(0x0101)],
    ]
}

/// Writes that bring the devices to where something happens: interrupts on, timers running, FIFOs on.
fn setting() -> impl Strategy<Value = Step> {
    let write = |at, len, data| Step::Write { memory: false, at, len, data };
    prop_oneof![
        // COM1: IER, FCR, LCR, MCR.
        (0..16u64).prop_map(move |ier| write(0x3f9, 1, ier)),
        prop_oneof![Just(0x01u64), Just(0x81), Just(0xc1), Just(0)].prop_map(move |fcr| write(0x3fa, 1, fcr)),
        prop_oneof![Just(0x03u64), Just(0x83)].prop_map(move |lcr| write(0x3fb, 1, lcr)),
        prop_oneof![Just(0x0bu64), Just(0x1b)].prop_map(move |mcr| write(0x3fc, 1, mcr)),
        // RTC: index and data in one write: any time and alarm, registers A and B.
        (0..10u64, 0..0x60u64).prop_map(move |(index, data)| write(0x70, 2, data << 8 | index)),
        (1..16u64).prop_map(move |rate| write(0x70, 2, (0x20 | rate) << 8 | 0x0a)),
        (0..8u64, 0..8u64).prop_map(move |(sources, mode)| write(0x70, 2, (sources << 4 | mode) << 8 | 0x0b)),
        Just(write(0x70, 1, 0x0c)),
        // i8042 commands, ACPI on, its events on and acknowledged.
        (0xa0..0xe0u64).prop_map(move |command| write(0x64, 1, command)),
        Just(write(0xb2, 1, 2)),
        any::<u16>().prop_map(move |enable| write(0x602, 2, enable.into())),
        Just(write(0x600, 2, 0xffff)),
        any::<u32>().prop_map(move |enable| write(0x628, 4, enable.into())),
        any::<u32>().prop_map(move |clear| write(0x620, 4, clear.into())),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => place().prop_map(|(memory, at, len)| Step::Read { memory, at, len }),
        14 => (place(), data()).prop_map(|((memory, at, len), data)| Step::Write { memory, at, len, data }),
        14 => setting(),
        3 => prop_oneof![0..1_000_000u64, 0..3_000_000_000u64, Just(100_000_000_000)].prop_map(Step::Pass),
        2 => vec(any::<u8>(), 1..24).prop_map(Step::Input),
        1 => Just(Step::Drain),
        1 => Just(Step::PowerButton),
        1 => (0..64u8).prop_map(Step::Gpe),
        1 => Just(Step::Reset),
    ]
}

/// What the outside can see of one step.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    value: u64,
    high: Vec<u32>,
    power: Vec<PowerEvent>,
    sent: Vec<u8>,
}

fn take(rig: &mut Rig, step: &Step, advance: bool) -> Seen {
    let mut value = 0;
    let mut sent = Vec::new();
    match step {
        Step::Read { memory, at, len } => value = rig.access(*memory, *at, *len, None),
        Step::Write { memory, at, len, data } => value = rig.access(*memory, *at, *len, Some(*data)),
        // Two machines may share a clock: only one moves it.
        Step::Pass(time) if advance => rig.pass(Duration::from_nanos(*time)),
        Step::Pass(_) => {}
        // Bytes in the queue are the outside's: only what the UART takes at once is sent, so that the queue stays empty.
        Step::Input(bytes) => {
            let state = rig.serial.lock().unwrap().save();
            let depth = if state.fcr & 1 != 0 { 16 } else { 1 };
            let room = if state.mcr & 0x10 != 0 { 0 } else { depth - state.rx.len() };
            value = rig.serial_in.try_write(&bytes[..bytes.len().min(room)]).unwrap() as u64;
        }
        Step::Drain => sent = drain(rig),
        Step::PowerButton => rig.acpi_handle.press_power_button(),
        Step::Gpe(gpe) => rig.acpi_handle.raise_gpe(*gpe),
        Step::Reset => {
            rig.ports.reset();
            rig.memory.reset();
        }
    }
    rig.settle();
    let sizes = rig.serial.lock().unwrap().save();
    assert!(sizes.rx.len() <= 16 && sizes.tx.len() <= 16);
    Seen { value, high: rig.lines.all_high(), power: rig.power.take(), sent }
}

/// Reads the serial port's output until it has no more.
fn drain(rig: &mut Rig) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let sent = rig.sent();
        assert!(sent.len() <= ROOM);
        if sent.is_empty() {
            return all;
        }
        all.extend(sent);
        rig.settle();
    }
}

/// Moves one device's state by way of its wire form.
fn transfer<D: Persist>(from: &std::sync::Mutex<D>, to: &std::sync::Mutex<D>)
where
    D::State: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let state = from.lock().unwrap().save();
    let wire = serde_json::to_vec(&state).unwrap();
    to.lock().unwrap().restore(&serde_json::from_slice(&wire).unwrap()).unwrap();
    assert_eq!(to.lock().unwrap().save(), state);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_access_is_survived(steps in vec(step(), 1..400), widths in vec((port(), any::<u8>(), data()), 0..50)) {
        let mut rig = Rig::new();
        for step in &steps {
            take(&mut rig, step, true);
        }
        // Widths that no CPU makes, should a host send them.
        for (at, len, data) in widths {
            rig.access(false, at, len, Some(data));
            rig.access(false, at, len, None);
        }
        // Reset is reset: whatever was before, no line is high and nothing is due.
        rig.ports.reset();
        prop_assert!(rig.lines.all_high().is_empty());
        prop_assert_eq!(rig.ports.deadline(), None);
    }

    #[test]
    fn a_restored_machine_goes_on_as_the_saved_one(
        before in vec(step(), 0..200),
        elsewhere in vec(step(), 0..50),
        after in vec(step(), 1..200),
    ) {
        let clock = HandClock::new();
        let mut saved = Rig::with(clock.clone(), PmTimerWidth::Bits24);
        let mut restored = Rig::with(clock, PmTimerWidth::Bits24);
        // The destination has a past of its own, which must not shine through.
        for step in &elsewhere {
            take(&mut restored, step, true);
        }
        for step in &before {
            take(&mut saved, step, true);
        }
        drain(&mut saved);
        drain(&mut restored);
        // What waits in handles belongs to the outside, like what waits in queues.
        saved.settle();
        restored.settle();
        // What the outside was told is no part of the machine.
        (_, _) = (saved.power.take(), restored.power.take());
        transfer(&saved.serial, &restored.serial);
        transfer(&saved.rtc, &restored.rtc);
        transfer(&saved.i8042, &restored.i8042);
        transfer(&saved.acpi, &restored.acpi);
        transfer(&saved.port92, &restored.port92);
        transfer(&saved.reset_control, &restored.reset_control);
        transfer(&saved.test_ports, &restored.test_ports);
        transfer(&saved.test_memory, &restored.test_memory);
        saved.ports.poll();
        restored.ports.poll();
        for (nth, step) in after.iter().enumerate() {
            let (expected, got) = if let Step::Pass(time) = step {
                let end = Duration::from_nanos(*time);
                pass_both(&mut saved, &mut restored, end);
                (take(&mut saved, step, false), take(&mut restored, step, false))
            } else {
                (take(&mut saved, step, true), take(&mut restored, step, true))
            };
            prop_assert_eq!(expected, got, "step {} {:?}", nth, step);
        }
    }
}

/// A restored irqchip need not know the levels: each device says its own again.
#[test]
fn restoring_says_the_levels_again() {
    let mut rig = Rig::new();
    rig.outb(0x3f9, 0x02);
    rig.out(0x70, 2, 0x420b);
    rig.outb(0x64, 0xaa);
    rig.outb(0xb2, 2);
    rig.out(0x602, 2, 1 << 8);
    rig.acpi_handle.press_power_button();
    rig.outb(0x2017, 1);
    rig.pass(Duration::from_secs(1));
    let high = [1, 4, 8, 9, 23];
    assert_eq!(rig.lines.all_high(), high);
    rig.lines.forget();
    transfer(&rig.serial, &rig.serial);
    transfer(&rig.rtc, &rig.rtc);
    transfer(&rig.i8042, &rig.i8042);
    transfer(&rig.acpi, &rig.acpi);
    transfer(&rig.test_ports, &rig.test_ports);
    assert_eq!(rig.lines.all_high(), high);
}

/// Lets time pass for two machines on one clock.
fn pass_both(one: &mut Rig, two: &mut Rig, time: Duration) {
    use soc_vmm::devices::Clock;
    let end = one.clock.monotonic() + time;
    loop {
        let next = [one.ports.deadline(), two.ports.deadline()].into_iter().flatten().min();
        let Some(at) = next.filter(|at| *at <= end) else { break };
        one.clock.pass(at.saturating_duration_since(one.clock.monotonic()));
        one.settle();
        two.settle();
    }
    one.clock.pass(end - one.clock.monotonic());
}
