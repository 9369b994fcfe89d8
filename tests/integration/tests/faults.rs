//! A side that dies or stands still: what the other one does, says, and leaves behind.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use integration::hostile::{Running, Trial, free_of_trouble, one_line, wait_until};
use integration::{kvm, test_name};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use payloads::counter::{Each, counter};
use payloads::{PASSED, Payload, Privilege};

/// Longer than anything here may take on a busy machine, but what is meant to take long.
const MOST: Duration = Duration::from_secs(60);
/// What is to happen at once, or within seconds: how long that takes is the machine's.
const SOON: Duration = Duration::from_secs(60);
/// Longer than a heartbeat may be silent (10 s).
const SILENCE: Duration = Duration::from_secs(13);

/// Asks the SoC for a command over and over, for ever.
fn endless() -> Payload {
    counter(Privilege::Cpl0, Each::Nothing).expect("the payload assembles")
}

/// Ends by itself.
fn short() -> Payload {
    payloads::pio::pio(Privilege::Cpl0).expect("the payload assembles")
}

/// A trial with a shim that listens on `function`, and the option that names it.
fn listening(lease: &str) -> (Trial, Running, String) {
    let trial = Trial::default();
    let shim = trial.listening_shim("function", &["--lease", lease]);
    let function = format!("unix:{}", trial.at("function"));
    (trial, shim, function)
}

/// Subscribes to a VM's events.
fn monitor(trial: &Trial, name: &str) -> BufReader<UnixStream> {
    let mut stream = UnixStream::connect(trial.path(&format!("{name}.qmp"))).expect("the monitor listens");
    stream.set_read_timeout(Some(MOST)).expect("a time limit");
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").expect("a command");
    let mut monitor = BufReader::new(stream);
    // The greeting and the reply: from then on it hears of everything.
    for _ in 0..2 {
        monitor.read_line(&mut String::new()).expect("a line");
    }
    monitor
}

/// Whether the VM's last words were that its host failed.
fn told_of_a_host_error(monitor: BufReader<UnixStream>) -> bool {
    let lines: Vec<_> = monitor.lines().map_while(Result::ok).collect();
    lines.iter().any(|line| line.contains("SHUTDOWN") && line.contains("host-error"))
}

#[test]
fn a_killed_shim_is_reported_and_its_vm_ends() {
    if !kvm(&test_name()) {
        return;
    }
    for own in [true, false] {
        let (trial, mut shim, function) = listening("5m");
        let function = if own { "local" } else { &function };
        let mut vm = trial.vm("vm", &endless(), &["--function", function]);
        trial.becomes("vm", "running");
        let monitor = monitor(&trial, "vm");
        let pid = if own { vm.children()[0] } else { shim.pid() };
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
        one_line("a killed shim", &vm.wait(SOON), 6, &["the VM is lost", "the function is gone"]);
        assert!(told_of_a_host_error(monitor));
        if own {
            shim.signal(Signal::SIGKILL);
        }
        shim.wait(SOON);
        trial.leaves_nothing("a killed shim");
    }
}

#[test]
fn a_shim_of_its_own_ends_with_a_killed_soc_vmm() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let mut vm = trial.vm("vm", &endless(), &[]);
    trial.becomes("vm", "running");
    assert_eq!(vm.children().len(), 1);
    vm.signal(Signal::SIGKILL);
    vm.wait(SOON);
    wait_until("the shim is gone", SOON, || trial.processes().is_empty());
    // What the dead process could not remove is no obstacle to its successor, which does.
    let mut next = trial.vm("vm", &short(), &[]);
    assert_eq!(next.wait(MOST).status.code(), Some(PASSED));
    trial.leaves_nothing("a VM after a killed one");
}

#[test]
fn a_shim_holds_the_vm_of_a_killed_soc_vmm() {
    if !kvm(&test_name()) {
        return;
    }
    let (trial, mut shim, function) = listening("5m");
    let mut vm = trial.vm("vm", &endless(), &["--function", &function]);
    trial.becomes("vm", "running");
    vm.signal(Signal::SIGKILL);
    vm.wait(SOON);
    shim.says("is lost: held for 300 s", SOON);
    // Its vCPU waits for an answer that nobody gives, and does not spin for it.
    let before = shim.cpu_time();
    std::thread::sleep(Duration::from_secs(1));
    assert!(shim.cpu_time() - before < Duration::from_millis(200), "the vCPU spins");
    for _ in 0..2 {
        let refused = trial.vm("next", &short(), &["--function", &function]).wait(MOST);
        one_line(
            "a held function",
            &refused,
            4,
            &[
                &format!("VM {} is held here since its soc-vmm was lost", trial.name("vm")),
                "restart this function's host-kvm-shim",
            ],
        );
    }
    assert!(shim.runs());
    shim.signal(Signal::SIGKILL);
    shim.wait(SOON);
    let _shim = trial.listening_shim("function", &[]);
    let mut next = trial.vm("next", &short(), &["--function", &function]);
    assert_eq!(next.wait(MOST).status.code(), Some(PASSED));
}

#[test]
fn without_a_lease_a_killed_soc_vmm_s_vm_ends_at_once() {
    if !kvm(&test_name()) {
        return;
    }
    let (trial, mut shim, function) = listening("0");
    for _ in 0..3 {
        let mut vm = trial.vm("vm", &endless(), &["--function", &function]);
        trial.becomes("vm", "running");
        vm.signal(Signal::SIGKILL);
        vm.wait(SOON);
        let mut next = trial.vm("next", &short(), &["--function", &function]);
        assert_eq!(next.wait(MOST).status.code(), Some(PASSED), "{}", next.stderr());
    }
    assert!(shim.runs());
}

