//! Hyper-V's connections, and the test device that opens them.

mod rig;

use proptest::prelude::*;
use rig::{RAM, ROUTES, Rig, VCPUS};
use soc_vmm::devices::{HypervTestdevState, Persist};
use soc_vmm::hyperv::Sint;
use soc_vmm::persist::{Moves, Saved, States};

/// Where vCPU 1 has its pages, and where a hypercall finds its parameters.
const MESSAGES: u64 = 0x5000;
const EVENTS: u64 = 0x6000;
const INPUT: u64 = 0x7000;
/// The SINT of the tests, of vCPU 1.
const SINT: Sint = Sint { vcpu: 1, number: 2 };
const SLOT: usize = MESSAGES as usize + 2 * 256;
const FLAGS: usize = EVENTS as usize + 2 * 256;
/// Connections.
const MESSAGE: u8 = 0x10;
const EVENT: u8 = 0x2b;

/// Commands of the test device.
const MAKE_ROUTE: u8 = 1;
const DROP_ROUTE: u8 = 2;
const RAISE: u8 = 3;
const OPEN_MESSAGES: u8 = 4;
const CLOSE_MESSAGES: u8 = 5;
const OPEN_EVENTS: u8 = 6;

/// Hypercalls and their results.
const POST: u64 = 0x5c;
const SIGNAL: u64 = 0x5d;
const FAST: u64 = 1 << 16;
const DONE: u64 = 0;
const NO_BUFFERS: u64 = 19;

/// Both connections are open, vCPU 1 has both pages.
fn ready() -> Rig {
    let mut rig = Rig::new();
    rig.command(OPEN_MESSAGES, 1, SINT.number, MESSAGE);
    rig.command(OPEN_EVENTS, 1, SINT.number, EVENT);
    rig.hyperv.changed(1, [1, EVENTS | 1, MESSAGES | 1]);
    rig
}

/// The parameters of a message of a type, its payload of `len` bytes beginning with `first`.
fn input(rig: &Rig, connection: u32, kind: u32, len: u32, first: u8) {
    let words = [connection, 0, kind, len].map(u32::to_le_bytes).concat();
    rig.ram.guest(|ram| {
        ram[INPUT as usize..][..16].copy_from_slice(&words);
        ram[INPUT as usize + 16] = first;
    });
}

fn post(rig: &Rig, first: u8) -> u64 {
    input(rig, MESSAGE.into(), 0x77, 8, first);
    rig.hyperv.hypercall(POST, [INPUT, 0])
}

fn signal(rig: &Rig) -> u64 {
    rig.hyperv.hypercall(SIGNAL | FAST, [EVENT.into(), 0])
}

/// Type, bytes, flags, port and first byte of payload of the message in the slot.
fn slot(ram: &[u8]) -> (u8, u8, u8, u8, u8) {
    (ram[SLOT], ram[SLOT + 4], ram[SLOT + 5], ram[SLOT + 8], ram[SLOT + 16])
}

/// The guest empties the slot; whether it must write EOM.
fn empty(ram: &mut [u8]) -> bool {
    ram[SLOT..SLOT + 4].fill(0);
    ram[SLOT + 5] & 1 != 0
}

fn eom(rig: &Rig) {
    rig.sints().ended.push(SINT);
    rig.hyperv.poll();
}

fn raised(rig: &Rig) -> usize {
    let raised = std::mem::take(&mut rig.sints().raised);
    assert!(raised.iter().all(|sint| *sint == SINT));
    raised.len()
}

#[test]
fn a_message_stands_in_its_slot_when_the_interrupt_comes() {
    let rig = ready();
    assert_eq!(post(&rig, 9), DONE);
    assert_eq!((rig.ram.guest(|ram| slot(ram)), raised(&rig)), ((0x77, 8, 0, MESSAGE, 9), 1));
}

#[test]
fn a_second_message_waits_for_the_first_and_a_third_is_refused() {
    let rig = ready();
    assert_eq!(post(&rig, 1), DONE);
    assert_eq!(post(&rig, 2), DONE);
    assert_eq!((rig.ram.guest(|ram| slot(ram)), raised(&rig)), ((0x77, 8, 1, MESSAGE, 1), 1));
    assert_eq!(post(&rig, 3), NO_BUFFERS);
    eom(&rig);
    assert_eq!(raised(&rig), 0, "the slot is full still");
    assert!(rig.ram.guest(empty));
    eom(&rig);
    assert_eq!((rig.ram.guest(|ram| slot(ram)), raised(&rig)), ((0x77, 8, 0, MESSAGE, 2), 1));
    assert_eq!(post(&rig, 4), DONE);
}

