//! The side of a balloon that isn't the guest's: how much memory the guest shall have, and what it says of it.

use std::io;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use nix::sys::eventfd::EventFd;

use super::PAGE;
use crate::virtio::session::{eventfd, ring_bell};

/// Statistics that have a name (§5.5.6.4).
const TAGS: usize = 10;

/// Hears of a balloon's size: QMP's `BALLOON_CHANGE`. Called on the device's thread.
pub trait BalloonEvents: Send + Sync {
    /// The guest has so many bytes of memory now.
    fn changed(&self, memory: u64);
}

/// What the guest said of its memory (§5.5.6.4), and when; a number that it didn't give is none. Nothing of it is to be relied on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestStats {
    values: [Option<u64>; TAGS],
    /// When it did; none: it didn't yet.
    pub updated: Option<SystemTime>,
}

impl GuestStats {
    /// QMP's names of the statistics, as in `guest-stats`, and their values: bytes, or counts of events.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, Option<u64>)> {
        const NAMES: [&str; TAGS] = [
            "stat-swap-in",
            "stat-swap-out",
            "stat-major-faults",
            "stat-minor-faults",
            "stat-free-memory",
            "stat-total-memory",
            "stat-available-memory",
            "stat-disk-caches",
            "stat-htlb-pgalloc",
            "stat-htlb-pgfail",
        ];
        NAMES.into_iter().zip(self.values)
    }

    pub(super) fn set(&mut self, tag: u16, value: u64) {
        // Tags of a later specification are none of ours.
        if let Some(place) = self.values.get_mut(usize::from(tag)) {
            *place = Some(value);
        }
    }
}

/// Why no memory goes back to the host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest's memory can't go back to the host: {0}")]
pub struct Pinned(pub(super) String);

/// From where a balloon is told its size, and asked.
#[derive(Debug)]
pub struct BalloonHandle {
    ram: u64,
    pinned: OnceLock<Pinned>,
    state: Mutex<State>,
    bell: EventFd,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Pages that the guest shall give, and those that it says it gave.
    pub(super) wanted: u32,
    pub(super) actual: u32,
    pub(super) stats: GuestStats,
    /// How often the guest is asked for statistics.
    pub(super) interval: Option<Duration>,
    /// Bytes that went back to the host.
    pub(super) freed: u64,
}

impl BalloonHandle {
    /// The handle of a balloon that is yet to be made, of a guest with so many bytes of RAM.
    ///
    /// # Errors
    /// This process can have no more descriptors.
    pub fn new(ram: u64) -> io::Result<Self> {
        Ok(Self { ram, pinned: OnceLock::new(), state: Mutex::default(), bell: eventfd()? })
    }

    /// Asks the guest to make do with so many bytes of memory: QMP's `balloon`. More than it has means all of it.
    ///
    /// # Errors
    /// It must keep all of its memory, and that is more.
    pub fn set_target(&self, memory: u64) -> Result<(), Pinned> {
        let pages = self.ram.saturating_sub(memory) / PAGE;
        if let Some(pinned) = self.pinned.get().filter(|_| pages > 0) {
            return Err(pinned.clone());
        }
        self.state().wanted = u32::try_from(pages).unwrap_or(u32::MAX);
        ring_bell(&self.bell);
        Ok(())
    }

    /// Pages of all of the guest's memory.
    pub(super) fn pages(&self) -> u64 {
        self.ram / PAGE
    }

    /// Bytes of memory that the guest has: QMP's `query-balloon`.
    pub fn memory(&self) -> u64 {
        self.ram.saturating_sub(u64::from(self.state().actual) * PAGE)
    }

    /// Asks for statistics that often, or no more: QMP's `guest-stats-polling-interval`.
    pub fn set_interval(&self, interval: Option<Duration>) {
        self.state().interval = interval.filter(|interval| !interval.is_zero());
        ring_bell(&self.bell);
    }

    /// How often it asks.
    pub fn interval(&self) -> Option<Duration> {
        self.state().interval
    }

    /// What the guest said last: QMP's `guest-stats`.
    pub fn stats(&self) -> GuestStats {
        self.state().stats
    }

    /// Bytes that went back to the host since the device was made, some of them more than once.
    pub fn freed(&self) -> u64 {
        self.state().freed
    }

    /// Nothing goes back from now on.
    pub(super) fn pin(&self, pinned: Pinned) {
        // What is pinned stays so.
        _ = self.pinned.set(pinned);
    }

    pub(super) fn is_pinned(&self) -> bool {
        self.pinned.get().is_some()
    }

    pub(super) fn bell(&self) -> &EventFd {
        &self.bell
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
