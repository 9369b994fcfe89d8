//! QEMU's tree of objects, as far as it is asked for: the devices that can be added and deleted, and what can be read of the balloon.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::command::Command;
use super::cpus;
use super::devices::{DISK, NET, slots_of};
use super::tune::balloon_of;
use super::types::{Empty, ObjectProperty};
use super::{ErrorClass, QmpError};
use crate::control::{BALLOON_ID, VmHandle};
use crate::slots::{self, SlotsHandle};
use crate::virtio::balloon::BalloonHandle;

/// Where devices are in QEMU's tree of objects.
pub const PERIPHERAL: &str = "/machine/peripheral";
/// What it calls the ports that they are behind.
pub const ROOT_PORT: &str = "pcie-root-port";

/// QMP `qom-list`, of the one place where the devices are that can be added and deleted.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QomList {
    /// `/machine/peripheral`.
    path: String,
}

impl Command for QomList {
    const NAME: &'static str = "qom-list";
    type Reply = Vec<ObjectProperty>;

    async fn run(self, vm: VmHandle) -> Result<Vec<ObjectProperty>, QmpError> {
        // A processor's features are asked of its model.
        if cpus::is_cpu_path(&vm, &self.path) {
            return Ok(Vec::new());
        }
        let children = children(&vm, &slots_of(&vm)?);
        let of_its_own = |name: &str, kind: &str| ObjectProperty { name: name.into(), kind: kind.into() };
        let own = std::iter::once(of_its_own("type", "string"));
        if self.path == PERIPHERAL {
            return Ok(own.chain(children).collect());
        }
        let name = in_peripheral(&self.path).filter(|name| children.iter().any(|child| child.name == *name));
        let Some(name) = name else {
            return Err(QmpError {
                class: ErrorClass::DeviceNotFound,
                desc: format!("There is nothing at '{}': '{PERIPHERAL}' and what it lists is all there is", self.path),
            });
        };
        let balloon = [of_its_own(STATS, "guest statistics"), of_its_own(INTERVAL, "int")];
        Ok(own.chain(balloon.into_iter().filter(|_| name == BALLOON_ID)).collect())
    }
}

/// The name of what has that path among the devices.
pub(super) fn in_peripheral(path: &str) -> Option<&str> {
    path.strip_prefix(PERIPHERAL)?.strip_prefix('/')
}

fn children(vm: &VmHandle, slots: &SlotsHandle) -> Vec<ObjectProperty> {
    let child = |name, driver| ObjectProperty { name, kind: format!("child<{driver}>") };
    let ports = slots.ports().into_iter().map(|name| child(name, ROOT_PORT));
    let devices = slots.devices().into_iter().map(|device| {
        let driver = match device.kind {
            slots::DeviceKind::Disk => DISK,
            slots::DeviceKind::Net(_) => NET,
            slots::DeviceKind::Entropy => "virtio-rng-pci",
            slots::DeviceKind::Ports => "virtio-serial-pci",
            slots::DeviceKind::Vsock => "vhost-vsock-pci",
            slots::DeviceKind::Balloon => "virtio-balloon-pci",
            slots::DeviceKind::VhostDisk => "vhost-user-blk-pci",
            slots::DeviceKind::VhostNet(_) => NET,
            slots::DeviceKind::VhostFs => "vhost-user-fs-pci",
        };
        child(device.id, driver)
    });
    let streams = slots.serial_ports().into_iter().map(|port| child(port.id, "virtserialport"));
    let board = slots.on_board();
    let board = board.iter().map(|(id, driver)| child(id.clone(), driver));
    let processors = cpus::added(vm).map(|(name, driver)| child(name, driver));
    ports.chain(devices).chain(streams).chain(board).chain(processors).collect()
}

/// Properties of the balloon.
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

fn property_of_balloon(vm: &VmHandle, path: &str, property: &str) -> Result<Arc<BalloonHandle>, QmpError> {
    if in_peripheral(path) != Some(BALLOON_ID) {
        let desc = format!("Device '{path}' not found: only {PERIPHERAL}/{BALLOON_ID} has properties");
        return Err(QmpError { class: ErrorClass::DeviceNotFound, desc });
    }
    if property != STATS && property != INTERVAL {
        return Err(QmpError::generic(format!(
            "Property '{path}.{property}' not found: it has {STATS} and {INTERVAL}"
        )));
    }
    balloon_of(vm)
}
