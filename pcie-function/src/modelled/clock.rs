//! The clock that crossings are stamped by.

use std::time::{Duration, Instant};

/// Time since some moment; one clock for both ends of a link.
pub(super) trait Clock: Send + Sync {
    /// Now. Never less than before, whichever thread asks.
    fn now(&self) -> Duration;

    /// Returns at `moment` or just after it; at once if it is past.
    fn wait_until(&self, moment: Duration);
}

/// A sleep may last so much longer than asked. What is left is spun away.
pub(super) const OVERSLEEP: Duration = Duration::from_micros(100);

/// The machine's monotonic clock, since this was made.
#[derive(Debug)]
pub(super) struct Monotonic(Instant);

impl Monotonic {
    pub(super) fn new() -> Self {
        Self(Instant::now())
    }
}

impl Clock for Monotonic {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn wait_until(&self, moment: Duration) {
        let ahead = moment.saturating_sub(self.now());
        if ahead > OVERSLEEP {
            std::thread::sleep(ahead - OVERSLEEP);
        }
        while self.now() < moment {
            std::hint::spin_loop();
        }
    }
}
