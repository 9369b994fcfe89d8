//! The peer runs payloads as the benchmarks have it run them.

use std::time::Duration;

use bench::contender::{Contender, Job, Qemu};
use kvm_ioctls::Kvm;
use payloads::{Payload, Privilege, hot, interrupts, ports, real, smp, string_io};

const LIMIT: Duration = Duration::from_secs(60);

/// QEMU, if it can run a guest here; otherwise it has been said why not.
fn qemu_or_skip(test: &str) -> Option<Qemu> {
    if let Err(error) = Kvm::new() {
        testbed::skip(test, &format!("/dev/kvm: {error}"));
        return None;
    }
    Qemu::new().inspect_err(|error| testbed::skip(test, &error.to_string())).ok()
}

#[test]
fn a_firmware_image_and_kernels() {
    let Some(mut qemu) = qemu_or_skip("payloads under QEMU") else { return };
    let mut run = |payload: &Payload| {
        qemu.run(&Job { payload, disk: None, net: None, limit: LIMIT })
            .unwrap_or_else(|error| panic!("{}: {error}", payload.name))
    };
    assert!(run(&real::real_mode().unwrap()).contains(real::TEXT));
    assert!(run(&string_io::string_io().unwrap()).contains(&string_io::text()));
    assert!(run(&smp::bring_up(2).unwrap()).contains("vcpu 0000000000000001\n"));
    run(&interrupts::level().unwrap());
    let console = run(&hot::read_port(Privilege::Cpl0, ports::DEBUG_CONSOLE, 100, 2).unwrap());
    assert_eq!(console.lines().filter_map(hot::parse_round).count(), 2);
}

#[test]
fn a_guest_that_does_not_end_is_an_error() {
    let Some(mut qemu) = qemu_or_skip("a payload without end under QEMU") else { return };
    let payload = smp::halted(1).unwrap();
    let error = qemu.run(&Job { payload: &payload, disk: None, net: None, limit: Duration::from_secs(1) }).unwrap_err();
    assert!(error.to_string().contains("no end within 1s"), "{error}");
}
