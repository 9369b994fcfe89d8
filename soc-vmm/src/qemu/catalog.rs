//! What there is to be had: devices' drivers, types of objects, and the properties of each, told from the types that are read.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings, json_schema};
use serde_json::{Map, Value, json};

use super::device::{self, Common, DebugExitProperties, NoProperties};
use super::inert::INERT;
use super::object::{MemoryProperties, RandomProperties, SecretProperties, ThrottleProperties, TlsProperties};
use super::{Blockdev, BlockdevAdd, Device, Netdev, NetdevAdd, Object};

/// A property of something that can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Property {
    /// Its name.
    pub name: String,
    /// QOM's name of its type.
    pub kind: &'static str,
}

/// Drivers of devices, as `-device` names them.
pub fn drivers() -> impl Iterator<Item = &'static str> {
    DRIVERS.iter().map(|entry| entry.name)
}

/// Devices that are on the board always.
pub fn on_board() -> impl Iterator<Item = &'static str> {
    ON_BOARD.iter().map(|(name, _)| *name)
}

/// Types of objects, as `-object` names them.
pub fn objects() -> impl Iterator<Item = &'static str> {
    OBJECTS.iter().map(|entry| entry.name)
}

/// The properties of a driver or a type of objects.
pub fn properties(of: &str) -> Option<Vec<Property>> {
    if let Some((_, names)) = ON_BOARD.iter().find(|(name, _)| *name == of) {
        return Some(names.iter().map(|name| Property { name: (*name).to_owned(), kind: "str" }).collect());
    }
    let all = || DRIVERS.iter().map(|entry| (entry, true)).chain(OBJECTS.iter().map(|entry| (entry, false)));
    let (entry, is_device) = all().find(|(entry, _)| entry.name == of)?;
    let mut generator = SchemaSettings::draft2020_12().for_deserialize().into_generator();
    let mut found = entry.members(&mut generator).0;
    if is_device {
        found.extend(members(&Common::json_schema(&mut generator)).0);
    }
    Some(found.into_iter().map(|(name, schema)| Property { name, kind: kind(&schema) }).collect())
}

/// Something that can be had.
struct Entry {
    name: &'static str,
    /// What [`INERT`] calls it.
    plain: &'static str,
    describe: fn(&mut SchemaGenerator) -> Schema,
}

impl Entry {
    const fn of<T: JsonSchema>(name: &'static str) -> Self {
        Self { name, plain: name, describe: T::json_schema }
    }

    const fn like<T: JsonSchema>(name: &'static str, plain: &'static str) -> Self {
        Self { name, plain, describe: T::json_schema }
    }

    /// Its properties, and which of them it needs.
    fn members(&self, generator: &mut SchemaGenerator) -> (Map<String, Value>, Vec<Value>) {
        let (mut all, required) = members(&(self.describe)(generator));
        let inert = INERT.iter().filter(|inert| inert.of.contains(&self.plain));
        all.extend(inert.map(|inert| (inert.key.to_owned(), Value::Bool(true))));
        (all, required)
    }
}

/// Every driver.
const DRIVERS: &[Entry] = &[
    Entry::of::<device::RootPort>("pcie-root-port"),
    Entry::of::<device::Disk>("virtio-blk-pci"),
    Entry::like::<device::Disk>("virtio-blk-pci-non-transitional", "virtio-blk-pci"),
    Entry::of::<device::Net>("virtio-net-pci"),
    Entry::like::<device::Net>("virtio-net-pci-non-transitional", "virtio-net-pci"),
    Entry::of::<device::Entropy>("virtio-rng-pci"),
    Entry::like::<device::Entropy>("virtio-rng-pci-non-transitional", "virtio-rng-pci"),
    Entry::of::<device::Balloon>("virtio-balloon-pci"),
    Entry::like::<device::Balloon>("virtio-balloon-pci-non-transitional", "virtio-balloon-pci"),
    Entry::of::<NoProperties>("virtio-serial-pci"),
    Entry::like::<NoProperties>("virtio-serial-pci-non-transitional", "virtio-serial-pci"),
    Entry::of::<device::Port>("virtserialport"),
    Entry::of::<device::VhostDisk>("vhost-user-blk-pci"),
    Entry::of::<device::FileSystem>("vhost-user-fs-pci"),
    Entry::of::<device::Cd>("ide-cd"),
    Entry::of::<device::Serial>("isa-serial"),
    Entry::of::<device::DebugConsole>("isa-debugcon"),
    Entry::of::<DebugExitProperties>("isa-debug-exit"),
    Entry::of::<NoProperties>("pvpanic"),
    Entry::of::<device::Cpu>("host-x86_64-cpu"),
];

