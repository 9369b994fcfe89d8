//! The time that devices see, but for what derives from the host's TSC.

use std::fmt::Debug;
use std::time::{Duration, Instant, SystemTime};

/// A source of time. Deadlines are in its monotonic time, dates in its real time.
pub trait Clock: Send + Sync + Debug {
    /// Monotonic time.
    fn monotonic(&self) -> Instant;

    /// Real time since 1970-01-01T00:00:00Z; it may be stepped.
    fn realtime(&self) -> Duration;
}

/// The operating system's clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn monotonic(&self) -> Instant {
        Instant::now()
    }

    fn realtime(&self) -> Duration {
        // A clock before 1970 is one that was never set.
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
    }
}
