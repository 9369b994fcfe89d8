//! What a person gets wrong: each mistake is told in one line, with the promised exit status, and leaves nothing behind.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::Duration;

use integration::hostile::{Ended, Trial, one_line};
use integration::{kvm, program, test_name};
use nix::unistd::{getuid, mkfifo};
use payloads::{Payload, Privilege};

/// Longer than any of this may take on a busy machine.
const MOST: Duration = Duration::from_secs(60);

/// A kernel that boots.
fn kernel() -> Vec<u8> {
    payloads::pio::pio(Privilege::Cpl0).expect("the payload assembles").file().1
}

/// A kernel that runs until it is ended.
fn endless() -> Payload {
    payloads::counter::counter(Privilege::Cpl0, payloads::counter::Each::Nothing).expect("the payload assembles")
}

/// Runs `soc-vmm run` with `args` to its end.
fn run(trial: &Trial, args: &[&str]) -> Ended {
    let serial: &[&str] = if args.contains(&"--serial") { &[] } else { &["--serial", "null"] };
    trial.soc_vmm(&[&["run"], serial, args].concat()).wait(MOST)
}

/// Runs it and expects one line.
fn wrong(trial: &Trial, args: &[&str], status: i32, words: &[&str]) {
    one_line(&args.join(" "), &run(trial, args), status, words);
    trial.leaves_nothing(&args.join(" "));
}

