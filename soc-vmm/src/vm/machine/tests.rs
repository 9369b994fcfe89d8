//! Whole machines that move: whatever a guest did, it can't tell where it goes on.

mod rig;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::Value;

use crate::block::{self, BlockBackend, ImageSpec};
use crate::persist::{Saved, States};
use rig::{CHIP, RAM, Rig};

/// Functions: host bridge, LPC bridge, AHCI controller, edu, root ports.
const FUNCTIONS: [u32; 6] = [0, 0xf8, AHCI, EDU, 8, 9];
const AHCI: u32 = 0x1f << 3 | 2;
const EDU: u32 = 25 << 3;
/// Where the test puts the windows of the controller and of edu, if nobody else does.
const AHCI_WINDOW: u32 = 0xd000_0000;
const EDU_WINDOW: u32 = 0xd010_0000;
/// The controller's driver has its things there.
const LIST: u64 = 0x1_0000;
const RECEIVED: u64 = 0x2_0000;
const TABLE: u64 = 0x3_0000;
const DATA: u64 = 0x4_0000;

const WITHOUT_FIRMWARE: &[&str] = &["--kernel", "k", "--cpus", "2,maxcpus=4"];
const WITH_FIRMWARE: &[&str] = &["--firmware", "f", "--cpus", "2,maxcpus=4"];
const WITH_IOMMU: &[&str] = &["--kernel", "k", "--cpus", "2,maxcpus=4", "--iommu", "intel"];

#[derive(Clone, Debug)]
enum Step {
    Access {
        memory: bool,
        at: u64,
        len: u8,
        data: Option<u64>,
    },
    Config {
        function: u32,
        offset: u32,
        data: Option<u32>,
    },
    Ahci {
        register: u64,
        data: Option<u32>,
    },
    /// A packet command for the drive.
    Packet {
        slot: u32,
        packet: Vec<u8>,
    },
    Edu {
        register: u64,
        data: Option<u64>,
    },
    /// The driver of the controller begins.
    Start,
    Fill {
        at: u64,
        bytes: Vec<u8>,
    },
    PowerButton,
    Insert(usize),
    Poll,
    Reset,
}

/// Every port but those that tell time: the RTC's, and the PM timer.
fn port() -> impl Strategy<Value = (u64, u8)> {
    let block = |first: u64, len: u64| (first..first + len, select(vec![1u8, 2, 4]));
    prop_oneof![
        4 => (0x3f8..0x400u64, Just(1u8)),
        2 => (select(vec![0x60u64, 0x64, 0x80, 0x92, 0xcf9, 0x402, 0x505, 0xb2, 0xb3]), Just(1u8)),
        2 => (select(vec![0x600u64, 0x602, 0x604, 0x620, 0x622, 0x628, 0x62a]), Just(2u8)),
        2 => prop_oneof![Just((0xcd8u64, 4u8)), Just((0xcdc, 1)), Just((0xcdd, 1)), Just((0xce0, 4))],
        2 => prop_oneof![Just((0x510u64, 2u8)), Just((0x511, 1)), Just((0x514, 4)), Just((0x518, 4))],
        1 => block(0xe0, 12),
        // Lines that no other device has.
        1 => (0x200d..0x2010u64, Just(1u8)),
        1 => Just((0x3000, 4)),
        1 => Just((0xcf8, 4)),
        1 => block(0xcfc, 4),
    ]
}

fn memory() -> impl Strategy<Value = (u64, u8)> {
    let vtd =
        vec![0x18, 0x20, 0x28, 0x34, 0x38, 0x3c, 0x40, 0x80, 0x88, 0x90, 0x9c, 0xa0, 0xa4, 0xa8, 0xb8, 0xf8, 0x220];
    prop_oneof![
        3 => (select(vec![0xfec0_0000u64, 0xfec0_0010, 0xfec0_0040]), Just(4u8)),
        3 => (select(vtd).prop_map(|at: u64| 0xfed9_0000 + at), select(vec![4u8, 8])),
        1 => (0xff00_0000..0xff00_0020u64, 1..=8u8),
        2 => ((1u64 << 32) - 2 * CHIP..1 << 32, select(vec![1u8, 2, 4])),
        1 => (0xfed1_f100..0xfed1_f158u64, Just(2u8)),
    ]
}

