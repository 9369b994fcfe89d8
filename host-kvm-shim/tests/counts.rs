//! What an exit costs the shim while both sides poll: one system call, no allocation.

mod soc;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use api_channel::call::{Call, Irqchip, PostedRange};
use host_kvm_shim::{Ended, Level, Options, Shim};
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use pcie_function::header::Role;
use pcie_function::local::LocalHost;
use soc::Soc;

/// Asks port 0x90 for ever, writes to 0xe0 and to memory that isn't there: in al, 0x90; out 0xe0, al; mov [0x10], al; jmp back
const GUEST: [u8; 14] = [0xb9, 0xff, 0xff, 0x8e, 0xd9, 0xe4, 0x90, 0xe6, 0xe0, 0xa2, 0x10, 0x00, 0xeb, 0xf7];

/// One test at a time: each needs both of a small machine's CPUs.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Counts what threads allocate that don't belong to the test's own side.
struct Counting;

static WATCHED: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static OWN: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if WATCHED.load(Ordering::Relaxed) && !OWN.try_with(Cell::get).unwrap_or(true) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

#[allow(unsafe_code, reason = "a global allocator is an unsafe trait")]
// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's own promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller's own promise.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's own promise.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn an_exit_allocates_nothing() {
    if !soc::has_kvm() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    OWN.set(true);
    let (ours, theirs) = soc::socket_pair();
    let shim = std::thread::spawn(move || {
        let options =
            Options { lease: Duration::ZERO, outlives_function: false, once: true, log: Level::Info, role: Role::Vm };
        Shim::open(options).unwrap().serve(LocalHost::new(theirs).unwrap()).unwrap()
    });
    let mut soc = Soc::connect(ours);
    soc.real_mode(1, Irqchip::Full, &GUEST);
    soc.ok(&Call::PostedRanges(vec![PostedRange { base: 0xe0, len: 1, ports: 1 }]));
    soc.run();
    soc.until("warm", |soc| soc.seen.len() > 100);
    WATCHED.store(true, Ordering::SeqCst);
    soc.until("enough", |soc| soc.seen.len() > 5_000);
    WATCHED.store(false, Ordering::SeqCst);
    assert_eq!(ALLOCATIONS.load(Ordering::SeqCst), 0);
    // The counter counts: a call allocates.
    WATCHED.store(true, Ordering::SeqCst);
    soc.ok(&Call::Statistics);
    WATCHED.store(false, Ordering::SeqCst);
    assert_ne!(ALLOCATIONS.load(Ordering::SeqCst), 0);
    soc.lanes.clear();
    soc.ok(&Call::DestroyVm);
    assert_eq!(shim.join().unwrap(), Ended::Once);
}

/// Counts the system calls of a thread until it has made `most`, and the signals that it got meanwhile.
fn system_calls(thread: Pid, most: u32) -> (BTreeMap<u64, u32>, Vec<Signal>) {
    let (mut calls, mut signals) = (BTreeMap::new(), Vec::new());
    ptrace::seize(thread, ptrace::Options::PTRACE_O_TRACESYSGOOD).unwrap();
    ptrace::interrupt(thread).unwrap();
    let (mut entry, mut seen) = (true, 0);
    loop {
        let signal = match waitpid(thread, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::PtraceSyscall(_)) => {
                if entry {
                    *calls.entry(ptrace::getregs(thread).unwrap().orig_rax).or_default() += 1;
                    seen += 1;
                }
                entry = !entry;
                None
            }
            Ok(WaitStatus::Stopped(_, signal)) => {
                signals.push(signal);
                Some(signal)
            }
            Ok(WaitStatus::PtraceEvent(..)) => None,
            Err(Errno::EINTR) => continue,
            other => panic!("{other:?}"),
        };
        if seen == most && entry {
            ptrace::detach(thread, None).unwrap();
            return (calls, signals);
        }
        ptrace::syscall(thread, signal).unwrap();
    }
}

#[test]
fn an_exit_takes_no_system_call_but_kvm_run() {
    if !soc::has_kvm() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    OWN.set(true);
    let mut soc = Soc::start(&[]);
    let pid = soc.child.as_ref().unwrap().id();
    soc.real_mode(1, Irqchip::Full, &GUEST);
    soc.run();
    soc.until("warm", |soc| soc.seen.len() > 100);
    let thread = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|t| t.unwrap().path());
    let thread =
        thread.into_iter().find(|t| std::fs::read_to_string(t.join("comm")).unwrap().trim() == "vcpu0").unwrap();
    let thread = Pid::from_raw(thread.file_name().unwrap().to_str().unwrap().parse().unwrap());
    const CALLS: u32 = 1_000;
    let (before, slept) = (soc.seen.len(), soc.counter("shim.sleep"));
    let tracer = std::thread::spawn(move || system_calls(thread, CALLS));
    soc.until("traced", |_| tracer.is_finished());
    let (calls, signals) = tracer.join().unwrap();
    let exits = soc.seen.len() - before;
    // 16: ioctl; 232: epoll_wait, where an answer came later than a spin lasts, as happens on a busy machine: each is counted, and may find the
    // last one's signal first.
    // 15: rt_sigreturn, one a kick from outside; an exit makes none.
    let [runs, sleeps, returns] = [16, 232, 15].map(|call| calls.get(&call).copied().unwrap_or(0));
    assert_eq!(runs + sleeps + returns, CALLS, "{calls:?}");
    let kicks = signals.len() <= 2 && signals.iter().all(|signal| *signal == Signal::SIGUSR1);
    assert!(kicks && returns as usize <= signals.len(), "{returns} returns from {signals:?}");
    assert!(exits >= runs as usize - 2, "{exits} exits by {runs} KVM_RUN");
    let slept = soc.counter("shim.sleep") - slept;
    assert!(u64::from(sleeps) <= 2 * slept + 2, "{sleeps} epoll_wait in {slept} sleeps");
    assert!(soc.shut_down().success());
}
