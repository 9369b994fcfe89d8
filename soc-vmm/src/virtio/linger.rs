//! How long a device looks at its queues before it sleeps: while it looks, the driver need not kick, and nothing waits for a wake-up.

use std::time::{Duration, Instant};

use super::{Engine, QueueError, Session, Wait};

/// As long as a sleeper takes to wake up on a busy machine: who sleeps for less had better looked on.
const MOST: Duration = Duration::from_micros(50);
/// Below this it isn't worth looking.
const LEAST: Duration = Duration::from_micros(2);

/// Long where the last sleeps were short, none where they were long: an idle device costs no CPU time.
#[derive(Debug)]
pub(super) struct Linger {
    budget: Duration,
    /// Looking is free of charge there.
    near: bool,
}

impl Linger {
    pub(super) fn new(session: &Session) -> Self {
        Self { budget: Duration::ZERO, near: session.control.lease.is_near() }
    }

    /// Looks for as long as it is worth; whether there is something to do, or time is over. What a device waits for and can't look at
    /// without a system call is slept for.
    pub(super) fn look(&self, engine: &mut dyn Engine, session: &mut Session, wait: Wait) -> Result<bool, QueueError> {
        let sees = wait.source.is_empty() || engine.is_ready().is_some();
        if self.budget.is_zero() || !self.near || !sees {
            return Ok(false);
        }
        let start = Instant::now();
        loop {
            for queue in session.queues.iter_mut().flatten() {
                if queue.has_news()? {
                    return Ok(true);
                }
            }
            if !wait.source.is_empty() && engine.is_ready() == Some(true) {
                return Ok(true);
            }
            let time = start.elapsed();
            if wait.timeout.is_some_and(|timeout| time >= timeout) {
                return Ok(true);
            }
            if time >= self.budget {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    /// Says how long it slept.
    pub(super) fn slept(&mut self, time: Duration) {
        let budget = if time < MOST { MOST } else { self.budget / 2 };
        self.budget = if budget < LEAST { Duration::ZERO } else { budget };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_slept_for_long_looks_less_and_less_and_who_did_not_looks_on() {
        let mut linger = Linger { budget: Duration::ZERO, near: true };
        linger.slept(MOST);
        assert_eq!(linger.budget, Duration::ZERO);
        linger.slept(MOST / 2);
        assert_eq!(linger.budget, MOST);
        let mut sleeps = 0;
        while !linger.budget.is_zero() {
            let before = linger.budget;
            linger.slept(Duration::from_secs(1));
            assert!(linger.budget < before);
            sleeps += 1;
        }
        assert!(sleeps < 8);
    }
}
