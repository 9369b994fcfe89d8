//! How fast a vCPU may write pages that were clean. Pure.
//!
//! Its ring is the means: once that is full, room is made for as many pages as time has earned, and not before it has earned some. So it
//! stands still for a few milliseconds at a time, and only while it writes faster than it may.

use std::time::{Duration, Instant};

/// Room is made for what this long earns.
const SLICE: Duration = Duration::from_millis(5);
/// So much is earned at most while the ring isn't full.
const MOST: Duration = Duration::from_millis(20);

/// A vCPU's limit.
#[derive(Debug)]
pub(super) struct Limit {
    /// Pages a second; 0: none.
    pages: u64,
    /// Pages that are enough to go on with: less than a ring has.
    enough: u64,
    /// What was earned before this is used.
    since: Instant,
}

/// What a vCPU whose ring is full may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Go on, with room for so many pages.
    Room(u32),
    /// Stand still for this long.
    Stand(Duration),
}

impl Limit {
    /// None, of a vCPU whose ring has so many entries.
    pub(super) fn none(entries: u32, now: Instant) -> Self {
        Self { pages: 0, enough: u64::from(entries / 2).max(1), since: now }
    }

    /// So many pages a second from now on; 0: no limit.
    pub(super) fn set(&mut self, pages: u64, now: Instant) {
        *self = Self { pages, since: now, ..*self };
    }

    /// The vCPU's ring is full.
    pub(super) fn turn(&mut self, now: Instant) -> Turn {
        if self.pages == 0 {
            return Turn::Room(u32::MAX);
        }
        let wanted = self.earned(SLICE).clamp(1, self.enough);
        let passed = now.saturating_duration_since(self.since);
        let earned = self.earned(passed.min(MOST.max(self.takes(wanted))));
        if earned < wanted {
            return Turn::Stand(self.takes(wanted).saturating_sub(passed).max(Duration::from_micros(1)));
        }
        self.since = now;
        Turn::Room(u32::try_from(earned).unwrap_or(u32::MAX))
    }

    fn earned(&self, time: Duration) -> u64 {
        (u128::from(self.pages) * time.as_nanos() / NANOS) as u64
    }

    fn takes(&self, pages: u64) -> Duration {
        // Rounded up, so that what it takes is earned by then. Of a page it is a second at most.
        Duration::from_nanos((u128::from(pages) * NANOS).div_ceil(self.pages.max(1).into()) as u64)
    }
}

const NANOS: u128 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RING: u32 = 1024;

    #[test]
    fn without_a_limit_nobody_stands() {
        let now = Instant::now();
        assert_eq!(Limit::none(1024, now).turn(now), Turn::Room(u32::MAX));
    }

    proptest! {
        /// A vCPU that does nothing but write writes as fast as it may, and never stands for long at once.
        #[test]
        fn a_limit_is_kept(pages in prop_oneof![1..100u64, 100..1_000_000u64], stops in prop::collection::vec(0..50u64, 0..50)) {
            let start = Instant::now();
            let (mut now, mut wrote) = (start, 0u64);
            let mut limit = Limit::none(RING, start);
            limit.set(pages, start);
            let mut stops = stops.into_iter();
            while now - start < Duration::from_secs(10) {
                match limit.turn(now) {
                    // Its ring has no more.
                    Turn::Room(room) => wrote += u64::from(room.min(RING)),
                    Turn::Stand(time) => {
                        prop_assert!(time <= SLICE.max(Duration::from_secs(1).div_f64(pages as f64)) + Duration::from_micros(1));
                        now += time + Duration::from_millis(stops.next().unwrap_or(0));
                    }
                }
            }
            let may = pages as f64 * (now - start).as_secs_f64();
            prop_assert!(wrote as f64 <= may + 1.0, "{wrote} of {may}");
            let lost = f64::from(50 * 50) / 1000.0 * pages as f64;
            prop_assert!(wrote as f64 >= may * 0.8 - lost - 2.0, "{wrote} of {may}");
        }
    }
}
