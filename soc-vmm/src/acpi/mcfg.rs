//! MCFG (PCI Firmware Specification 3.3 §4.1.2): where configuration space is in memory.

use super::pci::Ecam;
use super::table;

const REVISION: u8 = 1;

/// Builds the table: one segment, from bus 0 on.
pub(super) fn build(ecam: Ecam) -> Vec<u8> {
    const RESERVED: [u8; 8] = [0; 8];
    const SEGMENT: [u8; 2] = [0; 2];
    let body = [&RESERVED[..], &ecam.base.to_le_bytes(), &SEGMENT, &[0, ecam.last_bus()], &[0; 4]].concat();
    table(*b"MCFG", REVISION, &body)
}
