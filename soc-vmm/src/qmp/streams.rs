//! Commands to character devices.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::QmpError;
use super::command::Command;
use crate::chardev;
use crate::control::VmHandle;

/// QMP `query-chardev`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryChardev {}

/// QMP `ChardevInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ChardevInfo {
    label: String,
    filename: String,
    frontend_open: bool,
}

impl Command for QueryChardev {
    const NAME: &'static str = "query-chardev";
    type Reply = Vec<ChardevInfo>;

    async fn run(self, vm: VmHandle) -> Result<Vec<ChardevInfo>, QmpError> {
        let ports = vm.slots().map(|slots| slots.serial_ports()).unwrap_or_default();
        let info =
            |chardev::ChardevInfo { label, filename, frontend_open }| ChardevInfo { label, filename, frontend_open };
        Ok(vm.chardevs().list(&ports).into_iter().map(info).collect())
    }
}
