//! Slots without a guest: names, addresses, and whose back end is whose.

use std::fs;
use std::sync::mpsc;

use super::*;
use crate::block::{self, ImageSpec};
use crate::cli::DiskTuning;
use crate::interrupt::LineSink;
use crate::memory::{GuestMemory, MemoryError};
use crate::pci::{MemoryView, Platform, Signal, Window, test_sink::TestSink};
use crate::virtio::RateLimits;
use crate::virtio::balloon::BalloonEvents;
use crate::virtio::block::{DiskError, DiskErrorListener};
use crate::virtio::console::PortEvents;

/// What surrounds slots whose guest does nothing.
#[derive(Debug)]
struct Nothing;

impl Wake for Nothing {
    fn wake(&self) {}
}

impl Platform for Nothing {
    fn show(&self, _: &MemoryView, _: Option<crate::bus::Ticket>) {}

    fn post(&self, _: &[Window]) {}

    fn signal(&self, _: &[Signal]) {}
}

impl LineSink for Nothing {
    fn set_level(&self, _: u32, _: bool) {}
}

impl GuestMemory for Nothing {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        Err(MemoryError::NotRam { addr, len: data.len() as u64 })
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError::NotRam { addr, len: data.len() as u64 })
    }
}

impl DiskErrorListener for Nothing {
    fn failed(&self, _: DiskError) {}
}

impl PortEvents for Nothing {
    fn guest_open(&self, _: &str, _: bool) {}
}

impl BalloonEvents for Nothing {
    fn changed(&self, _: u64) {}
}

struct Heard(mpsc::Sender<String>);

impl SlotListener for Heard {
    fn deleted(&self, id: &str) {
        self.0.send(id.into()).unwrap();
    }
}

fn disk_on(path: std::path::PathBuf) -> NewKind {
    NewKind::Disk(NewDisk::new(block::open(&ImageSpec::read_only(path)).unwrap(), DiskTuning::default()))
}

fn place_of(bus: Option<&str>) -> Place {
    bus.map_or(Place::Free, |bus| Place::Bus(bus.into()))
}

struct Rig {
    slots: Slots,
    deleted: mpsc::Receiver<String>,
    place: tempfile::TempDir,
}

impl Rig {
    fn new(ports: u16) -> Self {
        let (heard, deleted) = mpsc::channel();
        let slots = Slots::new(SlotParts {
            fabric: Arc::new(Mutex::new(Fabric::new(None, Arc::new(Nothing)))),
            ways: Ways::new(Arc::new(TestSink::default()), Arc::new(Nothing), None),
            notify: Arc::default(),
            wake: Arc::new(Nothing),
            pirqs: Arc::new(Pirqs::new(Arc::new(Nothing))),
            listener: Arc::new(Heard(heard)),
            device_listeners: DeviceListeners {
                disks: Arc::new(Nothing),
                ports: Arc::new(Nothing),
                balloons: Arc::new(Nothing),
            },
            machine: "vm".into(),
            names: vec!["cdrom0".into()],
            reserved: Arc::default(),
            named: Named::default(),
        });
        let slots = slots.unwrap();
        (1..=ports).for_each(|number| slots.add_port(&format!("pci.{number}"), 8 + number as u8 - 1, number).unwrap());
        Self { slots, deleted, place: tempfile::tempdir().unwrap() }
    }

    /// A disk on a file of its own, whose name is its id.
    fn disk(&self, id: Option<&str>, bus: Option<&str>) -> Result<String, SlotError> {
        let path = self.place.path().join(id.unwrap_or("unnamed"));
        fs::write(&path, [0; 4096]).unwrap();
        let kind = disk_on(path);
        self.slots.handle().add(NewDevice { id: id.map(Into::into), kind, node: None, place: place_of(bus) })
    }

    fn new_net(mac: Option<Mac>) -> NewNet {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let backend = crate::net::StreamBackend::new("test".into(), ours).unwrap();
        NewNet { backends: vec![Box::new(backend)], mac, mtu: None, limits: RateLimits::default() }
    }

    fn try_net(&self, mac: Option<Mac>) -> Result<String, SlotError> {
        let new = NewDevice { id: None, kind: NewKind::Net(Self::new_net(mac)), node: None, place: Place::Free };
        self.slots.handle().add(new)
    }

    fn net(&self, mac: Option<Mac>) -> Mac {
        let id = self.try_net(mac).unwrap();
        let devices = self.slots.handle().devices();
        match devices.iter().find(|device| device.id == id).map(|device| device.kind) {
            Some(DeviceKind::Net(mac)) => mac,
            other => panic!("{other:?}"),
        }
    }

    fn remove(&self, id: &str) {
        self.slots.handle().remove(id).unwrap();
        assert_eq!(self.deleted.recv().as_deref(), Ok(id));
    }
}

