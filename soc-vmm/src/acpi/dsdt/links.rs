//! Interrupts of PCI's INTx pins: in PIC mode the PIRQs as the LPC bridge's registers route them, by link devices (ACPI 6.5 §6.2.13,
//! PNP0C0F); in APIC mode their GSIs.

use acpi_tables::aml::{
    And, Arg, CreateDWordField, FieldAccessType, MethodCall, NotEqual, OpRegionSpace, Or, Path, ZERO,
};

use crate::acpi::aml::{
    Term, device, eisa, fields, give, method, name, package, path, region, resources, shared_interrupts, store, when,
};
use crate::pci::{LPC, PIRQ_GSI, PIRQS, pirq_of};

const LETTERS: [char; PIRQS] = ['A', 'B', 'C', 'D', 'E', 'F', 'G', 'H'];
/// A route's bit that says: off.
const OFF: u8 = 0x80;
/// ISA lines that a PIRQ may take.
const CHOICES: [u32; 3] = [5, 10, 11];
/// The interrupt number's offset in an Extended Interrupt descriptor.
const NUMBER: u8 = 5;
const SLOTS: u8 = 32;
const PINS: u8 = 4;

/// `_PIC` (§5.8.1): the guest tells which controllers it uses.
pub(super) fn interrupt_model() -> [Term; 2] {
    [name("\\PICF", &ZERO), method("\\_PIC", 1, &[store(&path("PICF"), &Arg(0))])]
}

/// The LPC bridge's registers, within its device.
pub(super) fn registers() -> [Term; 2] {
    let byte = |n: usize| {
        let letter = LETTERS[n] as u8;
        (Some([b'P', b'R', b'Q', letter]), 8)
    };
    let gap = (None, 32);
    let all: Vec<_> = (0..4).map(byte).chain([gap]).chain((4..8).map(byte)).collect();
    [region("PIRQ", OpRegionSpace::PCIConfig, 0x60, 0x0c), fields("PIRQ", FieldAccessType::Byte, &all)]
}

/// The link devices, and what they share.
pub(super) fn devices() -> Vec<Term> {
    const OFF_STATUS: u8 = 0x9;
    const ON_STATUS: u8 = 0xb;
    let (template, number) = (path("PRR0"), path("PRRI"));
    let status = method("IQST", 1, &[when(&And::new(&ZERO, &Arg(0), &OFF), &[give(&OFF_STATUS)]), give(&ON_STATUS)]);
    let template_of_one = resources("PRR0", &[shared_interrupts(&[0])]);
    let current = method(
        "IQCR",
        1,
        &[
            Term::of(&CreateDWordField::new(&number, &template, &NUMBER)),
            store(&number, &Arg(0)),
            when(&And::new(&ZERO, &Arg(0), &OFF), &[store(&number, &ZERO)]),
            give(&template),
        ],
    );
    let link = |(n, letter): (usize, char)| {
        let route = route(letter);
        device(
            &format!("LNK{letter}"),
            &[
                eisa("_HID", "PNP0C0F"),
                name("_UID", &(n as u8)),
                resources("_PRS", &[shared_interrupts(&CHOICES)]),
                method("_STA", 0, &[give(&MethodCall::new(path("IQST"), vec![&route]))]),
                method("_DIS", 0, &[Term::of(&Or::new(&route, &route, &OFF))]),
                method("_CRS", 0, &[give(&MethodCall::new(path("IQCR"), vec![&route]))]),
                method(
                    "_SRS",
                    1,
                    &[Term::of(&CreateDWordField::new(&number, &Arg(0), &NUMBER)), store(&route, &number)],
                ),
            ],
        )
    };
    [status, template_of_one, current].into_iter().chain(LETTERS.into_iter().enumerate().map(link)).collect()
}

/// `_PRT` of bus 0 (§6.2.13) and its tables.
pub(super) fn routing() -> [Term; 3] {
    let pins = || (0..SLOTS).flat_map(|slot| (0..PINS).map(move |pin| (slot, pin)));
    let entry = |slot: u8, pin: u8, source: Term, index: Term| {
        let address = u32::from(slot) << 16 | 0xffff;
        package(&[Term::of(&address), Term::of(&pin), source, index])
    };
    let by_link = pins().map(|(slot, pin)| {
        let link = path(&format!("LNK{}", LETTERS[pirq_of(slot, pin)]));
        entry(slot, pin, Term::of(&link), Term::of(&ZERO))
    });
    let by_gsi = pins().map(|(slot, pin)| {
        let gsi = PIRQ_GSI + pirq_of(slot, pin) as u32;
        entry(slot, pin, Term::of(&ZERO), Term::of(&(gsi as u8)))
    });
    let (pic, apic) = (path("PRTP"), path("PRTA"));
    [
        name("PRTP", &package(&by_link.collect::<Vec<_>>())),
        name("PRTA", &package(&by_gsi.collect::<Vec<_>>())),
        method("_PRT", 0, &[when(&NotEqual::new(&path("\\PICF"), &ZERO), &[give(&apic)]), give(&pic)]),
    ]
}

/// The LPC bridge's register of a PIRQ.
fn route(letter: char) -> Path {
    path(&format!("\\_SB_.PCI0.LPC_.PRQ{letter}"))
}

/// The LPC bridge's `_ADR`.
pub(super) fn lpc_address() -> Term {
    const { assert!(LPC & 7 == 0) };
    name("_ADR", &(u32::from(LPC >> 3) << 16))
}
