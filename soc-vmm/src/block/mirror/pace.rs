//! The speed of a copy: a token bucket whose debt is waited for.

use std::time::{Duration, Instant};

/// What may be copied at once after a rest, as time.
const BURST: Duration = Duration::from_millis(100);

/// Bytes a second.
#[derive(Debug)]
pub(super) struct Pace {
    speed: u64,
    /// When everything is paid that was copied.
    paid: Instant,
}

impl Pace {
    /// So many; 0: no limit.
    pub(super) fn new(speed: u64) -> Self {
        Self { speed, paid: Instant::now() }
    }

    /// How long it is until more may be copied; none: now.
    pub(super) fn wait(&self, now: Instant) -> Option<Duration> {
        let wait = self.paid.saturating_duration_since(now + BURST);
        (self.speed > 0 && !wait.is_zero()).then_some(wait)
    }

    /// So many are copied now.
    pub(super) fn take(&mut self, bytes: u64, now: Instant) {
        if self.speed > 0 {
            let time = Duration::from_secs_f64((bytes as f64 / self.speed as f64).min(3600.0));
            self.paid = self.paid.max(now) + time;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is copied in whatever pieces: no more than the speed, the burst and the last piece.
        #[test]
        fn no_more_than_the_speed(speed in 1_000..1u64 << 34, pieces in prop::collection::vec((1..1u64 << 20, 0..50u64), 1..100)) {
            let mut pace = Pace::new(speed);
            let start = Instant::now();
            let (mut now, mut copied) = (start, 0);
            for (bytes, pause) in pieces {
                now += Duration::from_millis(pause);
                if let Some(wait) = pace.wait(now) {
                    now += wait;
                }
                prop_assert_eq!(pace.wait(now), None);
                let most = speed as f64 * (now - start + BURST).as_secs_f64() * 1.001 + 1000.0;
                prop_assert!(copied as f64 <= most, "{copied} bytes in {:?} at {speed}", now - start);
                pace.take(bytes, now);
                copied += bytes;
            }
        }
    }
}
