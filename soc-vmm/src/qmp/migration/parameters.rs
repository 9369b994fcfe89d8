//! How a migration is done.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::QmpError;
use super::super::command::Command;
use super::super::types::Empty;
use crate::control::VmHandle;
use crate::migrate::{MigrateError, Settings};

/// QMP `MultiFDCompression`: those that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MultiFDCompression {
    /// None.
    None,
    /// zstd.
    Zstd,
}

/// QMP `MigrationParameters`, of those that there are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct MigrationParameters {
    /// Most bytes a second; 0: as many as there can be.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_bandwidth: Option<u64>,
    /// Bytes a second to count on while the guest stands still; 0: as measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    avail_switchover_bandwidth: Option<u64>,
    /// Most bytes a second of pages that come after the guest has started and that nobody waits for; 0: as many as there can be.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_postcopy_bandwidth: Option<u64>,
    /// Milliseconds that the guest may stand still.
    #[serde(skip_serializing_if = "Option::is_none")]
    downtime_limit: Option<u64>,
    /// The part of what was sent, in percent, that may be written meanwhile without a throttle.
    #[serde(skip_serializing_if = "Option::is_none")]
    throttle_trigger_threshold: Option<u8>,
    /// The first throttle, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_throttle_initial: Option<u8>,
    /// What each further one adds.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_throttle_increment: Option<u8>,
    /// The last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_cpu_throttle: Option<u8>,
    /// MiB a second that each vCPU may write, with capability dirty-limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu_dirty_limit: Option<u64>,
    /// Connections with capability multifd.
    #[serde(skip_serializing_if = "Option::is_none")]
    multifd_channels: Option<u8>,
    /// What is done to pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    multifd_compression: Option<MultiFDCompression>,
    /// How much zstd tries.
    #[serde(skip_serializing_if = "Option::is_none")]
    multifd_zstd_level: Option<u8>,
    /// The certificates for TLS; empty: no TLS.
    #[serde(default, deserialize_with = "text_or_null", skip_serializing_if = "Option::is_none")]
    tls_creds: Option<String>,
    /// Whom the destination's certificate has to be for; empty: the host in the URI.
    #[serde(default, deserialize_with = "text_or_null", skip_serializing_if = "Option::is_none")]
    tls_hostname: Option<String>,
    /// Empty: whoever has a certificate may bring a guest.
    #[serde(default, deserialize_with = "text_or_null", skip_serializing_if = "Option::is_none")]
    tls_authz: Option<String>,
}

/// QMP `StrOrNull`, of which null is as empty.
fn text_or_null<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Option::deserialize(deserializer).map(|text| Some(text.unwrap_or_default()))
}

/// The highest limit of a vCPU's writes, in MiB a second: more than memory takes.
pub(super) const MOST_WRITES: u64 = 1 << 20;
/// The longest downtime that QEMU takes, in milliseconds.
const LONGEST_DOWNTIME: u64 = 2_000_000;

impl MigrationParameters {
    fn of(settings: &Settings) -> Self {
        let rest = &settings.rest;
        Self {
            max_bandwidth: Some(rest.max_bandwidth),
            avail_switchover_bandwidth: Some(rest.switchover_bandwidth),
            max_postcopy_bandwidth: Some(rest.max_post_copy_bandwidth),
            downtime_limit: Some(rest.downtime_limit.as_millis() as u64),
            throttle_trigger_threshold: Some(rest.throttle_threshold),
            cpu_throttle_initial: Some(rest.throttle_initial),
            cpu_throttle_increment: Some(rest.throttle_increment),
            max_cpu_throttle: Some(rest.throttle_max),
            vcpu_dirty_limit: Some(rest.write_limit >> 20),
            multifd_channels: Some(settings.channels as u8),
            multifd_compression: Some(if settings.zstd { MultiFDCompression::Zstd } else { MultiFDCompression::None }),
            multifd_zstd_level: Some(settings.zstd_level),
            tls_creds: Some(settings.tls.creds.clone()),
            tls_hostname: Some(settings.tls.hostname.clone()),
            tls_authz: Some(String::new()),
        }
    }