#[test]
fn no_message_is_lost_whenever_the_guest_empties_the_slot() {
    for moment in 0..12 {
        let rig = ready();
        post(&rig, 1);
        let (told, tells) = std::sync::mpsc::channel();
        // The parameters of the hypercall are the first access.
        rig.ram.before(moment, move |ram| told.send(empty(ram)).unwrap());
        assert_eq!(post(&rig, 2), DONE);
        match tells.try_recv() {
            Ok(true) => eom(&rig),
            Ok(false) => {}
            // Not yet: later it finds the flag.
            Err(_) => {
                assert!(rig.ram.guest(empty), "before access {moment}");
                eom(&rig);
            }
        }
        assert_eq!((rig.ram.guest(|ram| slot(ram)).4, raised(&rig)), (2, 2), "before access {moment}");
    }
}

#[test]
fn a_message_waits_for_a_page() {
    let rig = ready();
    for off in [[0, EVENTS | 1, MESSAGES | 1], [1, EVENTS | 1, MESSAGES], [1, EVENTS | 1, RAM | 1]] {
        rig.hyperv.changed(1, off);
        post(&rig, 5);
        assert_eq!(raised(&rig), 0);
        rig.hyperv.changed(0, [1, EVENTS | 1, MESSAGES | 1]);
        assert_eq!(raised(&rig), 0, "another vCPU's");
        rig.hyperv.changed(1, [1, EVENTS | 1, MESSAGES | 1]);
        assert_eq!((rig.ram.guest(empty), raised(&rig)), (false, 1));
    }
}

#[test]
fn an_event_raises_its_interrupt_once_until_its_flag_is_cleared() {
    let rig = ready();
    let flag = |ram: &mut [u8]| ram[FLAGS..FLAGS + 256].to_vec();
    for _ in 0..2 {
        assert_eq!((signal(&rig), raised(&rig)), (DONE, 1));
        assert_eq!((signal(&rig), raised(&rig)), (DONE, 0));
        let mut expected = vec![0; 256];
        expected[usize::from(EVENT / 8)] = 1 << (EVENT % 8);
        assert_eq!(rig.ram.guest(flag), expected);
        rig.ram.guest(|ram| ram[FLAGS..FLAGS + 256].fill(0));
    }
    rig.hyperv.changed(1, [1, EVENTS, MESSAGES | 1]);
    assert_eq!((signal(&rig), raised(&rig)), (DONE, 0));
    rig.ram.guest(|ram| ram[INPUT as usize..][..8].copy_from_slice(&u64::from(EVENT).to_le_bytes()));
    rig.hyperv.changed(1, [1, EVENTS | 1, MESSAGES | 1]);
    assert_eq!((rig.hyperv.hypercall(SIGNAL, [INPUT, 0]), raised(&rig)), (DONE, 1));
}

#[test]
fn hypercalls_that_make_no_sense_say_why() {
    let rig = ready();
    let call = |input, parameter| rig.hyperv.hypercall(input, [parameter, 0]);
    assert_eq!(call(0x5b, 0), 2);
    assert_eq!(call(POST | FAST, INPUT), 3);
    assert_eq!(call(POST, INPUT + 4), 4);
    assert_eq!(call(POST, INPUT + 4096 - 8), 4, "across a page");
    assert_eq!(call(POST, RAM), 3);
    assert_eq!(call(POST, u64::MAX - 4095), 3);
    for (connection, kind, len, result) in [
        (u32::from(MESSAGE), 0x77, 241, 3),
        (MESSAGE.into(), 0x77, u32::MAX, 3),
        (MESSAGE.into(), 0, 8, 5),
        (MESSAGE.into(), 1 << 31, 8, 5),
        (EVENT.into(), 0x77, 8, 18),
        (0x11, 0x77, 8, 18),
        (MESSAGE.into(), 0x77, 240, DONE),
    ] {
        input(&rig, connection, kind, len, 0);
        assert_eq!(call(POST, INPUT), result, "{connection:#x} {kind:#x} {len}");
    }
    assert_eq!(call(SIGNAL | FAST, MESSAGE.into()), 18);
    assert_eq!(call(SIGNAL | FAST, 1 << 24), 3);
    assert_eq!(call(SIGNAL | FAST, 1 << 48 | u64::from(EVENT)), 3);
    assert_eq!(call(SIGNAL | FAST, 1 << 32 | u64::from(EVENT)), 17);
    assert_eq!(call(SIGNAL, INPUT + 1), 4);
}

