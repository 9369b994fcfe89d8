//! The machine's PCI side: chipset functions, root ports, and the devices behind them, each in the place that QEMU's q35 gives it.

use std::sync::{Arc, Mutex};

use super::machine::BuildError;
use crate::acpi::{Hotplug, PciConfig, PortConfig};
use crate::devices::AcpiPm;
use crate::interrupt::{LineSink, MessageSink};
use crate::layout::{ECAM, ECAM_SIZE, MemoryLayout};
use crate::pci::{Apertures, Fabric, LPC, LpcBridge, Pirqs, Platform, RootPort};

/// Root ports, each with a slot for a device.
pub(super) const ROOT_PORTS: u8 = 8;
/// Where they sit on the root bus: one slot, eight functions.
const PORT_SLOT: u8 = 1;

/// What the PCI side is made of.
pub(super) struct PciParts<'a> {
    pub(super) prepared: bool,
    pub(super) layout: MemoryLayout,
    pub(super) platform: Arc<dyn Platform>,
    pub(super) messages: &'a dyn MessageSink,
    pub(super) lines: Arc<dyn LineSink>,
    pub(super) acpi: AcpiPm,
}

/// Puts it together.
pub(super) fn build(parts: PciParts<'_>) -> Result<Arc<Mutex<Fabric>>, BuildError> {
    let PciParts { prepared, layout, platform, messages, lines, acpi } = parts;
    let mut fabric = Fabric::new(prepared.then(|| Apertures::above(layout.high_end())), platform);
    let pirqs = Arc::new(Pirqs::new(lines));
    fabric.plug(None, LPC, Box::new(LpcBridge::new(acpi, pirqs.clone(), prepared)))?;
    for port in ports() {
        let function = RootPort::new(port.slot, pirqs.wire(PORT_SLOT), messages);
        fabric.plug(None, port.devfn, Box::new(function))?;
    }
    fabric.prepare()?;
    Ok(Arc::new(Mutex::new(fabric)))
}

fn ports() -> impl Iterator<Item = PortConfig> {
    (0..ROOT_PORTS).map(|function| PortConfig { devfn: PORT_SLOT << 3 | function, slot: u16::from(function) + 1 })
}

/// What ACPI tells of it. Without firmware (`physical_bits` unknown) the window above 4 GiB is where the loader placed windows.
pub(super) fn acpi(layout: &MemoryLayout, physical_bits: Option<u8>) -> PciConfig {
    let placed = Apertures::above(layout.high_end()).high.1;
    PciConfig {
        low_end: layout.low_end(),
        high_end: layout.high_end(),
        ecam: physical_bits.is_none().then_some((ECAM, ECAM_SIZE)),
        physical_bits: physical_bits.unwrap_or(placed.next_power_of_two().trailing_zeros() as u8),
        ports: ports().collect(),
        hotplug: Hotplug::Native,
    }
}