/// What is on the board always, and what `-global` may say of it.
const ON_BOARD: &[(&str, &[&str])] =
    &[("ICH9-LPC", &["disable_s3", "disable_s4", "noreboot"]), ("kvm-pit", &["lost_tick_policy"]), ("ich9-ahci", &[])];

/// Every type of objects.
const OBJECTS: &[Entry] = &[
    Entry::of::<SecretProperties>("secret"),
    Entry::of::<MemoryProperties>("memory-backend-ram"),
    Entry::of::<MemoryProperties>("memory-backend-memfd"),
    Entry::of::<MemoryProperties>("memory-backend-file"),
    Entry::of::<NoProperties>("rng-builtin"),
    Entry::of::<RandomProperties>("rng-random"),
    Entry::of::<ThrottleProperties>("throttle-group"),
    Entry::of::<TlsProperties>("tls-creds-x509"),
];

/// The properties of an object's schema, and which are needed.
fn members(schema: &Schema) -> (Map<String, Value>, Vec<Value>) {
    let part = |name: &str| schema.get(name).cloned().unwrap_or_default();
    let properties = part("properties").as_object().cloned().unwrap_or_default();
    (properties, part("required").as_array().cloned().unwrap_or_default())
}

/// QOM's name of a property's type. QEMU's own are finer; clients look at the names of properties.
fn kind(schema: &Value) -> &'static str {
    let is = |wanted: &str| match &schema["type"] {
        Value::String(one) => one == wanted,
        Value::Array(several) => several.iter().any(|one| one == wanted),
        _ => false,
    };
    match () {
        () if is("boolean") => "bool",
        () if is("integer") => "int",
        () => "str",
    }
}

/// An object that has `common` and, by what `tag` says, the members of an entry.
fn union(generator: &mut SchemaGenerator, tag: &str, common: &Schema, entries: &[Entry]) -> Schema {
    let (properties, required) = members(common);
    let cases = entries.iter().map(|entry| {
        let (mut properties, mut required) = entry.members(generator);
        properties.insert(tag.to_owned(), json!({ "type": "string", "const": entry.name }));
        required.push(tag.into());
        json!({ "type": "object", "properties": properties, "required": required })
    });
    let cases: Vec<Value> = cases.collect();
    json_schema!({ "type": "object", "properties": properties, "required": required, "oneOf": cases })
}

/// What every object has.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "it only describes")]
struct Named {
    id: String,
}

impl JsonSchema for Device {
    fn schema_name() -> Cow<'static, str> {
        "DeviceOptions".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let common = Common::json_schema(generator);
        union(generator, "driver", &common, DRIVERS)
    }
}

impl JsonSchema for Object {
    fn schema_name() -> Cow<'static, str> {
        "ObjectOptions".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let common = Named::json_schema(generator);
        union(generator, "qom-type", &common, OBJECTS)
    }
}

/// The same members as another type, and those that change nothing.
fn with_inert(mut schema: Schema, option: &str) -> Schema {
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        let inert = INERT.iter().filter(|inert| inert.of.contains(&option));
        properties.extend(inert.map(|inert| (inert.key.to_owned(), Value::Bool(true))));
    }
    schema
}

impl JsonSchema for BlockdevAdd {
    fn schema_name() -> Cow<'static, str> {
        "BlockdevOptions".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        with_inert(Blockdev::json_schema(generator), "-blockdev")
    }
}

impl JsonSchema for NetdevAdd {
    fn schema_name() -> Cow<'static, str> {
        "Netdev".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        with_inert(Netdev::json_schema(generator), "-netdev")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_tells_what_can_be_said_of_it() {
        let names = |of: &str| properties(of).unwrap().into_iter().map(|it| it.name).collect::<Vec<_>>();
        let disk = names("virtio-blk-pci");
        for name in ["drive", "num-queues", "write-cache", "bootindex", "disable-legacy", "addr"] {
            assert!(disk.contains(&name.to_owned()), "{name} in {disk:?}");
        }
        assert_eq!(disk, names("virtio-blk-pci-non-transitional"));
        assert!(names("memory-backend-memfd").contains(&"hugetlb".to_owned()));
        assert!(!names("memory-backend-memfd").contains(&"addr".to_owned()));
        assert_eq!(names("kvm-pit"), ["lost_tick_policy"]);
        assert_eq!(properties("usb-host"), None);
    }

    #[test]
    fn what_is_told_of_the_board_can_be_said() {
        for (device, names) in ON_BOARD {
            for name in *names {
                let said = |(global, _): &(&str, &str)| global.starts_with(&format!("{device}.{name}="));
                assert!(super::super::inert::INERT_GLOBALS.iter().any(said), "{device}.{name}");
            }
        }
    }
}
