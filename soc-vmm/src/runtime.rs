//! tokio's runtime, where it can be had.

use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc;

use tokio::runtime::{Builder, Runtime};

use crate::cli::{ExitStatus, Failure};

/// What the runtime needs at the least: tokio panics without.
const DESCRIPTORS: usize = 12;
const ADDRESSES: usize = 32 << 20;

/// A runtime with so many threads.
///
/// # Errors
/// The process may not have what the runtime needs.
pub(crate) fn runtime(threads: usize) -> Result<Runtime, Failure> {
    let built =
        has_room(threads).and_then(|()| Builder::new_multi_thread().worker_threads(threads).enable_all().build());
    built.map_err(|e| Failure::of(ExitStatus::Unavailable, "can't start (look at the limits of this process)", &e))
}

/// Takes for a moment what the runtime will.
fn has_room(threads: usize) -> io::Result<()> {
    let mut addresses = Vec::<u8>::new();
    addresses.try_reserve_exact(ADDRESSES).map_err(|_| io::ErrorKind::OutOfMemory)?;
    drop(addresses);
    let stderr = io::stderr();
    let _descriptors = (0..DESCRIPTORS).map(|_| stderr.as_fd().try_clone_to_owned()).collect::<io::Result<Vec<_>>>()?;
    // They are there at the same time: each waits until all have begun.
    let started = (0..=threads).map(|_| {
        let (go, wait) = mpsc::channel::<()>();
        // Nothing ever comes: the other end is dropped.
        let wait = move || wait.recv().unwrap_or_default();
        std::thread::Builder::new().spawn(wait).map(|thread| (go, thread))
    });
    let started = started.collect::<io::Result<Vec<_>>>()?;
    for (go, thread) in started {
        drop(go);
        // It does nothing that could fail.
        let _ = thread.join();
    }
    Ok(())
}
