//! A throttle for vCPUs: they stand still for a part of each period.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// How long vCPUs run and stand together, but for very small parts of it.
const PERIOD: Duration = Duration::from_millis(20);

/// The throttle: off, or at which point of its period.
#[derive(Debug, Default)]
pub(super) struct Throttle(Option<Turns>);

#[derive(Debug)]
struct Turns {
    percent: u8,
    /// Whether they stand now.
    stand: bool,
    /// When the other turn begins.
    next: Instant,
}

impl Throttle {
    /// vCPUs are to stand still `percent` of their time, 99 at most. Whether they have to be let go, since they stood and shall no more.
    #[must_use]
    pub(super) fn set(&mut self, percent: u8) -> bool {
        match (&mut self.0, percent) {
            (_, 0) => self.0.take().is_some_and(|turns| turns.stand),
            (Some(turns), _) => {
                turns.percent = percent;
                false
            }
            (None, _) => {
                self.0 = Some(Turns { percent, stand: false, next: Instant::now() });
                false
            }
        }
    }

    /// It is over, and nobody lets anybody go.
    pub(super) fn end(&mut self) {
        self.0 = None;
    }

    /// Waits for the next turn: whether vCPUs are to stand in it. For ever where there is no throttle. Safe to cancel.
    pub(super) async fn turn(&mut self) -> bool {
        let Some(turns) = &mut self.0 else { return std::future::pending().await };
        sleep_until(turns.next).await;
        turns.stand = !turns.stand;
        let percent = if turns.stand { turns.percent } else { 100 - turns.percent };
        turns.next = Instant::now() + PERIOD * percent.into() / 100;
        turns.stand
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn vcpus_stand_their_part_of_the_time() {
        let mut throttle = Throttle::default();
        assert!(!throttle.set(80));
        let (start, mut stood, mut last) = (Instant::now(), Duration::ZERO, None);
        for _ in 0..100 {
            let stands = throttle.turn().await;
            if let Some(since) = last.replace(Instant::now()).filter(|_| !stands) {
                stood += since.elapsed();
            }
        }
        let part = stood.as_secs_f64() / start.elapsed().as_secs_f64();
        assert!((0.75..0.85).contains(&part), "{part}");
        let stands = throttle.turn().await;
        assert_eq!(throttle.set(0), stands);
        let none = tokio::time::timeout(Duration::from_secs(60), throttle.turn()).await;
        assert!(none.is_err());
    }
}
