//! DMAR (VT-d specification §8): the one IOMMU, which has every PCI function and the I/O APIC.

use super::table;
use crate::iommu::{ADDRESS_BITS, IO_APIC_REQUESTER};
use crate::layout::IOMMU;

const REVISION: u8 = 1;
/// Flags: interrupts can be remapped.
const INTERRUPT_REMAPPING: u8 = 1;
/// A unit's flags: it has all functions that no other one has.
const INCLUDE_ALL: u8 = 1;
/// A scope's type: I/O APIC; its ID is the MADT's.
const IO_APIC: u8 = 3;
const IO_APIC_ID: u8 = 0;

/// Builds the table.
pub(super) fn build() -> Vec<u8> {
    let [bus, devfn] = IO_APIC_REQUESTER.to_be_bytes();
    let scope = [IO_APIC, 8, 0, 0, IO_APIC_ID, bus, devfn >> 3, devfn & 7];
    let len = 16 + scope.len() as u16;
    let unit =
        [&0u16.to_le_bytes()[..], &len.to_le_bytes(), &[INCLUDE_ALL, 0, 0, 0], &IOMMU.to_le_bytes(), &scope].concat();
    let body = [&[ADDRESS_BITS - 1, INTERRUPT_REMAPPING][..], &[0; 10], &unit].concat();
    table(*b"DMAR", REVISION, &body)
}