#[test]
fn kernels_that_are_none() {
    let trial = Trial::default();
    let good = kernel();
    std::fs::create_dir(trial.path("directory")).unwrap();
    mkfifo(&trial.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = UnixListener::bind(trial.path("socket")).unwrap();
    trial.file("empty", b"");
    trial.file("text", b"#!/bin/sh\necho no kernel\n");
    trial.file("truncated", &good[..good.len() / 2]);
    // The first program header's p_memsz: more than any guest has.
    let mut oversized = good.clone();
    let headers = u64::from_le_bytes(oversized[32..40].try_into().unwrap()) as usize;
    let load = (headers..).step_by(56).find(|&at| oversized[at..at + 4] == 1u32.to_le_bytes()).unwrap();
    oversized[load + 40..load + 48].copy_from_slice(&(1u64 << 40).to_le_bytes());
    trial.file("oversized", &oversized);
    for (name, why) in [
        ("absent", "can't open it"),
        ("directory", "a directory"),
        ("fifo", "a FIFO"),
        ("socket", "can't open it"),
        ("empty", "it is empty"),
        ("text", "it is no bzImage"),
        ("truncated", "it is truncated"),
        ("oversized", "more memory"),
    ] {
        let path = trial.at(name);
        wrong(&trial, &["--kernel", &path], 2, &["kernel", &path, why]);
    }
    wrong(&trial, &["--kernel", "/dev/zero"], 2, &["/dev/zero", "a device"]);
    wrong(&trial, &["--kernel", "/proc/self/mem"], 2, &["/proc/self/mem"]);
}

#[test]
fn initrds_and_firmware_that_are_none() {
    let trial = Trial::default();
    let kernel = trial.file("kernel", &kernel());
    mkfifo(&trial.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (name, size) in [("oversized", 1u64 << 40), ("larger-than-memory", 65 << 20), ("odd", 4097)] {
        std::fs::File::create(trial.path(name)).unwrap().set_len(size).unwrap();
    }
    for (name, why) in [
        ("absent", "can't open it"),
        ("fifo", "a FIFO"),
        ("oversized", "more memory, or a smaller image"),
        ("larger-than-memory", "more memory, or a smaller image"),
    ] {
        let path = trial.at(name);
        let args = ["--kernel", &kernel, "--initrd", &path, "--memory", "64M"];
        wrong(&trial, &args, 2, &["initrd", &path, why]);
    }
    wrong(&trial, &["--kernel", &kernel, "--initrd", "/dev/zero"], 2, &["/dev/zero", "a device"]);
    for (name, why) in [("absent", "can't open it"), ("odd", "multiple of 4096"), ("oversized", "flat firmware image")]
    {
        let path = trial.at(name);
        wrong(&trial, &["--firmware", &path], 2, &["firmware", &path, why]);
    }
}

#[test]
fn a_file_that_another_user_may_not_read() {
    if !getuid().is_root() {
        return testbed::skip(&test_name(), "only root can run a program as somebody else");
    }
    let trial = Trial::default();
    let kernel = trial.file("kernel", &kernel());
    let secret = |mode| std::fs::set_permissions(trial.path("kernel"), PermissionsExt::from_mode(mode)).unwrap();
    secret(0o600);
    for open in ["", "run"] {
        std::fs::set_permissions(trial.path(open), PermissionsExt::from_mode(0o777)).unwrap();
    }
    // The programs may lie where nobody else may look.
    for name in ["soc-vmm", "host-kvm-shim"] {
        std::fs::copy(program(name), trial.path(name)).unwrap();
    }
    let as_nobody = |args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", &trial.at("soc-vmm"), "run"]).args(args);
        trial.start(&mut command).wait(MOST)
    };
    let args = ["--serial", "null", "--kernel", &kernel];
    one_line("a secret kernel", &as_nobody(&args), 2, &[&kernel, "Permission denied", "permissions"]);
    trial.leaves_nothing("a secret kernel");
    secret(0o644);
    if std::fs::metadata("/dev/kvm").is_ok_and(|kvm| kvm.permissions().mode() & 0o006 == 0) {
        one_line("KVM of others", &as_nobody(&args), 4, &["/dev/kvm", "Permission denied"]);
        trial.leaves_nothing("KVM of others");
    }
}

#[test]
fn devices_that_can_t_be() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let kernel = trial.file("kernel", &kernel());
    let disk = format!("file={}", trial.file("disk", &[0; 4096]));
    let [socket, absent] = ["socket", "absent"].map(|name| trial.at(name));
    let _listens = UnixListener::bind(&socket).unwrap();
    std::os::unix::fs::symlink(trial.path("loop"), trial.path("loop")).unwrap();
    let a_loop = format!("file={}", trial.at("loop"));
    let net = format!("stream={socket},mac=52:54:00:00:00:01");
    let long = format!("stream=/{}", "x".repeat(120));
    let many: Vec<String> = (0..16).map(|n| format!("unix:{absent}{n},name=n{n}")).collect();
    let many: Vec<&str> = many.iter().flat_map(|channel| ["--channel", channel]).collect();
    let slash = format!("unix:{absent},name=a/b");
    let read_only = format!("{disk},readonly=on");
    let more: Vec<&str> = std::iter::repeat_n(["--disk", &read_only], 193).flatten().collect();
    let [pci, cpu] = ["pci.1", "cpu0"].map(|id| format!("{disk},id={id}"));
    for (args, words) in [
        (&["--disk", &pci][..], &["id=pci.1", "another id"][..]),
        (&["--disk", &cpu], &["id=cpu0", "another id"]),
        (&["--net", &net, "--net", &net], &["mac=", "'net0'"]),
        (&["--channel", &slash], &["--channel", "'a/b' is no name for a port"]),
        (&many, &["--channel", "more than the 15"]),
        (&["--disk", &a_loop], &["loop", "check its path"]),
        (&["--net", &long], &["at most 107 bytes"]),
        (&["--cpus", "1,maxcpus=1025"], &["--cpus", "maxcpus=1025", "1 to 1024"]),
        (&more, &["193 devices", "fewer"]),
    ] {
        wrong(&trial, &[&["--kernel", &kernel], args].concat(), 2, words);
    }
}

#[test]
fn memory_that_can_t_be() {
    let trial = Trial::default();
    let kernel = trial.file("kernel", &kernel());
    for (memory, why) in [
        ("0", "a VM needs memory"),
        ("many", "a number"),
        ("5K", "whole pages"),
        ("3M,hugepages=2M", "whole pages"),
        ("64M,hugepages=4M", "2M or 1G"),
        ("64M,node=x", "a number"),
        ("18446744073709551615G", "no host has that much"),
    ] {
        wrong(&trial, &["--kernel", &kernel, "--memory", memory], 2, &["--memory", why]);
    }
    for memory in ["4K", "64K", "1M"] {
        wrong(&trial, &["--kernel", &kernel, "--memory", memory], 2, &["--memory", "at least 2 MiB"]);
    }
}

#[test]
fn memory_that_the_host_has_not() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let kernel = trial.file("kernel", &kernel());
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total: u64 = meminfo.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap();
    let twice = format!("{}M", total / 512);
    let huge = format!("{}M,hugepages=2M", (total / 512).next_multiple_of(2));
    for (memory, why) in
        [(twice.as_str(), "MiB free"), (&huge, "huge pages of 2 MiB"), ("64M,node=4095", "no NUMA node 4095")]
    {
        wrong(&trial, &["--kernel", &kernel, "--memory", memory], 4, &["--memory", why]);
    }
}

