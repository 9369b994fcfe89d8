//! The embedded default: a host-kvm-shim of our own on this machine.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use pcie_function::FunctionError;
use pcie_function::header::Role;
use pcie_function::local::LocalSoc;
use tokio::process::{Child, Command};

use crate::cli::{ExitStatus, Failure};

/// How long the shim may take to end once its function's socket is closed.
const PATIENCE: Duration = Duration::from_secs(10);

/// The exit status of a shim that can't serve, and has said why on standard error.
const UNUSABLE: i32 = 4;

/// A shim that ends with its VM.
#[derive(Debug)]
pub(crate) struct Shim(Child);

/// Starts a shim and opens the function between it and this process.
///
/// # Errors
/// The program is not there, or it gave up: then its own line on standard error says why.
pub(crate) async fn start(role: Role) -> Result<(LocalSoc, Shim), Failure> {
    let os = |what| move |e| Failure::of(ExitStatus::Unavailable, "--function local", &FunctionError::Os(what, e));
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(os("make a socket pair"))?;
    let program = program();
    let mut command = Command::new(&program);
    command.args(["--function", "fd:0", "--once"]);
    if role == Role::Host {
        command.args(["--role", "host"]);
    }
    let mut child = command
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| Failure::of(ExitStatus::Unavailable, &format!("can't start {}", program.display()), &e))?;
    // The command keeps a copy of the shim's end of the socket, and with it open nobody would see the shim hang up.
    drop(command);
    match tokio::task::block_in_place(|| LocalSoc::new(ours)) {
        Ok(function) => Ok((function, Shim(child))),
        Err(e) => {
            let ended = tokio::time::timeout(PATIENCE, child.wait()).await;
            Err(match ended.ok().and_then(Result::ok).map(|status| (status, status.code())) {
                Some((_, Some(UNUSABLE))) => Failure::told(ExitStatus::Unavailable),
                Some((status, _)) => Failure::new(
                    ExitStatus::Unavailable,
                    format!("--function local: {} ended before it served ({status})", program.display()),
                ),
                None => Failure::of(ExitStatus::Unavailable, "--function local", &e),
            })
        }
    }
}

impl Shim {
    /// Waits for the shim's end; the function must be dropped by now.
    ///
    /// # Errors
    /// It doesn't end, and was killed.
    pub(crate) async fn end(&mut self) -> Result<(), Failure> {
        match tokio::time::timeout(PATIENCE, self.0.wait()).await {
            Ok(_) => Ok(()),
            Err(_) => {
                // Killed at the latest when it is dropped.
                let _ = self.0.kill().await;
                Err(Failure::new(ExitStatus::Failed, "host-kvm-shim did not end with its VM and was killed"))
            }
        }
    }
}

/// The shim beside this program, else the one on the path.
fn program() -> PathBuf {
    const NAME: &str = "host-kvm-shim";
    let beside = std::env::current_exe().ok().map(|exe| exe.with_file_name(NAME));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| NAME.into())
}
