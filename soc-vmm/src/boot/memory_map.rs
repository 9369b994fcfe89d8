//! The memory map that kernels are handed: e820 (Linux), `hvm_memmap` (PVH) and multiboot use the same numbers.

use crate::layout::{
    BIOS_WINDOW, EBDA, ECAM, ECAM_SIZE, FOUR_GIB, KVM_PAGES, KVM_PAGES_SIZE, MemoryLayout, ONE_MIB, VGA_WINDOW,
};

/// What a range is for (ACPI 6.5 table 15.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// AddressRangeMemory.
    Ram = 1,
    /// AddressRangeReserved.
    Reserved = 2,
    /// AddressRangeACPI: tables, free once they are read.
    Acpi = 3,
    /// AddressRangeNVS: the FACS, kept over sleep.
    AcpiNvs = 4,
}

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapEntry {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) kind: Kind,
}

/// The map of a guest whose ACPI tables lie in `[nvs, acpi)` and `[acpi, low_end)`.
pub(super) fn memory_map(layout: &MemoryLayout, nvs: u64, acpi: u64) -> Vec<MapEntry> {
    let range = |start: u64, end: u64, kind| MapEntry { start, len: end - start, kind };
    let mut map = vec![
        range(0, EBDA, Kind::Ram),
        range(EBDA, VGA_WINDOW, Kind::Reserved),
        range(BIOS_WINDOW, ONE_MIB, Kind::Reserved),
        range(ONE_MIB, nvs, Kind::Ram),
        range(nvs, acpi, Kind::AcpiNvs),
        range(acpi, layout.low_end(), Kind::Acpi),
        range(ECAM, ECAM + ECAM_SIZE, Kind::Reserved),
        range(KVM_PAGES, KVM_PAGES + KVM_PAGES_SIZE, Kind::Reserved),
        range(FOUR_GIB, layout.high_end(), Kind::Ram),
    ];
    map.retain(|entry| entry.len != 0);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_ascends_without_overlap() {
        for (ram, entries) in [(16 << 20, 8), (0xb000_0000 - 0x1000, 8), (8 << 30, 9)] {
            let layout = MemoryLayout::new(ram).unwrap();
            let map = memory_map(&layout, layout.low_end() - 0x3000, layout.low_end() - 0x2000);
            assert_eq!(map.len(), entries);
            assert!(map.windows(2).all(|pair| pair[0].start + pair[0].len <= pair[1].start));
            let ram_bytes: u64 = map.iter().filter(|entry| entry.kind == Kind::Ram).map(|entry| entry.len).sum();
            assert_eq!(ram_bytes, ram - ONE_MIB + EBDA - 0x3000);
        }
    }
}
