//! What a guest, or a peer, can make the log say.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// Lines that a device writes as warnings; a guest can cause any number of them.
const LOUD: u32 = 10;

/// A device's complaints: the first ones as warnings, the rest for whoever looks for them.
#[derive(Debug, Default)]
pub(super) struct Complaints(u32);

impl Complaints {
    pub(super) fn say(&mut self, device: &str, what: impl Display) {
        self.0 = self.0.saturating_add(1);
        match self.0 {
            ..LOUD => tracing::warn!("{device}: {what}"),
            LOUD => tracing::warn!("{device}: {what} (further ones are logged at level debug)"),
            _ => tracing::debug!("{device}: {what}"),
        }
    }
}

/// How long what comes again is nothing new.
const PERIOD: Duration = Duration::from_secs(60);

/// What a peer can bring about for ever, as by closing each connection that it accepts: once a period it is a warning.
#[derive(Debug, Default)]
pub(crate) struct Rarely(Option<Instant>);

impl Rarely {
    pub(crate) fn say(&mut self, now: Instant, what: impl Display) {
        if self.is_due(now) {
            tracing::warn!("{what}");
        } else {
            tracing::debug!("{what}");
        }
    }

    fn is_due(&mut self, now: Instant) -> bool {
        let due = self.0.is_none_or(|last| now.saturating_duration_since(last) >= PERIOD);
        if due {
            self.0 = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_complains_each_second_of_an_hour_is_heard_each_minute() {
        let start = Instant::now();
        let mut rarely = Rarely::default();
        let heard = (0..3600).filter(|second| rarely.is_due(start + Duration::from_secs(*second))).count();
        assert_eq!(heard, 60);
    }
}
