//! MADT (ACPI 6.5 §5.2.12): local APICs, the I/O APIC, and the two lines whose wiring differs from ISA's.

use super::{AcpiConfig, table};
use crate::devices::SCI_GSI;
use crate::layout::{IO_APIC, LOCAL_APIC};

const REVISION: u8 = 6;
/// MADT flags: there are two 8259s, which must be masked when the APICs are used.
const PCAT_COMPAT: u32 = 1;
/// Local APIC flags: it is there.
pub(super) const ENABLED: u32 = 1;
/// It isn't, but can come while the guest runs (ACPI 6.3). Older guests take each that isn't there for one of these.
const ONLINE_CAPABLE: u32 = 1 << 1;
/// APIC IDs and processor UIDs from here on take an x2APIC structure (§5.2.12.12).
const FIRST_X2APIC_ID: u32 = 255;
/// The type of an x2APIC structure.
const X2APIC: u8 = 9;
/// GSI of the PIT, which ISA has at IRQ 0.
const PIT_GSI: u32 = 2;
/// MPS INTI flags (§5.2.12.5, table 5.26).
const CONFORMING: u16 = 0;
const ACTIVE_HIGH_LEVEL: u16 = 0b11_01;
/// Local interrupt input of the NMI.
const LINT1: u8 = 1;

/// Builds the table.
pub(super) fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend((LOCAL_APIC as u32).to_le_bytes());
    body.extend(if config.iommu { 0 } else { PCAT_COMPAT }.to_le_bytes());
    let flags = |index| if config.absent.contains(&index) { ONLINE_CAPABLE } else { ENABLED };
    let processors = (0u32..).zip(&config.apic_ids).map(|(uid, apic_id)| processor(uid, *apic_id, flags(uid as usize)));
    let processors: Vec<_> = processors.collect();
    let has_x2apic = processors.iter().any(|structure| structure[0] == X2APIC);
    body.extend(processors.concat());
    // I/O APIC ID 0, GSIs from 0 on.
    structure(&mut body, 1, &[&[0, 0], &(IO_APIC as u32).to_le_bytes(), &0u32.to_le_bytes()]);
    source_override(&mut body, 0, PIT_GSI, CONFORMING);
    source_override(&mut body, SCI_GSI as u8, SCI_GSI, ACTIVE_HIGH_LEVEL);
    // NMIs of all processors, whatever their structure.
    structure(&mut body, 4, &[&[0xff], &CONFORMING.to_le_bytes(), &[LINT1]]);
    if has_x2apic {
        structure(&mut body, 10, &[&CONFORMING.to_le_bytes(), &u32::MAX.to_le_bytes(), &[LINT1], &[0; 3]]);
    }
    table(*b"APIC", REVISION, &body)
}

/// A processor's local APIC structure.
pub(super) fn processor(uid: u32, apic_id: u32, flags: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    match (u8::try_from(uid), u8::try_from(apic_id)) {
        (Ok(uid), Ok(apic_id)) if u32::from(uid.max(apic_id)) < FIRST_X2APIC_ID => {
            structure(&mut bytes, 0, &[&[uid, apic_id], &flags.to_le_bytes()]);
        }
        _ => {
            let fields = [apic_id, flags, uid].map(u32::to_le_bytes).concat();
            structure(&mut bytes, X2APIC, &[&[0; 2], &fields]);
        }
    }
    bytes
}

/// An interrupt source override: ISA line `irq` is `gsi` (§5.2.12.5).
fn source_override(body: &mut Vec<u8>, irq: u8, gsi: u32, flags: u16) {
    const ISA: u8 = 0;
    structure(body, 2, &[&[ISA, irq], &gsi.to_le_bytes(), &flags.to_le_bytes()]);
}

/// Appends an interrupt controller structure: its type, its length, its fields.
fn structure(body: &mut Vec<u8>, kind: u8, fields: &[&[u8]]) {
    let len: usize = fields.iter().map(|field| field.len()).sum();
    body.extend([kind, len as u8 + 2]);
    body.extend(fields.concat());
}
