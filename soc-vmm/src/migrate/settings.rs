//! How migrations are done, in QEMU's words: capabilities and parameters.

use std::fmt;
use std::time::Duration;

use migration::{After, Parameters, Phase};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Rounds while a guest runs on that is being kept: each page is written so often at most, and once more.
const ROUNDS: u32 = 2;

/// Capabilities and parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The other side answers: false for a pipe, which is what `fd:` is without it.
    pub return_path: bool,
    /// Several connections.
    pub multifd: bool,
    /// The destination's disks are opened when the guest is there; they are, always.
    pub late_block_activate: bool,
    /// Pages have places of their own in a file.
    pub mapped: bool,
    /// zstd on the wire.
    pub zstd: bool,
    /// Of zstd.
    pub zstd_level: u8,
    /// Connections, where there are several.
    pub channels: u16,
    /// TLS.
    pub tls: TlsSettings,
    /// All else.
    pub rest: Parameters,
}

/// With which certificates connections are made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsSettings {
    /// The name of the `tls-creds-x509`; empty: without TLS.
    pub creds: String,
    /// Whom the destination's certificate has to be for; empty: the host that the place names.
    pub hostname: String,
}

impl Default for Settings {
    fn default() -> Self {
        let rest = Parameters { max_bandwidth: 0, downtime_limit: Duration::from_millis(300), ..Parameters::default() };
        Self {
            return_path: false,
            multifd: false,
            late_block_activate: false,
            mapped: false,
            zstd: false,
            zstd_level: 1,
            channels: 2,
            tls: TlsSettings::default(),
            rest,
        }
    }
}

impl Settings {
    /// As the protocol takes them.
    pub fn parameters(&self) -> Parameters {
        Parameters {
            connections: if self.multifd { self.channels } else { 1 },
            zstd: self.zstd.then_some(self.zstd_level),
            mapped: self.mapped,
            ..self.rest.clone()
        }
    }

    /// The same into a file: a guest can write as fast as a disk, which would be full before all of it is there.
    pub fn into_file(&self) -> Parameters {
        Parameters { most_rounds: Some(ROUNDS), ..self.parameters() }
    }

    /// As a guest is kept in a file: by each of its pages once, in a time that it can't prolong.
    pub fn keeping(&self, after: After) -> Parameters {
        Parameters {
            mapped: true,
            // One that goes on is to stand still for a short time; one that doesn't has nothing to run for.
            most_rounds: Some(if after == After::GoesOn { ROUNDS } else { 0 }),
            after,
            ..Parameters::default()
        }
    }

    /// Whether whoever is at the other end of a passed socket answers.
    pub fn answers(&self) -> bool {
        self.return_path
    }
}

/// QMP `MigrationStatus`: where a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "MigrationStatus")]
pub enum Step {
    /// There was none.
    None,
    /// The sides find each other.
    Setup,
    /// Somebody wants it to end.
    Cancelling,
    /// It did.
    Cancelled,
    /// Memory moves, the guest runs.
    Active,
    /// The guest runs at the destination, and memory still moves.
    PostcopyActive,
    /// The same, but the connection is lost.
    PostcopyPaused,
    /// The same, and there is a new one.
    PostcopyRecover,
    /// The guest is at the destination.
    Completed,
    /// It failed.
    Failed,
    /// The guest stands still, and waits for `migrate-continue`.
    PreSwitchover,
    /// The guest stands still, what is left of it moves.
    Device,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl Step {
    /// Of a phase.
    pub fn of(phase: &Phase) -> Self {
        match phase {
            Phase::Setup => Self::Setup,
            Phase::Active => Self::Active,
            Phase::PreSwitchover => Self::PreSwitchover,
            Phase::Device => Self::Device,
            Phase::PostcopyActive => Self::PostcopyActive,
            Phase::PostcopyPaused(_) => Self::PostcopyPaused,
            Phase::PostcopyRecover => Self::PostcopyRecover,
            Phase::Completed => Self::Completed,
            Phase::Failed(_) => Self::Failed,
            Phase::Cancelling => Self::Cancelling,
            Phase::Cancelled => Self::Cancelled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_protocol() {
        let phases = [Phase::Setup, Phase::PreSwitchover, Phase::PostcopyRecover, Phase::Failed(String::new())];
        for phase in phases {
            assert_eq!(serde_json::to_value(Step::of(&phase)).unwrap(), phase.word());
        }
    }

    #[test]
    fn several_connections_are_asked_for() {
        let settings = Settings { channels: 4, ..Settings::default() };
        assert_eq!((settings.parameters().connections, settings.parameters().zstd), (1, None));
        let settings = Settings { multifd: true, zstd: true, ..settings };
        assert_eq!((settings.parameters().connections, settings.parameters().zstd), (4, Some(1)));
    }
}
