//! Clocks beside this machine's: a server's, which is set by it, and a guest's.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::machine::{Error, Machine};
use crate::protocol::{Answer, Request};

/// How often a clock is looked at: where much else runs, most looks take long.
const LOOKS: u32 = 16;
/// How long a server may take to tell its clock.
const LIMIT: Duration = Duration::from_secs(90);

/// How far a clock is ahead of this machine's, in ns: as exactly as somebody can know who asks for it and waits for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ahead {
    least: i64,
    most: i64,
}

impl Ahead {
    /// Looks at a clock some times: `read` asks what it says, in ns since 1970.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn of(mut read: impl FnMut() -> Result<i64, Error>) -> Result<Self, Error> {
        let mut ahead = Self { least: i64::MIN, most: i64::MAX };
        for _ in 0..LOOKS {
            let before = now();
            let says = read()?;
            // It said so at some time between.
            let look = Self { least: says.saturating_sub(now()), most: says.saturating_sub(before) };
            ahead = ahead.and(look);
        }
        Ok(ahead)
    }

    /// What both looks leave.
    const fn and(self, other: Self) -> Self {
        Self {
            least: if self.least > other.least { self.least } else { other.least },
            most: if self.most < other.most { self.most } else { other.most },
        }
    }

    /// By how much the clock was set on between this look and a later one, at the least; 0 if it may have just gone on.
    #[must_use]
    pub fn jump_to(&self, later: &Self) -> Duration {
        let jump = later.least.saturating_sub(self.most).max(self.least.saturating_sub(later.most));
        Duration::from_nanos(u64::try_from(jump).unwrap_or(0))
    }

    /// How far from the truth the middle may be, and more.
    #[must_use]
    pub fn doubt(&self) -> Duration {
        Duration::from_nanos(self.most.abs_diff(self.least))
    }
}

/// Sets a machine's clock to this one's, as NTP keeps those of servers together; by how much it may still be wrong. It started with that of
/// its RTC, which counts seconds.
///
/// # Errors
/// [`Error::Call`].
pub fn set(machine: &Machine) -> Result<Duration, Error> {
    let ahead = Ahead::of(|| match machine.call(Request::Clock, LIMIT)? {
        Answer::Clock(nanoseconds) => Ok(nanoseconds),
        other => Err(machine.unexpected("clock", other)),
    })?;
    let middle = i64::midpoint(ahead.least, ahead.most);
    machine.done(Request::StepClock { by: middle.saturating_neg() })?;
    Ok(ahead.doubt())
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_on_shows() {
        let ahead = |by: i64| Ahead::of(|| Ok(now() + by)).unwrap();
        assert_eq!(ahead(0).jump_to(&ahead(0)), Duration::ZERO);
        for by in [-3_600_000_000_000, 3_600_000_000_000] {
            let jump = ahead(0).jump_to(&ahead(by));
            assert!(jump <= Duration::from_secs(3600) && jump > Duration::from_secs(1800), "{jump:?}");
        }
        let [a, b] = [(2, 9), (4, 11)].map(|(least, most)| Ahead { least, most });
        assert_eq!(a.and(b), Ahead { least: 4, most: 9 });
        assert_eq!(a.doubt(), Duration::from_nanos(7));
    }
}
