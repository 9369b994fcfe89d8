//! SRAT (ACPI 6.5 §5.2.16): which processors and which memory belong together; and SLIT (§5.2.17), how far they are from each other.

use super::{AcpiConfig, table};

const SRAT_REVISION: u8 = 3;
const SLIT_REVISION: u8 = 1;
/// Structures' flag.
const ENABLED: u32 = 1;
/// Distance of a node to itself, and to another where none is given (§5.2.17).
const HERE: u8 = 10;
const AWAY: u8 = 20;
/// APIC IDs from here on take an x2APIC structure.
const FIRST_X2APIC_ID: u32 = 255;

/// Builds the SRAT.
pub(super) fn build(config: &AcpiConfig) -> Vec<u8> {
    // Reserved: 1 for compatibility, then zeros.
    let mut body = [&1u32.to_le_bytes()[..], &[0; 8]].concat();
    for (domain, node) in (0u32..).zip(&config.numa) {
        for &apic_id in node.processors.iter().filter_map(|&index| config.apic_ids.get(index)) {
            let near = domain.to_le_bytes();
            match u8::try_from(apic_id) {
                Ok(id) if apic_id < FIRST_X2APIC_ID => {
                    body.extend([0, 16, near[0], id]);
                    body.extend(ENABLED.to_le_bytes());
                    body.extend([0, near[1], near[2], near[3], 0, 0, 0, 0]);
                }
                _ => {
                    let words = [domain, apic_id, ENABLED, 0, 0];
                    body.extend([2, 24, 0, 0]);
                    body.extend(words.into_iter().flat_map(u32::to_le_bytes));
                }
            }
        }
        for &(start, len) in &node.memory {
            body.extend([1, 40]);
            body.extend(domain.to_le_bytes());
            body.extend([0; 2]);
            body.extend(start.to_le_bytes());
            body.extend(len.to_le_bytes());
            body.extend([0; 4]);
            body.extend(ENABLED.to_le_bytes());
            body.extend([0; 8]);
        }
    }
    table(*b"SRAT", SRAT_REVISION, &body)
}

/// Builds the SLIT.
pub(super) fn distances(config: &AcpiConfig) -> Vec<u8> {
    let count = config.numa.len();
    let mut body = (count as u64).to_le_bytes().to_vec();
    for (from, node) in config.numa.iter().enumerate() {
        let default = |to| if to == from { HERE } else { AWAY };
        body.extend((0..count).map(|to| node.distances.get(to).copied().unwrap_or_else(|| default(to))));
    }
    table(*b"SLIT", SLIT_REVISION, &body)
}
