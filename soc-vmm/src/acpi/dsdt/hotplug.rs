//! Hot-plug by ACPI (ACPI 6.5 §6.3): the slots' devices, and the event that tells of changes; the registers are
//! [`crate::devices::PciHotplug`]'s.

use acpi_tables::aml::{
    Acquire, And, Arg, FieldAccessType, Local, MethodCall, Mutex, Notify, ONE, OpRegionSpace, Release, ShiftLeft, ZERO,
};

use crate::acpi::aml::{Term, device, fields, method, name, path, region, store, when};
use crate::acpi::pci::PciConfig;
use crate::devices::{PCI_HOTPLUG_BANK, PCI_HOTPLUG_GPE, PCI_HOTPLUG_LEN, PCI_HOTPLUG_PORT};

/// Device notifications (§5.6.6): look whether it is there; let it go.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
const FOREVER: u16 = 0xffff;

/// The event's handler.
pub(super) fn event() -> Term {
    let changes = MethodCall::new(path("\\_SB_.PCI0.PCNT"), vec![]);
    method(&format!("_E{PCI_HOTPLUG_GPE:02X}"), 0, &[Term::of(&changes)])
}

/// What stands in the host bridge: registers, methods, ports with their slots.
pub(super) fn slots(pci: &PciConfig) -> Vec<Term> {
    let [inserted, leaving, eject, select] = [*b"PCIU", *b"PCID", *b"PCEJ", *b"PCIB"];
    let word = |name| (Some(name), 32);
    let mut terms = vec![
        region("PCST", OpRegionSpace::SystemIO, PCI_HOTPLUG_PORT.into(), PCI_HOTPLUG_LEN.into()),
        fields("PCST", FieldAccessType::DWord, &[word(inserted), word(leaving), word(eject), word(select)]),
        Term::of(&Mutex::new(path("PCLK"), 0)),
        // Ejects what is in slot Arg1 of bank Arg0.
        method(
            "PCEO",
            2,
            &[
                acquire(),
                store(&path("PCIB"), &Arg(0)),
                Term::of(&ShiftLeft::new(&path("PCEJ"), &ONE, &Arg(1))),
                release(),
            ],
        ),
    ];
    terms.extend(pci.ports.iter().enumerate().map(|(n, port)| {
        let (slot, function) = (u32::from(port.devfn >> 3), u32::from(port.devfn & 7));
        let (bank, bit) = ((n / PCI_HOTPLUG_BANK) as u8, (n % PCI_HOTPLUG_BANK) as u8);
        let eject = MethodCall::new(path("PCEO"), vec![&bank, &bit]);
        let within =
            device("S00_", &[name("_ADR", &ZERO), name("_SUN", &port.slot), method("_EJ0", 1, &[Term::of(&eject)])]);
        device(&port_name(port.devfn), &[name("_ADR", &(slot << 16 | function)), within])
    }));
    terms.push(changes(pci));
    terms
}

/// Tells the guest of every change.
fn changes(pci: &PciConfig) -> Term {
    let mut body = Vec::new();
    for (bank, ports) in pci.ports.chunks(PCI_HOTPLUG_BANK).enumerate() {
        body.extend([
            acquire(),
            store(&path("PCIB"), &(bank as u8)),
            store(&Local(0), &path("PCIU")),
            store(&path("PCIU"), &Local(0)),
            store(&Local(1), &path("PCID")),
            store(&path("PCID"), &Local(1)),
            release(),
        ]);
        for (bit, port) in ports.iter().enumerate() {
            let slot = path(&format!("\\_SB_.PCI0.{}.S00_", port_name(port.devfn)));
            for (local, what) in [(0, DEVICE_CHECK), (1, EJECT_REQUEST)] {
                let bit = 1u32 << bit;
                let is_set = Term::of(&And::new(&ZERO, &Local(local), &bit));
                body.push(when(&is_set, &[Term::of(&Notify::new(&slot, &what))]));
            }
        }
    }
    method("PCNT", 0, &body)
}

fn acquire() -> Term {
    Term::of(&Acquire::new(path("PCLK"), FOREVER))
}

fn release() -> Term {
    Term::of(&Release::new(path("PCLK")))
}

fn port_name(devfn: u8) -> String {
    format!("S{devfn:02X}_")
}