#[test]
fn a_reset_leaves_nothing_open() {
    let mut rig = ready();
    rig.command(MAKE_ROUTE, 0, 5, 0);
    post(&rig, 1);
    post(&rig, 2);
    rig.bus.reset();
    rig.hyperv.reset();
    assert!(rig.sints().routes.is_empty());
    raised(&rig);
    rig.ram.guest(empty);
    rig.command(OPEN_MESSAGES, 1, SINT.number, MESSAGE);
    rig.hyperv.changed(1, [1, EVENTS | 1, MESSAGES | 1]);
    assert_eq!(raised(&rig), 0, "what waited is gone");
    assert_eq!((post(&rig, 3), raised(&rig)), (DONE, 1));
}

/// All of a guest that stands still.
fn states(rig: &mut Rig) -> States {
    let mut states = States::default();
    rig.bus.save_into(&mut states);
    rig.hyperv.save_into("", &mut states);
    states
}

#[test]
fn a_guest_goes_on_elsewhere_and_what_waited_is_sent_there() {
    let mut rig = ready();
    rig.command(MAKE_ROUTE, 0, 5, 0);
    post(&rig, 1);
    post(&rig, 2);
    rig.bus.halt();
    rig.hyperv.halt();
    assert!(rig.bus.is_halted() && rig.hyperv.is_halted());
    // The guest has emptied its slot; what it told the host of that comes too late.
    assert!(rig.ram.guest(empty));
    eom(&rig);
    let saved = states(&mut rig);

    let mut there = Rig::new();
    rig.ram.guest(|from| there.ram.guest(|to| to.copy_from_slice(from)));
    let mut left = saved.clone();
    there.bus.load(&mut left).unwrap();
    there.hyperv.load("", &mut left).unwrap();
    left.end().unwrap();
    assert_eq!((states(&mut there), raised(&there)), (saved, 0));
    there.bus.go_on();
    there.hyperv.go_on();
    assert_eq!((there.ram.guest(|ram| slot(ram)), raised(&there)), ((0x77, 8, 0, MESSAGE, 2), 1));
    assert_eq!((signal(&there), raised(&there)), (DONE, 1));
    assert_eq!(there.sints().routes.keys().map(|sint| sint.number).collect::<Vec<_>>(), [5, SINT.number]);
    // Or here, if nothing came of it.
    let _ = raised(&rig);
    rig.hyperv.go_on();
    assert_eq!((rig.ram.guest(|ram| slot(ram)), raised(&rig)), ((0x77, 8, 0, MESSAGE, 2), 1));
}