/// Values that mean something somewhere more often than chance would have it.
fn data() -> impl Strategy<Value = u64> {
    let telling = vec![
        0x10,
        0x20,
        0x40,
        0x70,
        0x90,
        0x98,
        0xd0,
        0xe8,
        0xff,
        0xaa,
        0xfe,
        0x60,
        0x0100,
        0x2401,
        0x82,
        0x8041,
        0x1_8041,
        1 << 31,
        1 << 26,
        1 << 25 | 1 << 24,
        0x2_0000,
        0x4_0100,
        0x6_0203,
    ];
    prop_oneof![3 => any::<u64>(), 4 => 0..0x40u64, 4 => select(telling)]
}

fn step() -> impl Strategy<Value = Step> {
    let config = vec![
        0x04u32, 0x10, 0x18, 0x24, 0x3c, 0x40, 0x44, 0x48, 0x4c, 0x50, 0x58, 0x60, 0x68, 0x7c, 0x80, 0x90, 0x9c, 0xf0,
    ];
    let code = select(vec![0u8, 3, 0x12, 0x1b, 0x1e, 0x25, 0x28, 0x43, 0x46, 0x4a, 0x5a, 0xbd]);
    let packet =
        (code, vec(select(vec![0u8, 0, 1, 2, 3, 9, 18]), 11)).prop_map(|(code, rest)| [vec![code], rest].concat());
    let register = prop_oneof![select(vec![0u64, 4, 8]), (0u64..16).prop_map(|n| 0x100 + 4 * n)];
    let edu = select(vec![0u64, 4, 8, 0x20, 0x24, 0x60, 0x64, 0x80, 0x88, 0x90, 0x98]);
    prop_oneof![
        8 => (port(), proptest::option::weighted(0.6, data()))
            .prop_map(|((at, len), data)| Step::Access { memory: false, at, len, data }),
        6 => (memory(), proptest::option::weighted(0.6, data()))
            .prop_map(|((at, len), data)| Step::Access { memory: true, at, len, data }),
        4 => (select(FUNCTIONS.to_vec()), select(config), proptest::option::weighted(0.6, data()))
            .prop_map(|(function, offset, data)| Step::Config { function, offset, data: data.map(|data| data as u32) }),
        3 => (register, proptest::option::weighted(0.6, data()))
            .prop_map(|(register, data)| Step::Ahci { register, data: data.map(|data| data as u32) }),
        4 => (0u32..32, packet).prop_map(|(slot, packet)| Step::Packet { slot, packet }),
        2 => (edu, proptest::option::weighted(0.6, data())).prop_map(|(register, data)| Step::Edu { register, data }),
        3 => Just(Step::Start),
        1 => (0x8_0000..0xf_0000u64, vec(any::<u8>(), 1..16)).prop_map(|(at, bytes)| Step::Fill { at, bytes }),
        1 => Just(Step::PowerButton),
        1 => (1..4usize).prop_map(Step::Insert),
        2 => Just(Step::Poll),
        1 => Just(Step::Reset),
    ]
}

/// A window of a function, wherever the guest has put it by now.
fn window(rig: &mut Rig, function: u32, bar: u32) -> u64 {
    u64::from(rig.config(function, bar, None) & !0xf)
}

fn take(rig: &mut Rig, step: &Step) -> u64 {
    match step {
        Step::Access { memory, at, len, data } => rig.access(*memory, *at, *len, *data),
        Step::Config { function, offset, data } => rig.config(*function, *offset, *data).into(),
        Step::Ahci { register, data } => {
            let at = window(rig, AHCI, 0x24) + register;
            rig.access(true, at, 4, data.map(u64::from))
        }
        Step::Packet { slot, packet } => {
            let table = TABLE + 0x100 * u64::from(*slot);
            rig.put(LIST + 32 * u64::from(*slot), &0x1_0025u32.to_le_bytes());
            rig.put(LIST + 32 * u64::from(*slot) + 8, &table.to_le_bytes());
            rig.put(table, &[0x27, 0x80, 0xa0, 1]);
            rig.put(table + 0x40, packet);
            rig.put(table + 0x80, &DATA.to_le_bytes());
            rig.put(table + 0x8c, &4095u32.to_le_bytes());
            let at = window(rig, AHCI, 0x24) + 0x138;
            rig.access(true, at, 4, Some(1 << slot))
        }
        Step::Edu { register, data } => {
            let at = window(rig, EDU, 0x10) + register;
            rig.access(true, at, if *register >= 0x80 { 8 } else { 4 }, *data)
        }
        Step::Start => {
            start(rig);
            0
        }
        Step::Fill { at, bytes } => {
            rig.put(*at, bytes);
            0
        }
        Step::PowerButton => {
            rig.machine.acpi.press_power_button();
            0
        }
        // As the control loop does.
        Step::Insert(cpu) => u64::from(rig.machine.cpus.registers().insert(*cpu)),
        Step::Poll => {
            rig.poll();
            0
        }
        Step::Reset => {
            rig.reset();
            0
        }
    }
}

