//! What clients say of migration at each start of a VM: which events they want.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::QmpError;
use super::command::Command;
use super::types::Empty;
use crate::control::VmHandle;

/// QMP `MigrationCapability`: those that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum MigrationCapability {
    /// Monitors hear of a migration's states, always.
    Events,
}

/// QMP `MigrationCapabilityStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MigrationCapabilityStatus {
    capability: MigrationCapability,
    state: bool,
}

/// QMP `query-migrate-capabilities`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryMigrateCapabilities {}

impl Command for QueryMigrateCapabilities {
    const NAME: &'static str = "query-migrate-capabilities";
    type Reply = Vec<MigrationCapabilityStatus>;

    async fn run(self, _: VmHandle) -> Result<Vec<MigrationCapabilityStatus>, QmpError> {
        Ok(vec![MigrationCapabilityStatus { capability: MigrationCapability::Events, state: true }])
    }
}

/// QMP `migrate-set-capabilities`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MigrateSetCapabilities {
    /// What is wanted.
    capabilities: Vec<MigrationCapabilityStatus>,
}

impl Command for MigrateSetCapabilities {
    const NAME: &'static str = "migrate-set-capabilities";
    type Reply = Empty;

    async fn run(self, _: VmHandle) -> Result<Empty, QmpError> {
        match self.capabilities.iter().find(|it| it.capability == MigrationCapability::Events && !it.state) {
            None => Ok(Empty {}),
            Some(_) => Err(QmpError::generic("Events can't be switched off: monitors hear all of them")),
        }
    }
}
