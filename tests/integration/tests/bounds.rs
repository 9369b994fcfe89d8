//! Nothing waits without bound, whatever it waits for does; and what asks a VM to end, or lacks room, is taken for what it is.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::time::Duration;

use integration::hostile::{Ended, Running, Trial, one_line, wait_until};
use integration::{kvm, program, test_name};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::unistd::Pid;
use payloads::{Payload, Privilege};

/// Longer than anything here may take on a busy machine; shorter than a command's 70 s.
const MOST: Duration = Duration::from_secs(60);

/// Runs until it is ended.
fn endless() -> Payload {
    payloads::counter::counter(Privilege::Cpl0, payloads::counter::Each::Nothing).expect("the payload assembles")
}

/// A VM that `shell` starts, in which `"$@"` is soc-vmm; what it starts is a process group of its own.
fn job(trial: &Trial, shell: &str, memory: &str) -> Running {
    let (option, bytes) = endless().file();
    let image = trial.file("image", &bytes);
    let mut command = Command::new("sh");
    command.args(["-c", shell, "sh"]).arg(program("soc-vmm")).args(["run", option, &image, "--memory", memory]);
    command.args(["--serial", "null", "--qmp", &format!("unix:{}", trial.at("vm.qmp")), "--name", &trial.name("vm")]);
    trial.start(command.process_group(0))
}

#[test]
fn a_signal_to_the_whole_job_ends_the_vm_in_order() {
    if !kvm(&test_name()) {
        return;
    }
    for round in 0..20 {
        let trial = Trial::default();
        let signal = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP][round % 3];
        let mut vm = job(&trial, "exec \"$@\"", "64M");
        // As soon as there is a shim, or once the guest runs.
        if round < 10 {
            wait_until("it starts its shim", MOST, || !vm.children().is_empty());
        } else {
            trial.becomes("vm", "running");
            // It is nobody's turn first: here it is the shim's, which still counts for its VM afterwards.
            kill(Pid::from_raw(vm.children()[0] as i32), signal).unwrap();
            assert!(trial.status("vm").is_some(), "round {round}: {}", vm.stderr());
        }
        killpg(Pid::from_raw(vm.pid() as i32), signal).unwrap();
        let ended = vm.wait(MOST);
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "round {round}: {signal}");
        trial.leaves_nothing("a signal to the whole job");
    }
}

#[test]
fn a_stopped_vm_holds_no_command_up() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let mut vm = trial.vm("vm", &endless(), &[]);
    trial.becomes("vm", "running");
    vm.signal(Signal::SIGSTOP);
    let qmp = trial.at("vm.qmp");
    let mut asked: Vec<_> =
        ["status", "pause", "reset", "quit"].map(|verb| (verb, trial.soc_vmm(&[verb, "--qmp", &qmp]))).into();
    for (verb, command) in &mut asked {
        one_line(verb, &command.wait(MOST), 4, &[&qmp, "stopped answering", "kill -CONT"]);
    }
    vm.signal(Signal::SIGCONT);
    assert!(trial.soc_vmm(&["quit", "--qmp", &qmp]).wait(MOST).status.success());
    assert!(vm.wait(MOST).status.success());
}

#[test]
fn a_network_s_peer_that_accepts_nobody_is_told() {
    let trial = Trial::default();
    let full = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(full.as_raw_fd(), &UnixAddr::new(&trial.path("full")).unwrap()).unwrap();
    listen(&full, Backlog::new(1).unwrap()).unwrap();
    let _queue = [(); 2].map(|()| UnixStream::connect(trial.path("full")).unwrap());
    let ended = trial.vm("vm", &endless(), &["--net", &format!("stream={}", trial.at("full"))]).wait(MOST);
    one_line("a full backlog", &ended, 2, &["--net: can't connect to", &trial.at("full"), "timed out"]);
    trial.leaves_nothing("a full backlog");
}

/// Sets how many descriptors a process may have.
fn limit_descriptors(vm: &Running, limit: usize) {
    let mut command = Command::new("prlimit");
    let set = command.args([format!("--pid={}", vm.pid()), format!("--nofile={limit}:")]).stdout(Stdio::null());
    assert!(set.status().expect("prlimit(1)").success());
}

