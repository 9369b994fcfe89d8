//! Who hears what a guest changes on a disk, for as long as somebody does.
//!
//! A disk without a listener pays one load for each request that is done.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use super::BlockBackend;

/// A disk that a guest writes, as somebody has it who copies it.
pub trait Watched: Send + Sync {
    /// What holds its bytes.
    fn image(&self) -> Arc<dyn BlockBackend>;

    /// Has somebody hear of every change from now on, as [`WatchSlot::fill`] says. False: somebody does already.
    fn watch(&self, watcher: Arc<dyn Watcher>) -> bool;

    /// Nobody hears of changes any more; requests that wait for it go on.
    fn unwatch(&self);

    /// Has the disk look whether requests may go on that wait for who hears of them.
    fn wake(&self);
}

/// Hears what was changed.
pub trait Watcher: Send + Sync {
    /// These bytes were changed, or may have been: the write is over, and the guest doesn't know that yet. A number: it is to be told only
    /// once [`Watcher::is_settled`] says so.
    fn changed(&self, offset: u64, len: u64) -> Option<u64>;

    /// Whether the guest may be told.
    fn is_settled(&self, ticket: u64) -> bool;
}

/// Where a disk has its listener.
#[derive(Default)]
pub struct WatchSlot {
    on: AtomicBool,
    watcher: Mutex<Option<Arc<dyn Watcher>>>,
}

impl WatchSlot {
    /// Listens from now on. What was written and isn't told of is what a read finds that comes after this. False: somebody does already.
    pub fn fill(&self, watcher: Arc<dyn Watcher>) -> bool {
        let mut slot = self.watcher.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_some() {
            return false;
        }
        *slot = Some(watcher);
        self.on.store(true, Ordering::SeqCst);
        // Before the listener's reads: a write that this comes too late for is over by now.
        fence(Ordering::SeqCst);
        true
    }

    /// Nobody listens any more.
    pub fn clear(&self) {
        self.on.store(false, Ordering::SeqCst);
        *self.watcher.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whoever listens.
    pub fn get(&self) -> Option<Arc<dyn Watcher>> {
        if !self.on.load(Ordering::SeqCst) {
            return None;
        }
        self.watcher.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl std::fmt::Debug for WatchSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("WatchSlot").field(&self.on.load(Ordering::Relaxed)).finish()
    }
}
