//! Consoles that somebody may connect to and leave: a UNIX socket, a pseudo-terminal. One peer at a time; while there is none,
//! the output vanishes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixListener;

use super::pty::Pty;
use crate::control::ListeningSocket;
use crate::devices::{InputWriter, OutputReader};

/// Bytes read at once.
const READ: usize = 4 << 10;
/// Pause after a failed accept or attachment, so that a lack of descriptors doesn't spin.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves one client of the socket after the other until the VM has ended; `socket` is removed then.
pub(super) async fn serve_unix(
    listener: UnixListener,
    socket: ListeningSocket,
    mut output: OutputReader,
    mut input: InputWriter,
    connected: &AtomicBool,
) {
    // Of those in a row the first failure is told: a log must not grow with them.
    let mut failing = false;
    loop {
        match discard_until(listener.accept(), &mut output).await {
            None => break,
            Some(Ok((stream, _))) => {
                connected.store(true, Ordering::Relaxed);
                let ended = exchange(stream, &mut output, &mut input).await;
                connected.store(false, Ordering::Relaxed);
                match ended {
                    Ended::Peer => failing = false,
                    Ended::Vm => break,
                }
            }
            Some(Err(e)) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!("serial: can't accept on {}: {e}; tries on", socket.path().display());
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Lets the output vanish until the VM has ended.
pub(super) async fn discard(mut output: OutputReader) {
    // Nothing else is waited for.
    discard_until(std::future::pending::<()>(), &mut output).await;
}

/// Serves whoever has the pseudo-terminal open, until the VM has ended.
pub(super) async fn serve_pty(pty: Pty, mut output: OutputReader, mut input: InputWriter) {
    let mut failing = false;
    while discard_until(pty.opened(), &mut output).await.is_some() {
        match pty.attach() {
            Ok(peer) => match exchange(peer, &mut output, &mut input).await {
                Ended::Peer => failing = false,
                Ended::Vm => return pty.taken().await,
            },
            Err(e) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!("serial: {}: {e}; tries on", pty.path().display());
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Waits for `event` while the output vanishes; `None`: the VM has ended.
async fn discard_until<T>(event: impl Future<Output = T>, output: &mut OutputReader) -> Option<T> {
    tokio::pin!(event);
    let mut nobodys = Vec::new();
    loop {
        tokio::select! {
            what = &mut event => return Some(what),
            count = output.read(&mut nobodys) => {
                if count == 0 {
                    return None;
                }
                nobodys.clear();
            }
        }
    }
}

enum Ended {
    Peer,
    Vm,
}

/// Moves bytes both ways until the peer goes, or the VM has ended and the peer has all of its output.
async fn exchange<S: AsyncRead + AsyncWrite>(stream: S, output: &mut OutputReader, input: &mut InputWriter) -> Ended {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let outward = async {
        let mut bytes = Vec::new();
        while output.read(&mut bytes).await > 0 {
            if writer.write_all(&bytes).await.is_err() {
                return Ended::Peer;
            }
            bytes.clear();
        }
        Ended::Vm
    };
    let inward = async {
        let mut bytes = [0; READ];
        loop {
            match reader.read(&mut bytes).await {
                Ok(0) | Err(_) => return Ended::Peer,
                // The device is gone; the output's end tells so when all of it is out.
                Ok(count) if input.write_all(&bytes[..count]).await.is_err() => std::future::pending::<()>().await,
                Ok(_) => {}
            }
        }
    };
    tokio::select! {
        ended = outward => ended,
        ended = inward => ended,
    }
}
