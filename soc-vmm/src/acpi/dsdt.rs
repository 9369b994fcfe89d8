//! DSDT (ACPI 6.5 §5.2.11.1): the devices that can't be found by probing, the processors, and S5.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope};

use super::{AcpiConfig, bytes_of, table};
use crate::devices::SLEEP_TYPE_S5;
use crate::layout::{ECAM, ECAM_SIZE};

const REVISION: u8 = 2;

/// Builds the table.
pub(super) fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut devices = vec![platform(), isa_device("RTC0", "PNP0B00", 0, &[(0x70, 2)], 8)];
    let serial = [("COM1", 0x3f8, 4), ("COM2", 0x2f8, 3), ("COM3", 0x3e8, 4), ("COM4", 0x2e8, 3)];
    for (uid, (name, port, irq)) in (1..=config.serial_ports).zip(serial) {
        devices.push(isa_device(name, "PNP0501", uid, &[(port, 8)], irq));
    }
    if config.keyboard {
        devices.push(isa_device("PS2K", "PNP0303", 0, &[(0x60, 1), (0x64, 1)], 1));
    }
    devices.extend((0u32..).zip(&config.apic_ids).map(|(uid, _)| processor(uid)));
    let devices: Vec<_> = devices.into_iter().map(Bytes).collect();
    let devices = devices.iter().map(|device| device as &dyn Aml).collect();

    let off = SLEEP_TYPE_S5;
    // SLP_TYPa, SLP_TYPb and two reserved words (§7.4.2).
    let s5 = Name::new("_S5_".into(), &Package::new(vec![&off, &off, &0u8, &0u8]));
    let system = Scope::new("\\_SB_".into(), devices);
    table(*b"DSDT", REVISION, &[bytes_of(&s5), bytes_of(&system)].concat())
}

/// AML that is already encoded: a device borrows its children, and ends before the scope that holds it.
struct Bytes(Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// What belongs to no driver, so that none takes it: the configuration space's window.
fn platform() -> Vec<u8> {
    let window = Memory32Fixed::new(true, ECAM as u32, ECAM_SIZE as u32);
    bytes_of(&Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&window])),
        ],
    ))
}

/// A device with I/O ports (first, count) and an edge-triggered ISA line.
fn isa_device(name: &str, id: &str, uid: u8, ports: &[(u16, u8)], irq: u32) -> Vec<u8> {
    let ports: Vec<_> = ports.iter().map(|&(first, count)| IO::new(first, first, 1, count)).collect();
    let line = Interrupt::new(true, true, false, false, irq);
    let mut resources: Vec<&dyn Aml> = ports.iter().map(|port| port as &dyn Aml).collect();
    resources.push(&line);
    // Present, enabled, shown, working (§6.3.7).
    let status = 0xfu8;
    bytes_of(&Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(id)),
            &Name::new("_UID".into(), &uid),
            &Name::new("_STA".into(), &status),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    ))
}

/// A processor device (§8.4); its UID leads to its MADT structure.
fn processor(uid: u32) -> Vec<u8> {
    let name = format!("C{uid:03X}");
    bytes_of(&Device::new(
        name.as_str().into(),
        vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &uid)],
    ))
}
