//! The shim on the other end: the program, or its library in a thread.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host_kvm_shim::args::{self, Command as Asked};
use pcie_function::HostFunction;
use pcie_function::local::LocalHost;

use super::{PATIENCE, socket_pair};

/// A running shim. A process is killed when this is dropped; a thread ends when the function hangs up.
pub(super) enum Shim {
    Process(Child),
    Thread(Option<JoinHandle<()>>),
    /// On another machine.
    Elsewhere,
}

/// What every shim of a test is told.
const ARGS: [&str; 3] = ["--function", "fd:0", "--once"];

impl Shim {
    /// Starts `program`; gives the SoC's end of its function's socket.
    pub(super) fn process(program: PathBuf, more: &[&str]) -> (Self, OwnedFd) {
        let (ours, theirs) = socket_pair();
        let mut command = Command::new(program);
        let child = command.args(ARGS).args(more).stdin(Stdio::from(theirs)).spawn().expect("host-kvm-shim starts");
        // The command keeps the shim's end of the socket open.
        drop(command);
        (Self::Process(child), ours)
    }

    /// Serves one VM in a thread, on the function that `wrap` makes of a local one.
    pub(super) fn thread<F: HostFunction + 'static>(
        wrap: impl FnOnce(LocalHost) -> F + Send + 'static,
    ) -> (Self, OwnedFd) {
        let (ours, theirs) = socket_pair();
        let Ok(Asked::Serve { options, .. }) = args::parse(ARGS.map(Into::into)) else {
            panic!("arguments of the shim")
        };
        let serve = move || {
            let mut shim = host_kvm_shim::Shim::open(options).expect("KVM");
            let function = LocalHost::new(theirs).expect("a local function");
            shim.serve(wrap(function)).expect("the shim serves");
        };
        let thread = std::thread::Builder::new().name("shim".into()).spawn(serve).expect("a thread");
        (Self::Thread(Some(thread)), ours)
    }

    pub(super) fn pid(&self) -> u32 {
        match self {
            Self::Process(child) => child.id(),
            Self::Thread(_) => std::process::id(),
            Self::Elsewhere => panic!("the shim runs elsewhere"),
        }
    }

    /// Waits for its end.
    pub(super) fn end(&mut self) -> Option<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self {
                Self::Process(child) => {
                    let ended = child.try_wait().expect("the shim can be waited for");
                    if ended.is_some() {
                        return ended;
                    }
                }
                Self::Elsewhere => return None,
                Self::Thread(thread) => {
                    if let Some(thread) = thread.take_if(|thread| thread.is_finished()) {
                        thread.join().expect("the shim's thread");
                        return None;
                    }
                }
            }
            assert!(Instant::now() < deadline, "the shim does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        if let Self::Process(child) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