#[test]
fn each_device_has_a_name_a_slot_and_an_address_of_its_own() {
    let rig = Rig::new(4);
    assert_eq!(rig.disk(None, Some("pci.3")).unwrap(), "disk0");
    assert_eq!(rig.disk(Some("disk2"), None).unwrap(), "disk2");
    assert_eq!(rig.disk(None, None).unwrap(), "disk1");
    let first = rig.net(None);
    assert_eq!(first, Mac::of("vm", 0));
    for (id, bus, words) in [
        (Some("disk2"), None, "is a device of this VM already"),
        (Some("cdrom0"), None, "is a device of this VM already"),
        (Some("pci.1"), None, "is a device of this VM already"),
        (Some("2"), None, "an id is a letter"),
        (Some("a b"), None, "an id is a letter"),
        (Some("x"), Some("pci.3"), "pci.3 has a device"),
        (Some("x"), Some("pci.9"), "no bus 'pci.9'"),
        (Some("x"), None, "all 4 slots"),
    ] {
        let why = rig.disk(id, bus).unwrap_err().to_string();
        assert!(why.contains(words), "{id:?} {bus:?}: {why}");
    }
    rig.remove("disk0");
    assert!(matches!(rig.slots.handle().remove("disk0"), Err(SlotError::NotFound(_))));
    assert!(rig.net(None) == Mac::of("vm", 1) && rig.slots.handle().devices().len() == 4);
    rig.remove("net0");
    assert_eq!(rig.net(None), first, "the address that is free");
}

#[test]
fn disks_that_a_guest_could_not_tell_apart_are_refused() {
    let rig = Rig::new(2);
    rig.disk(Some("the-disk-of-the-guest-1"), None).unwrap();
    assert!(matches!(rig.disk(Some("the-disk-of-the-guest-2"), None), Err(SlotError::Serial(_))));
    rig.remove("the-disk-of-the-guest-1");
    rig.disk(Some("the-disk-of-the-guest-2"), None).unwrap();
}

#[test]
fn on_the_root_bus_devices_are_there_from_the_start_and_stay() {
    let rig = Rig::new(1);
    let handle = rig.slots.handle();
    let add = |id: &str, devfn| {
        let path = rig.place.path().join(id);
        fs::write(&path, [0; 4096]).unwrap();
        let place = Place::Root(devfn);
        handle.add(NewDevice { id: Some(id.into()), kind: disk_on(path), node: None, place })
    };
    add("a", 0x18).unwrap();
    assert!(matches!(add("b", 0x18), Err(SlotError::Plug(PlugError::Taken { .. }))));
    assert_eq!(handle.devices()[0].bus, ROOT_BUS);
    assert_eq!(handle.ports(), ["pci.1"]);
    assert_eq!(handle.disks()[0].path, "/machine/peripheral/a/virtio-backend");
    rig.slots.close();
    assert!(matches!(add("b", 0x20), Err(SlotError::OnBoard(_))));
    assert!(matches!(handle.remove("a"), Err(SlotError::OnBoard(_))));
    assert_eq!(rig.disk(Some("c"), None).unwrap(), "c");
}

#[test]
fn a_serial_number_of_its_own_is_one_that_no_other_disk_has() {
    let rig = Rig::new(2);
    rig.disk(Some("a"), None).unwrap();
    let path = rig.place.path().join("b");
    fs::write(&path, [0; 4096]).unwrap();
    let add = |serial: &str| {
        let NewKind::Disk(disk) = disk_on(path.clone()) else { unreachable!() };
        let kind = NewKind::Disk(NewDisk { serial: Some(serial.into()), ..disk });
        rig.slots.handle().add(NewDevice { id: Some("b".into()), kind, node: None, place: Place::Free })
    };
    assert!(matches!(add("a"), Err(SlotError::Serial(_))));
    add("s").unwrap();
}

#[test]
fn two_interfaces_of_one_address_are_refused() {
    let rig = Rig::new(3);
    let mac = rig.net(None);
    let why = rig.try_net(Some(mac)).unwrap_err();
    assert!(matches!(&why, SlotError::Address(other) if other == "net0"), "{why}");
    rig.net(Some(Mac([2, 0, 0, 0, 0, 1])));
    rig.remove("net0");
    assert_eq!(rig.net(Some(mac)), mac);
}

#[test]
fn a_network_with_a_name_survives_a_device_that_is_refused() {
    let rig = Rig::new(3);
    let handle = rig.slots.handle();
    rig.disk(Some("d"), None).unwrap();
    handle.name_net("n", NetNode::Own(Rig::new_net(None))).unwrap();
    let add = |id: &str, bus| handle.add_named_net("n", None, None, Some(id.into()), place_of(bus));
    for (id, bus, words) in [("d", None, "already"), ("0", None, "a letter"), ("x", Some("pci.9"), "no bus")] {
        let why = add(id, bus).unwrap_err().to_string();
        assert!(why.contains(words), "{why}");
    }
    // A disk's back end has names of its own.
    let path = rig.place.path().join("d");
    let kind = disk_on(path);
    handle.add(NewDevice { id: Some("e".into()), kind, node: Some("n".into()), place: Place::Free }).unwrap();
    assert_eq!(add("x", None).unwrap(), "x");
    assert!(matches!(add("y", None), Err(NodeError::Spent(_))));
    rig.remove("x");
    assert!(matches!(add("x", None), Err(NodeError::Spent(_))), "its peer is gone");
    handle.delete_net("n").unwrap();
}

#[test]
fn a_handle_keeps_no_machine_and_what_was_in_its_slots_ends_with_it() {
    let rig = Rig::new(2);
    rig.disk(Some("a"), None).unwrap();
    let handle = rig.slots.handle();
    // Waits for the disk's thread, and for the one that ends devices.
    rig.slots.end();
    assert!(handle.devices().is_empty() && matches!(handle.remove("a"), Err(SlotError::Ended)));
}
