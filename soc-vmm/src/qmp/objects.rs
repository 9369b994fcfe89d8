//! Commands that ask what there is in QEMU's object model: types, and their properties.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::command::Command;
use super::machines::MACHINE;
use super::types::ObjectProperty;
use super::{ErrorClass, QmpError};
use crate::control::VmHandle;
use crate::cpuid::model_names;
use crate::qemu::catalog::{self, Property};

/// QMP `qom-list-types`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QomListTypes {
    /// What they shall be: nothing here stands on anything else.
    implements: Option<String>,
    /// Also types that can't be made: there is none.
    #[serde(rename = "abstract")]
    _abstract: Option<bool>,
}

/// QMP `ObjectTypeInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct ObjectTypeInfo {
    name: String,
}

impl Command for QomListTypes {
    const NAME: &'static str = "qom-list-types";
    type Reply = Vec<ObjectTypeInfo>;

    async fn run(self, _: VmHandle) -> Result<Vec<ObjectTypeInfo>, QmpError> {
        let devices = catalog::drivers().chain(catalog::on_board()).chain(catalog::objects()).map(str::to_owned);
        let cpus = ["host", "max"].into_iter().chain(model_names()).map(|model| format!("{model}-x86_64-cpu"));
        let machines = [MACHINE, "none"].map(|machine| format!("{machine}-machine"));
        let mut names: Vec<String> = devices.chain(cpus).chain(machines).collect();
        names.sort();
        names.dedup();
        if let Some(implements) = &self.implements {
            names.retain(|name| name == implements);
        }
        Ok(names.into_iter().map(|name| ObjectTypeInfo { name }).collect())
    }
}

/// QMP `device-list-properties`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DeviceListProperties {
    /// The driver.
    typename: String,
}

impl Command for DeviceListProperties {
    const NAME: &'static str = "device-list-properties";
    type Reply = Vec<ObjectProperty>;

    async fn run(self, _: VmHandle) -> Result<Vec<ObjectProperty>, QmpError> {
        let is_driver = catalog::drivers().chain(catalog::on_board()).any(|driver| driver == self.typename);
        let properties = is_driver.then(|| catalog::properties(&self.typename)).flatten();
        let desc = || format!("Device '{}' not found", self.typename);
        let properties = properties.ok_or_else(|| QmpError { class: ErrorClass::DeviceNotFound, desc: desc() })?;
        Ok(properties.into_iter().map(property).collect())
    }
}

/// QMP `qom-list-properties`: of a type that isn't there none, since libvirt 9.0 crashes where that is an error.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QomListProperties {
    /// The type.
    typename: String,
}

impl Command for QomListProperties {
    const NAME: &'static str = "qom-list-properties";
    type Reply = Vec<ObjectProperty>;

    async fn run(self, _: VmHandle) -> Result<Vec<ObjectProperty>, QmpError> {
        Ok(catalog::properties(&self.typename).unwrap_or_default().into_iter().map(property).collect())
    }
}

fn property(Property { name, kind }: Property) -> ObjectProperty {
    ObjectProperty { name, kind: kind.to_owned() }
}
