//! Commands that change a device while its guest uses it.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use super::aside::aside;
use super::command::Command;
use super::devices::slots_of;
use super::types::{BalloonInfo, Empty};
use super::{ErrorClass, QmpError};
use crate::control::{BALLOON_ID, VmHandle};
use crate::slots::{DeviceHandle, SlotError};
use crate::virtio::balloon::BalloonHandle;

/// QMP `block_resize`: a disk's image grows, and its guest sees it.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct BlockResize {
    /// The disk.
    device: Option<String>,
    /// Its block node.
    node_name: Option<String>,
    /// Bytes.
    size: i64,
}

impl Command for BlockResize {
    const NAME: &'static str = "block_resize";
    const PLUGS: bool = true;
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let slots = slots_of(&vm)?;
        let Self { device, node_name, size } = self;
        let id = match (device, node_name) {
            (Some(device), None) => device,
            (None, Some(node)) => {
                let devices = slots.devices();
                let user = devices.into_iter().find(|device| device.uses(&node, false));
                user.ok_or_else(|| QmpError::generic(format!("No disk has the node '{node}'")))?.id
            }
            _ => return Err(QmpError::generic("block_resize needs either 'device' or 'node-name'")),
        };
        let size = u64::try_from(size).map_err(|_| QmpError::generic("A disk's size is not negative"))?;
        aside(move || Ok(slots.resize(&id, size)?)).await?;
        Ok(Empty {})
    }
}

/// QMP `set_link`: an interface's cable is plugged in or pulled.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SetLink {
    /// The interface.
    name: String,
    /// Whether the cable is in.
    up: bool,
}

impl Command for SetLink {
    const NAME: &'static str = "set_link";
    const ALTERS: bool = true;
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        match slots_of(&vm)?.device(&self.name)? {
            DeviceHandle::Net(link, _) | DeviceHandle::VhostNet(link) => link.set_up(self.up),
            _ => return Err(QmpError::generic(format!("'{}' is no network interface", self.name))),
        }
        Ok(Empty {})
    }
}

/// QMP `balloon`: the guest is to make do with so much memory.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Balloon {
    /// Bytes.
    value: i64,
}

impl Command for Balloon {
    const NAME: &'static str = "balloon";
    const ALTERS: bool = true;
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let balloon = balloon_of(&vm)?;
        match u64::try_from(self.value) {
            Ok(memory) if memory > 0 => balloon.set_target(memory).map_err(|e| QmpError::generic(e.to_string()))?,
            _ => return Err(QmpError::generic("A guest can't do without memory: 'value' is its bytes")),
        }
        Ok(Empty {})
    }
}

/// QMP `query-balloon`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryBalloon {}

impl Command for QueryBalloon {
    const NAME: &'static str = "query-balloon";
    type Reply = BalloonInfo;

    async fn run(self, vm: VmHandle) -> Result<BalloonInfo, QmpError> {
        Ok(BalloonInfo { actual: balloon_of(&vm)?.memory() })
    }
}

/// The VM's balloon.
pub(super) fn balloon_of(vm: &VmHandle) -> Result<Arc<BalloonHandle>, QmpError> {
    match slots_of(vm)?.device(BALLOON_ID) {
        Ok(DeviceHandle::Balloon(balloon)) => Ok(balloon),
        Ok(_) | Err(SlotError::NotFound(_)) => Err(QmpError {
            class: ErrorClass::DeviceNotActive,
            desc: "The VM has no balloon: give it one with --balloon on".into(),
        }),
        Err(e) => Err(e.into()),
    }
}
