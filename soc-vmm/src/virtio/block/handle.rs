//! A disk as the VM has it, while its device is the guest's.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use super::DiskLimits;
use crate::block::{BlockBackend, BlockError, WatchSlot, Watched, Watcher};

/// What a disk has done since it was made.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Requests that the guest was given back.
    pub requests: AtomicU64,
    /// Times that operations were handed over to the kernel or to threads: those of one time are one system call.
    pub submissions: AtomicU64,
    /// Times that the guest was shown what it was given back, on one queue: each at most an interrupt.
    pub publications: AtomicU64,
    /// Bytes that the guest has read.
    pub read: AtomicU64,
    /// Bytes that it has written.
    pub written: AtomicU64,
    /// Errors of the image.
    pub errors: AtomicU64,
    /// What the requests of each [`Sort`] came to.
    pub sorts: [SortCounters; Sort::ALL.len()],
}

impl BlockCounters {
    /// What the requests of a sort came to.
    pub fn of(&self, sort: Sort) -> &SortCounters {
        &self.sorts[sort as usize]
    }
}

/// Requests that are counted apart, as QEMU's statistics have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// Reads.
    Read,
    /// Writes, zeroing among them.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
}

impl Sort {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Flush, Self::Discard];
}

/// What the requests of one sort came to.
#[derive(Debug, Default)]
pub struct SortCounters {
    /// Those that were done.
    pub done: AtomicU64,
    /// Those that failed or were refused.
    pub failed: AtomicU64,
    /// Nanoseconds from when each was taken to when it was given back, together.
    pub nanoseconds: AtomicU64,
}

/// Why requests wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Trouble {
    /// There is no room where the image is.
    NoSpace = 1,
    /// The image failed in another way.
    Failed = 2,
}

/// Reaches a disk from any thread.
#[derive(Clone)]
pub struct DiskHandle {
    pub(super) backend: Arc<dyn BlockBackend>,
    pub(super) shared: Arc<Shared>,
}

/// What the disk's thread is to look at.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) bell: EventFd,
    pub(super) retry: AtomicBool,
    /// A [`Trouble`], or none.
    trouble: AtomicU8,
    /// What the disk is held to.
    limits: Mutex<DiskLimits>,
    /// Those are new.
    limited: AtomicBool,
    /// Who hears what the guest writes.
    pub(super) watch: WatchSlot,
    /// The bell has been signalled.
    woken: AtomicBool,
    pub(super) counters: BlockCounters,
}

impl Shared {
    pub(super) fn new(limits: DiskLimits) -> nix::Result<Self> {
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self {
            bell,
            retry: AtomicBool::new(false),
            trouble: AtomicU8::new(0),
            limits: Mutex::new(limits),
            limited: AtomicBool::new(false),
            watch: WatchSlot::default(),
            woken: AtomicBool::new(false),
            counters: BlockCounters::default(),
        })
    }

    fn limits(&self) -> MutexGuard<'_, DiskLimits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests wait for something to be mended, or no longer.
    pub(super) fn set_trouble(&self, trouble: Option<Trouble>) {
        self.trouble.store(trouble.map_or(0, |trouble| trouble as u8), Ordering::Relaxed);
    }

    /// Why requests wait, if some do.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        let trouble = self.trouble.load(Ordering::Relaxed);
        [Trouble::NoSpace, Trouble::Failed].into_iter().find(|it| *it as u8 == trouble)
    }

    /// What the disk is held to from now on, if that is new.
    pub(super) fn new_limits(&self) -> Option<DiskLimits> {
        self.limited.swap(false, Ordering::AcqRel).then(|| *self.limits())
    }

    /// Wakes the disk's thread. A full counter is as good as a signalled one.
    fn wake(&self) {
        let _ = self.bell.write(1);
        // Behind the signal: who sees it is sure to take that back, and until then looks again.
        self.woken.store(true, Ordering::Release);
    }

    /// Whether somebody wants the disk's thread to look.
    pub(super) fn is_asked(&self) -> bool {
        self.woken.load(Ordering::Acquire)
    }

    /// Takes the signal back, if there is one, before what it is for is looked at. Mostly there is none, and no system call.
    pub(super) fn answer(&self) {
        if self.woken.swap(false, Ordering::AcqRel) {
            let _ = self.bell.read();
        }
    }
}

impl DiskHandle {
    /// See [`BlockBackend::release`]; the device is halted.
    ///
    /// # Errors
    /// As there.
    pub fn release(&self) -> Result<(), BlockError> {
        self.backend.release()
    }

    /// See [`BlockBackend::claim`]; the device is halted.
    ///
    /// # Errors
    /// As there.
    pub fn claim(&self) -> Result<(), BlockError> {
        self.backend.claim()
    }

    /// Whether the guest can't write to it.
    pub fn is_read_only(&self) -> bool {
        self.backend.is_read_only()
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.backend.size()
    }

    /// Makes the image `size` bytes large and tells the guest, which sees it soon after. It calls the file system.
    ///
    /// # Errors
    /// It would shrink, is read-only, or being copied, or the image can't grow. The guest's disk has the size it had.
    pub fn resize(&self, size: u64) -> Result<(), BlockError> {
        if self.shared.watch.get().is_some() {
            return Err(BlockError::Copied);
        }
        self.backend.grow(size)?;
        self.shared.wake();
        Ok(())
    }

    /// Makes the requests again that wait since the VM stopped for an error ([`super::ErrorAction::Stop`]).
    pub fn retry(&self) {
        self.shared.retry.store(true, Ordering::Release);
        self.shared.wake();
    }

    /// Why requests wait until the VM goes on, if some do.
    pub fn trouble(&self) -> Option<Trouble> {
        self.shared.trouble()
    }

    /// What it is held to.
    pub fn limits(&self) -> DiskLimits {
        *self.shared.limits()
    }

    /// Holds it to other limits from now on, as if it had rested before.
    pub fn set_limits(&self, limits: DiskLimits) {
        *self.shared.limits() = limits;
        self.shared.limited.store(true, Ordering::Release);
        self.shared.wake();
    }

    /// What it has done.
    pub fn counters(&self) -> &BlockCounters {
        &self.shared.counters
    }
}

impl Watched for DiskHandle {
    fn image(&self) -> Arc<dyn BlockBackend> {
        self.backend.clone()
    }

    fn watch(&self, watcher: Arc<dyn Watcher>) -> bool {
        self.shared.watch.fill(watcher)
    }

    fn unwatch(&self) {
        self.shared.watch.clear();
        self.shared.wake();
    }

    fn wake(&self) {
        self.shared.wake();
    }
}

impl std::fmt::Debug for DiskHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskHandle").field("size", &self.size()).field("shared", &self.shared).finish()
    }
}
