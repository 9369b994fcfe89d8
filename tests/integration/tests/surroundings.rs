//! What surrounds a VM fails it: streams, disks and limits that are full, files that change under it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Command;
use std::time::Duration;

use integration::hostile::{Running, Trial, one_line, wait_until};
use integration::{kvm, program, test_name};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use payloads::{PASSED, Payload, Privilege};

/// Longer than anything here may take on a busy machine.
const MOST: Duration = Duration::from_secs(120);

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

#[test]
fn a_console_s_file_is_kept_until_the_vm_runs() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let log = trial.file("log", b"of an earlier VM");
    let absent = format!("unix:{}", trial.at("absent"));
    let (option, image) = short().file();
    let image = trial.file("image", &image);
    let run = |function: &str| {
        let console = format!("file:{log}");
        let args = ["run", option, &image, "--debug-exit", "--serial", "null", "--debugcon", &console];
        trial.soc_vmm(&[&args[..], &["--function", function]].concat()).wait(MOST).status.code()
    };
    assert_eq!(run(&absent), Some(4));
    assert_eq!(std::fs::read(&log).unwrap(), b"of an earlier VM");
    assert_eq!(run("local"), Some(PASSED));
    assert!(!std::fs::read_to_string(&log).unwrap().contains("earlier"));
}

#[test]
fn a_console_is_no_image_and_no_fifo_that_nobody_reads() {
    let trial = Trial::default();
    let (_, image) = short().file();
    trial.file("image", &image);
    std::fs::hard_link(trial.path("image"), trial.path("link")).unwrap();
    mkfifo(&trial.path("fifo"), Mode::S_IRWXU).unwrap();
    for (file, words) in [
        ("image", ["the file is the kernel image"]),
        ("link", ["the file is the kernel image"]),
        ("fifo", ["nobody reads the FIFO"]),
    ] {
        for option in ["--serial", "--debugcon"] {
            let value = format!("file:{}", trial.at(file));
            let other: &[&str] = if option == "--serial" { &[] } else { &["--serial", "null"] };
            let run = ["run", "--kernel", &trial.at("image"), option, &value];
            let ended = trial.soc_vmm(&[&run[..], other].concat()).wait(MOST);
            one_line(&format!("{option} {file}"), &ended, 2, &[&[option], &words[..]].concat());
            trial.leaves_nothing(file);
        }
    }
    assert_eq!(std::fs::read(trial.path("image")).unwrap(), image, "an image was written to");
}

#[test]
fn a_vm_that_waits_for_a_deaf_function_can_be_ended() {
    let trial = Trial::default();
    let flags = SockFlag::SOCK_CLOEXEC;
    let deaf = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    bind(deaf.as_raw_fd(), &UnixAddr::new(&trial.path("deaf")).unwrap()).unwrap();
    listen(&deaf, Backlog::new(5).unwrap()).unwrap();
    let function = format!("unix:{}", trial.at("deaf"));
    let mut vm = trial.vm("vm", &short(), &["--function", &function]);
    wait_until("its monitor listens", MOST, || trial.path("vm.qmp").exists());
    std::thread::sleep(Duration::from_millis(300));
    vm.signal(Signal::SIGTERM);
    // Where the function is given up by itself, that is said.
    let ended = vm.wait(MOST);
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
    trial.leaves_nothing("a deaf function");
}

#[test]
fn a_shim_that_fails_is_told_in_one_line() {
    let trial = Trial::default();
    std::fs::copy(program("soc-vmm"), trial.path("soc-vmm")).unwrap();
    let (_, image) = short().file();
    let image = trial.file("image", &image);
    for (script, words) in [
        ("exit 0", ["host-kvm-shim ended by itself", "exit status: 0"]),
        ("exit 4", ["--function local", "exit status: 4"]),
        ("echo no KVM >&2; exit 4", ["--function local", "no KVM"]),
        ("echo oh >&2; kill -9 $$", ["signal: 9", "oh"]),
    ] {
        trial.file("host-kvm-shim", format!("#!/bin/sh\n{script}\n").as_bytes());
        std::fs::set_permissions(trial.path("host-kvm-shim"), PermissionsExt::from_mode(0o755)).unwrap();
        let mut command = Command::new(trial.path("soc-vmm"));
        command.args(["run", "--serial", "null", "--kernel", &image]);
        one_line(script, &trial.start(&mut command).wait(MOST), 4, &words);
        trial.leaves_nothing(script);
    }
}

