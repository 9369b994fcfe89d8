//! What surrounds a VM fails it: streams, disks and limits that are full, files that change under it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use integration::hostile::{Running, Trial, one_line, wait_until};
use integration::{kvm, program, test_name};
use nix::sys::signal::Signal;
use payloads::{EXIT_PASS, Payload, Privilege};

/// Longer than anything here may take on a busy machine.
const MOST: Duration = Duration::from_secs(60);
const PASSED: i32 = (EXIT_PASS as i32) << 1 | 1;

/// Ends by itself.
fn short() -> Payload {
    payloads::pio::pio(Privilege::Cpl0).expect("the payload assembles")
}

/// Runs until it is ended.
fn endless() -> Payload {
    payloads::counter::counter(Privilege::Cpl0, payloads::counter::Each::Nothing).expect("the payload assembles")
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

/// A place for control sockets of a VM's own, on a file system of `size`; in the mount namespace of that VM alone.
fn small_run_directory(size: &str, filled: &str) -> String {
    format!(
        "mkdir -p /run/outboard && mount -t tmpfs -o size={size},mode=700 none /run/outboard || exit 77
         dd if=/dev/zero of=/run/outboard/filled bs=1k count={filled} 2>/dev/null; exec \"$@\""
    )
}

#[test]
fn a_full_run_directory_is_told_in_one_line() {
    if !kvm(&test_name()) {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        return testbed::skip(&test_name(), "only root can mount");
    }
    let trial = Trial::default();
    for (vcpus, filled) in [("1", "64"), ("200", "56")] {
        let shell = format!("exec unshare -m sh -c '{}' sh \"$@\"", small_run_directory("64k", filled));
        let ended = within(&trial, &shell, &short(), &["--cpus", vcpus]).wait(MOST);
        one_line("a full run directory", &ended, 4, &["state file", "/run/outboard", "No space left"]);
    }
}

#[test]
fn a_state_file_that_is_truncated_ends_its_vm_in_words() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let mut vm = trial.vm("vm", &endless(), &[]);
    trial.becomes("vm", "running");
    let run = if nix::unistd::geteuid().is_root() { "/run/outboard".into() } else { trial.at("run/outboard") };
    let state = File::options().write(true).open(format!("{run}/{}.state/lanes", trial.name("vm"))).unwrap();
    state.set_len(0).unwrap();
    one_line("a truncated state file", &vm.wait(MOST), 6, &["the VM is lost", "state file was truncated"]);
    trial.leaves_nothing("a truncated state file");
}

#[test]
fn an_image_that_is_written_to_costs_no_vm_and_one_that_shrinks_is_told() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let mut vm = trial.vm("vm", &endless(), &[]);
    trial.becomes("vm", "running");
    let reset = || trial.soc_vmm(&["reset", "--qmp", &trial.at("vm.qmp")]).wait(MOST);
    let image = File::options().write(true).open(trial.path("vm.image")).unwrap();
    let whole = std::fs::read(trial.path("vm.image")).unwrap();
    image.set_modified(std::time::SystemTime::now()).unwrap();
    assert_eq!(reset().status.code(), Some(0), "a touched image");
    image.set_len(100).unwrap();
    for _ in 0..2 {
        let words = [&trial.at("vm.image") as &str, "shorter than when it was opened"];
        one_line("a reset with a damaged image", &reset(), 6, &words);
        // Nothing has happened to it.
        assert_eq!(trial.status("vm").unwrap()["status"], "running");
        let before = trial.exits("vm");
        wait_until("the guest goes on", MOST, || trial.exits("vm") > before);
    }
    image.write_all_at(&whole, 0).unwrap();
    assert_eq!(reset().status.code(), Some(0), "a restored image");
    trial.becomes("vm", "running");
    vm.signal(Signal::SIGTERM);
    assert_eq!(vm.wait(MOST).status.code(), Some(0));
}

#[test]
fn a_vm_that_is_paused_while_it_is_built_does_not_run() {
    if !kvm(&test_name()) {
        return;
    }
    for _ in 0..5 {
        let trial = Trial::default();
        let mut vm = trial.vm("vm", &endless(), &[]);
        let command = |verb| trial.soc_vmm(&[verb, "--qmp", &trial.at("vm.qmp")]).wait(MOST).status.code();
        wait_until("its monitor listens", MOST, || command("pause") == Some(0));
        wait_until("it is built", MOST, || trial.status("vm").is_some());
        std::thread::sleep(Duration::from_millis(200));
        let status = trial.status("vm").unwrap();
        assert!(status["status"] == "prelaunch" || status["status"] == "paused", "{status}");
        assert_eq!(trial.exits("vm"), status["counters"]["exits.pio"].as_u64().unwrap());
        assert_eq!(command("resume"), Some(0));
        trial.becomes("vm", "running");
        vm.signal(Signal::SIGTERM);
        assert_eq!(vm.wait(MOST).status.code(), Some(0));
    }
}
