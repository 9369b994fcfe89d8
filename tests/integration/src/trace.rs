//! One thread of another process, stopped at each of its system calls or after each of its instructions.

use std::collections::HashMap;
use std::fs;

use nix::libc::user_regs_struct;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// A traced thread, running between two looks; it goes on alone when this is dropped. What it needs of others, they must give it:
/// trace in a thread of its own.
#[derive(Debug)]
pub struct Traced {
    thread: Pid,
    /// Bytes at addresses where it stopped before an instruction.
    code: HashMap<u64, [u8; CODE]>,
    /// A signal that it was stopped for, and gets when it goes on.
    signal: Option<Signal>,
}

/// As many bytes as the longest instruction has, in words.
const CODE: usize = 16;

/// An instruction about to be executed.
#[derive(Clone, Copy, Debug)]
pub struct Instruction {
    /// Registers before it.
    pub registers: user_regs_struct,
    /// Its bytes, and some that follow.
    pub bytes: [u8; CODE],
}

/// A system call about to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syscall {
    /// Its number.
    pub number: u64,
    /// Its second argument: the request of an ioctl.
    pub second: u64,
}

impl Syscall {
    /// Whether it runs the guest.
    pub fn runs_guest(&self) -> bool {
        const KVM_RUN: u64 = 0xae80;
        self.is_ioctl() && self.second == KVM_RUN
    }

    /// Whether it is an ioctl.
    pub fn is_ioctl(&self) -> bool {
        self.number == nix::libc::SYS_ioctl as u64
    }

    /// Whether it sleeps until a descriptor is ready.
    pub fn sleeps(&self) -> bool {
        let number = self.number as i64;
        number == nix::libc::SYS_epoll_wait || number == nix::libc::SYS_epoll_pwait
    }
}

impl Traced {
    /// Stops the thread `name` of process `pid`.
    ///
    /// # Panics
    /// There is none, or this process may not trace it.
    pub fn thread(pid: u32, name: &str) -> Self {
        let named = |task: &fs::DirEntry| fs::read_to_string(task.path().join("comm")).is_ok_and(|n| n.trim() == name);
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process is there");
        let task = tasks.flatten().find(named).unwrap_or_else(|| panic!("no thread {name} in {pid}"));
        let thread = task.file_name().to_str().and_then(|id| id.parse().ok()).expect("a thread's number");
        let mut traced = Self { thread: Pid::from_raw(thread), code: HashMap::new(), signal: None };
        ptrace::seize(traced.thread, Options::PTRACE_O_TRACESYSGOOD).expect("this process may trace its children");
        ptrace::interrupt(traced.thread).expect("a seized thread can be stopped");
        traced.wait();
        traced
    }

    /// Lets it run up to its next system call.
    pub fn syscall(&mut self) -> Syscall {
        loop {
            ptrace::syscall(self.thread, self.signal.take()).expect("the thread goes on");
            if self.wait() && self.enters() {
                let registers = self.registers();
                return Syscall { number: registers.orig_rax, second: registers.rsi };
            }
        }
    }

    /// Lets it execute one instruction; the next one.
    pub fn instruction(&mut self) -> Instruction {
        ptrace::step(self.thread, self.signal.take()).expect("the thread goes on");
        self.wait();
        let registers = self.registers();
        let thread = self.thread;
        let read = |at: u64| {
            let word = ptrace::read(thread, std::ptr::without_provenance_mut(at as usize)).expect("code can be read");
            word.to_le_bytes()
        };
        let bytes = self.code.entry(registers.rip).or_insert_with(|| {
            let words = [read(registers.rip), read(registers.rip + 8)];
            words.concat().try_into().expect("two words")
        });
        Instruction { registers, bytes: *bytes }
    }

    /// Waits for its next stop; whether that is one for a system call.
    fn wait(&mut self) -> bool {
        match waitpid(self.thread, Some(WaitPidFlag::__WALL)).expect("a traced thread can be waited for") {
            WaitStatus::PtraceSyscall(_) => return true,
            // A step's own trap is no signal for the thread.
            WaitStatus::Stopped(_, signal) if signal != Signal::SIGTRAP => self.signal = Some(signal),
            WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => {}
            ended => panic!("the traced thread ended: {ended:?}"),
        }
        false
    }

    /// Whether the stop is at a system call's beginning, not at its end.
    fn enters(&self) -> bool {
        let info = ptrace::syscall_info(self.thread).expect("a stop at a system call");
        info.op == nix::libc::PTRACE_SYSCALL_INFO_ENTRY
    }

    fn registers(&self) -> user_regs_struct {
        ptrace::getregs(self.thread).expect("a stopped thread's registers")
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // It may have ended.
        let _ = ptrace::detach(self.thread, self.signal.take());
    }
}
