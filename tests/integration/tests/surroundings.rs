//! What surrounds a VM fails it: streams, disks and limits that are full, files that change under it.

use std::process::Command;
use std::time::Duration;

use integration::hostile::{Running, Trial};
use integration::{kvm, program, test_name};
use payloads::{EXIT_PASS, Payload, Privilege};

/// Longer than anything here may take on a busy machine.
const MOST: Duration = Duration::from_secs(60);
const PASSED: i32 = (EXIT_PASS as i32) << 1 | 1;

/// Ends by itself.
fn short() -> Payload {
    payloads::pio::pio(Privilege::Cpl0).expect("the payload assembles")
}

/// Starts `soc-vmm run` of a payload by a shell command, in which `"$@"` is it.
fn within(trial: &Trial, shell: &str, payload: &Payload, more: &[&str]) -> Running {
    let (option, bytes) = payload.file();
    let image = trial.file("image", &bytes);
    let qmp = format!("unix:{}", trial.at("vm.qmp"));
    let debugcon = format!("file:{}", trial.at("vm.debugcon"));
    let mut command = Command::new("sh");
    command.args(["-c", shell, "sh"]).arg(program("soc-vmm")).args(["run", option, &image, "--memory", "64M"]);
    command.args(["--serial", "null", "--debug-exit", "--qmp", &qmp, "--name", &trial.name("vm")]);
    command.args(["--debugcon", &debugcon]).args(more);
    trial.start(&mut command)
}

#[test]
fn a_standard_error_that_takes_nothing_ends_no_vm() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    for nowhere in ["2>/dev/full", "2>&-"] {
        let ended = within(&trial, &format!("exec \"$@\" {nowhere}"), &short(), &["--log", "trace"]).wait(MOST);
        assert_eq!(ended.status.code(), Some(PASSED), "{nowhere}");
        trial.leaves_nothing(nowhere);
    }
}
