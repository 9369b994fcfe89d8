//! Going on in the background: QEMU's `-daemonize`.
//!
//! This process starts its program again with the same arguments, waits until that says that it is ready, and ends. A fork of its own would need
//! `unsafe`, and who waits for a daemon can't tell the two apart.

use std::ffi::OsString;
use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, pipe2, setsid};

use crate::cli::{ExitStatus, Failure};
use crate::fds;

/// Tells the process in the background on which descriptor it says that it is ready.
const VARIABLE: &str = "OUTBOARD_READY";

/// Which of the two a process is.
#[derive(Debug)]
pub enum Side {
    /// The daemon is ready, or has failed: this process ends so.
    Front(u8),
    /// The daemon.
    Back(Ready),
}

/// Says that the daemon is ready.
#[derive(Debug)]
pub struct Ready(OwnedFd);

/// Becomes a process in the background. To be called before there are threads.
///
/// # Errors
/// It can't be started.
pub fn detach() -> Result<Side, Failure> {
    let failed = |e: &dyn std::error::Error| Failure::of(ExitStatus::Unavailable, "-daemonize", e);
    if let Some(number) = std::env::var(VARIABLE).ok().and_then(|number| number.parse().ok()) {
        let ready = fds::inherit(number).map_err(|e| failed(&e))?;
        setsid().map_err(|e| failed(&e))?;
        return Ok(Side::Back(Ready(ready)));
    }
    front().map(Side::Front).map_err(|e| failed(&e))
}

/// Starts the daemon and waits for it; how this process ends.
fn front() -> io::Result<u8> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
    // This process has one thread and starts this one program.
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_else(|| OsString::from("soc-vmm"));
    let mut command = Command::new("/proc/self/exe");
    command.arg0(name).args(args).env(VARIABLE, theirs.as_raw_fd().to_string());
    let mut daemon = command.stdin(Stdio::null()).spawn()?;
    drop(theirs);
    let mut said = [0];
    match File::from(ours).read(&mut said)? {
        // It has said why on the standard error that it shares with this process.
        0 => {
            let status = daemon.wait()?;
            Ok(status.code().or(status.signal().map(|signal| 128 + signal)).map_or(1, |code| code as u8))
        }
        _ => Ok(0),
    }
}

impl Ready {
    /// Lets go of the standard streams, which who started this waits to see closed, and of the directory; then who waits goes on.
    ///
    /// # Errors
    /// There is no /dev/null.
    pub fn say(self) -> io::Result<()> {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        std::env::set_current_dir("/")?;
        File::from(self.0).write_all(&[1])
    }
}

/// A file that has this process's id; it goes with this handle.
#[derive(Debug)]
pub struct PidFile(PathBuf);

impl PidFile {
    /// Writes it, if `check` has nothing against the file that was there.
    ///
    /// # Errors
    /// It can't be, or is no file of its own: a device would be removed at the end.
    pub fn write(path: &Path, check: impl FnOnce(&File) -> Result<(), Failure>) -> Result<Self, Failure> {
        let failed = |why: &dyn Display| {
            Failure::new(
                ExitStatus::Usage,
                format!("-pidfile: can't write {}: {why}; name a file of its own", path.display()),
            )
        };
        // Without O_NONBLOCK, open(2) of a FIFO waits for its reader.
        let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
        let mut options = OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(false).custom_flags(flags).open(path).map_err(|e| failed(&e))?;
        if !file.metadata().map_err(|e| failed(&e))?.is_file() {
            return Err(failed(&"it is no regular file"));
        }
        check(&file)?;
        // The directory may be another one by the time that it is removed.
        let written = Self(std::path::absolute(path).unwrap_or_else(|_| path.to_owned()));
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(|e| failed(&e))?;
        Ok(written)
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Whoever looks for it finds that the process is gone.
        let _ = std::fs::remove_file(&self.0);
    }
}