    fn put(self, settings: &mut Settings) -> Result<(), MigrateError> {
        let rest = &mut settings.rest;
        if let Some(limit) = self.downtime_limit {
            if limit > LONGEST_DOWNTIME {
                let why = format!(
                    "Parameter 'downtime-limit' expects an integer in the range of 0 to {LONGEST_DOWNTIME} milliseconds"
                );
                return Err(MigrateError::Refused(why));
            }
            rest.downtime_limit = Duration::from_millis(limit);
        }
        if let Some(limit) = self.vcpu_dirty_limit {
            if !(1..=MOST_WRITES).contains(&limit) {
                let why = format!("Parameter 'vcpu-dirty-limit' expects MiB a second, 1 to {MOST_WRITES}");
                return Err(MigrateError::Refused(why));
            }
            rest.write_limit = limit << 20;
        }
        if self.tls_authz.is_some_and(|authz| !authz.is_empty()) {
            let why = "Parameter 'tls-authz' has to be empty: who has a certificate of an authority in ca-cert.pem may bring a guest, \
                       so use an authority of your own for that";
            return Err(MigrateError::Refused(why.into()));
        }
        if let Some(creds) = self.tls_creds {
            settings.tls.creds = creds;
        }
        if let Some(hostname) = self.tls_hostname {
            settings.tls.hostname = hostname;
        }
        rest.max_bandwidth = self.max_bandwidth.unwrap_or(rest.max_bandwidth);
        rest.max_post_copy_bandwidth = self.max_postcopy_bandwidth.unwrap_or(rest.max_post_copy_bandwidth);
        rest.switchover_bandwidth = self.avail_switchover_bandwidth.unwrap_or(rest.switchover_bandwidth);
        rest.throttle_threshold = self.throttle_trigger_threshold.unwrap_or(rest.throttle_threshold);
        rest.throttle_initial = self.cpu_throttle_initial.unwrap_or(rest.throttle_initial);
        rest.throttle_increment = self.cpu_throttle_increment.unwrap_or(rest.throttle_increment);
        rest.throttle_max = self.max_cpu_throttle.unwrap_or(rest.throttle_max);
        settings.channels = self.multifd_channels.map_or(settings.channels, u16::from);
        settings.zstd = self.multifd_compression.map_or(settings.zstd, |it| it == MultiFDCompression::Zstd);
        settings.zstd_level = self.multifd_zstd_level.unwrap_or(settings.zstd_level);
        Ok(())
    }
}

/// QMP `query-migrate-parameters`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct QueryMigrateParameters {}

impl Command for QueryMigrateParameters {
    const NAME: &'static str = "query-migrate-parameters";
    type Reply = MigrationParameters;

    async fn run(self, vm: VmHandle) -> Result<MigrationParameters, QmpError> {
        Ok(MigrationParameters::of(&vm.migration().settings()))
    }
}

/// QMP `migrate-set-parameters`. What is read at a migration's start alone is the next one's.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
pub(crate) struct MigrateSetParameters(MigrationParameters);

impl Command for MigrateSetParameters {
    const NAME: &'static str = "migrate-set-parameters";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.migration().change(|settings| self.0.put(settings))?;
        Ok(Empty {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_changed_and_nothing_else() {
        let mut settings = Settings::default();
        let said: MigrationParameters =
            serde_json::from_str(r#"{"max-bandwidth": 5, "multifd-channels": 9, "multifd-compression": "zstd"}"#)
                .unwrap();
        said.put(&mut settings).unwrap();
        let now = MigrationParameters::of(&settings);
        let default = MigrationParameters::of(&Settings::default());
        assert_eq!(
            now,
            MigrationParameters {
                max_bandwidth: Some(5),
                multifd_channels: Some(9),
                multifd_compression: Some(MultiFDCompression::Zstd),
                ..default
            }
        );
        let tls: MigrationParameters = serde_json::from_str(r#"{"tls-creds": "tls0", "tls-hostname": null}"#).unwrap();
        settings.tls.hostname = "there".into();
        tls.put(&mut settings).unwrap();
        assert_eq!((settings.tls.creds.as_str(), settings.tls.hostname.as_str()), ("tls0", ""));
        let authz = MigrationParameters { tls_authz: Some("a".into()), ..MigrationParameters::default() };
        assert!(authz.put(&mut settings).is_err());
        let now = MigrationParameters::of(&settings);
        let long = MigrationParameters { downtime_limit: Some(LONGEST_DOWNTIME + 1), ..MigrationParameters::default() };
        assert!(long.put(&mut settings).is_err());
        assert_eq!(MigrationParameters::of(&settings), now);
    }
}
