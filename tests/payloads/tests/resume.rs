//! A payload that is stopped anywhere goes on exactly in a new VM, on this machine's /dev/kvm.

mod run;

use std::time::Duration;

use bench::bare::{Driver, End, Machine, Options, TestDevice};
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xsave,
};
use kvm_ioctls::VmFd;
use payloads::counter::{self, Each, Model};
use payloads::{EXIT_PASS, Privilege};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Asks for a report at every read, and for the end after some.
struct Reports(u32);

impl Driver for Reports {
    fn command(&mut self, _vcpu: u8, _vm: &VmFd) -> u32 {
        match self.0.checked_sub(1) {
            Some(left) => {
                self.0 = left;
                counter::REPORT
            }
            None => counter::STOP,
        }
    }
}

/// All that makes the machine go on, in KVM's own form.
struct State {
    regs: kvm_regs,
    sregs: kvm_sregs,
    debug: kvm_debugregs,
    xsave: kvm_xsave,
    msrs: Msrs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    memory: Vec<u8>,
    test_device: TestDevice,
}

impl State {
    fn read(machine: &mut Machine) -> Self {
        let mut memory = vec![0; machine.memory().last_addr().0 as usize + 1];
        machine.memory().read_slice(&mut memory, GuestAddress(0)).unwrap();
        let test_device = machine.test_device().clone();
        let vcpu = &machine.vcpus()[0];
        let mut msrs = Msrs::from_entries(
            &[0xc000_0080, 0xc000_0082, 0xc000_0102].map(|index| kvm_msr_entry { index, ..Default::default() }),
        )
        .unwrap();
        assert_eq!(vcpu.get_msrs(&mut msrs).unwrap(), 3);
        State {
            regs: vcpu.get_regs().unwrap(),
            sregs: vcpu.get_sregs().unwrap(),
            debug: vcpu.get_debug_regs().unwrap(),
            xsave: vcpu.get_xsave().unwrap(),
            msrs,
            lapic: vcpu.get_lapic().unwrap(),
            events: vcpu.get_vcpu_events().unwrap(),
            mp_state: vcpu.get_mp_state().unwrap(),
            memory,
            test_device,
        }
    }

    #[allow(unsafe_code)] // KVM_SET_XSAVE
    fn write(&self, machine: &mut Machine) {
        machine.memory().write_slice(&self.memory, GuestAddress(0)).unwrap();
        *machine.test_device() = self.test_device.clone();
        let vcpu = &machine.vcpus()[0];
        vcpu.set_sregs(&self.sregs).unwrap();
        vcpu.set_regs(&self.regs).unwrap();
        // SAFETY: no dynamically enabled feature: 4096 bytes are all of the state.
        unsafe { vcpu.set_xsave(&self.xsave) }.unwrap();
        assert_eq!(vcpu.set_msrs(&self.msrs).unwrap(), 3);
        vcpu.set_debug_regs(&self.debug).unwrap();
        vcpu.set_lapic(&self.lapic).unwrap();
        vcpu.set_vcpu_events(&self.events).unwrap();
        vcpu.set_mp_state(self.mp_state).unwrap();
    }
}

fn check(privilege: Privilege, each: Each) {
    let payload = counter::counter(privilege, each).unwrap();
    let mut console = String::new();
    let mut machine = Machine::new(&payload, Options::default()).unwrap();
    for stop in 0..4 {
        // Long enough to get somewhere, and the end is at no particular place.
        let outcome = machine.run(Reports(u32::MAX), Duration::from_millis(60 + 7 * stop)).unwrap();
        assert_eq!(outcome.ends, [End::Stopped], "{}\n{}", payload.name, outcome.console);
        console += &outcome.console;
        let state = State::read(&mut machine);
        assert_eq!(state.mp_state.mp_state, KVM_MP_STATE_RUNNABLE);
        machine = Machine::new(&payload, Options::default()).unwrap();
        state.write(&mut machine);
    }
    // The stops may come before the first report on a busy machine; the last run goes on until there were enough.
    let outcome = machine.run(Reports(3), run::LIMIT).unwrap();
    assert_eq!(outcome.exit_code, Some(EXIT_PASS), "{}: {:?}\n{}", payload.name, outcome.ends, outcome.console);
    console += &outcome.console;

    let mut model = Model::new(privilege, each);
    let mut reports = 0;
    for line in console.lines().filter(|line| *line != "pass") {
        let (step, digest) = counter::parse_report(line).unwrap();
        reports += 1;
        assert_eq!(step, reports * u64::from(counter::STRIDE), "{}", payload.name);
        assert_eq!(digest, model.digest_at(step), "{}: step {step}", payload.name);
    }
    assert!(reports > 2, "{}: {reports}", payload.name);
}

#[test]
fn goes_on_at_cpl0() {
    if !run::kvm_or_skip() {
        return;
    }
    check(Privilege::Cpl0, Each::Nothing);
}

#[test]
fn goes_on_at_cpl3() {
    if !run::kvm_or_skip() {
        return;
    }
    check(Privilege::Cpl3, Each::Nothing);
}

#[test]
fn goes_on_from_inside_a_page_split_access() {
    if !run::kvm_or_skip() {
        return;
    }
    check(Privilege::Cpl0, Each::PageSplit);
    check(Privilege::Cpl3, Each::PageSplit);
}

#[test]
fn goes_on_from_inside_a_string() {
    if !run::kvm_or_skip() {
        return;
    }
    check(Privilege::Cpl0, Each::String);
    check(Privilege::Cpl3, Each::String);
}
