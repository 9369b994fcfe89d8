//! A shim on a socket: who may come, what it says and to whom, when it ends.

mod soc;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use api_channel::Status;
use api_channel::call::{Call, CreateVm, Irqchip, Name};
use ioreq_ring::BusMemory;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{pipe2, write};
use pcie_function::SocFunction;
use soc::listening::{Listening, connected, offered_again};

/// Counts in SI for ever: inc si; jmp back
const COUNT: [u8; 3] = [0x46, 0xeb, 0xfd];
const CREATE: CreateVm = CreateVm { vcpus: 1, irqchip: 1, flags: 0, dirty_ring: 0, spin_ns: 0, name: Name::NONE };

/// What nobody can write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeadEnd {
    /// A disk that is full.
    Full,
    /// A pipe whose reader has gone.
    Unread,
    /// A pipe whose reader reads no more.
    Stuffed,
}

impl DeadEnd {
    fn open(self) -> Stdio {
        if self == Self::Full {
            return File::options().write(true).open("/dev/full").unwrap().into();
        }
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        if self == Self::Stuffed {
            let size = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
            assert_eq!(write(&writer, &vec![0; size as usize]), Ok(size as usize));
            // Until this process ends.
            std::mem::forget(reader);
        }
        writer.into()
    }
}

fn said(args: &[&str], stdout: Stdio, stderr: Stdio) -> Output {
    Command::new(soc::program()).args(args).stdin(Stdio::null()).stdout(stdout).stderr(stderr).output().unwrap()
}

#[test]
fn a_held_vm_outlives_whoever_reads_of_it() {
    if !soc::has_kvm() {
        return;
    }
    for end in [DeadEnd::Full, DeadEnd::Unread, DeadEnd::Stuffed] {
        let shim = Listening::start_with(&format!("{end:?}"), &["--lease", "1s"], end.open());
        // A connection whose rules were broken is something to say.
        let mut soc = shim.connect();
        let lines = soc.function.remote(soc.header.inbox, soc.header.inbox_len as usize);
        lines.store(api_channel::lines::soc::REQUESTS_TAIL, 1 << 40);
        soc.function.raise(0);
        soc = offered_again(soc, 7);
        soc.ok(&Call::Ping);
        drop(soc);
        // So is a lost soc-vmm, and the end of the lease.
        let mut soc = shim.connect();
        soc.real_mode(1, Irqchip::Full, &COUNT);
        soc.run();
        drop(soc);
        let mut soc = shim.connect();
        let over = Instant::now() + Duration::from_secs(2);
        while Instant::now() < over {
            soc.pump(None);
            std::thread::sleep(Duration::from_millis(10));
        }
        let (status, why) = soc.refused(&Call::CreateVm(CREATE));
        assert!(status == Status::STATE && why.starts_with("VM test-vm is held here"), "{why}");
    }
}

#[test]
fn nobody_who_reads_is_a_status_and_no_panic() {
    for text in ["--help", "--version"] {
        let output = said(&[text], DeadEnd::Full.open(), Stdio::piped());
        let why = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(4), "{why}");
        assert!(why.starts_with("host-kvm-shim: standard output: ") && why.lines().count() == 1, "{why}");
        let output = said(&[text], DeadEnd::Unread.open(), Stdio::piped());
        assert_eq!((output.status.code(), output.stderr), (Some(0), Vec::new()), "as with `| head`");
    }
    for end in [DeadEnd::Full, DeadEnd::Unread, DeadEnd::Stuffed] {
        assert_eq!(said(&["--nope"], Stdio::null(), end.open()).status.code(), Some(2), "{end:?}");
        let nowhere = ["--function", "unix:/nonexistent/x"];
        assert_eq!(said(&nowhere, Stdio::null(), end.open()).status.code(), Some(4), "{end:?}");
    }
}

#[test]
fn once_counts_vms_not_visitors() {
    if !soc::has_kvm() {
        return;
    }
    let mut shim = Listening::start("visitors", &["--once"]);
    // One asks and goes.
    let mut soc = shim.connect();
    soc.ok(&Call::HostInfo);
    drop(soc);
    // One is refused a VM, and breaks the channel's rules.
    let mut soc = shim.connect();
    soc.refused(&Call::CreateVm(CreateVm { vcpus: 0, ..CREATE }));
    let lines = soc.function.remote(soc.header.inbox, soc.header.inbox_len as usize);
    lines.store(api_channel::lines::soc::REQUESTS_TAIL, 1 << 40);
    soc.function.raise(0);
    let mut soc = offered_again(soc, 7);
    soc.ok(&Call::CreateVm(CREATE));
    soc.ok(&Call::DestroyVm);
    assert!(soc::wait(shim.child.take().unwrap()).success(), "it ends after its VM");
}

#[test]
fn once_is_over_too_when_the_vm_goes_with_its_soc() {
    if !soc::has_kvm() {
        return;
    }
    let mut shim = Listening::start("gone", &["--once", "--lease", "0"]);
    let mut soc = shim.connect();
    soc.real_mode(1, Irqchip::Full, &COUNT);
    soc.run();
    drop(soc);
    assert!(soc::wait(shim.child.take().unwrap()).success());
}

#[test]
fn the_socket_is_its_user_s_alone() {
    if !soc::has_kvm() {
        return;
    }
    let shim = Listening::start("private", &[]);
    drop(connected(&shim.path));
    assert_eq!(fs::metadata(&shim.path).unwrap().permissions().mode() & 0o777, 0o600);
}

/// How often a thread went to sleep by itself.
fn sleeps(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    line.trim().parse().unwrap()
}

#[test]
fn a_lack_of_descriptors_is_said_once_and_waited_for() {
    if !soc::has_kvm() {
        return;
    }
    let shim = Listening::start("descriptors", &[]);
    shim.connect().ok(&Call::Ping);
    let pid = shim.child.as_ref().unwrap().id();
    let limit = |nofile: &str| {
        let done = Command::new("prlimit").args(["--pid", &pid.to_string(), nofile]).status();
        assert!(done.unwrap().success());
    };
    limit("--nofile=3:");
    let waits = connected(&shim.path);
    // It sleeps between its attempts.
    let (start, deadline) = (sleeps(pid), Instant::now() + soc::PATIENCE);
    while sleeps(pid) < start + 5 {
        assert!(Instant::now() < deadline, "it spins");
        std::thread::sleep(Duration::from_millis(20));
    }
    limit("--nofile=1024:");
    soc::Soc::connect(waits).ok(&Call::Ping);
    let said = shim.kill();
    assert_eq!(said.matches("can't take a connection").count(), 1, "{said}");
}