#[test]
fn processors_that_can_t_be() {
    let trial = Trial::default();
    let kernel = trial.file("kernel", &kernel());
    for (args, option) in [
        (["--cpus", "0"], "--cpus"),
        (["--cpus", "1025"], "--cpus"),
        (["--cpus", "two"], "--cpus"),
        (["--cpu", "Skylake"], "--cpu"),
        (["--cpu-affinity", "1=0"], "--cpu-affinity"),
    ] {
        wrong(&trial, &["--kernel", &kernel, args[0], args[1]], 2, &[option]);
    }
    wrong(&trial, &["--kernel", &kernel, "--cpu-affinity", "0=1023"], 4, &["--cpu-affinity", "no CPU [1023]"]);
}

/// Runs soc-vmm in a mount namespace of its own, after `prepare` in a shell; nothing if that can't be done here.
fn in_own_mounts(trial: &Trial, prepare: &str, args: &[&str]) -> Option<Ended> {
    let script = format!("{prepare} || exit 77; exec \"$@\"");
    let mut command = Command::new("unshare");
    command
        .args(["-m", "sh", "-c", &script, "sh"])
        .arg(program("soc-vmm"))
        .args(["run", "--serial", "null"])
        .args(args);
    let ended = trial.start(&mut command).wait(MOST);
    if matches!(ended.status.code(), Some(77) | Some(1)) {
        testbed::skip(&test_name(), &format!("no mount namespace here: {}", ended.stderr.trim()));
        return None;
    }
    Some(ended)
}

#[test]
fn no_kvm() {
    let trial = Trial::default();
    let kernel = trial.file("kernel", &kernel());
    for (what, prepare, why) in [
        ("another device there", "mount --bind /dev/null /dev/kvm", "/dev/kvm"),
        ("nothing there", "mount -t tmpfs none /dev && mknod /dev/null c 1 3", "No such file"),
    ] {
        let Some(ended) = in_own_mounts(&trial, prepare, &["--kernel", &kernel]) else { return };
        one_line(what, &ended, 4, &["/dev/kvm", why]);
        trial.leaves_nothing(what);
    }
}

#[test]
fn functions_that_are_none() {
    let trial = Trial::default();
    let kernel = trial.file("kernel", &kernel());
    let _stream = UnixListener::bind(trial.path("stream")).unwrap();
    trial.file("file", b"");
    let long = "x".repeat(200);
    for (spec, why) in [
        (format!("unix:{}", trial.at("absent")), "no host-kvm-shim listens there"),
        (format!("unix:{}", trial.at("file")), "no host-kvm-shim listens there"),
        (format!("unix:{}", trial.at("stream")), "no host-kvm-shim's"),
        (format!("unix:/{long}"), "name the socket"),
        (format!("card:{}", trial.at("absent")), "can't"),
        ("pci:ffff:ff:1f.7".into(), "ffff:ff:1f.7"),
        ("pool".into(), "the configuration has no [pool]"),
    ] {
        wrong(&trial, &["--kernel", &kernel, "--function", &spec], 4, &["--function", &spec, why]);
    }
    for spec in ["", "tcp:x", "unix:", "pci:1"] {
        wrong(&trial, &["--kernel", &kernel, "--function", spec], 2, &["--function"]);
    }
}

#[test]
fn a_function_that_serves_another() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let mut shim = trial.listening_shim("function", &["--lease", "0"]);
    let spec = format!("unix:{}", trial.at("function"));
    let mut first = trial.vm("first", &endless(), &["--function", &spec]);
    trial.becomes("first", "running");
    let second = trial.vm("second", &endless(), &["--function", &spec]).wait(MOST);
    one_line("a busy function", &second, 4, &["--function", &spec, "serves another soc-vmm"]);
    assert!(first.runs() && shim.runs());
    assert!(trial.soc_vmm(&["quit", "--qmp", &trial.at("first.qmp")]).wait(MOST).status.success());
    assert!(first.wait(MOST).status.success());
    drop(shim);
    trial.leaves_nothing("a busy function");
}

