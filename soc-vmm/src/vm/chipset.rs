//! The machine's PCI side: chipset functions, root ports, and the devices behind them, each in the place that QEMU's q35 gives it.

use std::io;
use std::sync::{Arc, Mutex};

use super::machine::BuildError;
use super::media::{Disk, Net};
use crate::acpi::{Hotplug, PciConfig, PortConfig};
use crate::ahci::{self, Ahci, CdDrive, CdHandle, TrayListener};
use crate::block::BlockBackend;
use crate::bus::Wake;
use crate::cli::TestDevice;
use crate::devices::{AcpiPm, Edu};
use crate::interrupt::{LineSink, MessageSink};
use crate::iommu::Iommu;
use crate::layout::{ECAM, ECAM_SIZE, MemoryLayout};
use crate::memory::GuestMemory;
use crate::pci::{
    Apertures, ConfigSpace, Fabric, LPC, LpcBridge, PIRQ_GSI, PciFunction, Pirqs, Platform, Requester, RootPort,
    header, pirq_of,
};
use crate::virtio::block::BlockConfig;
use crate::virtio::net::NetConfig;
use crate::virtio::{self, Plumbing};

/// The first slot of root ports on the root bus: eight in each.
const FIRST_PORT_SLOT: u8 = 1;
/// The last: devices for tests follow, and the chipset's own.
const LAST_PORT_SLOT: u8 = 24;
/// The first slot of devices for tests.
const FIRST_TEST_SLOT: u8 = LAST_PORT_SLOT + 1;
/// Where the AHCI controller sits: slot × 8 + function.
const AHCI: u8 = 0x1f << 3 | 2;
/// The controller's port with the CD-ROM drive, as QEMU's `-cdrom` has it.
const CDROM_PORT: usize = 2;
/// Ports without a device, for what is plugged in later.
const SPARE_PORTS: usize = 2;

/// What the PCI side is made of.
pub(super) struct PciParts<'a> {
    pub(super) prepared: bool,
    pub(super) layout: MemoryLayout,
    pub(super) platform: Arc<dyn Platform>,
    pub(super) messages: &'a dyn MessageSink,
    /// What functions' requests go through, if there is an IOMMU.
    pub(super) iommu: Option<Arc<Iommu>>,
    pub(super) lines: Arc<dyn LineSink>,
    pub(super) memory: Arc<dyn GuestMemory>,
    pub(super) acpi: AcpiPm,
    pub(super) disks: Vec<Disk>,
    pub(super) nets: Vec<Net>,
    /// What is in the CD-ROM drive; there is none without it.
    pub(super) cdrom: Option<Arc<dyn BlockBackend>>,
    /// Hears of its tray.
    pub(super) tray: Arc<dyn TrayListener>,
    pub(super) wake: Arc<dyn Wake>,
    pub(super) test_devices: &'a [TestDevice],
}

