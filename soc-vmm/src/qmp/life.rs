//! Commands to the life of a VM.

use schemars::JsonSchema;
use serde::Deserialize;

use super::QmpError;
use super::command::Command;
use super::types::Empty;
use crate::control::{ShutdownCause, VmHandle};
use crate::qemu::small::ActionOption;

/// QMP `stop`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stop {}

impl Command for Stop {
    const NAME: &'static str = "stop";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.stop().await?;
        Ok(Empty {})
    }
}

/// QMP `cont`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cont {}

impl Command for Cont {
    const NAME: &'static str = "cont";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.cont().await?;
        Ok(Empty {})
    }
}

/// QMP `system_reset`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SystemReset {}

impl Command for SystemReset {
    const NAME: &'static str = "system_reset";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.reset().await?;
        Ok(Empty {})
    }
}

/// QMP `system_powerdown`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SystemPowerdown {}

impl Command for SystemPowerdown {
    const NAME: &'static str = "system_powerdown";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.powerdown().await?;
        Ok(Empty {})
    }
}

/// QMP `quit`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Quit {}

impl Command for Quit {
    const NAME: &'static str = "quit";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.quit(ShutdownCause::HostQmpQuit).await?;
        Ok(Empty {})
    }
}

/// QMP `set-action`: what resets, powering off and panics come to from now on.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct SetAction(ActionOption);

impl Command for SetAction {
    const NAME: &'static str = "set-action";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.actions().set(self.0);
        Ok(Empty {})
    }
}
