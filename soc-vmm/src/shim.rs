//! The embedded default: a host-kvm-shim of our own on this machine.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{ExitStatus as Ended, Stdio};
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use pcie_function::FunctionError;
use pcie_function::header::Role;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use crate::cli::{ExitStatus, Failure};

/// How long the shim may take to end once its function's socket is closed.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long what a shim that has ended said last may take.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Most bytes of what it said that are passed on.
const MOST_WORDS: usize = 1024;

/// The exit status of a shim that can't serve, and has said why on standard error.
const UNUSABLE: i32 = 4;

/// A shim that ends with its VM; killed when dropped.
#[derive(Debug)]
pub(crate) struct Shim {
    child: Child,
    program: PathBuf,
    /// What it says on standard error, once it has ended: it goes with this side's own line, or, where all is well, nowhere.
    said: JoinHandle<Vec<u8>>,
}

impl Shim {
    /// Starts a shim; what comes second is this side's end of its function's socket.
    ///
    /// # Errors
    /// The program is not there, or can't be started.
    pub(crate) fn start(role: Role) -> Result<(Self, OwnedFd), Failure> {
        let os = |what| move |e| Failure::of(ExitStatus::Unavailable, "--function local", &FunctionError::Os(what, e));
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(os("make a socket pair"))?;
        let program = program();
        let mut command = Command::new(&program);
        command.args(["--function", "fd:0", "--once"]);
        if role == Role::Host {
            command.args(["--role", "host"]);
        }
        // The command keeps a copy of the shim's end of the socket, and with it open nobody would see the shim hang up: it is gone at
        // the end of this function.
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = without_ends(|| command.spawn())
            .map_err(|e| Failure::of(ExitStatus::Unavailable, &format!("can't start {}", program.display()), &e))?;
        let said = tokio::spawn(first_bytes(child.stderr.take()));
        Ok((Self { child, program, said }, ours))
    }

    /// Waits for the shim's end; the function must be dropped by now. Where it was lost, the shim's end tells why.
    ///
    /// # Errors
    /// `outcome`'s; or the shim doesn't end, and was killed.
    pub(crate) async fn end<T>(mut self, outcome: Result<T, Failure>) -> Result<T, Failure> {
        let ended = self.wait().await;
        match (outcome, ended) {
            (Err(failure), Some(ended)) if failure.is_loss() && !ended.success() => {
                Err(failure.with(&self.last_words(ended).await))
            }
            (Ok(_), None) => {
                Err(Failure::new(ExitStatus::Failed, "host-kvm-shim did not end with its VM and was killed"))
            }
            (outcome, _) => outcome,
        }
    }

    /// Why no function came of it, which failed with `error`.
    pub(crate) async fn failed(mut self, error: &FunctionError) -> Failure {
        match self.wait().await {
            Some(ended) => {
                let words = self.last_words(ended).await;
                Failure::new(ExitStatus::Unavailable, format!("--function local: {words}"))
            }
            None => Failure::of(ExitStatus::Unavailable, "--function local", error),
        }
    }

    /// How it ended; `None`: it didn't, and was killed.
    async fn wait(&mut self) -> Option<Ended> {
        match tokio::time::timeout(PATIENCE, self.child.wait()).await {
            Ok(ended) => ended.ok(),
            Err(_) => {
                // Killed at the latest when it is dropped.
                let _ = self.child.kill().await;
                None
            }
        }
    }

    /// What it said, and how it ended where that tells more.
    async fn last_words(&mut self, ended: Ended) -> String {
        let said = tokio::time::timeout(LAST_WORDS, &mut self.said).await.ok().and_then(Result::ok).unwrap_or_default();
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        let program = self.program.display();
        match (said.is_empty(), ended.code()) {
            (true, _) => format!("{program} ended by itself: {ended}"),
            (false, Some(UNUSABLE)) => said,
            (false, _) => format!("{program} ended by itself: {ended}: {said}"),
        }
    }
}

/// Spawns with the signals blocked that ask a process to end, which the child inherits. One that is sent to all of a terminal's job, or of a
/// service, is for this side to obey: the shim ignores them by itself, once it has come so far.
fn without_ends<T>(spawn: impl FnOnce() -> T) -> T {
    let ends = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    // This thread's alone: another one takes what comes meanwhile. Neither call fails with a mask that there is.
    let before = ends.thread_swap_mask(SigmaskHow::SIG_BLOCK);
    let spawned = spawn();
    if let Ok(before) = before {
        let _ = before.thread_set_mask();
    }
    spawned
}

/// The first bytes of a stream, which is read to its end.
async fn first_bytes(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let (mut kept, mut bytes) = (Vec::new(), [0; 1024]);
    if let Some(mut stream) = stream {
        // An error is an end.
        while let Ok(count @ 1..) = stream.read(&mut bytes).await {
            let room = MOST_WORDS - kept.len();
            kept.extend_from_slice(&bytes[..count.min(room)]);
        }
    }
    kept
}

/// The shim beside this program, else the one on the path.
fn program() -> PathBuf {
    const NAME: &str = "host-kvm-shim";
    let beside = std::env::current_exe().ok().map(|exe| exe.with_file_name(NAME));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| NAME.into())
}