/// What drivers do first.
fn start(rig: &mut Rig) {
    for (function, bar, window) in [(AHCI, 0x24, AHCI_WINDOW), (EDU, 0x10, EDU_WINDOW)] {
        rig.config(function, bar, Some(window));
        rig.config(function, 4, Some(7));
    }
    // What had waited for that comes before what follows.
    settle(rig);
    let ahci = u64::from(AHCI_WINDOW);
    rig.access(true, ahci + 4, 4, Some(0x8000_0002));
    let registers = [(0x00, LIST), (0x08, RECEIVED), (0x30, 0xffff_ffff), (0x10, 0xffff_ffff), (0x14, 0xffff_ffff)];
    for (register, value) in registers.into_iter().chain([(0x18, 0x10), (0x18, 0x11)]) {
        rig.access(true, ahci + 0x100 + register, 4, Some(value));
    }
}

/// Lets everything happen that is under way: the controller's thread has nothing more to do.
fn settle(rig: &mut Rig) {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        rig.halt();
        let has_work = has_work(rig.states_of_memory_bus());
        rig.go_on();
        if !has_work {
            return rig.poll();
        }
        assert!(Instant::now() < end, "a command never ends");
        // The thread must get to it before the next halt.
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Whether a command, or the drive's first frame, can be begun.
fn has_work(mut states: States) -> bool {
    let state: Value = states.take("ahci", "1f.2", 1).unwrap();
    let bus_master = u8::from_str_radix(&state["config"].as_str().unwrap()[8..10], 16).unwrap() & 4 != 0;
    let port = |port: &Value| {
        let number = |name| port["registers"][name].as_u64().unwrap();
        let begins = number("cmd") & 1 != 0
            && !port["registers"]["halted"].as_bool().unwrap()
            && number("task_file") & 0x88 == 0
            && number("control") & 0xf == 0
            && number("issued") != 0;
        let signature = port["registers"]["owes_signature"].as_bool().unwrap() && number("cmd") & 0x10 != 0;
        !port["drive"].is_null() && (begins || signature)
    };
    bus_master && state["ports"].as_array().unwrap().iter().any(port)
}

fn disc(dir: &Path) -> Arc<dyn BlockBackend> {
    let path = dir.join("disc.iso");
    std::fs::write(&path, (0..16u8).flat_map(|sector| [sector; 2048]).collect::<Vec<_>>()).unwrap();
    block::open(&ImageSpec::read_only(path)).unwrap()
}

/// What the control loop keeps the same on both sides: the processors.
fn with_processors_of(rig: &Rig, other: &Rig) {
    let there = other.machine.cpus.present();
    for cpu in there {
        rig.machine.cpus.registers().insert(cpu);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_guest_can_not_tell_where_it_goes_on(
        options in select(vec![WITHOUT_FIRMWARE, WITH_FIRMWARE, WITH_IOMMU]),
        before in vec(step(), 0..150),
        after in vec(step(), 1..100),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let medium = disc(dir.path());
        let mut here = Rig::new(options, Some(medium.clone()));
        start(&mut here);
        for step in &before {
            // A processor that is ejected would have to be parked before it can be on neither side.
            if !matches!(step, Step::Access { at: 0xcdc, data: Some(_), .. }) {
                take(&mut here, step);
            }
        }
        here.halt();
        let frozen = here.memory();
        let (outside, states) = (here.outside(), here.states());
        let mut there = Rig::new(options, Some(medium));
        with_processors_of(&there, &here);
        there.copy_memory(&here);
        there.outside();
        there.load(states).unwrap();
        prop_assert_eq!(there.outside(), outside.quiet());
        prop_assert!(here.memory() == frozen && there.memory() == frozen, "it moved while all stood still");
        here.go_on();
        there.go_on();
        settle(&mut here);
        settle(&mut there);
        prop_assert_eq!(here.outside(), there.outside());
        for (nth, step) in after.iter().enumerate() {
            let (expected, got) = (take(&mut here, step), take(&mut there, step));
            prop_assert_eq!(expected, got, "step {} {:?}", nth, step);
            settle(&mut here);
            settle(&mut there);
            prop_assert_eq!(here.outside(), there.outside(), "step {} {:?}", nth, step);
        }
        prop_assert!(here.memory() == there.memory());
    }

    #[test]
    fn a_damaged_state_is_refused_or_as_good_as_any_other(
        options in select(vec![WITHOUT_FIRMWARE, WITH_IOMMU]),
        before in vec(step(), 0..40),
        damages in vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), damage()), 1..4),
        after in vec(step(), 1..60),
    ) {
        let mut here = Rig::new(options, None);
        start(&mut here);
        for step in &before {
            take(&mut here, step);
        }
        here.halt();
        let mut states: Vec<_> = here.states().into_iter().collect();
        for (device, leaf, damage) in damages {
            let device = device.index(states.len());
            spoil(&mut states[device].1, leaf.index(200), &damage);
        }
        let mut damaged = States::default();
        states.into_iter().for_each(|(name, saved)| damaged.add(&name, saved).unwrap());
        let mut there = Rig::new(options, None);
        with_processors_of(&there, &here);
        there.copy_memory(&here);
        if let Err(why) = there.load(damaged) {
            let why = why.to_string();
            prop_assert!(!why.is_empty() && !why.contains('\n'), "{}", why);
        }
        // Refused amid its devices or taken: nothing is so broken that it panics, or that a reset doesn't mend it.
        there.go_on();
        for step in &after {
            take(&mut there, step);
        }
        there.halt();
        there.reset();
        there.go_on();
        start(&mut there);
        settle(&mut there);
        prop_assert_eq!(there.access(true, u64::from(AHCI_WINDOW) + 0x128, 4, None), 0x113);
    }
}

