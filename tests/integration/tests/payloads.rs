//! Payloads through the whole path on this machine: guest, KVM, shim, lanes, soc-vmm's devices, and back.

use integration::{Vm, kvm};
use payloads::{PASSED, Payload, Privilege};

/// Runs a payload to its end, which must be its own `pass`.
fn passes(payload: &Payload) {
    passes_with(payload, &[]);
}

/// The same on a machine with more than that.
fn passes_with(payload: &Payload, options: &[&str]) {
    if !kvm(payload.name) {
        return;
    }
    let ended = Vm::payload(payload, options).wait();
    assert_eq!(ended.status.code(), Some(PASSED), "{}: {}\n{}", payload.name, ended.debugcon, ended.stderr);
    assert!(ended.debugcon.ends_with("pass\n"), "{}: {}", payload.name, ended.debugcon);
    assert_eq!(ended.stderr, "", "{} made soc-vmm speak", payload.name);
}

#[test]
fn ports_of_every_width() {
    passes(&payloads::pio::pio(Privilege::Cpl0).unwrap());
    passes(&payloads::pio::pio(Privilege::Cpl3).unwrap());
}

#[test]
fn memory_accesses_of_every_length_across_page_ends() {
    passes(&payloads::mmio::mmio().unwrap());
}

#[test]
fn strings_in_and_out() {
    passes(&payloads::string_io::string_io().unwrap());
}

#[test]
fn real_mode_firmware() {
    passes(&payloads::real::real_mode().unwrap());
}

#[test]
fn a_level_triggered_line() {
    passes(&payloads::interrupts::level().unwrap());
}

#[test]
fn a_level_triggered_line_of_the_machines_own_io_apic() {
    passes_with(&payloads::interrupts::level().unwrap(), &["--iommu", "intel"]);
    passes_with(&payloads::smp::ipi(3).unwrap(), &["--iommu", "intel", "--test-device", "edu"]);
}

#[test]
fn processors_are_started_and_interrupt_each_other() {
    for vcpus in [2, 8] {
        passes(&payloads::smp::bring_up(vcpus).unwrap());
        passes(&payloads::smp::ipi(vcpus).unwrap());
    }
}