#[test]
fn a_shim_that_is_killed_while_the_vm_is_built_is_not_blamed_on_memory() {
    if !kvm(&test_name()) {
        return;
    }
    let mut killed = 0;
    for i in 0..20 {
        let trial = Trial::default();
        let mut vm = trial.vm("vm", &endless(), &[]);
        wait_until("it starts its shim", MOST, || !vm.children().is_empty());
        std::thread::sleep(Duration::from_millis(i * 3));
        let shim = vm.children()[0];
        kill(Pid::from_raw(shim as i32), Signal::SIGKILL).unwrap();
        let ended = vm.wait(MOST);
        let status = ended.status.code().unwrap_or_default();
        assert!([4, 6].contains(&status), "round {i}: {}", ended.stderr);
        one_line("a killed shim", &ended, status, &["signal: 9"]);
        assert!(!ended.stderr.contains("--memory"), "{}", ended.stderr);
        killed += u32::from(status == 4);
    }
    assert!(killed > 0, "each VM was built before its shim was killed");
}

#[test]
fn however_often_and_early_a_vm_is_told_to_end_it_says_nothing() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    for i in 0..20 {
        let mut vm = trial.vm("vm", &endless(), &[]);
        wait_until("it runs its own code", MOST, || trial.path("vm.qmp").exists());
        std::thread::sleep(Duration::from_millis(i * 3));
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGTERM] {
            vm.signal(signal);
        }
        let ended = vm.wait(MOST);
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "round {i}");
    }
    trial.leaves_nothing("VMs that were told to end");
}

#[test]
fn a_door_that_no_guest_came_to_goes_with_its_vm() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    for ask in [true, false] {
        let mut vm = trial.vm("vm", &endless(), &["--incoming", &format!("unix:{}", trial.at("door"))]);
        wait_until("the door is there", MOST, || trial.path("door").exists());
        if ask {
            let quit = Command::new(program("soc-vmm")).args(["quit", &trial.name("vm")]).status();
            assert!(quit.unwrap().success());
        } else {
            vm.signal(Signal::SIGTERM);
        }
        let ended = vm.wait(MOST);
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
        assert!(!trial.path("door").exists());
    }
}

#[test]
fn a_process_without_room_says_so_in_one_line() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let mut refused = 0;
    for limit in [4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 32, 40] {
        let what = format!("{limit} descriptors");
        let ended = within(&trial, &format!("ulimit -n {limit}; exec \"$@\""), &short(), &[]).wait(MOST);
        if ended.status.code() != Some(PASSED) {
            let status = if ended.stderr.contains("--qmp") || ended.stderr.contains("--debugcon") { 2 } else { 4 };
            // The loader of programs needs some itself.
            let loads = !ended.stderr.contains("shared librar");
            if loads && !ended.stderr.contains("kernel") {
                one_line(&what, &ended, status, &["Too many open files"]);
                refused += 1;
            }
        }
        trial.leaves_nothing(&what);
    }
    assert!(refused > 3);
    // A build for tests is 31 MiB by itself.
    for mebibytes in [40, 56] {
        let shell = format!("ulimit -v {}; exec \"$@\"", mebibytes << 10);
        let ended = within(&trial, &shell, &short(), &[]).wait(MOST);
        one_line(&format!("{mebibytes} MiB"), &ended, 4, &[]);
    }
}