#[test]
fn a_name_that_is_taken() {
    if !kvm(&test_name()) {
        return;
    }
    let trial = Trial::default();
    let name = trial.name("web");
    let mut first = trial.vm("first", &endless(), &["--name", &name, "--paused"]);
    trial.becomes("first", "prelaunch");
    let second = trial.vm("second", &endless(), &["--name", &name]).wait(MOST);
    one_line("a name in use", &second, 4, &["--name", &name]);
    let qmp = format!("unix:{}", trial.at("first.qmp"));
    let third = trial.vm("third", &endless(), &["--qmp", &qmp]).wait(MOST);
    one_line("a QMP socket in use", &third, 2, &["--qmp", &trial.at("first.qmp"), "in use"]);
    assert!(first.runs());
    first.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(first.wait(MOST).status.success());
    trial.leaves_nothing("a name in use");
    wrong(&trial, &["--kernel", "absent", "--name", "../web"], 2, &["--name"]);
}

#[test]
fn sockets_and_files_that_can_t_be_made() {
    let trial = Trial::default();
    let kernel = trial.file("kernel", &kernel());
    trial.file("file", b"kept");
    std::fs::create_dir(trial.path("directory")).unwrap();
    let (nowhere, file, directory) = (trial.at("absent/file"), trial.at("file"), trial.at("directory"));
    let long = format!("unix:/{}", "x".repeat(200));
    for (option, value, status, words) in [
        ("--qmp", format!("unix:{nowhere}"), 2, vec![&nowhere as &str]),
        ("--qmp", format!("unix:{file}"), 2, vec![&file, "not a socket"]),
        ("--qmp", format!("unix:{directory}"), 2, vec![&directory, "not a socket"]),
        ("--qmp", long.clone(), 2, vec!["too long"]),
        ("--qmp", "tcp:1".into(), 2, vec!["unix:SOCKET"]),
        ("--serial", format!("file:{nowhere}"), 2, vec![&nowhere, "No such file"]),
        ("--serial", format!("file:{directory}"), 2, vec![&directory, "directory"]),
        ("--serial", format!("unix:{nowhere}"), 2, vec![&nowhere]),
        ("--serial", format!("unix:{file}"), 2, vec![&file, "not a socket"]),
        ("--debugcon", format!("file:{nowhere}"), 2, vec![&nowhere, "No such file"]),
        ("--debugcon", format!("file:{directory}"), 2, vec![&directory, "directory"]),
        ("--log", "loud".into(), 2, vec!["loud"]),
    ] {
        wrong(&trial, &["--kernel", &kernel, option, &value], status, &[&[option], &words[..]].concat());
    }
    assert_eq!(std::fs::read(trial.path("file")).unwrap(), b"kept", "a file of somebody else");
}

#[test]
fn a_shim_s_command_line() {
    let trial = Trial::default();
    let shim = |args: &[&str], status, words: &[&str]| {
        one_line(&args.join(" "), &trial.shim(args).wait(MOST), status, words);
        trial.leaves_nothing(&args.join(" "));
    };
    for (args, words) in [
        (&[][..], &["--function is missing"][..]),
        (&["--function"], &["--function needs a value"]),
        (&["--function", "tcp:1"], &["tcp:1", "unix:PATH"]),
        (&["--function", "unix:"], &["the path is empty"]),
        (&["--function", "fd:x"], &["fd:x", "no descriptor"]),
        (&["--function", "pci:3:0.0"], &["pci:3:0.0", "0000:03:00.1"]),
        (&["--function", "fd:3", "--lease", "soon"], &["--lease soon", "30s"]),
        (&["--function", "fd:3", "--log", "loud"], &["--log loud", "levels"]),
        (&["--frobnicate\n\x1b[2J"], &["unknown argument"]),
    ] {
        shim(args, 2, words);
    }
    shim(&["--function", "pci:ffff:ff:1f.7"], 4, &["ffff:ff:1f.7"]);
    if !kvm(&test_name()) {
        return;
    }
    shim(&["--function", "fd:9"], 4, &["fd:9", "no connected SOCK_SEQPACKET"]);
    shim(&["--function", "fd:0"], 4, &["fd:0", "no connected SOCK_SEQPACKET"]);
    let path = trial.file("file", b"kept");
    shim(&["--function", &format!("unix:{path}")], 4, &[&path, "can't listen there"]);
    shim(&["--function", "unix:/no/such/directory/f"], 4, &["/no/such/directory/f", "No such file"]);
    let mut first = trial.listening_shim("function", &[]);
    let function = format!("unix:{}", trial.at("function"));
    let second = trial.shim(&["--function", &function]).wait(MOST);
    one_line("a path in use", &second, 4, &[&function, "another host-kvm-shim serves it"]);
    assert!(first.runs());
    assert_eq!(std::fs::read(trial.path("file")).unwrap(), b"kept", "a file of somebody else");
}
