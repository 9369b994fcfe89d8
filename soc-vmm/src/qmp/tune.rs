//! Commands that change a device while its guest uses it.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::aside::aside;
use super::command::Command;
use super::cpus;
use super::devices::slots_of;
use super::types::{BalloonInfo, Empty, ObjectProperty};
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
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let balloon = balloon_of(&vm)?;
        match u64::try_from(self.value) {
            Ok(memory) if memory > 0 => {
                balloon.set_target(memory).map(|()| Empty {}).map_err(|e| QmpError::generic(e.to_string()))
            }
            _ => Err(QmpError::generic("A guest can't do without memory: 'value' is its bytes")),
        }
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
fn balloon_of(vm: &VmHandle) -> Result<Arc<BalloonHandle>, QmpError> {
    match slots_of(vm)?.device(BALLOON_ID) {
        Ok(DeviceHandle::Balloon(balloon)) => Ok(balloon),
        Ok(_) | Err(SlotError::NotFound(_)) => Err(QmpError {
            class: ErrorClass::DeviceNotActive,
            desc: "The VM has no balloon: give it one with --balloon on".into(),
        }),
        Err(e) => Err(e.into()),
    }
}

/// Where the balloon is in QEMU's tree of objects, and its properties.
pub(super) const BALLOON_PATH: &str = "/machine/peripheral/balloon0";
const STATS: &str = "guest-stats";
const INTERVAL: &str = "guest-stats-polling-interval";

/// QMP `qom-get`, of the balloon's properties, and of what processors lack.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QomGet {
    /// The object.
    path: String,
    /// The property.
    property: String,
}

/// QEMU's `guest-stats`.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Stats {
    /// Each by its name; 2⁶⁴ − 1: the guest didn't say.
    stats: serde_json::Map<String, Value>,
    /// Seconds since the epoch; 0: it said nothing yet.
    last_update: u64,
}

impl Command for QomGet {
    const NAME: &'static str = "qom-get";
    type Reply = Value;

    async fn run(self, vm: VmHandle) -> Result<Value, QmpError> {
        if cpus::is_cpu_path(&vm, &self.path) {
            // libvirt looks for `migratable` when it comes back to a domain, and gives the domain up at another class of errors.
            return if self.property == cpus::UNAVAILABLE {
                Ok(Value::Array(Vec::new()))
            } else {
                Err(QmpError::generic(format!("Property '{}.{}' not found", self.path, self.property)))
            };
        }
        let balloon = property_of_balloon(&vm, &self.path, &self.property)?;
        if self.property == INTERVAL {
            return Ok(balloon.interval().map_or(0, |interval| interval.as_secs()).into());
        }
        let stats = balloon.stats();
        let value = |value: Option<u64>| Value::from(value.unwrap_or(u64::MAX));
        let named = stats.named().map(|(name, number)| (name.to_owned(), value(number))).collect();
        let since = stats.updated.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let stats = Stats { stats: named, last_update: since.map_or(0, |since| since.as_secs()) };
        serde_json::to_value(stats).map_err(|e| QmpError::generic(e.to_string()))
    }
}

/// QMP `qom-set`, of how often the balloon asks for statistics.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QomSet {
    /// The object.
    path: String,
    /// The property.
    property: String,
    /// Its value.
    value: Value,
}

impl Command for QomSet {
    const NAME: &'static str = "qom-set";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let balloon = property_of_balloon(&vm, &self.path, &self.property)?;
        let seconds = self.value.as_u64().filter(|_| self.property == INTERVAL).and_then(|s| u32::try_from(s).ok());
        let Some(seconds) = seconds else {
            return Err(QmpError::generic(format!("{INTERVAL} alone can be set: to seconds, or to 0")));
        };
        balloon.set_interval(Some(Duration::from_secs(seconds.into())));
        Ok(Empty {})
    }
}

/// The properties of the balloon, if the VM has one: by them libvirt finds that it tells statistics.
pub(super) fn properties_of_balloon(vm: &VmHandle) -> Result<Vec<ObjectProperty>, QmpError> {
    balloon_of(vm)?;
    let property = |name: &str, kind: &str| ObjectProperty { name: name.into(), kind: kind.into() };
    Ok(vec![property(STATS, "guest statistics"), property(INTERVAL, "int")])
}

fn property_of_balloon(vm: &VmHandle, path: &str, property: &str) -> Result<Arc<BalloonHandle>, QmpError> {
    if path != BALLOON_PATH {
        let desc = format!("Device '{path}' not found: only {BALLOON_PATH} has properties");
        return Err(QmpError { class: ErrorClass::DeviceNotFound, desc });
    }
    if property != STATS && property != INTERVAL {
        return Err(QmpError::generic(format!(
            "Property '{path}.{property}' not found: it has {STATS} and {INTERVAL}"
        )));
    }
    balloon_of(vm)
}
