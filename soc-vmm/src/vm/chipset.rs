//! The machine's PCI side: chipset functions, root ports, and the devices behind them, each in the place that QEMU's q35 gives it.

use std::sync::{Arc, Mutex, PoisonError};

use super::machine::BuildError;
use super::media::{Cdrom, Media};
use crate::acpi::{Hotplug, PciConfig, PortConfig};
use crate::ahci::{self, Ahci, CdDrive, TrayListener};
use crate::bus::Wake;
use crate::cli::{RunConfig, TestDevice};
use crate::control::CdromDrive;
use crate::cpus::own_name;
use crate::devices::{AcpiPm, Edu};
use crate::interrupt::{LineSink, MessageSink};
use crate::iommu::Iommu;
use crate::layout::{ECAM, ECAM_SIZE, MemoryLayout};
use crate::memory::GuestMemory;
use crate::pci::{Apertures, Fabric, LPC, LpcBridge, PciFunction, Pirqs, Platform};
use crate::qemu::PortPlace;
use crate::slots::{
    DeviceListeners, Named, NewBalloon, NewDevice, NewKind, Place, Planned, Reserved, SlotListener, SlotParts, Slots,
    Way, Ways,
};
use crate::virtio::NotifyPages;

/// The first slot of root ports on the root bus: eight in each.
const FIRST_PORT_SLOT: u8 = 1;
/// The last: devices for tests follow, and the chipset's own.
const LAST_PORT_SLOT: u8 = 24;
/// The first slot of devices for tests.
const FIRST_TEST_SLOT: u8 = LAST_PORT_SLOT + 1;
/// Where the AHCI controller sits: slot × 8 + function.
const AHCI: u8 = 0x1f << 3 | 2;
/// Ports without a device, for what is plugged in later.
const SPARE_PORTS: usize = 4;

/// Makes who hears of the tray of the drive of a name.
pub(super) type Trays = Arc<dyn Fn(&str) -> Arc<dyn TrayListener> + Send + Sync>;

/// What the PCI side is made of.
pub(super) struct PciParts<'a> {
    /// The VM's name.
    pub(super) name: &'a str,
    pub(super) prepared: bool,
    pub(super) layout: MemoryLayout,
    pub(super) platform: Arc<dyn Platform>,
    pub(super) messages: Arc<dyn MessageSink>,
    /// What functions' requests go through, if there is an IOMMU.
    pub(super) iommu: Option<Arc<Iommu>>,
    pub(super) lines: Arc<dyn LineSink>,
    pub(super) memory: Arc<dyn GuestMemory>,
    /// Where kicks may come from.
    pub(super) notify: Arc<NotifyPages>,
    pub(super) acpi: AcpiPm,
    /// Processors that there can be.
    pub(super) cpus: usize,
    /// Root ports.
    pub(super) ports: Vec<PortPlace>,
    /// Back ends that have names.
    pub(super) named: Named,
    /// What is there from the start, in order.
    pub(super) devices: Vec<Planned>,
    /// The balloon, if there is one.
    pub(super) balloon: Option<NewBalloon>,
    /// The files that disks may not write.
    pub(super) reserved: Arc<Reserved>,
    /// Hears of devices that are gone.
    pub(super) listener: Arc<dyn SlotListener>,
    /// Who hears of what devices meet.
    pub(super) device_listeners: DeviceListeners,
    /// CD-ROM drives.
    pub(super) cdroms: Vec<Cdrom>,
    /// Makes those who hear of their trays.
    pub(super) trays: Trays,
    pub(super) wake: Arc<dyn Wake>,
    pub(super) test_devices: &'a [TestDevice],
}

/// The PCI side, put together.
pub(super) struct PciSide {
    pub(super) fabric: Arc<Mutex<Fabric>>,
    pub(super) slots: Slots,
    /// The CD-ROM drives.
    pub(super) drives: Vec<CdromDrive>,
}