#[test]
fn a_lease_that_is_over_pauses_the_vm() {
    if !kvm(&test_name()) {
        return;
    }
    let (trial, mut shim, function) = listening("6s");
    // It needs nothing of the SoC: it runs on while it is held.
    let payload = payloads::hot::busy(Privilege::Cpl0).expect("the payload assembles");
    let mut vm = trial.vm("vm", &payload, &["--function", &function]);
    trial.becomes("vm", "running");
    vm.signal(Signal::SIGKILL);
    vm.wait(SOON);
    let before = shim.cpu_time();
    shim.says("held for 6 s", SOON);
    shim.says("paused (soc-lost)", SOON);
    assert!(shim.cpu_time() - before > Duration::from_millis(100), "the held VM doesn't run");
    // The pause takes a moment.
    wait_until("the paused VM stands still", SOON, || {
        let before = shim.cpu_time();
        std::thread::sleep(Duration::from_secs(1));
        shim.cpu_time() - before < Duration::from_millis(100)
    });
    let refused = trial.vm("next", &short(), &["--function", &function]).wait(MOST);
    one_line("a held function", &refused, 4, &["is held here"]);
}

#[test]
fn a_stopped_soc_vmm_s_vm_is_suspended_and_goes_on() {
    if !kvm(&test_name()) {
        return;
    }
    // Neither a shim of soc-vmm's own nor one without a lease destroys a VM for silence.
    let (trial, mut shim, function) = listening("0");
    let mut own = trial.vm("own", &endless(), &[]);
    let mut other = trial.vm("other", &endless(), &["--function", &function]);
    for name in ["own", "other"] {
        trial.becomes(name, "running");
    }
    for vm in [&own, &other] {
        vm.signal(Signal::SIGSTOP);
    }
    std::thread::sleep(SILENCE);
    for (name, vm) in [("own", &mut own), ("other", &mut other)] {
        vm.signal(Signal::SIGCONT);
        vm.says("the SoC's heartbeat is silent", SOON);
        vm.says("the SoC's heartbeat is back", SOON);
        goes_on(&trial, name);
        vm.signal(Signal::SIGTERM);
        let ended = vm.wait(SOON);
        free_of_trouble("a stopped soc-vmm", &ended);
        assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    }
    assert!(shim.runs());
}

#[test]
fn a_stopped_shim_is_reported_and_its_vm_goes_on() {
    if !kvm(&test_name()) {
        return;
    }
    let (trial, shim, function) = listening("0");
    let mut vm = trial.vm("vm", &endless(), &["--function", &function, "--log", "info"]);
    trial.becomes("vm", "running");
    shim.signal(Signal::SIGSTOP);
    vm.says("the host is silent", SILENCE + SOON);
    shim.signal(Signal::SIGCONT);
    vm.says("heartbeat goes on", SOON);
    goes_on(&trial, "vm");
    // A VM whose shim stands still can be ended too, also while it is to do something else.
    shim.signal(Signal::SIGSTOP);
    let mut monitor = monitor(&trial, "vm");
    monitor.get_mut().write_all(b"{\"execute\":\"stop\"}\n").unwrap();
    // Time to ask the shim; where it is too short, the VM just ends at once.
    std::thread::sleep(Duration::from_millis(500));
    vm.signal(Signal::SIGTERM);
    assert_eq!(vm.wait(Duration::from_secs(40)).status.code(), Some(0));
}

/// The VM's exits are served again.
fn goes_on(trial: &Trial, name: &str) {
    let before = trial.exits(name);
    wait_until("the guest goes on", SOON, || trial.exits(name) > before + 10);
}

#[test]
fn a_vm_that_is_ended_while_it_is_built_is_not_held() {
    if !kvm(&test_name()) {
        return;
    }
    let (trial, mut shim, function) = listening("5m");
    for i in 0..20 {
        let mut vm = trial.vm("vm", &endless(), &["--function", &function]);
        wait_until("it runs its own code", SOON, || trial.path("vm.qmp").exists());
        std::thread::sleep(Duration::from_millis(i * 3));
        vm.signal(Signal::SIGTERM);
        let ended = vm.wait(SOON);
        free_of_trouble("a VM that is ended early", &ended);
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "round {i}");
    }
    assert!(!shim.stderr().contains("held"), "{}", shim.stderr());
    let mut next = trial.vm("next", &short(), &["--function", &function]);
    assert_eq!(next.wait(MOST).status.code(), Some(PASSED), "{}", next.stderr());
    assert!(shim.runs());
}

#[test]
fn nothing_leaks_however_vms_end() {
    const ROUNDS: u32 = 50;
    if !kvm(&test_name()) {
        return;
    }
    let (trial, mut shim, function) = listening("0");
    let payload = payloads::smp::halted(2).expect("the payload assembles");
    let round = |i: u32| {
        let mut vm = trial.vm("vm", &payload, &["--function", &function]);
        // Everywhere in a VM's life, also before it runs.
        if i.is_multiple_of(2) {
            trial.becomes("vm", "running");
        } else {
            std::thread::sleep(Duration::from_millis(u64::from(i) * 2));
        }
        vm.signal(if i.is_multiple_of(5) { Signal::SIGTERM } else { Signal::SIGKILL });
        vm.wait(SOON);
    };
    let at_rest = shim.holds_at_rest();
    (0..4).for_each(round);
    shim.holds_again(at_rest);
    let memory = shim.proc_status("VmRSS");
    (0..ROUNDS).for_each(round);
    shim.holds_again(at_rest);
    let grown = shim.proc_status("VmRSS").saturating_sub(memory);
    assert!(grown < 512, "the shim has grown by {grown} KiB in {ROUNDS} rounds");
    assert!(shim.runs());
    assert_eq!(trial.processes(), [shim.pid()], "processes of VMs that ended");
}