#[test]
fn a_file_that_may_not_grow_costs_its_output_and_no_vm() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let talks = payloads::hot::read_port(Privilege::Cpl0, payloads::ports::ECHO, 500, u32::MAX).unwrap();
    // The shim's memory may grow.
    let _shim = trial.listening_shim("function", &[]);
    let function = format!("unix:{}", trial.at("function"));
    // Units of 512 bytes.
    let mut vm = within(&trial, "ulimit -f 8; exec \"$@\"", &talks, &["--function", &function]);
    vm.says("console output is lost from here on: File too large", MOST);
    trial.becomes("vm", "running");
    vm.signal(Signal::SIGTERM);
    assert_eq!(vm.wait(MOST).status.code(), Some(0));
}

#[test]
fn an_output_that_takes_nothing_is_a_failure_and_one_that_is_closed_is_not() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    for verb in ["host", "list", "--help"] {
        let run = |shell: &str| {
            let mut command = Command::new("sh");
            trial.start(command.args(["-c", shell, "sh"]).arg(program("soc-vmm")).arg(verb)).wait(MOST)
        };
        one_line(verb, &run("exec \"$@\" >/dev/full"), 4, &["standard output", "No space left"]);
        let closed = run("{ \"$@\"; echo $? >&2; } | true");
        assert_eq!(closed.stderr.trim(), "0", "{verb} into a closed pipe");
    }
}

#[test]
fn a_vm_whose_images_are_being_loaded_can_be_ended() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let initrd = trial.file("initrd", b"");
    // All of it a hole: it costs no disk.
    const SIZE: u64 = 1 << 28;
    File::options().write(true).open(&initrd).unwrap().set_len(SIZE).unwrap();
    let (option, image) = endless().file();
    let image = trial.file("image", &image);
    let args = ["run", option, &image, "--initrd", &initrd, "--memory", "400M", "--serial", "null"];
    // On a busy machine it may be told so late that nearly all is loaded: then it is told once more.
    let is_told_in_time = || {
        let mut vm = trial.soc_vmm(&args);
        // The kernel keeps the account of a process until its parent has asked for its end.
        let account = |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", vm.pid())).unwrap();
        let has_read =
            || -> u64 { account("io").lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap() };
        wait_until("it loads", MOST, || has_read() > SIZE / 16);
        kill(Pid::from_raw(vm.pid() as i32), Signal::SIGTERM).unwrap();
        let until_told = has_read();
        wait_until("it ends", MOST, || account("stat").contains(") Z "));
        let read = has_read();
        assert_eq!(vm.wait(MOST).status.code(), Some(0));
        let is_in_time = until_told < SIZE / 2;
        assert!(read < SIZE || !is_in_time, "it was ended only when all was loaded: {read} bytes read");
        is_in_time
    };
    assert!((0..10).any(|_| is_told_in_time()), "it was told too late each time");
    trial.leaves_nothing("a VM that was being loaded");
}

#[test]
fn a_vm_that_may_have_no_more_threads_refuses_what_needs_one_and_goes_on() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let [disk, medium] = ["disk", "medium"].map(|name| trial.file(name, &[0; 4096]));
    let name = trial.name("vm");
    let mut vm = trial.vm("vm", &endless(), &["--cdrom", &medium]);
    trial.becomes("vm", "running");
    let command = |words: &[&str]| trial.soc_vmm(words).wait(MOST);
    // Room for what commands need, and none for a thread's stack.
    let pages = std::fs::read_to_string(format!("/proc/{}/statm", vm.pid())).unwrap();
    let pages: u64 = pages.split(' ').next().unwrap().parse().unwrap();
    let limit = |bytes: &str| {
        let prlimit =
            Command::new("prlimit").args(["--pid", &vm.pid().to_string(), &format!("--as={bytes}:")]).status();
        assert!(prlimit.unwrap().success());
    };
    limit(&(pages * 4096 + (1 << 20)).to_string());
    for words in [["add-disk", &name, &format!("file={disk}")], ["insert", &name, &disk]] {
        one_line(words[0], &command(&words), 6, &["no thread is left", "limits"]);
    }
    limit("unlimited");
    assert!(command(&["insert", &name, &disk]).status.success());
    assert!(command(&["quit", &name]).status.success());
    assert_eq!(vm.wait(MOST).status.code(), Some(0));
}