/// Puts it together.
pub(super) fn build(parts: PciParts<'_>) -> Result<PciSide, BuildError> {
    let PciParts { name, prepared, layout, platform, messages, iommu, lines, memory, notify, acpi, .. } = parts;
    let PciParts { cpus, ports, named, devices, mut balloon, reserved, .. } = parts;
    let PciParts { listener, device_listeners, cdroms, trays, wake, test_devices, .. } = parts;
    let fabric = Fabric::new(prepared.then(|| Apertures::above(layout.high_end())), platform);
    let fabric = Arc::new(Mutex::new(fabric));
    let locked = || fabric.lock().unwrap_or_else(PoisonError::into_inner);
    let pirqs = Arc::new(Pirqs::new(lines));
    locked().plug(None, LPC, Box::new(LpcBridge::new(acpi, pirqs.clone(), prepared)))?;
    let slots = Slots::new(SlotParts {
        fabric: fabric.clone(),
        ways: Ways::new(messages, memory, iommu),
        notify,
        wake: wake.clone(),
        pirqs: pirqs.clone(),
        listener,
        device_listeners,
        machine: name.to_owned(),
        names: cdroms.iter().map(|drive| drive.id.clone()).chain((0..cpus).map(own_name)).collect(),
        reserved,
        named,
    });
    let slots = slots.map_err(BuildError::Thread)?;
    let behind = |planned: &&Planned| planned.place().is_some_and(|place| *place == Place::Free);
    let free = devices.iter().filter(behind).count();
    if free > ports.len() {
        return Err(BuildError::TooMany { devices: free, ports: ports.len() });
    }
    for PortPlace { name, devfn, slot } in &ports {
        slots.add_port(name, *devfn, *slot)?;
    }
    for planned in devices {
        let planned = match (planned, balloon.take()) {
            (Planned::Balloon { id, place }, Some(new)) => {
                Planned::Device(NewDevice { id, kind: NewKind::Balloon(new), node: None, place })
            }
            (planned, kept) => {
                balloon = kept;
                planned
            }
        };
        slots.handle().put(planned)?;
    }
    let ways = slots.ways();
    let mut drives: [Option<CdDrive>; ahci::PORTS] = Default::default();
    let mut named = Vec::new();
    for Cdrom { id, port, medium, node } in cdroms {
        drives[port] = Some(CdDrive { name: id.clone(), medium, listener: Some(trays(&id)) });
        named.push((id, port, node));
    }
    let Way { requester, messages, memory } = ways.of_function();
    let plumbing = ahci::Plumbing { memory, messages: &*messages, line: pirqs.wire(AHCI >> 3), wake };
    let (mut controller, mut handles) = Ahci::new(drives, plumbing).map_err(BuildError::Thread)?;
    ways.show_line(controller.config_mut(), AHCI >> 3);
    let controller = locked().plug(None, AHCI, Box::new(controller))?;
    locked().identify(controller, requester);
    drop(messages);
    for (_, slot) in test_devices.iter().filter(|device| **device == TestDevice::Edu).zip(FIRST_TEST_SLOT..) {
        let way = ways.of_function();
        let mut function = Box::new(Edu::new(way.memory, &*way.messages, pirqs.wire(slot)));
        ways.show_line(function.config_mut(), slot);
        let function = locked().plug(None, slot << 3, function)?;
        locked().identify(function, way.requester);
    }
    locked().prepare()?;
    slots.close();
    let drive = |(id, port, node): (String, usize, _)| {
        let handle = handles[port].take()?;
        Some(CdromDrive::new(id, handle, node))
    };
    let drives = named.into_iter().filter_map(drive).collect();
    Ok(PciSide { fabric, slots, drives })
}

/// The root ports of the machine that `config` asks for.
pub(super) fn ports(config: &RunConfig) -> Vec<PortPlace> {
    match &config.hardware {
        Some(hardware) => hardware.ports.clone(),
        None => ports_for(Media::devices(config)),
    }
}

/// The root ports of a machine with so many devices.
fn ports_for(devices: usize) -> Vec<PortPlace> {
    let slots = FIRST_PORT_SLOT..=LAST_PORT_SLOT;
    let places = slots.flat_map(|slot| (0..8).map(move |function| slot << 3 | function));
    let port = |(devfn, slot)| PortPlace { name: format!("pci.{slot}"), devfn, slot };
    places.zip(1..).map(port).take(devices + SPARE_PORTS).collect()
}

/// What ACPI tells of it. Without firmware (`physical_bits` unknown) the window above 4 GiB is where the loader placed windows.
pub(super) fn acpi(layout: &MemoryLayout, ports: &[PortPlace], physical_bits: Option<u8>) -> PciConfig {
    let placed = Apertures::above(layout.high_end()).high.1;
    PciConfig {
        low_end: layout.low_end(),
        high_end: layout.high_end(),
        ecam: physical_bits.is_none().then_some((ECAM, ECAM_SIZE)),
        physical_bits: physical_bits.unwrap_or(placed.next_power_of_two().trailing_zeros() as u8),
        ports: ports.iter().map(|PortPlace { devfn, slot, .. }| PortConfig { devfn: *devfn, slot: *slot }).collect(),
        hotplug: Hotplug::Native,
    }
}