#[test]
fn a_lack_of_descriptors_is_logged_when_it_begins_and_when_it_is_over() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let mut vm = trial.vm("vm", &endless(), &["--log", "info"]);
    trial.becomes("vm", "running");
    for times in 1..=2 {
        let count = |what: &str| vm.stderr().matches(what).count();
        limit_descriptors(&vm, 3);
        let mut waits = UnixStream::connect(trial.path("vm.qmp")).unwrap();
        wait_until("it says so", MOST, || count("can't accept") == times);
        // Time for it to say so again and again.
        std::thread::sleep(Duration::from_secs(1));
        limit_descriptors(&vm, 256);
        std::io::Read::read_exact(&mut waits, &mut [0]).unwrap();
        wait_until("it says that it goes on", MOST, || count("accepted again") == times);
        assert_eq!(count("can't accept"), times, "{}", vm.stderr());
    }
    vm.signal(Signal::SIGTERM);
    assert!(vm.wait(MOST).status.success());
}

#[test]
fn a_limit_that_is_met_is_named() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    // In units of 512 bytes: less than what the shim shares with soc-vmm, less than the guest's memory.
    for limit in ["ulimit -f 128", "ulimit -f 65536"] {
        let ended = job(&trial, &format!("{limit}; exec \"$@\""), "512M").wait(MOST);
        one_line(limit, &ended, 4, &["File too large", "ulimit -f"]);
        trial.leaves_nothing(limit);
    }
    // In KiB: from where it is enough for the shim, which maps the guest's memory first, to where it is for soc-vmm too.
    let mut unmapped = 0;
    for limit in (550_000..=850_000).step_by(25_000) {
        let Some((shell, ended)) = refused_beside(&trial, limit) else { break };
        // The last to fail are the threads' stacks.
        let what = if ended.stderr.contains("thread") { "can't start a thread" } else { "Out of memory" };
        one_line(&shell, &ended, 4, &[what]);
        unmapped += u32::from(ended.stderr.contains("ulimit -v"));
    }
    assert!(unmapped > 0, "soc-vmm had room whenever the shim had");
    // Whoever runs out of them first.
    let mut lacking = 0;
    for limit in (16..=128).step_by(8) {
        let shell = format!("ulimit -n {limit}; exec \"$@\"");
        let Some(ended) = refused(&trial, &shell, "64M") else { break };
        one_line(&shell, &ended, 4, &["Too many open files", "ulimit -n"]);
        lacking += 1;
    }
    assert!(lacking > 3, "{lacking} lacked descriptors");
}

/// How a VM of 512 MiB is refused that may have `limit` KiB of addresses, or a little more; none: it runs.
fn refused_beside(trial: &Trial, limit: u32) -> Option<(String, Ended)> {
    // A limit that the program meets in an allocation of some bytes ends it by SIGABRT, as every program of Rust's: such limits are a few
    // hundred KiB wide.
    let aborted = |ended: &Ended| ended.status.signal() == Some(Signal::SIGABRT as i32);
    for limit in (limit..).step_by(1000).take(4) {
        let shell = format!("ulimit -v {limit}; exec \"$@\"");
        match refused(trial, &shell, "512M") {
            Some(ended) if aborted(&ended) => {}
            other => return other.map(|ended| (shell, ended)),
        }
    }
    panic!("it is aborted at {limit} KiB and beside");
}

/// How a VM is refused; none: it runs.
fn refused(trial: &Trial, shell: &str, memory: &str) -> Option<Ended> {
    // That it is asked costs descriptors too, which is a warning.
    let mut vm = job(trial, &format!("{shell} --log error"), memory);
    let runs = || trial.status("vm").is_some_and(|status| status["status"] == "running");
    while vm.runs() {
        if runs() {
            vm.signal(Signal::SIGTERM);
            assert!(vm.wait(MOST).status.success());
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(vm.wait(MOST))
}
