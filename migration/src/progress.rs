//! How far a migration is.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::Phase;
use crate::ending::lock;
use crate::stream::PAGE;

/// What [`Progress::rate`] is an average over.
const WINDOW: Duration = Duration::from_secs(2);

/// What QMP's `query-migrate` reports. Sizes in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// `status`.
    pub phase: Phase,
    /// `total-time`.
    pub total_time: Duration,
    /// `setup-time`: until the first page moved.
    pub setup_time: Duration,
    /// `downtime`: from when the guest stood still until the destination said that it runs. At the destination none.
    pub downtime: Duration,
    /// `expected-downtime`, were the guest to stop now.
    pub expected_downtime: Duration,
    /// `ram.total`.
    pub total: u64,
    /// `ram.transferred`: over all connections, with what is around the pages.
    pub transferred: u64,
    /// `ram.remaining`.
    pub remaining: u64,
    /// `ram.duplicate`: pages of zeros.
    pub zero_pages: u64,
    /// `ram.normal`: other pages.
    pub normal_pages: u64,
    /// `ram.dirty-sync-count`.
    pub rounds: u64,
    /// `ram.dirty-pages-rate`, pages a second.
    pub dirty_rate: u64,
    /// `ram.mbps` in bytes a second: over the last seconds, or over all of it once it is over.
    pub rate: u64,
    /// Bytes of pages a second while there are some to send: what the downtime is foretold from.
    pub bandwidth: u64,
    /// `cpu-throttle-percentage`.
    pub throttle: u8,
    /// Bytes a second that each vCPU may write; 0: as many as it can.
    pub write_limit: u64,
    /// `compression.pages`.
    pub compressed_pages: u64,
    /// `compression.compressed-size`: what became of those.
    pub compressed_bytes: u64,
    /// `ram.precopy-bytes`: sent while the guest ran.
    pub precopy_bytes: u64,
    /// `ram.downtime-bytes`: sent while it stood still.
    pub downtime_bytes: u64,
    /// `ram.postcopy-bytes`: those sent while the guest ran at the destination.
    pub postcopy_bytes: u64,
    /// `ram.postcopy-requests`: pages that the guest waited for at the destination.
    pub postcopy_requests: u64,
}

/// The counters behind it: each has one thread or is added to, so none needs an order.
#[derive(Default)]
pub(crate) struct Meter {
    pub(crate) total: AtomicU64,
    pub(crate) transferred: AtomicU64,
    pub(crate) remaining: AtomicU64,
    pub(crate) zero_pages: AtomicU64,
    pub(crate) normal_pages: AtomicU64,
    pub(crate) rounds: AtomicU64,
    pub(crate) dirty_rate: AtomicU64,
    pub(crate) bandwidth: AtomicU64,
    pub(crate) throttle: AtomicU64,
    pub(crate) write_limit: AtomicU64,
    pub(crate) compressed_pages: AtomicU64,
    pub(crate) compressed_bytes: AtomicU64,
    pub(crate) postcopy_requests: AtomicU64,
    /// `transferred` when the guest stood still.
    precopy_bytes: AtomicU64,
    /// And when it ran at the destination without some of its pages.
    before_post_copy: AtomicU64,
    setup_ns: AtomicU64,
    downtime_ns: AtomicU64,
    total_ns: AtomicU64,
    window: Mutex<VecDeque<(Instant, u64)>>,
}

impl Meter {
    pub(crate) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn set(counter: &AtomicU64, value: u64) {
        counter.store(value, Ordering::Relaxed);
    }

    /// Pages are no longer to be sent.
    pub(crate) fn took(&self, pages: u64) {
        self.remaining.fetch_sub(pages * PAGE, Ordering::Relaxed);
    }

    pub(crate) fn setup_took(&self, time: Duration) {
        Self::set(&self.setup_ns, nanoseconds(time));
    }

    /// The guest stands still.
    pub(crate) fn stopped(&self) {
        Self::set(&self.precopy_bytes, self.transferred.load(Ordering::Relaxed));
    }

    /// The guest runs at the destination without some of its pages.
    pub(crate) fn runs_there(&self) {
        Self::set(&self.before_post_copy, self.transferred.load(Ordering::Relaxed));
    }

    pub(crate) fn downtime_was(&self, time: Duration) {
        Self::set(&self.downtime_ns, nanoseconds(time));
    }

    /// Called a few times a second.
    pub(crate) fn tick(&self, now: Instant) {
        let mut window = lock(&self.window);
        window.push_back((now, self.transferred.load(Ordering::Relaxed)));
        while window.front().is_some_and(|(then, _)| now.duration_since(*then) > WINDOW) && window.len() > 2 {
            window.pop_front();
        }
    }

    pub(crate) fn finish(&self, began: Option<Instant>) {
        Self::set(&self.total_ns, began.map_or(0, |began| nanoseconds(began.elapsed())).max(1));
    }

    pub(crate) fn progress(&self, phase: Phase, began: Option<Instant>) -> Progress {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let time = |counter: &AtomicU64| Duration::from_nanos(get(counter));
        let is_over = get(&self.total_ns) > 0;
        let total_time =
            if is_over { time(&self.total_ns) } else { began.map_or(Duration::ZERO, |began| began.elapsed()) };
        let (transferred, remaining, bandwidth) = (get(&self.transferred), get(&self.remaining), get(&self.bandwidth));
        let stopped = get(&self.precopy_bytes);
        let precopy_bytes = if stopped > 0 { stopped } else { transferred };
        let until_it_ran = match get(&self.before_post_copy) {
            0 => transferred,
            before => before.min(transferred),
        };
        let moving = total_time.saturating_sub(time(&self.setup_ns));
        let rate = if is_over { per_second(transferred, moving) } else { self.rate().unwrap_or(0) };
        Progress {
            phase,
            total_time,
            setup_time: time(&self.setup_ns),
            downtime: time(&self.downtime_ns),
            expected_downtime: expected(remaining, bandwidth),
            total: get(&self.total),
            transferred,
            remaining,
            zero_pages: get(&self.zero_pages),
            normal_pages: get(&self.normal_pages),
            rounds: get(&self.rounds),
            dirty_rate: get(&self.dirty_rate),
            rate,
            bandwidth,
            throttle: get(&self.throttle) as u8,
            write_limit: get(&self.write_limit),
            compressed_pages: get(&self.compressed_pages),
            compressed_bytes: get(&self.compressed_bytes),
            precopy_bytes,
            downtime_bytes: until_it_ran - precopy_bytes.min(until_it_ran),
            postcopy_bytes: transferred - until_it_ran,
            postcopy_requests: get(&self.postcopy_requests),
        }
    }

    fn rate(&self) -> Option<u64> {
        let window = lock(&self.window);
        let (first, last) = (window.front()?, window.back()?);
        Some(per_second(last.1 - first.1, last.0.duration_since(first.0)))
    }
}

/// How long `bytes` take, as far as anybody knows.
pub(crate) fn expected(bytes: u64, bandwidth: u64) -> Duration {
    match (bytes, bandwidth) {
        (0, _) | (_, 0) => Duration::ZERO,
        // A year is as good as never, and fits everywhere.
        _ => Duration::from_secs_f64((bytes as f64 / bandwidth as f64).min(31_536_000.0)),
    }
}

pub(crate) fn per_second(count: u64, time: Duration) -> u64 {
    if time.is_zero() { 0 } else { (count as f64 / time.as_secs_f64()) as u64 }
}

pub(crate) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
