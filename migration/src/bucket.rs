//! The bandwidth limit.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::ending::lock;

/// How long one wait is, so that a changed limit, a failure and a guest that waits are seen.
const SLICE: Duration = Duration::from_millis(10);
/// What may be sent at once after a rest, as time.
const BURST: f64 = 0.02;

/// A token bucket that all connections take from: bytes may be owed, then everybody waits until they are earned.
pub(crate) struct Bucket(Mutex<(f64, Instant)>);

impl Bucket {
    pub(crate) fn new() -> Self {
        Self(Mutex::new((0.0, Instant::now())))
    }

    /// Waits until `bytes` may be sent at `rate()` bytes a second (0: no limit), or somebody can't wait.
    pub(crate) fn take(&self, bytes: u64, rate: impl Fn() -> u64, hurries: impl Fn() -> bool) {
        while let Some(wait) = self.try_take(bytes, rate(), Instant::now()) {
            if hurries() {
                return;
            }
            std::thread::sleep(wait.min(SLICE));
        }
    }

    /// Takes them, or says how long to wait.
    fn try_take(&self, bytes: u64, rate: u64, now: Instant) -> Option<Duration> {
        let mut bucket = lock(&self.0);
        let (tokens, then) = &mut *bucket;
        if rate == 0 {
            (*tokens, *then) = (0.0, now);
            return None;
        }
        let rate = rate as f64;
        *tokens = (*tokens + now.saturating_duration_since(*then).as_secs_f64() * rate).min(BURST * rate);
        *then = now;
        if *tokens < 0.0 {
            return Some(Duration::from_secs_f64((-*tokens / rate).min(1.0)));
        }
        *tokens -= bytes as f64;
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is asked for, in whatever pieces: no more than the rate, one burst and one piece.
        #[test]
        fn no_more_than_the_rate(rate in 1_000..1u64 << 34, pieces in prop::collection::vec((1..400_000u64, 0..50u64), 1..200)) {
            let bucket = Bucket::new();
            let began = Instant::now();
            let (mut now, mut sent, mut largest) = (began, 0, 0);
            for (bytes, pause) in pieces {
                now += Duration::from_millis(pause);
                while let Some(wait) = bucket.try_take(bytes, rate, now) {
                    now += wait.max(Duration::from_micros(1));
                }
                sent += bytes;
                largest = largest.max(bytes);
                let allowed = (now.duration_since(began).as_secs_f64() + BURST) * rate as f64;
                prop_assert!(sent as f64 <= allowed * 1.001 + largest as f64 + 1.0, "{sent} of {allowed}");
            }
        }
    }

    #[test]
    fn no_limit_is_no_wait() {
        let bucket = Bucket::new();
        let now = Instant::now();
        assert_eq!(bucket.try_take(1 << 40, 1000, now), None);
        assert!(bucket.try_take(1, 1000, now).is_some());
        assert_eq!(bucket.try_take(1 << 40, 0, now), None);
        assert_eq!(bucket.try_take(1, 1000, now), None);
    }
}
