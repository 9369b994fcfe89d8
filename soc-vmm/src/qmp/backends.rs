//! Commands that name back ends: block nodes, networks, objects.

use schemars::JsonSchema;
use serde::Deserialize;

use super::QmpError;
use super::aside::aside;
use super::cdrom::in_no_drive;
use super::command::Command;
use super::devices::{in_world, slots_of};
use super::jobs::unused;
use super::types::Empty;
use crate::cli::with_causes;
use crate::control::VmHandle;
use crate::qemu::{BlockdevAdd, NetdevAdd, Object, ObjectKind, Properties, World};
use crate::slots::SlotsHandle;

/// QMP `blockdev-add`: a file, or an image in one.
impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let add = move |slots: &SlotsHandle, world: &World<'_>| {
            let (name, node) = self.0.open(world)?;
            Ok(slots.name_disk(&name, node)?)
        };
        in_world(vm, add).await?;
        Ok(Empty {})
    }
}

/// QMP `blockdev-del`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct BlockdevDel {
    /// Its name.
    node_name: String,
}

impl Command for BlockdevDel {
    const NAME: &'static str = "blockdev-del";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let slots = slots_of(&vm)?;
        in_no_drive(&vm, &self.node_name)?;
        unused(&vm, &self.node_name, "node")?;
        aside(move || Ok(slots.delete_disk(&self.node_name)?)).await?;
        Ok(Empty {})
    }
}

/// QMP `netdev_add`.
impl Command for NetdevAdd {
    const NAME: &'static str = "netdev_add";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let add = move |slots: &SlotsHandle, world: &World<'_>| {
            let (name, net) = self.0.open(world)?;
            Ok(slots.name_net(&name, net)?)
        };
        in_world(vm, add).await?;
        Ok(Empty {})
    }
}

/// QMP `netdev_del`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NetdevDel {
    /// Its name.
    id: String,
}

impl Command for NetdevDel {
    const NAME: &'static str = "netdev_del";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let slots = slots_of(&vm)?;
        aside(move || {
            slots.delete_net(&self.id)?;
            vm.chardevs().release(&self.id);
            Ok(())
        })
        .await?;
        Ok(Empty {})
    }
}

/// QMP `object-add`.
#[derive(Clone, Debug, JsonSchema)]
#[schemars(transparent)]
pub(super) struct ObjectAdd(Object);

impl<'de> Deserialize<'de> for ObjectAdd {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let properties = Properties::of_json(serde_json::Map::deserialize(deserializer)?);
        Object::of(properties).map(Self).map_err(serde::de::Error::custom)
    }
}

impl Command for ObjectAdd {
    const NAME: &'static str = "object-add";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        if let ObjectKind::Memory(_) = self.0.kind {
            return Err(QmpError::generic("Memory can't be added to a VM"));
        }
        if let ObjectKind::Tls(spec) = &self.0.kind {
            let spec = spec.clone();
            // Whoever uses them reads them again: by then there may be new ones.
            aside(move || spec.load().map_err(|e| QmpError::generic(with_causes(&e)))).await?;
        }
        slots_of(&vm)?.name_object(&self.0.id, self.0.kind)?;
        Ok(Empty {})
    }
}

/// QMP `object-del`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ObjectDel {
    /// Its name.
    id: String,
}

impl Command for ObjectDel {
    const NAME: &'static str = "object-del";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        slots_of(&vm)?.delete_object(&self.id)?;
        Ok(Empty {})
    }
}
