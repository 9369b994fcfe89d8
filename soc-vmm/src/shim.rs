//! The embedded default: a host-kvm-shim of our own on this machine.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use pcie_function::local::LocalSoc;
use tokio::process::{Child, Command};

use crate::cli::{ExitStatus, Failure};

/// How long the shim may take to end once its function's socket is closed.
const PATIENCE: Duration = Duration::from_secs(10);

/// A shim that ends with its VM.
#[derive(Debug)]
pub(crate) struct Shim(Child);

/// Starts a shim and opens the function between it and this process.
///
/// # Errors
/// The program is not there, or it gave up: then its own line says why.
pub(crate) fn start() -> Result<(LocalSoc, Shim), Failure> {
    let cant = |why: &dyn std::error::Error| Failure::of(ExitStatus::Unavailable, "--function local", why);
    let (ours, theirs) = crate::vm::shim_socket().map_err(|e| cant(&e))?;
    let program = program();
    let child = Command::new(&program)
        .args(["--function", "fd:0", "--once"])
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| Failure::of(ExitStatus::Unavailable, &format!("can't start {}", program.display()), &e))?;
    let function = LocalSoc::new(ours).map_err(|e| cant(&e))?;
    Ok((function, Shim(child)))
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
