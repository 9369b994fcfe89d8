//! Signals those who sleep.
//!
//! Who polls finds what has arrived by itself. Who sleeps in the kernel, or is KVM, looks at nothing: a thread lets the signals
//! arrive, and sleeps itself while none is under way.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;

use super::clock::OVERSLEEP;
use super::link::Wire;
use crate::FunctionError;

/// Tells the courier that there is a signal to wait for, or that it is over.
#[derive(Default)]
pub(super) struct Notice {
    over: Mutex<bool>,
    changed: Condvar,
}

impl Notice {
    /// A signal is under way. Called after it was sent: the courier looks while it holds the lock, and so sees it or is woken.
    pub(super) fn give(&self) {
        drop(self.lock());
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread; it ends when this is dropped.
pub(super) struct Courier {
    wire: Arc<Wire>,
    thread: Option<JoinHandle<()>>,
}

impl Courier {
    pub(super) fn start(wire: Arc<Wire>) -> Result<Self, FunctionError> {
        let works_on = wire.clone();
        let thread = std::thread::Builder::new()
            .name("modelled-link".into())
            .spawn(move || while deliver_next(&works_on) {})
            .map_err(|_| FunctionError::Os("start a thread", Errno::EAGAIN))?;
        Ok(Self { wire, thread: Some(thread) })
    }
}

impl Drop for Courier {
    fn drop(&mut self) {
        *self.wire.notice.lock() = true;
        self.wire.notice.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits for the next signal and lets it arrive; false when it is over.
fn deliver_next(wire: &Wire) -> bool {
    let mut over = wire.notice.lock();
    while !*over {
        let changed = &wire.notice.changed;
        let Some(due) = wire.next_signal() else {
            over = changed.wait(over).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        let ahead = due.saturating_sub(wire.clock.now());
        if ahead <= OVERSLEEP {
            drop(over);
            wire.clock.wait_until(due);
            wire.arrive();
            return true;
        }
        over = changed.wait_timeout(over, ahead - OVERSLEEP).unwrap_or_else(PoisonError::into_inner).0;
    }
    false
}