#[derive(Clone, Debug)]
enum Damage {
    Number(u64),
    Text(String),
    Null,
    /// One more of what is there.
    Longer,
    Shorter,
    Version(u32),
}

fn damage() -> impl Strategy<Value = Damage> {
    let numbers = prop_oneof![any::<u64>(), 0..64u64, Just(u64::MAX), Just(1 << 31), Just(1 << 62)];
    prop_oneof![
        6 => numbers.prop_map(Damage::Number),
        1 => "[0-9a-f]{0,40}".prop_map(Damage::Text),
        1 => Just(Damage::Null),
        1 => Just(Damage::Longer),
        1 => Just(Damage::Shorter),
        1 => any::<u32>().prop_map(Damage::Version),
    ]
}

/// Changes the `leaf`-th value of a state, counted around.
fn spoil(saved: &mut Saved, leaf: usize, damage: &Damage) {
    if let Damage::Version(version) = damage {
        saved.version = *version;
        return;
    }
    let mut state: Value = serde_json::from_slice(&saved.state).unwrap();
    let mut count = usize::MAX;
    visit(&mut state, &mut count, damage);
    // `count` values were passed.
    let mut left = leaf % (usize::MAX - count).max(1);
    visit(&mut state, &mut left, damage);
    saved.state = serde_json::to_vec(&state).unwrap();
}

fn visit(value: &mut Value, left: &mut usize, damage: &Damage) {
    let here = *left == 0;
    *left = left.wrapping_sub(1);
    match (value, damage) {
        (Value::Array(items), Damage::Longer) if here => items.extend(items.last().cloned()),
        (Value::Array(items), Damage::Shorter) if here => drop(items.pop()),
        (Value::Array(items), _) => items.iter_mut().for_each(|item| visit(item, left, damage)),
        (Value::Object(members), _) => members.values_mut().for_each(|member| visit(member, left, damage)),
        (Value::Bool(bit), _) if here => *bit = !*bit,
        (leaf, Damage::Number(number)) if here => *leaf = (*number).into(),
        (leaf, Damage::Text(text)) if here => *leaf = text.as_str().into(),
        (leaf, Damage::Null) if here => *leaf = Value::Null,
        (Value::String(text), Damage::Longer) if here => text.push_str("5a"),
        (Value::String(text), Damage::Shorter) if here => drop(text.pop()),
        _ => {}
    }
}

#[test]
fn a_machine_of_other_devices_says_which() {
    let dir = tempfile::tempdir().unwrap();
    let mut here = Rig::new(WITHOUT_FIRMWARE, Some(disc(dir.path())));
    here.halt();
    let refused = |options, medium| Rig::new(options, medium).load(here.states()).unwrap_err().to_string();
    assert!(refused(WITH_IOMMU, None).contains("there is no state of io-apic, which this machine has"));
    assert!(refused(WITHOUT_FIRMWARE, None).contains("CD-ROM drive 'cd' has a medium of 32768 bytes at the source"));
    let other = &["--kernel", "k", "--cpus", "4"];
    assert!(refused(other, Some(disc(dir.path()))).contains("processor 2 is here, and not at the source"));
    assert!(here.ram.0.lock().unwrap().len() == RAM);
}