#[test]
fn pages_that_can_t_be_are_refused() {
    let mut rig = ready();
    for (pages, sound) in [
        ("[[null,null],[20480,24576]]", true),
        ("[[null,null]]", false),
        ("[[null,null],[20481,null]]", false),
        ("[[null,18446744073709551615],[null,null]]", false),
        ("[[null,18446744073709547520],[null,null]]", true),
        ("[[null],[null]]", false),
    ] {
        let mut states = States::default();
        let state = format!(r#"{{"pages":{pages}}}"#).into_bytes();
        states.add("hyperv", Saved { version: 1, state }).unwrap();
        assert_eq!(rig.hyperv.load("", &mut states).is_ok(), sound, "{pages}");
        rig.hyperv.go_on();
        post(&rig, 1);
        signal(&rig);
    }
}

#[test]
fn a_state_that_can_t_be_is_refused_and_changes_nothing() {
    let rig = ready();
    post(&rig, 1);
    post(&rig, 2);
    let good = rig.device().save();
    let spoils: [fn(&mut HypervTestdevState); 8] = [
        |state| state.routes.push((VCPUS, 0)),
        |state| state.routes.push((0, 16)),
        |state| state.ports[0].sint.1 = 16,
        |state| state.ports[1].connection = state.ports[0].connection,
        |state| state.ports[0].messages = false,
        |state| state.ports[0].waiting.as_mut().unwrap()[4] = 241,
        |state| state.ports[0].waiting.as_mut().unwrap()[..4].fill(0),
        |state| state.ports[0].waiting.as_mut().unwrap().truncate(255),
    ];
    for spoil in spoils {
        let mut bad = good.clone();
        spoil(&mut bad);
        assert!(rig.device().restore(&bad).is_err(), "{bad:?}");
        assert_eq!(rig.device().save(), good);
    }
}

#[test]
fn a_route_is_there_when_the_write_is_complete() {
    let mut rig = Rig::new();
    let command = |command: u8| u64::from(command) << 16 | 1 << 8 | 2;
    assert!(!rig.write(0, 4, command(MAKE_ROUTE)));
    assert_eq!(rig.settle(), 1);
    assert!(rig.write(0, 4, command(RAISE)));
    assert_eq!(raised(&rig), 1);
    assert!(rig.write(0, 4, command(DROP_ROUTE)));
    assert!(rig.sints().routes.is_empty());
    assert!(rig.write(0, 4, command(RAISE)));
    assert_eq!(raised(&rig), 0);
    for (offset, len, data) in [(0, 2, command(MAKE_ROUTE)), (2, 2, 1), (0, 4, 0), (0, 4, 8 << 16), (0, 1, 0)] {
        assert!(rig.write(offset, len, data));
    }
    assert!(rig.sints().routes.is_empty());
}

#[test]
fn a_sint_has_one_route_and_the_host_so_many() {
    let mut rig = ready();
    rig.command(MAKE_ROUTE, 1, SINT.number, 0);
    assert_eq!(rig.sints().routes.get(&SINT), Some(&1), "three users");
    rig.command(CLOSE_MESSAGES, 0, 0, MESSAGE);
    rig.command(CLOSE_MESSAGES, 0, 0, EVENT);
    rig.command(DROP_ROUTE, 1, SINT.number, 0);
    assert_eq!(rig.sints().routes.get(&SINT), Some(&1), "the event's");
    for vcpu in 0..4 {
        for sint in 0..32 {
            rig.command(MAKE_ROUTE, vcpu, sint, 0);
        }
    }
    let sints = rig.sints();
    assert_eq!(sints.routes.len(), ROUTES);
    assert!(sints.routes.keys().all(|sint| sint.vcpu < VCPUS && sint.number < 16));
}

/// One thing that guest or host may do.
#[derive(Clone, Debug)]
enum Step {
    Command(u32),
    Changed(u16, [u64; 3]),
    Call(u64, u64),
    Input(u32, u32, u32),
    End(u16, u8),
    Empty,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let page = || prop_oneof![Just(0), Just(MESSAGES | 1), Just(EVENTS | 1), Just(RAM - 255), any::<u64>()];
    let connection = || prop_oneof![0u64..4, any::<u64>()];
    let command = (0u8..9, 0u8..3, 0u8..18, 0u8..4);
    let command = command.prop_map(|(command, vcpu, sint, connection)| [sint, vcpu, command, connection]);
    prop_oneof![
        4 => command.prop_map(|bytes| Step::Command(u32::from_le_bytes(bytes))),
        1 => any::<u32>().prop_map(Step::Command),
        2 => (0u16..3, [0u64..2, 0u64..2, 0u64..2], page(), page())
            .prop_map(|(vcpu, [control, ..], events, messages)| Step::Changed(vcpu, [control, events, messages])),
        3 => (connection()).prop_map(|connection| Step::Call(SIGNAL | FAST, connection)),
        3 => prop_oneof![Just(INPUT), any::<u64>()].prop_map(|gpa| Step::Call(POST, gpa)),
        1 => (any::<u64>(), any::<u64>()).prop_map(|(input, parameter)| Step::Call(input, parameter)),
        3 => (0u32..4, any::<u32>(), 0u32..300).prop_map(|(connection, kind, len)| Step::Input(connection, kind, len)),
        2 => (0u16..3, 0u8..18).prop_map(|(vcpu, number)| Step::End(vcpu, number)),
        1 => Just(Step::Empty),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn a_guest_may_do_anything(steps in prop::collection::vec(step(), 0..200)) {
        let mut rig = Rig::new();
        for step in steps {
            match step {
                Step::Command(command) => {
                    rig.write(0, 4, command.into());
                    rig.settle();
                }
                Step::Changed(vcpu, registers) => rig.hyperv.changed(vcpu, registers),
                Step::Call(call, parameter) => {
                    prop_assert!(matches!(rig.hyperv.hypercall(call, [parameter, 0]), 0 | 2..=5 | 17..=19));
                }
                Step::Input(connection, kind, len) => input(&rig, connection, kind, len, 0),
                Step::End(vcpu, number) => {
                    rig.sints().ended.push(Sint { vcpu, number });
                    rig.hyperv.poll();
                }
                Step::Empty => rig.ram.guest(|ram| ram[MESSAGES as usize..][..8192].fill(0)),
                Step::Reset => {
                    rig.bus.reset();
                    rig.hyperv.reset();
                    prop_assert!(rig.sints().routes.is_empty());
                }
            }
            let sints = rig.sints();
            prop_assert!(sints.routes.len() <= ROUTES && sints.routes.values().all(|count| *count == 1));
            prop_assert!(sints.raised.iter().all(|sint| sint.vcpu < VCPUS && sint.number < 16));
        }
    }
}
