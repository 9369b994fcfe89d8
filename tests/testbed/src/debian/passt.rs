//! passt: a guest's network without privileges. It speaks to a VMM on a UNIX socket and to the world by sockets of its own.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::fetch::Error;
use crate::process::Child;

use super::{PASST, Tools, command};

/// How long it may take to listen.
const LIMIT: Duration = Duration::from_secs(30);

/// A running passt, for one VMM's connection: it ends with that, or with this handle.
#[derive(Debug)]
pub struct Passt {
    socket: PathBuf,
    // Kept for its end.
    _process: Child,
}

impl Passt {
    /// What the guest is to reach this machine's loopback interface by: its router.
    pub const HOST: &str = "10.0.2.2";

    /// Starts it, listening at `socket`.
    ///
    /// # Errors
    /// It can't be started, or doesn't listen.
    pub fn start(tools: &Tools, socket: PathBuf) -> Result<Self, Error> {
        let mut passt = command(&tools.dir.join(PASST), "usr/bin/passt");
        // Addresses of its own, so that it doesn't matter which ones this machine has, if any.
        passt
            .args(["--foreground", "--quiet", "--one-off", "--ipv4-only", "--no-dhcp-dns", "--dns", "none"])
            .args(["--address", "10.0.2.15", "--netmask", "24", "--gateway", Self::HOST, "--socket"])
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut process = Child::spawn(passt)?;
        let end = Instant::now() + LIMIT;
        while !socket.exists() {
            let status = process.wait(Duration::from_millis(20)).map_err(|e| Error::file(&socket, e))?;
            if status.is_some() || Instant::now() >= end {
                return Err(Error::file(&socket, io::ErrorKind::NotConnected.into()));
            }
        }
        Ok(Self { socket, _process: process })
    }

    /// Where a VMM connects.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}
