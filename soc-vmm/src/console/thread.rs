//! Threads for what may block: files, and standard input and output, which other processes may share and which therefore must
//! not be made non-blocking.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, Builder};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use super::{Escapes, Typed};
use crate::control::{ShutdownCause, VmHandle};
use crate::devices::{InputWriter, OutputReader};
use crate::say::say;

/// Bytes read at once.
const READ: usize = 4 << 10;
/// Reads that may wait for the guest.
const QUEUED_READS: usize = 64;
/// Copies of output that may wait for a slow log; more are lost.
const QUEUED_COPIES: usize = 256;
/// Pause where somebody else made our descriptor non-blocking.
const RETRY: Duration = Duration::from_millis(10);

/// Writes `output` to `sink` until its device is gone; the result closes then. After an error the output vanishes.
pub(super) fn write(mut output: OutputReader, mut sink: File) -> io::Result<oneshot::Receiver<()>> {
    let runtime = Handle::current();
    let (running, written) = oneshot::channel();
    Builder::new().name("console-out".into()).spawn(move || {
        let _running: oneshot::Sender<()> = running;
        let mut bytes = Vec::new();
        while runtime.block_on(output.read(&mut bytes)) > 0 {
            if let Err(e) = write_all(&mut sink, &bytes) {
                tracing::warn!("console output is lost from here on: {e}");
                return;
            }
            bytes.clear();
        }
    })?;
    Ok(written)
}

/// Writes copies of an output to `sink`; where they go, and what closes when the last one is written.
pub(super) fn copy(mut sink: File) -> io::Result<(SyncSender<Vec<u8>>, oneshot::Receiver<()>)> {
    let (sender, receiver) = sync_channel::<Vec<u8>>(QUEUED_COPIES);
    let (running, written) = oneshot::channel();
    Builder::new().name("console-log".into()).spawn(move || {
        let _running: oneshot::Sender<()> = running;
        while let Ok(bytes) = receiver.recv() {
            if let Err(e) = write_all(&mut sink, &bytes) {
                tracing::warn!("the console's log has a gap from here on: {e}");
                return;
            }
        }
    })?;
    Ok((sender, written))
}

fn write_all(sink: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(e) if e.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Hands standard input to the guest until its end, which ends nothing else. With `vm` it is a terminal: Ctrl-A commands are
/// obeyed at any time, and what the guest doesn't take for long is dropped. Without, the input waits for the guest.
pub(super) fn read_stdin(mut input: InputWriter, vm: Option<VmHandle>) -> io::Result<()> {
    let source = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let (typed, mut queue) = mpsc::channel::<Vec<u8>>(QUEUED_READS);
    tokio::spawn(async move {
        while let Some(bytes) = queue.recv().await {
            if input.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
    // Not joined: it is in read(2) until a key is pressed, and ends with the process.
    Builder::new().name("console-in".into()).spawn(move || match vm {
        Some(vm) => read_terminal(source, &typed, &vm),
        None => read_all(source, |bytes| typed.blocking_send(bytes.to_vec()).is_ok()),
    })?;
    Ok(())
}

fn read_terminal(source: File, typed: &mpsc::Sender<Vec<u8>>, vm: &VmHandle) {
    let mut escapes = Escapes::default();
    read_all(source, |bytes| {
        let mut to_guest = Vec::with_capacity(bytes.len());
        for byte in bytes {
            match escapes.take(*byte) {
                Typed::Guest(byte) => to_guest.push(byte),
                Typed::Quit => vm.quit_from_thread(ShutdownCause::HostUi),
                Typed::Help => say(Escapes::HELP),
                Typed::Nothing => {}
            }
        }
        to_guest.is_empty() || !matches!(typed.try_send(to_guest), Err(mpsc::error::TrySendError::Closed(_)))
    });
}

/// Reads until the end, an error, or until `take` has enough.
fn read_all(mut source: File, mut take: impl FnMut(&[u8]) -> bool) {
    let mut bytes = [0; READ];
    loop {
        match source.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) if take(&bytes[..count]) => {}
            Ok(_) => return,
            Err(e) if e.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => {
                tracing::debug!("standard input can't be read: {e}");
                return;
            }
        }
    }
}
