//! A user's own network: a passt that is the VM's, and ends with it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use super::{OpenError, StreamBackend};
use crate::sandbox;

/// The program, on the path.
const PROGRAM: &str = "passt";

/// A passt that runs; killed and waited for when it is dropped.
#[derive(Debug)]
pub(super) struct Passt(Child);

/// Starts one, whose only client is the back end.
///
/// # Errors
/// It is not there, or can't be started.
pub(super) fn start() -> Result<StreamBackend, OpenError> {
    let failed = |why: io::Error| OpenError::Passt { why };
    if !sandbox::may_spawn() {
        return Err(failed(io::Error::other("this process may start no others (-sandbox spawn=deny)")));
    }
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    // It takes over its standard input as the connection, and ends with that.
    let mut command = Command::new(PROGRAM);
    command.args(["--foreground", "--quiet", "--fd", "0"]);
    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::inherit());
    let child = command.spawn().map_err(failed)?;
    // The command had its end of the socket, and with that open nobody would see passt hang up.
    drop(command);
    let backend = StreamBackend::new("passt".into(), ours).map_err(failed)?;
    Ok(backend.with_peer(Passt(child)))
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