/// Makes a device behind a root port.
type Make = Box<dyn FnOnce(Plumbing<'_>) -> io::Result<Box<dyn PciFunction>>>;

/// Puts it together; the fabric, and the CD-ROM drive.
pub(super) fn build(parts: PciParts<'_>) -> Result<(Arc<Mutex<Fabric>>, Option<CdHandle>), BuildError> {
    let PciParts { prepared, layout, platform, messages, iommu, lines, memory, acpi, .. } = parts;
    let PciParts { disks, nets, cdrom, tray, wake, test_devices, .. } = parts;
    let ways = Ways { messages, memory, iommu };
    let mut fabric = Fabric::new(prepared.then(|| Apertures::above(layout.high_end())), platform);
    let pirqs = Arc::new(Pirqs::new(lines));
    fabric.plug(None, LPC, Box::new(LpcBridge::new(acpi, pirqs.clone(), prepared)))?;
    let disks = disks.into_iter().map(disk);
    let devices: Vec<Make> = disks.chain(nets.into_iter().map(net)).collect();
    let ports = ports(devices.len());
    if devices.len() > ports.len() {
        return Err(BuildError::TooMany { devices: devices.len(), ports: ports.len() });
    }
    let mut devices = devices.into_iter();
    for PortConfig { devfn, slot } in ports {
        // The device in the port's one slot has the port's own wire.
        let wire = || pirqs.wire(devfn >> 3);
        let (way, of_device) = (ways.of_function(), ways.of_function());
        let mut port = RootPort::new(slot, wire(), &*way.messages);
        ways.show_line(port.config_mut(), devfn >> 3);
        // Virtio's DMA goes past an IOMMU unless the driver agrees to VIRTIO_F_ACCESS_PLATFORM (virtio 1.2 §6.1), which isn't offered.
        let memory = ways.memory.clone();
        let device = devices.next().map(|make| make(Plumbing { memory, messages: &*of_device.messages, line: wire() }));
        let device = device.transpose().map_err(BuildError::Thread)?;
        if device.is_some() {
            port.occupy();
        }
        let port = fabric.plug(None, devfn, Box::new(port))?;
        fabric.identify(port, way.requester);
        if let Some(mut device) = device {
            ways.show_line(device.config_mut(), devfn >> 3);
            let device = fabric.plug(Some(port), 0, device)?;
            fabric.identify(device, of_device.requester);
        }
    }
    let mut drives: [Option<CdDrive>; ahci::PORTS] = Default::default();
    drives[CDROM_PORT] = cdrom.map(|medium| CdDrive { medium: Some(medium), listener: Some(tray) });
    let way = ways.of_function();
    let plumbing = ahci::Plumbing { memory: way.memory, messages: &*way.messages, line: pirqs.wire(AHCI >> 3), wake };
    let (mut controller, [_, _, drive, ..]) = Ahci::new(drives, plumbing).map_err(BuildError::Thread)?;
    ways.show_line(controller.config_mut(), AHCI >> 3);
    let controller = fabric.plug(None, AHCI, Box::new(controller))?;
    fabric.identify(controller, way.requester);
    for (_, slot) in test_devices.iter().filter(|device| **device == TestDevice::Edu).zip(FIRST_TEST_SLOT..) {
        let way = ways.of_function();
        let mut function = Box::new(Edu::new(way.memory, &*way.messages, pirqs.wire(slot)));
        ways.show_line(function.config_mut(), slot);
        let function = fabric.plug(None, slot << 3, function)?;
        fabric.identify(function, way.requester);
    }
    fabric.prepare()?;
    Ok((Arc::new(Mutex::new(fabric)), drive))
}

/// What functions send their DMA and their messages by.
struct Ways<'a> {
    messages: &'a dyn MessageSink,
    memory: Arc<dyn GuestMemory>,
    iommu: Option<Arc<Iommu>>,
}

/// The same for one function, which is to be known by this ID.
struct Way<'a> {
    requester: Requester,
    messages: Box<dyn MessageSink + 'a>,
    memory: Arc<dyn GuestMemory>,
}

impl<'a> Ways<'a> {
    fn of_function(&self) -> Way<'a> {
        let requester = Requester::default();
        let (messages, memory) = match &self.iommu {
            None => (Box::new(self.messages) as Box<dyn MessageSink + 'a>, self.memory.clone()),
            Some(iommu) => (iommu.messages_of(requester.clone(), self.messages), iommu.memory_of(requester.clone())),
        };
        Way { requester, messages, memory }
    }

    /// Where there are no 8259s, whose inputs the register names by rights, it has the GSI: a guest that looks at nothing else finds its
    /// interrupt.
    fn show_line(&self, config: &mut ConfigSpace, slot: u8) {
        if self.iommu.is_some() {
            config.set(header::INTERRUPT_LINE, &[PIRQ_GSI as u8 + pirq_of(slot, 0) as u8]);
        }
    }
}

fn disk(Disk { image, id }: Disk) -> Make {
    let config = BlockConfig { name: id.clone(), backend: image, serial: id };
    Box::new(|plumbing| virtio::block::new(config, plumbing))
}

fn net(Net { backend, mac, id }: Net) -> Make {
    let config = NetConfig { name: id, backend, mac: mac.0, mtu: None, counters: Arc::default() };
    Box::new(|plumbing| virtio::net::new(config, plumbing))
}

/// The root ports of a machine with so many devices.
fn ports(devices: usize) -> Vec<PortConfig> {
    let slots = FIRST_PORT_SLOT..=LAST_PORT_SLOT;
    let places = slots.flat_map(|slot| (0..8).map(move |function| slot << 3 | function));
    places.zip(1..).map(|(devfn, slot)| PortConfig { devfn, slot }).take(devices + SPARE_PORTS).collect()
}

/// What ACPI tells of it. Without firmware (`physical_bits` unknown) the window above 4 GiB is where the loader placed windows.
pub(super) fn acpi(layout: &MemoryLayout, devices: usize, physical_bits: Option<u8>) -> PciConfig {
    let placed = Apertures::above(layout.high_end()).high.1;
    PciConfig {
        low_end: layout.low_end(),
        high_end: layout.high_end(),
        ecam: physical_bits.is_none().then_some((ECAM, ECAM_SIZE)),
        physical_bits: physical_bits.unwrap_or(placed.next_power_of_two().trailing_zeros() as u8),
        ports: ports(devices),
        hotplug: Hotplug::Native,
    }
}
