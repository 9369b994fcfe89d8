//! `x-outboard-save`, a command of ours: `soc-vmm save`.

use std::path::PathBuf;

use migration::After;
use schemars::JsonSchema;
use serde::Deserialize;

use super::super::QmpError;
use super::super::aside::aside;
use super::super::command::Command;
use super::super::devices::slots_of;
use super::super::types::Empty;
use crate::control::{RunState, VmHandle};
use crate::slots::{DeviceKind, SlotsHandle};

/// Has a guest be kept in a file. Answered when that has begun; `query-migrate` tells how far it is.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Save {
    /// The path of the file, which isn't there yet, from / on.
    file: PathBuf,
    /// What becomes of the guest.
    #[serde(default)]
    then: Then,
}

/// `x-outboard-save-then`, a type of ours: what becomes of a guest that is in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "x-outboard-save-then")]
pub(crate) enum Then {
    /// It has left, and the VM ends.
    #[default]
    End,
    /// It goes on.
    Run,
    /// It stands still until somebody has it go on.
    Pause,
}

impl Command for Save {
    const NAME: &'static str = "x-outboard-save";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        if matches!(vm.state(), RunState::Inmigrate) {
            return Err(QmpError::generic("the guest is not here yet"));
        }
        if !self.file.is_absolute() {
            return Err(QmpError::generic("file: it needs a path from / on: this process's directory is nobody's"));
        }
        let migration = vm.migration().clone();
        migration.built().await;
        if self.then == Then::Run {
            changes_no_disk(&slots_of(&vm)?)?;
        }
        let after = match self.then {
            Then::End => After::Leaves,
            Then::Run => After::GoesOn,
            Then::Pause => After::StandsStill,
        };
        aside(move || Ok(migration.save(&self.file, after)?)).await?;
        Ok(Empty {})
    }
}

/// Disks are not in the file: a guest that goes on would change those that the one in the file counts on.
fn changes_no_disk(slots: &SlotsHandle) -> Result<(), QmpError> {
    let ours = slots.disks().into_iter().filter(|disk| !disk.handle.is_read_only()).map(|disk| disk.id);
    let theirs =
        slots.devices().into_iter().filter(|device| device.kind == DeviceKind::VhostDisk).map(|device| device.id);
    let changed: Vec<String> = ours.chain(theirs).collect();
    if changed.is_empty() {
        return Ok(());
    }
    Err(QmpError::generic(format!(
        "the guest would go on to write to {}, which the guest in the file counts on: have it stand still instead (soc-vmm save --keep=paused), copy \
         what it writes to, and resume it",
        changed.join(", ")
    )))
}
