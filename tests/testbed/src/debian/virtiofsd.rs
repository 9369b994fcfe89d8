//! virtiofsd: a directory of this machine as a guest's file system. It speaks vhost-user on a UNIX socket.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::fetch;
use crate::network::is_listened_on;
use crate::process::Child;

use super::command;

/// How long it may take to listen.
const LIMIT: Duration = Duration::from_secs(120);
/// Of Debian 13: Debian 12 has the one of QEMU 7.2 alone, which ended there.
const VIRTIOFSD: &str = "virtiofsd";

/// Fetches virtiofsd; where it is unpacked.
///
/// # Errors
/// [`fetch::Error`].
pub fn virtiofsd() -> Result<PathBuf, fetch::Error> {
    fetch::part(VIRTIOFSD, "1", "virtiofsd of Debian (4 MB)", |into| {
        fetch::trixie()?.unpack_closure(None, &[VIRTIOFSD], &[], into)
    })
}

/// A running virtiofsd, for one VMM's connection: it ends with that, or with this handle.
#[derive(Debug)]
pub struct Virtiofsd {
    socket: PathBuf,
    // Kept for its end.
    _process: Child,
}

impl Virtiofsd {
    /// Starts it on this machine for the directory `shared`, listening at `socket`. It needs no privileges: files are this user's.
    ///
    /// # Errors
    /// It can't be fetched or started, or doesn't listen.
    pub fn start(shared: &Path, socket: PathBuf) -> Result<Self, fetch::Error> {
        let dir = virtiofsd()?;
        let mut virtiofsd = command(&dir, "usr/libexec/virtiofsd");
        virtiofsd
            .args(["--sandbox", "none", "--log-level", "error", "--shared-dir"])
            .arg(shared)
            .arg("--socket-path")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut process = Child::spawn(virtiofsd)?;
        let end = Instant::now() + LIMIT;
        while !is_listened_on(&socket, None) {
            let status = process.wait(Duration::from_millis(20)).map_err(|e| fetch::Error::file(&socket, e))?;
            if status.is_some() || Instant::now() >= end {
                return Err(fetch::Error::file(&socket, io::ErrorKind::NotConnected.into()));
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
