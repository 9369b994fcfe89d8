//! After the privileged start: no privileges, no files, no network, no exec; each kind of thread has its own list of calls.
//!
//! A call that is not on its thread's list fails with EPERM. It does not kill the process: an error on a rare path is reported like
//! any other, and the guest goes on.
//!
//! `unsafe`: capset and close_range have no wrapper.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use nix::errno::Errno;
use nix::libc::{self, c_long};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

use crate::error::ServeError;

/// The filter that vCPU threads add to the one that they inherit.
#[derive(Clone)]
pub(crate) struct VcpuFilter(Arc<BpfProgram>);

impl VcpuFilter {
    /// Confines the calling thread.
    pub(crate) fn apply(&self) -> Result<(), seccompiler::Error> {
        apply_filter(&self.0)
    }
}

/// Closes every descriptor but the standard ones and `keep`: whatever started this process may have left some open.
///
/// Call it before anything is opened: what is closed here must not have an owner.
pub fn close_inherited(keep: Option<i32>) {
    let close = |from: u32, to: u32| {
        if from <= to {
            // SAFETY: numbers alone; the caller says that nothing owns these descriptors.
            unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        }
    };
    match keep.and_then(|fd| u32::try_from(fd).ok()).filter(|&fd| fd > 2) {
        Some(fd) => {
            close(3, fd - 1);
            close(fd + 1, u32::MAX);
        }
        None => close(3, u32::MAX),
    }
}

/// Confines this process and its main thread; threads started from now on inherit that.
pub(crate) fn confine() -> Result<VcpuFilter, ServeError> {
    let os = |what| move |errno| ServeError::Os(what, errno);
    // Pinned guest memory counts against it once CAP_IPC_LOCK is gone.
    let (_, most) = getrlimit(Resource::RLIMIT_MEMLOCK).map_err(os("read a resource limit"))?;
    let unlimited = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    unlimited.or_else(|_| setrlimit(Resource::RLIMIT_MEMLOCK, most, most)).map_err(os("raise a resource limit"))?;
    // A vCPU takes four descriptors or five, and the usual soft limit is for programs that use select(2).
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).map_err(os("read a resource limit"))?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).map_err(os("raise a resource limit"))?;
    nix::sys::prctl::set_no_new_privs().map_err(os("give up new privileges"))?;
    drop_capabilities().map_err(os("drop capabilities"))?;
    let seccomp = |error: &dyn std::fmt::Display| {
        ServeError::Kvm(format!("seccomp can't be used: {error}; use a kernel with CONFIG_SECCOMP_FILTER"))
    };
    let vcpu = compile(&[&VCPU], false).map_err(|e| seccomp(&e))?;
    let main = compile(&[&VCPU, &MAIN], true).map_err(|e| seccomp(&e))?;
    let no_clone3 = without_clone3().map_err(|e| seccomp(&e))?;
    // Of two filters that refuse a call, the error of the one applied last counts.
    apply_filter(&main).and_then(|()| apply_filter(&no_clone3)).map_err(|e| seccomp(&e))?;
    Ok(VcpuFilter(Arc::new(vcpu)))
}

/// Empties the thread's permitted, effective and inheritable sets: capabilities(7).
fn drop_capabilities() -> Result<(), Errno> {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let data = [0u32; 6];
    // SAFETY: the structures of version 3 are two and six words; both outlive the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

/// What a vCPU's thread calls: KVM, its sleep, doorbells and wake-ups by eventfd, the allocator off the exit path, its end, and what a
/// function's SIGBUS handler needs.
const VCPU: [c_long; 24] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_epoll_wait,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What the API thread calls beyond that: threads, guest memory, polling, a local function's socket.
const MAIN: [c_long; 35] = [
    libc::SYS_accept4,
    libc::SYS_clock_nanosleep,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_geteuid,
    libc::SYS_getrandom,
    libc::SYS_getsockopt,
    libc::SYS_getuid,
    libc::SYS_lseek,
    libc::SYS_mbind,
    libc::SYS_memfd_create,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_prlimit64,
    libc::SYS_recvmsg,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_seccomp,
    libc::SYS_sendmsg,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_tkill,
];

/// Types of ioctl, in bits 8–15 of a request: KVM's, VFIO's and userfaultfd's.
const IOCTL_TYPES: [u64; 3] = [0xae, 0x3b, 0xaa];

/// The filter of a list of calls; `threads` may be started.
///
/// A filter that looks at arguments is run at every call: 25–45 ns at each KVM_RUN, where a call that is always allowed costs next to nothing.
/// So requests are looked at only where a descriptor is a terminal, to which they could do harm; all others that a shim has are KVM's and
/// VFIO's own, or obey nobody without capabilities.
fn compile(calls: &[&[c_long]], threads: bool) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<_, _> = calls.iter().copied().flatten().map(|&call| (call, Vec::new())).collect();
    let condition = |arg, op, value| SeccompCondition::new(arg, SeccompCmpArgLen::Dword, op, value);
    let mut requests = Vec::new();
    if has_terminal() {
        for kind in IOCTL_TYPES {
            requests.push(SeccompRule::new(vec![condition(1, SeccompCmpOp::MaskedEq(0xff00), kind << 8)?])?);
        }
    }
    rules.insert(libc::SYS_ioctl, requests);
    // A thread moves itself alone.
    let itself = SeccompRule::new(vec![condition(0, SeccompCmpOp::Eq, 0)?])?;
    rules.insert(libc::SYS_sched_setaffinity, vec![itself]);
    if threads {
        // Threads, no processes.
        let thread = SeccompCmpOp::MaskedEq(libc::CLONE_THREAD as u64);
        rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![condition(0, thread, libc::CLONE_THREAD as u64)?])?]);
    }
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

fn has_terminal() -> bool {
    use std::io::IsTerminal;
    std::io::stdin().is_terminal() || std::io::stdout().is_terminal() || std::io::stderr().is_terminal()
}

/// clone3 hides its flags from a filter. The C library falls back to clone where the kernel doesn't know it.
fn without_clone3() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = [(libc::SYS_clone3, Vec::new())].into_iter().collect();
    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, unknown, TargetArch::x86_64)?.try_into()
}
