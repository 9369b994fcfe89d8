//! What a user may choose, also while a guest moves.

use std::time::Duration;

use crate::MigrationError;
use crate::stream::MOST_CONNECTIONS;

/// What becomes of a guest here once it is in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// It has left, as one that moves.
    #[default]
    Leaves,
    /// It goes on, if it ran before.
    GoesOn,
    /// It stands still until somebody has it go on.
    StandsStill,
}

/// How a migration is done. Those that are read before the first page moves say so; the others may change at any time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Connections for pages, the main one among them: 1 to [`MOST_CONNECTIONS`]. Read at the start. QMP `multifd-channels`.
    pub connections: u16,
    /// Compress pages by zstd at this level (1 to 3), if the other side can. Read at the start. QMP `multifd-zstd-level`.
    pub zstd: Option<u8>,
    /// Most bytes a second of all connections together, 0 for no limit. The paused guest's last pages are beyond it. QMP `max-bandwidth`.
    pub max_bandwidth: u64,
    /// The same for pages that a guest at the destination lacks and doesn't wait for. QMP `max-postcopy-bandwidth`.
    pub max_post_copy_bandwidth: u64,
    /// Bytes a second to expect for the paused guest's last pages; 0: as measured before. QMP `avail-switchover-bandwidth`.
    pub switchover_bandwidth: u64,
    /// How long the last pages may take. QMP `downtime-limit`.
    pub downtime_limit: Duration,
    /// Slow the guest down if it writes faster than its pages move. QMP capability `auto-converge`.
    pub auto_converge: bool,
    /// The first throttle, in percent of the vCPUs' time. QMP `cpu-throttle-initial`.
    pub throttle_initial: u8,
    /// What each further one adds. QMP `cpu-throttle-increment`.
    pub throttle_increment: u8,
    /// The last one, 99 at most. QMP `max-cpu-throttle`.
    pub throttle_max: u8,
    /// Part of the bytes sent in a round, in percent, that has to become dirty meanwhile for a throttle. QMP `throttle-trigger-threshold`.
    pub throttle_threshold: u8,
    /// If the guest writes faster than its pages move, limit how fast each vCPU writes instead. QMP capability `dirty-limit`.
    pub dirty_limit: bool,
    /// Bytes a second that each vCPU may write then. QMP `vcpu-dirty-limit`.
    pub write_limit: u64,
    /// Wait for [`crate::Control::go_on`] once the guest stands still. QMP capability `pause-before-switchover`.
    pub pause_before_switchover: bool,
    /// Be ready for [`crate::Control::start_post_copy`]: the destination has to be able to. Read at the start. QMP capability `postcopy-ram`.
    pub post_copy: bool,
    /// Into a file: give pages places of their own, so that the file has each once, and whoever restores the guest can start it before it
    /// has read them. Read at the start. QMP capability `mapped-ram`.
    pub mapped: bool,
    /// Most rounds while the guest runs; 0: it stands still from the beginning. None: as many as it takes. Read at the start.
    pub most_rounds: Option<u32>,
    /// What becomes of the guest here; anywhere but into a file it leaves. Read at the start.
    pub after: After,
    /// Out of a file: start the guest once all of its pages are there, even if it could wait for some. Read at the start.
    pub pages_first: bool,
    /// How long the other side may say nothing, or take nothing, before it counts as lost. Read at the start.
    pub stall_limit: Duration,
    /// How long announced connections are waited for. Read at the start.
    pub connect_limit: Duration,
    /// How long the destination may take, once the source has sent its last byte, to say that it has loaded the guest, and then that it
    /// runs: the guest stands still meanwhile. Read at the start.
    pub answer_limit: Duration,
    /// How long either side tries to find out whether the guest runs at the destination, once the connection is lost. Read at the start.
    pub fate_limit: Duration,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            connections: 1,
            zstd: None,
            max_bandwidth: 0,
            max_post_copy_bandwidth: 0,
            switchover_bandwidth: 0,
            downtime_limit: Duration::from_millis(300),
            auto_converge: false,
            throttle_initial: 20,
            throttle_increment: 10,
            throttle_max: 99,
            throttle_threshold: 50,
            dirty_limit: false,
            write_limit: 1 << 20,
            pause_before_switchover: false,
            post_copy: false,
            mapped: false,
            most_rounds: None,
            after: After::Leaves,
            pages_first: false,
            stall_limit: Duration::from_secs(30),
            connect_limit: Duration::from_secs(30),
            answer_limit: Duration::from_secs(60),
            fate_limit: Duration::from_secs(60),
        }
    }
}

impl Parameters {
    /// Whether they can be used.
    ///
    /// # Errors
    /// [`MigrationError::Parameter`]: which can't, and what it may be.
    pub fn check(&self) -> Result<(), MigrationError> {
        let percents = [
            ("throttle_initial", self.throttle_initial, 1..=99),
            ("throttle_increment", self.throttle_increment, 1..=99),
            ("throttle_max", self.throttle_max, self.throttle_initial..=99),
            ("throttle_threshold", self.throttle_threshold, 1..=100),
        ];
        let wrong = |name, value: String, why| Err(MigrationError::Parameter { name, value, why });
        if !(1..=MOST_CONNECTIONS).contains(&self.connections) {
            return wrong("connections", self.connections.to_string(), "there are 1 to 16");
        }
        if self.dirty_limit && self.auto_converge {
            return wrong("dirty_limit", "true".into(), "auto_converge slows the guest as well: take one of them");
        }
        if self.write_limit == 0 {
            return wrong("write_limit", "0".into(), "a vCPU that may write nothing does nothing");
        }
        if let Some(level) = self.zstd.filter(|level| !(1..=3).contains(level)) {
            return wrong("zstd", level.to_string(), "its levels are 1 to 3");
        }
        if let Some(level) = self.zstd.filter(|_| self.mapped) {
            return wrong(
                "zstd",
                level.to_string(),
                "pages with places of their own in a file (mapped-ram) are not compressed",
            );
        }
        for (name, value, range) in percents {
            if !range.contains(&value) {
                return wrong(
                    name,
                    value.to_string(),
                    "it is a part of the time, in percent, throttle_max the largest",
                );
            }
        }
        let limits = [
            ("stall_limit", self.stall_limit),
            ("connect_limit", self.connect_limit),
            ("answer_limit", self.answer_limit),
        ];
        for (name, limit) in limits {
            if limit.is_zero() {
                return wrong(name, format!("{limit:?}"), "the other side needs some time");
            }
        }
        Ok(())
    }
}
