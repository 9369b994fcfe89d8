//! Work that may take long, beside the threads that serve sockets.
//!
//! Each piece has a thread of its own. tokio's threads for such work won't do: where the process may have no more, tokio panics, and a VM
//! must not end because a disk can't be added; and the end of a VM would wait for a peer that hangs.

use std::io;
use std::thread::Builder;

use tokio::sync::oneshot;

use super::QmpError;

/// Does it and gives what came of it.
pub(super) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, QmpError> + Send + 'static,
) -> Result<T, QmpError> {
    let (sender, receiver) = oneshot::channel();
    // Who asked may have gone.
    start(move || drop(sender.send(work()))).map_err(|e| {
        QmpError::generic(format!("no thread is left for it (look at the limits of the VM's process): {e}"))
    })?;
    receiver.await.unwrap_or_else(|_| Err(QmpError::generic("it was not finished; see the VM's log")))
}

/// Drops what may take its time to close.
pub(super) fn drop_aside(it: impl Send + 'static) {
    // Where there is no thread for it, it is gone at once.
    let _ = start(move || drop(it));
}

fn start(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    Builder::new().name("command".into()).spawn(work).map(drop)
}
