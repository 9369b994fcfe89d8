//! Every platform device against a guest and a host that make any access at any time, and a peer that sends any saved state.
#![no_main]

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use fuzz::damage::change;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use rig::{ROOM, Rig};
use soc_vmm::bus::{Access, Answer, Deferred, LateAnswer, RequestId, Wake};
use soc_vmm::devices::Persist;

#[allow(dead_code, reason = "shared with the devices' own tests")]
#[path = "../../../../soc-vmm/tests/devices/rig.rs"]
mod rig;

/// Where devices are, so that chance need not find them.
const PLACES: [u16; 16] =
    [0x3f8, 0x3fc, 0x70, 0x60, 0x64, 0x600, 0x604, 0x608, 0x620, 0x628, 0xb2, 0x92, 0xcf9, 0x402, 0xe0, 0x2000];

#[derive(Arbitrary, Debug)]
enum Place {
    Near { which: u8, off: u8 },
    Port(u16),
    Memory(u16),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Which {
    Serial,
    Rtc,
    I8042,
    Acpi,
    Port92,
    ResetControl,
    TestPorts,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Read {
        at: Place,
        len: u8,
        host_tsc: Option<u64>,
    },
    Write {
        at: Place,
        len: u8,
        host_tsc: Option<u64>,
        data: u64,
    },
    /// A byte to a register behind index and data ports, or to a register as it is.
    Set {
        at: Place,
        data: u8,
    },
    /// Time passes, at most 134 ms, with a poll at each deadline.
    Pass(u32),
    /// The thread that polls was away for long.
    Starve(u16),
    /// The SoC's real-time clock is set, in seconds since 1970.
    SetClock(u32),
    Input(&'a [u8]),
    Drain,
    PowerButton,
    Gpe(u8),
    Reset,
    /// Saves a device, changes one number of its state, and restores it.
    Restore {
        which: Which,
        leaf: u8,
        value: i64,
    },
}

fuzz_target!(|steps: Vec<Step<'_>>| {
    let mut rig = Rig::new();
    for step in steps.into_iter().take(200) {
        take(&mut rig, step);
        rig.settle();
        let state = rig.serial.lock().expect("no panic under the lock").save();
        assert!(state.rx.len() <= 16 && state.tx.len() <= 16, "{state:?}");
    }
    // Reset is reset, whatever was before.
    rig.ports.reset();
    rig.memory.reset();
    assert!(rig.lines.all_high().is_empty());
    assert_eq!(rig.ports.deadline(), None);
});

fn take(rig: &mut Rig, step: Step<'_>) {
    match step {
        Step::Read { at, len, host_tsc } => access(rig, &at, len, host_tsc, None),
        Step::Write { at, len, host_tsc, data } => access(rig, &at, len, host_tsc, Some(data)),
        Step::Set { at, data } => access(rig, &at, 1, None, Some(data.into())),
        Step::Pass(ns) => rig.pass(Duration::from_nanos(u64::from(ns) % (1 << 27))),
        Step::Starve(minutes) => rig.clock.pass(Duration::from_secs(u64::from(minutes) * 60)),
        Step::SetClock(seconds) => rig.clock.step_real(Duration::from_secs(seconds.into())),
        Step::Input(bytes) => drop(rig.serial_in.try_write(bytes)),
        Step::Drain => {
            assert!(rig.sent().len() <= ROOM);
            let mut bytes = Vec::new();
            rig.debug_out.try_read(&mut bytes);
            assert!(bytes.len() <= ROOM);
        }
        Step::PowerButton => rig.acpi_handle.press_power_button(),
        Step::Gpe(gpe) => rig.acpi_handle.raise_gpe(gpe),
        Step::Reset => {
            rig.ports.reset();
            rig.memory.reset();
        }
        Step::Restore { which, leaf, value } => match which {
            Which::Serial => restore(&rig.serial, leaf, value),
            Which::Rtc => restore(&rig.rtc, leaf, value),
            Which::I8042 => restore(&rig.i8042, leaf, value),
            Which::Acpi => restore(&rig.acpi, leaf, value),
            Which::Port92 => restore(&rig.port92, leaf, value),
            Which::ResetControl => restore(&rig.reset_control, leaf, value),
            Which::TestPorts => restore(&rig.test_ports, leaf, value),
        },
    }
}

/// One access as the thread that serves IOREQs makes it.
fn access(rig: &mut Rig, at: &Place, len: u8, host_tsc: Option<u64>, data: Option<u64>) {
    let (late, answers) = mpsc::channel::<LateAnswer>();
    let wake: Arc<dyn Wake> = rig.wakes.clone();
    let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &late, &wake);
    let access = Access { vcpu: 0, host_tsc: host_tsc.unwrap_or_else(|| rig.clock.host_tsc()), len };
    let (bus, at) = match *at {
        Place::Near { which, off } => {
            (&mut rig.ports, u64::from(PLACES[usize::from(which) % PLACES.len()]) + u64::from(off % 8))
        }
        Place::Port(port) => (&mut rig.ports, port.into()),
        Place::Memory(offset) => (&mut rig.memory, 0xff00_0000 + u64::from(offset)),
        Place::Any(at) => (&mut rig.memory, at),
    };
    let answer = match data {
        Some(data) => bus.write(at, data, &access, reply),
        None => bus.read(at, &access, reply),
    };
    assert!(!matches!(answer, Answer::Deferred) && answers.try_recv().is_err(), "none of these devices defers");
}

fn restore<D: Persist>(device: &Mutex<D>, leaf: u8, value: i64) {
    let mut device = device.lock().expect("no panic under the lock");
    let mut state = serde_json::to_value(device.save()).expect("a state is JSON");
    let mut left = usize::from(leaf);
    change(&mut state, &mut left, value);
    if let Ok(state) = serde_json::from_value(state) {
        // Refused, or as good as any other.
        let _ = device.restore(&state);
    }
}
