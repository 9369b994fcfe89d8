//! What a process can no longer do once it has confined itself. A program of its own: it starts itself once for each attempt.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::mpsc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, Uid, setuid};
use soc_vmm::block::{Aio, Buffer, ImageSpec, Job, Operation, open, open_queue};
use soc_vmm::sandbox::{SandboxSpec, may_spawn};

/// By which the other process is told what to try.
const ATTEMPT: &str = "OUTBOARD_TEST_ATTEMPT";

#[test]
fn what_is_denied_ends_the_process_and_the_rest_goes_on() {
    if let Ok(attempt) = std::env::var(ATTEMPT) {
        return try_it(&attempt);
    }
    let ends = |attempt: &str| run(attempt).signal();
    for attempt in ["exec", "exec elsewhere", "setuid", "ptrace", "fork"] {
        assert_eq!(ends(attempt), Some(Signal::SIGSYS as i32), "{attempt}");
    }
    for attempt in ["affinity", "threads", "allowed exec"] {
        let ended = run(attempt);
        assert!(ended.success(), "{attempt}: {ended}");
    }
}

fn run(attempt: &str) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let test = "what_is_denied_ends_the_process_and_the_rest_goes_on";
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(ATTEMPT, attempt);
    command.stdout(std::process::Stdio::null()).status().unwrap()
}

fn try_it(attempt: &str) {
    // A thread from before is confined too.
    let (confined, wait) = mpsc::channel();
    let before = std::thread::spawn(move || {
        wait.recv().unwrap();
        let _ = Command::new("/bin/true").status();
    });
    if attempt == "allowed exec" {
        SandboxSpec::QEMU.apply().unwrap();
        assert!(may_spawn());
        confined.send(()).unwrap();
        before.join().unwrap();
        assert!(Command::new("/bin/true").status().unwrap().success());
        return;
    }
    SandboxSpec::STRICT.apply().unwrap();
    assert!(!may_spawn());
    assert!(nix::sys::prctl::get_no_new_privs().unwrap());
    match attempt {
        "exec elsewhere" => {
            confined.send(()).unwrap();
            let _ = before.join();
        }
        "exec" => drop(nix::unistd::execv(c"/bin/true", &[c"true"])),
        "setuid" => drop(setuid(Uid::current())),
        "ptrace" => drop(ptrace::attach(Pid::parent())),
        "fork" => drop(Command::new("/bin/true").status()),
        "affinity" => {
            let own = Pid::from_raw(0);
            let everywhere = sched_getaffinity(own).unwrap();
            assert_eq!(sched_setaffinity(own, &everywhere), Err(Errno::EPERM));
            assert!((0..CpuSet::count()).any(|cpu| everywhere.is_set(cpu).unwrap_or_default()));
        }
        "threads" => threads_and_disks_work(),
        _ => panic!("no attempt {attempt}"),
    }
}

/// Threads start, tokio's too, and requests of a disk go through io_uring.
fn threads_and_disks_work() {
    assert_eq!(std::thread::spawn(|| 42).join().unwrap(), 42);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    assert_eq!(runtime.block_on(async { tokio::task::spawn_blocking(|| 43).await.unwrap() }), 43);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [7; 4096]).unwrap();
    for aio in [Aio::IoUring, Aio::Threads] {
        let image = open(&ImageSpec::new(&path)).unwrap();
        let mut queue = open_queue(image, aio, 4).unwrap();
        let mut buffer = Buffer::default();
        buffer.front(4096).fill(0);
        queue.add(Job { token: 1, operation: Operation::Read, offset: 0, len: 4096, buffer });
        let mut done = Vec::new();
        while done.is_empty() {
            if !queue.commit().unwrap() {
                poll(&mut [PollFd::new(queue.fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
            }
            queue.take(&mut done);
        }
        assert!(done[0].result.is_ok());
        assert_eq!(done[0].buffer.front(4096), [7; 4096]);
    }
}
