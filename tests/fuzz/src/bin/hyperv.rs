//! Hyper-V's connections against a guest that makes any hypercall, moves its pages at any moment, and opens what the test device opens.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use rig::{RAM, ROUTES, Rig, VCPUS};
use soc_vmm::hyperv::Sint;

#[allow(dead_code, reason = "shared with the connections' own tests")]
#[path = "../../../../soc-vmm/tests/hyperv/rig.rs"]
mod rig;

/// Where a hypercall finds its parameters, if the guest does it right.
const INPUT: usize = 0x7000;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A command to the test device that may be right.
    Command {
        command: u8,
        vcpu: u8,
        sint: u8,
        connection: u8,
    },
    /// Any write to it.
    Write {
        offset: u8,
        len: u8,
        data: u64,
    },
    /// The pages of a vCPU; low numbers are pages of RAM.
    Pages {
        vcpu: u8,
        control: u64,
        events: u64,
        messages: u64,
    },
    Post {
        connection: u8,
        kind: u32,
        len: u8,
        moment: Option<u8>,
    },
    Signal(u8),
    Call {
        input: u64,
        parameter: u64,
    },
    Ended {
        vcpu: u8,
        sint: u8,
    },
    /// The guest empties its pages.
    Empty,
    Settle,
    Reset,
}

/// Pages that a guest may choose.
fn page(word: u64) -> u64 {
    if word < 32 { (word >> 1 & 7) << 12 | word & 1 } else { word }
}

fn empty(ram: &mut [u8]) {
    ram[..INPUT].fill(0);
}

fuzz_target!(|steps: Vec<Step>| {
    let mut rig = Rig::new();
    for step in steps.into_iter().take(300) {
        take(&mut rig, step);
        rig.hyperv.poll();
        let sints = rig.sints();
        assert!(sints.routes.len() <= ROUTES && sints.routes.values().all(|count| *count == 1));
        assert!(sints.routes.keys().chain(&sints.raised).all(|sint| sint.vcpu < VCPUS && sint.number < 16));
    }
    rig.settle();
    rig.bus.reset();
    rig.hyperv.reset();
    assert!(rig.sints().routes.is_empty());
});

fn take(rig: &mut Rig, step: Step) {
    match step {
        Step::Command { command, vcpu, sint, connection } => {
            rig.command(command % 9, vcpu % 3, sint % 18, connection % 8);
        }
        Step::Write { offset, len, data } => drop(rig.write(u64::from(offset % 4), 1 << (len % 3), data)),
        Step::Pages { vcpu, control, events, messages } => {
            rig.hyperv.changed((vcpu % 3).into(), [control, page(events), page(messages)]);
        }
        Step::Post { connection, kind, len, moment } => {
            let words = [u32::from(connection % 8), 0, kind, len.into()].map(u32::to_le_bytes).concat();
            rig.ram.guest(|ram| ram[INPUT..INPUT + 16].copy_from_slice(&words));
            if let Some(moment) = moment {
                rig.ram.before((moment % 8).into(), empty);
            }
            call(rig, 0x5c, INPUT as u64);
        }
        Step::Signal(connection) => call(rig, 1 << 16 | 0x5d, (connection % 8).into()),
        Step::Call { input, parameter } => call(rig, input, if parameter < RAM { parameter & !7 } else { parameter }),
        Step::Ended { vcpu, sint } => rig.sints().ended.push(Sint { vcpu: vcpu.into(), number: sint }),
        Step::Empty => rig.ram.guest(empty),
        Step::Settle => drop(rig.settle()),
        Step::Reset => {
            rig.bus.reset();
            rig.hyperv.reset();
        }
    }
}

fn call(rig: &Rig, input: u64, parameter: u64) {
    assert!(matches!(rig.hyperv.hypercall(input, [parameter, 0]), 0 | 2..=5 | 17..=19));
}
