//! DSDT (ACPI 6.5 §5.2.11.1): the devices that can't be found by probing, PCI, the processors, and S5.

mod cpus;
mod hotplug;
mod isa;
mod links;
mod root;

use super::aml::{Term, device, eisa, name, package, resources, scope};
use super::{AcpiConfig, Hotplug, table};
use crate::devices::SLEEP_TYPE_S5;
use crate::layout::{ECAM, ECAM_SIZE};
use acpi_tables::aml::Memory32Fixed;

const REVISION: u8 = 2;

/// Builds the table.
pub(super) fn build(config: &AcpiConfig) -> Vec<u8> {
    let isa = isa::devices(config);
    let mut system = Vec::new();
    match &config.pci {
        Some(pci) => {
            system.extend(links::devices());
            system.push(root::bridge(pci, &isa, !config.numa.is_empty()));
            system.extend(pci.ecam().map(|ecam| reserved(ecam.base, ecam.len)));
        }
        None => {
            system.push(reserved(ECAM, ECAM_SIZE));
            system.extend(isa);
        }
    }
    system.extend(cpus::container(config));

    let mut body = vec![soft_off()];
    if config.pci.is_some() {
        body.extend(links::interrupt_model());
    }
    body.push(scope("\\_SB_", &system));
    let mut events = vec![name("_HID", &"ACPI0006"), cpus::event()];
    if config.pci.as_ref().is_some_and(|pci| pci.hotplug == Hotplug::Acpi) {
        events.push(hotplug::event());
    }
    body.push(scope("\\_GPE", &events));
    table(*b"DSDT", REVISION, &body.into_iter().flat_map(Term::into_bytes).collect::<Vec<_>>())
}

/// `_S5`: SLP_TYPa, SLP_TYPb and two reserved words (§7.4.2).
fn soft_off() -> Term {
    let words = [SLEEP_TYPE_S5, SLEEP_TYPE_S5, 0, 0];
    name("_S5_", &package(&words.map(|word| Term::of(&word))))
}

/// What belongs to no driver, so that none takes it: configuration space in memory, below 4 GiB.
fn reserved(base: u64, len: u64) -> Term {
    let window = Memory32Fixed::new(true, base as u32, len as u32);
    device("MBRD", &[eisa("_HID", "PNP0C02"), resources("_CRS", &[Term::of(&window)])])
}
