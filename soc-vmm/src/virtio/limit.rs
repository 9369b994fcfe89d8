//! How much a device may do in a time: buckets of tokens, which hold so many a second in the long run, and some at once after a rest.

use std::sync::Arc;
use std::time::{Duration, Instant};

/// What time it is.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

/// A limit: so many a second in the long run, and at once after a rest as many as the burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// A second, at least 1.
    pub per_second: u64,
    /// At once, at least 1.
    pub burst: u64,
}

impl Rate {
    /// That many a second, of which a tenth may come at once.
    pub fn new(per_second: u64) -> Self {
        Self { per_second, burst: per_second.div_ceil(10).max(1) }
    }
}

/// What a disk is held to, or an interface in each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Requests, or frames as the network has them, after segmentation; none: any number.
    pub operations: Option<Rate>,
    /// Bytes of data; none: any number.
    pub bytes: Option<Rate>,
}

/// The buckets of operations and of bytes. Something passes when neither is empty, and may leave a debt, so that one of any size passes
/// some time.
#[derive(Debug)]
pub(super) struct Limiter([Option<Bucket>; 2]);

impl Limiter {
    pub(super) fn new(limits: RateLimits, now: Instant) -> Self {
        Self([limits.operations, limits.bytes].map(|rate| rate.map(|rate| Bucket::new(rate, now))))
    }

    /// How long nothing may pass; none: something may now.
    pub(super) fn wait(&mut self, now: Instant) -> Option<Duration> {
        let waits = self.0.iter_mut().flatten().map(|bucket| bucket.wait(now));
        waits.max().filter(|wait| !wait.is_zero())
    }

    /// Counts what passes.
    pub(super) fn take(&mut self, operations: u64, bytes: u64) {
        for (bucket, count) in self.0.iter_mut().zip([operations, bytes]) {
            if let Some(bucket) = bucket {
                bucket.take(count);
            }
        }
    }
}

/// Parts of a token.
const NANOS: i128 = 1_000_000_000;

/// Tokens, which come back with time. Whoever comes while there is one may take more than there are: what is owed is waited for
/// afterwards, so that what is larger than the bucket passes too.
#[derive(Debug)]
struct Bucket {
    rate: Rate,
    /// In parts of a token; below 0 is a debt.
    level: i128,
    filled: Instant,
}

impl Bucket {
    /// A full one.
    fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, level: i128::from(rate.burst) * NANOS, filled: now }
    }

    /// Fills it up to now; the time until a token is in it.
    fn wait(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.filled).as_nanos() as i128;
        let per_second = i128::from(self.rate.per_second);
        self.filled = self.filled.max(now);
        let full = i128::from(self.rate.burst) * NANOS;
        self.level = passed.saturating_mul(per_second).saturating_add(self.level).min(full);
        let missing = NANOS - self.level;
        if missing <= 0 {
            return Duration::ZERO;
        }
        let nanos = (missing + per_second - 1) / per_second;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes tokens, whether or not there are so many.
    fn take(&mut self, count: u64) {
        self.level -= i128::from(count) * NANOS;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(per_second: u64, burst: u64) -> RateLimits {
        RateLimits { operations: None, bytes: Some(Rate { per_second, burst }) }
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let mut limiter = Limiter::new(bytes(1000, 100), start);
        assert_eq!(limiter.wait(start), None);
        limiter.take(1, 100);
        assert_eq!(limiter.wait(start), Some(Duration::from_millis(1)));
        assert_eq!(limiter.wait(after(1)), None);
        // One may be larger than all that is there; it is paid for.
        limiter.take(1, 501);
        assert_eq!(limiter.wait(after(1)), Some(Duration::from_millis(501)));
        assert_eq!(limiter.wait(after(501)), Some(Duration::from_millis(1)));
        assert_eq!(limiter.wait(after(502)), None);
        // After any rest there is one burst, and no more.
        assert_eq!(limiter.wait(after(100_000)), None);
        limiter.take(1, 100);
        assert!(limiter.wait(after(100_000)).is_some());
    }

    #[test]
    fn both_limits_hold() {
        let now = Instant::now();
        let mut limiter = Limiter::new(RateLimits { operations: Some(Rate::new(10)), ..bytes(1 << 40, 1) }, now);
        limiter.take(1, 1);
        assert_eq!(limiter.wait(now), Some(Duration::from_millis(100)));
        let mut free = Limiter::new(RateLimits::default(), now);
        free.take(u64::MAX, u64::MAX);
        assert_eq!(free.wait(now), None);
    }

    proptest! {
        /// Whatever comes, and whenever: never more than the burst, the rate, and the one that made the debt.
        #[test]
        fn never_more_than_the_rate(
            per_second in 1u64..1 << 40,
            burst in 1u64..1 << 40,
            steps in proptest::collection::vec((0u64..1 << 32, 0u64..1 << 30), 1..200),
        ) {
            let start = Instant::now();
            let mut limiter = Limiter::new(bytes(per_second, burst), start);
            let (mut now, mut passed, mut largest) = (start, 0u128, 0);
            for (bytes, nanos) in steps {
                now += Duration::from_nanos(nanos);
                if let Some(wait) = limiter.wait(now) {
                    now += wait;
                    prop_assert_eq!(limiter.wait(now), None, "after the time that was told");
                }
                limiter.take(1, bytes);
                passed += u128::from(bytes);
                largest = largest.max(bytes);
                let by_time = (now - start).as_nanos() * u128::from(per_second) / 1_000_000_000;
                prop_assert!(passed <= u128::from(burst) + u128::from(largest) + by_time + 1);
            }
        }
    }
}
