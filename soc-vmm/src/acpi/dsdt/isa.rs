//! Devices at fixed ports.

use acpi_tables::aml::{FieldAccessType, IO, Interrupt, OpRegionSpace};

use crate::acpi::AcpiConfig;
use crate::acpi::aml::{Term, device, eisa, fields, give, method, name, path, region, resources, store};
use crate::devices::{FW_CFG_LEN, FW_CFG_PORT, PVPANIC_PORT};

/// Present, enabled, shown, working (ACPI 6.5 §6.3.7).
const WORKING: u8 = 0xf;
/// The same, not shown to the user.
const HIDDEN: u8 = 0xb;

/// Those that the machine has.
pub(super) fn devices(config: &AcpiConfig) -> Vec<Term> {
    let mut devices = vec![legacy("RTC0", "PNP0B00", 0, &[(0x70, 2)], 8)];
    let serial = [("COM1", 0x3f8, 4), ("COM2", 0x2f8, 3), ("COM3", 0x3e8, 4), ("COM4", 0x2e8, 3)];
    for (uid, (name, port, irq)) in (1..=config.serial_ports).zip(serial) {
        devices.push(legacy(name, "PNP0501", uid, &[(port, 8)], irq));
    }
    if config.keyboard {
        devices.push(legacy("PS2K", "PNP0303", 0, &[(0x60, 1), (0x64, 1)], 1));
        devices.push(legacy("PS2M", "PNP0F13", 0, &[], 12));
    }
    if config.fw_cfg {
        devices.push(firmware_configuration());
    }
    if config.pvpanic {
        devices.push(panic_notifier());
    }
    devices
}

/// A device with I/O ports (first, count) and an edge-triggered ISA line.
fn legacy(of: &str, id: &str, uid: u8, ports: &[(u16, u8)], irq: u32) -> Term {
    let mut crs: Vec<_> = ports.iter().map(|&(first, count)| io(first, count)).collect();
    crs.push(Term::of(&Interrupt::new(true, true, false, false, irq)));
    device(of, &[eisa("_HID", id), name("_UID", &uid), name("_STA", &WORKING), resources("_CRS", &crs)])
}

/// fw_cfg, which a guest's driver finds by this.
fn firmware_configuration() -> Term {
    let crs = resources("_CRS", &[io(FW_CFG_PORT, FW_CFG_LEN)]);
    device("FWCF", &[name("_HID", &"QEMU0002"), name("_STA", &HIDDEN), crs])
}

/// pvpanic. Its methods are for drivers that leave the port to ACPI (QEMU docs/specs/pvpanic.rst).
fn panic_notifier() -> Term {
    let port = path("PEPT");
    device(
        "PEVT",
        &[
            name("_HID", &"QEMU0001"),
            name("_STA", &WORKING),
            resources("_CRS", &[io(PVPANIC_PORT, 1)]),
            region("PEOR", OpRegionSpace::SystemIO, PVPANIC_PORT.into(), 1),
            fields("PEOR", FieldAccessType::Byte, &[(Some(*b"PEPT"), 8)]),
            method("RDPT", 0, &[give(&port)]),
            method("WRPT", 1, &[store(&port, &acpi_tables::aml::Arg(0))]),
        ],
    )
}

fn io(first: u16, count: u8) -> Term {
    Term::of(&IO::new(first, first, 1, count))
}
