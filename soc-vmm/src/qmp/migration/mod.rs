//! Commands about a guest's way to another server, and from another one here.

mod capabilities;
mod dirty_limit;
mod dirty_rate;
mod parameters;
mod query;
mod save;

use schemars::JsonSchema;
use serde::Deserialize;

use super::QmpError;
use super::aside::aside;
use super::command::Command;
use super::devices::slots_of;
use super::types::Empty;
use crate::control::{RunState, VmHandle};
use crate::migrate::{MigrateError, Secure, Step, TlsSettings, Uri, Way};

pub(super) use capabilities::{MigrateSetCapabilities, QueryMigrateCapabilities};
pub(super) use dirty_limit::{CancelVcpuDirtyLimit, QueryVcpuDirtyLimit, SetVcpuDirtyLimit};
pub(super) use dirty_rate::{CalcDirtyRate, QueryDirtyRate};
pub(super) use parameters::{MigrateSetParameters, QueryMigrateParameters};
pub(super) use query::QueryMigrate;
pub(super) use save::Save;

impl From<MigrateError> for QmpError {
    fn from(e: MigrateError) -> Self {
        Self::generic(crate::cli::with_causes(&e))
    }
}

/// QMP `migrate`: the guest leaves. Answered when it has begun.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Migrate {
    /// Where to.
    uri: String,
    /// Means nothing: it is always so.
    #[serde(default)]
    #[allow(dead_code, reason = "clients send it")]
    detach: Option<bool>,
    /// Goes on with one whose connection broke.
    #[serde(default)]
    resume: Option<bool>,
}

impl Command for Migrate {
    const NAME: &'static str = "migrate";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        if self.resume == Some(true) {
            let way = way(&self.uri, true, &vm).await?;
            let migration = vm.migration().clone();
            aside(move || Ok(migration.resume(way)?)).await?;
            return Ok(Empty {});
        }
        if matches!(vm.state(), RunState::Inmigrate) {
            return Err(QmpError::generic("Guest is waiting for an incoming migration"));
        }
        let way = way(&self.uri, true, &vm).await?;
        let migration = vm.migration().clone();
        migration.built().await;
        aside(move || Ok(migration.leave(way)?)).await?;
        Ok(Empty {})
    }
}

/// QMP `migrate-incoming`: the guest comes. Answered when the door is open.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MigrateIncoming {
    /// Where from.
    uri: String,
}

impl Command for MigrateIncoming {
    const NAME: &'static str = "migrate-incoming";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        if vm.state() != RunState::Inmigrate {
            return Err(QmpError::generic("'-incoming' was not specified on the command line"));
        }
        let way = way(&self.uri, false, &vm).await?;
        let migration = vm.migration().clone();
        migration.built().await;
        aside(move || Ok(migration.come(way)?)).await?;
        Ok(Empty {})
    }
}

/// QMP `migrate-start-postcopy`: the guest is to run at the destination from the end of this round on.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MigrateStartPostcopy {}

impl Command for MigrateStartPostcopy {
    const NAME: &'static str = "migrate-start-postcopy";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.migration().start_post_copy()?;
        Ok(Empty {})
    }
}

/// QMP `migrate-pause`: gives up the connection of a guest that runs at the destination already, for another one.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MigratePause {}

impl Command for MigratePause {
    const NAME: &'static str = "migrate-pause";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let migration = vm.migration().clone();
        aside(move || Ok(migration.pause()?)).await?;
        Ok(Empty {})
    }
}

/// QMP `migrate-recover`: where the destination waits for another connection. The door that it had stays open until then.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MigrateRecover {
    /// Where from.
    uri: String,
}

impl Command for MigrateRecover {
    const NAME: &'static str = "migrate-recover";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let way = way(&self.uri, false, &vm).await?;
        let migration = vm.migration().clone();
        aside(move || Ok(migration.recover(way)?)).await?;
        Ok(Empty {})
    }
}

/// QMP `migrate_cancel`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MigrateCancel {}

impl Command for MigrateCancel {
    const NAME: &'static str = "migrate_cancel";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let migration = vm.migration().clone();
        aside(move || {
            migration.cancel();
            Ok(())
        })
        .await?;
        Ok(Empty {})
    }
}

/// QMP `migrate-continue`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MigrateContinue {
    /// Where it has to be.
    state: Step,
}

impl Command for MigrateContinue {
    const NAME: &'static str = "migrate-continue";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        if self.state != Step::PreSwitchover {
            return Err(QmpError::generic("A migration waits in the state pre-switchover alone"));
        }
        vm.migration().go_on()?;
        Ok(Empty {})
    }
}

/// The way that a URI means to the source, or to the destination.
async fn way(uri: &str, is_source: bool, vm: &VmHandle) -> Result<Way, QmpError> {
    let uri: Uri = uri.parse().map_err(|e| QmpError::generic(format!("uri={e}")))?;
    let tls = tls(&uri, is_source, vm).await?;
    let way = Way::of(&uri, is_source, vm.fds()).map_err(MigrateError::from)?;
    let way = way.ok_or_else(|| QmpError::generic("uri=defer: the place is to be told now"))?;
    Ok(match tls {
        Some(tls) => way.with(tls).map_err(MigrateError::from)?,
        None => way,
    })
}

/// What is needed for TLS, if that is wanted.
async fn tls(uri: &Uri, is_source: bool, vm: &VmHandle) -> Result<Option<Secure>, QmpError> {
    let TlsSettings { creds, hostname } = vm.migration().settings().tls;
    if creds.is_empty() {
        return match uri {
            Uri::Tls(..) => Err(QmpError::generic(format!(
                "uri={uri}: TLS needs certificates: object-add a tls-creds-x509, and name it by migrate-set-parameters' tls-creds"
            ))),
            _ => Ok(None),
        };
    }
    let spec = slots_of(vm)?.credentials(&creds);
    let spec = spec.map_err(|_| QmpError::generic(format!("tls-creds: there is no tls-creds-x509 '{creds}'")))?;
    let uri = uri.clone();
    let read = move || {
        let host = Some(hostname.as_str()).filter(|host| !host.is_empty());
        Ok(Secure::of(&spec, is_source, &uri, host).map_err(MigrateError::from)?)
    };
    aside(read).await.map(Some)
}
