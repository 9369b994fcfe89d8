//! What a migration can do.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::QmpError;
use super::super::aside::aside;
use super::super::command::Command;
use super::super::types::Empty;
use crate::control::{RunState, VmHandle};
use crate::migrate::{MigrateError, Settings};

/// QMP `MigrationCapability`: those that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MigrationCapability {
    /// Monitors hear of a migration's states, always.
    Events,
    /// The other side answers.
    ReturnPath,
    /// It waits before the guest changes sides.
    PauseBeforeSwitchover,
    /// The guest may run at the destination before all of its pages are there.
    PostcopyRam,
    /// A guest that writes faster than its pages move is slowed down.
    AutoConverge,
    /// Pages go by several connections.
    Multifd,
    /// Disks are opened when the guest is there, always.
    LateBlockActivate,
    /// Pages have places of their own in a file.
    MappedRam,
    /// Each vCPU of a guest that writes faster than its pages move is limited: of VMs with dirty rings.
    DirtyLimit,
}

impl MigrationCapability {
    const ALL: [Self; 9] = [
        Self::Events,
        Self::ReturnPath,
        Self::PauseBeforeSwitchover,
        Self::PostcopyRam,
        Self::AutoConverge,
        Self::Multifd,
        Self::LateBlockActivate,
        Self::MappedRam,
        Self::DirtyLimit,
    ];

    fn get(self, settings: &Settings) -> bool {
        match self {
            Self::Events => true,
            Self::ReturnPath => settings.return_path,
            Self::PauseBeforeSwitchover => settings.rest.pause_before_switchover,
            Self::PostcopyRam => settings.rest.post_copy,
            Self::AutoConverge => settings.rest.auto_converge,
            Self::Multifd => settings.multifd,
            Self::LateBlockActivate => settings.late_block_activate,
            Self::MappedRam => settings.mapped,
            Self::DirtyLimit => settings.rest.dirty_limit,
        }
    }

    fn set(self, settings: &mut Settings, on: bool) -> Result<(), MigrateError> {
        let place = match self {
            Self::Events if on => return Ok(()),
            Self::Events => {
                let why = "Events can't be switched off: monitors hear all of them";
                return Err(MigrateError::Refused(why.into()));
            }
            Self::ReturnPath => &mut settings.return_path,
            Self::PauseBeforeSwitchover => &mut settings.rest.pause_before_switchover,
            Self::PostcopyRam => &mut settings.rest.post_copy,
            Self::AutoConverge => &mut settings.rest.auto_converge,
            Self::Multifd => &mut settings.multifd,
            Self::LateBlockActivate => &mut settings.late_block_activate,
            Self::MappedRam => &mut settings.mapped,
            Self::DirtyLimit => &mut settings.rest.dirty_limit,
        };
        *place = on;
        Ok(())
    }
}

/// QMP `MigrationCapabilityStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MigrationCapabilityStatus {
    capability: MigrationCapability,
    state: bool,
}

/// QMP `query-migrate-capabilities`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct QueryMigrateCapabilities {}

impl Command for QueryMigrateCapabilities {
    const NAME: &'static str = "query-migrate-capabilities";
    type Reply = Vec<MigrationCapabilityStatus>;

    async fn run(self, vm: VmHandle) -> Result<Vec<MigrationCapabilityStatus>, QmpError> {
        let settings = vm.migration().settings();
        let status = |capability: MigrationCapability| MigrationCapabilityStatus {
            capability,
            state: capability.get(&settings),
        };
        Ok(MigrationCapability::ALL.map(status).to_vec())
    }
}

/// QMP `migrate-set-capabilities`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MigrateSetCapabilities {
    /// What is wanted.
    capabilities: Vec<MigrationCapabilityStatus>,
}

impl Command for MigrateSetCapabilities {
    const NAME: &'static str = "migrate-set-capabilities";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let wants = |capability| self.capabilities.iter().any(|wanted| wanted.capability == capability && wanted.state);
        if wants(MigrationCapability::DirtyLimit) {
            let migration = vm.migration().clone();
            migration.built().await;
            migration
                .check_rings()
                .map_err(|e| QmpError::generic(format!("dirty-limit: {e}, or use auto-converge")))?;
        }
        // It is the destination's host that has to be able to.
        if wants(MigrationCapability::PostcopyRam) && vm.state() == RunState::Inmigrate {
            let migration = vm.migration().clone();
            migration.built().await;
            aside(move || Ok(migration.check_post_copy()?)).await?;
        }
        if vm.migration().is_under_way() {
            return Err(MigrateError::Busy.into());
        }
        vm.migration().change(|settings| {
            self.capabilities.iter().try_for_each(|wanted| wanted.capability.set(settings, wanted.state))
        })?;
        Ok(Empty {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_what_it_was_set_to() {
        let mut settings = Settings::default();
        for capability in MigrationCapability::ALL.into_iter().filter(|it| *it != MigrationCapability::Events) {
            assert!(!capability.get(&settings), "{capability:?}");
            capability.set(&mut settings, true).unwrap();
            assert!(capability.get(&settings), "{capability:?}");
            capability.set(&mut settings, false).unwrap();
        }
        assert_eq!(settings, Settings::default());
        assert!(MigrationCapability::Events.set(&mut settings, false).is_err());
    }
}
