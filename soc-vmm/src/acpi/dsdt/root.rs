//! The PCI host bridge (PCI Firmware Specification 3.3 §4): its windows, its interrupts, and what of PCI Express it leaves to the guest.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Equal, IO, Local, NotEqual, ONE, Or, Uuid, ZERO,
};

use super::{hotplug, links};
use crate::acpi::aml::{Term, device, eisa, give, method, name, path, resources, store, when};
use crate::acpi::pci::{Hotplug, PciConfig};
use crate::layout::{VGA_WINDOW, VGA_WINDOW_END};

/// `_OSC` of a PCI Express host bridge (PCI Firmware Specification 3.3 §4.5.1).
const OSC: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";

/// What the guest may control (§4.5.1, table 4-5). The rest the machine doesn't have: no SHPC, no error reporting, no LTR.
mod control {
    pub(super) const NATIVE_HOTPLUG: u8 = 1 << 0;
    pub(super) const PME: u8 = 1 << 2;
    pub(super) const EXPRESS_CAPABILITY: u8 = 1 << 4;
}

/// What `_OSC` answers (ACPI 6.5 §6.2.11).
mod status {
    pub(super) const UNKNOWN_UUID: u8 = 1 << 2;
    pub(super) const UNKNOWN_REVISION: u8 = 1 << 3;
    pub(super) const MASKED: u8 = 1 << 4;
}

/// The bridge; `isa` stands behind its LPC bridge. `numa`: there are nodes, of which it belongs to the first.
pub(super) fn bridge(pci: &PciConfig, isa: &[Term], numa: bool) -> Term {
    let mut lpc = vec![links::lpc_address()];
    lpc.extend(links::registers());
    lpc.extend_from_slice(isa);
    let mut children = vec![
        eisa("_HID", "PNP0A08"),
        eisa("_CID", "PNP0A03"),
        name("_UID", &ZERO),
        name("_BBN", &ZERO),
        windows(pci),
        capabilities(pci.hotplug),
    ];
    if numa {
        children.push(name("_PXM", &ZERO));
    }
    children.extend(links::routing());
    children.push(device("LPC_", &lpc));
    if pci.hotplug == Hotplug::Acpi {
        children.extend(hotplug::slots(pci));
    }
    device("PCI0", &children)
}

/// `_CRS`: the buses, and what the bridge passes on. The configuration ports are its own.
fn windows(pci: &PciConfig) -> Term {
    use AddressSpaceCacheable::{Cacheable, NotCacheable};
    let memory = |(first, last)| Term::of(&AddressSpace::<u32>::new_memory(NotCacheable, true, first, last, None));
    let ports = |first, last| Term::of(&AddressSpace::<u16>::new_io(first, last, None));
    let mut crs = vec![
        Term::of(&AddressSpace::<u16>::new_bus_number(0, pci.last_bus().into())),
        Term::of(&IO::new(0xcf8, 0xcf8, 1, 8)),
        ports(0, 0xcf7),
        ports(0xd00, 0xffff),
        memory((VGA_WINDOW as u32, VGA_WINDOW_END as u32 - 1)),
    ];
    crs.extend(pci.low_windows().map(memory));
    let high = |(first, last)| Term::of(&AddressSpace::<u64>::new_memory(Cacheable, true, first, last, None));
    crs.extend(pci.high_window().map(high));
    resources("_CRS", &crs)
}

/// `_OSC`: the guest asks for control, and learns what it gets.
fn capabilities(hotplug: Hotplug) -> Term {
    let granted = control::PME
        | control::EXPRESS_CAPABILITY
        | if hotplug == Hotplug::Native { control::NATIVE_HOTPLUG } else { 0 };
    let (state, wanted) = (path("CDW1"), path("CDW3"));
    let flag = |flag: u8| Term::of(&Or::new(&state, &state, &flag));
    let uuid = Uuid::new(OSC);
    method(
        "_OSC",
        4,
        &[
            Term::of(&CreateDWordField::new(&state, &Arg(3), &ZERO)),
            when(
                &Equal::new(&Arg(0), &uuid),
                &[
                    Term::of(&CreateDWordField::new(&wanted, &Arg(3), &8u8)),
                    Term::of(&And::new(&Local(0), &wanted, &granted)),
                    when(&NotEqual::new(&Arg(1), &ONE), &[flag(status::UNKNOWN_REVISION)]),
                    when(&NotEqual::new(&wanted, &Local(0)), &[flag(status::MASKED)]),
                    store(&wanted, &Local(0)),
                    give(&Arg(3)),
                ],
            ),
            flag(status::UNKNOWN_UUID),
            give(&Arg(3)),
        ],
    )
}
