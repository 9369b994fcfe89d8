//! Runs a payload to its good end.
#![allow(dead_code, unreachable_pub)] // each test file uses its part

use std::time::Duration;

use bench::bare::{Driver, Machine, Options, Outcome, Silent};
use kvm_ioctls::Kvm;
use payloads::{EXIT_PASS, Payload};

/// Longer than any payload takes on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Whether there is a KVM to run on. If not, it has said so and the test is to return.
pub fn kvm_or_skip() -> bool {
    let Err(error) = Kvm::new() else { return true };
    // The thread of a test has its name.
    testbed::skip(std::thread::current().name().unwrap_or("a payload"), &format!("/dev/kvm: {error}"));
    false
}

/// Runs a payload that asks for nothing.
pub fn run(payload: &Payload, options: Options) -> Outcome {
    drive(payload, options, Silent)
}

/// Runs a payload that `driver` answers.
pub fn drive(payload: &Payload, options: Options, driver: impl Driver + 'static) -> Outcome {
    let mut machine = Machine::new(payload, options).unwrap();
    let outcome = machine.run(driver, LIMIT).unwrap();
    let console = outcome.console.as_str();
    if outcome.exit_code != Some(EXIT_PASS) {
        let at: Vec<_> = machine.vcpus().iter().map(|vcpu| format!("{:x?}", vcpu.get_regs().unwrap())).collect();
        panic!("{}: {:?} with {at:#?}\n{console}", payload.name, outcome.ends);
    }
    outcome
}
