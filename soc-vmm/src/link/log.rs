//! The host's log records, on their way into this process's own log.

use std::time::{Duration, Instant};

use crate::cli::one_line;

/// Records that may come at once.
const BURST: u32 = 64;
/// How long until one more may come.
const EACH: Duration = Duration::from_millis(100);

/// Passes records on, one line each, at a bounded rate: a host can't fill the SoC's disk.
#[derive(Debug)]
pub(super) struct HostLog {
    left: u32,
    since: Instant,
    dropped: u64,
}

impl HostLog {
    pub(super) fn new() -> Self {
        Self { left: BURST, since: Instant::now(), dropped: 0 }
    }

    /// Logs a record: 1 error, 2 warning, 3 information, all else detail.
    pub(super) fn record(&mut self, level: u8, text: &str) {
        if !self.may(Instant::now()) {
            self.dropped += 1;
            return;
        }
        if self.dropped != 0 {
            tracing::warn!(target: "host-kvm-shim", "{} records were dropped: too many at once", self.dropped);
            self.dropped = 0;
        }
        let text = one_line(text);
        match level {
            1 => tracing::error!(target: "host-kvm-shim", "{text}"),
            2 => tracing::warn!(target: "host-kvm-shim", "{text}"),
            3 => tracing::info!(target: "host-kvm-shim", "{text}"),
            _ => tracing::debug!(target: "host-kvm-shim", "{text}"),
        }
    }

    fn may(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.since).as_millis() / EACH.as_millis();
        if earned != 0 {
            self.left = self.left.saturating_add(earned.try_into().unwrap_or(BURST)).min(BURST);
            self.since = now;
        }
        let may = self.left != 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_to_a_burst_and_then_to_its_rate() {
        let mut log = HostLog::new();
        let start = log.since;
        let let_through = |log: &mut HostLog, at: Duration| (0..1000).filter(|_| log.may(start + at)).count();
        assert_eq!(let_through(&mut log, Duration::ZERO), 64);
        assert_eq!(let_through(&mut log, Duration::from_millis(350)), 3);
        assert_eq!(let_through(&mut log, Duration::from_secs(3600)), 64);
    }
}
