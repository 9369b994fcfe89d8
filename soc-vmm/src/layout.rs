//! The guest-physical address map, and what lies where in low memory at boot.
//!
//! The map is the one of QEMU's `q35` (its `pc_q35_init`), so that images and firmware made for that machine find what they know:
//!
//! | from | to | what |
//! | --- | --- | --- |
//! | 0 | 0xa0000 | RAM; the loader's tables at [`boot_data`] |
//! | 0xa0000 | 0xc0000 | legacy VGA window, no RAM |
//! | 0xc0000 | 0x100000 | RAM; a firmware's last 256 KiB, or the RSDP |
//! | 0x100000 | [`MemoryLayout::low_end`] | RAM; ACPI tables at its end |
//! | 0xb0000000 | 0xc0000000 | ECAM, reserved |
//! | 0xc0000000 | 0xfec00000 | 32-bit PCI memory |
//! | 0xfec00000 | | I/O APIC |
//! | 0xfed90000 | 0xfed91000 | IOMMU, if there is one |
//! | 0xfee00000 | | local APICs |
//! | 4 GiB − size | 4 GiB | firmware, read-only |
//! | 4 GiB | [`MemoryLayout::high_end`] | RAM |

/// Bytes of a guest page.
pub const PAGE_SIZE: u64 = 0x1000;
/// First address above 32 bits.
pub const FOUR_GIB: u64 = 1 << 32;
/// One mebibyte, where conventional memory and the legacy windows end.
pub const ONE_MIB: u64 = 1 << 20;

/// First byte of the legacy VGA window, which is no RAM.
pub const VGA_WINDOW: u64 = 0xa_0000;
/// First byte after the legacy VGA window.
pub const VGA_WINDOW_END: u64 = 0xc_0000;
/// The last KiB of conventional memory is reserved: guests that look for an extended BIOS data area look here.
pub const EBDA: u64 = 0x9_fc00;
/// Where a PC's system firmware begins below 1 MiB; without firmware the RSDP's page (ACPI 6.5 §5.2.5.1 has guests search from here).
pub const BIOS_WINDOW: u64 = 0xe_0000;
/// Enhanced configuration space of 256 buses (PCI Express Base §7.2.2); reserved in every map so that it never moves.
pub const ECAM: u64 = 0xb000_0000;
/// Bytes of [`ECAM`].
pub const ECAM_SIZE: u64 = 0x1000_0000;
/// I/O APIC registers.
pub const IO_APIC: u64 = 0xfec0_0000;
/// Registers of the IOMMU.
pub const IOMMU: u64 = 0xfed9_0000;
/// Local APIC registers at reset.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Four pages that the host's KVM needs where the processor has no real mode of its own: nothing may be placed there (as with QEMU).
pub const KVM_PAGES: u64 = 0xfeff_c000;
/// Bytes of [`KVM_PAGES`].
pub const KVM_PAGES_SIZE: u64 = 0x4000;
/// The most bytes a firmware image may have: what is free between the local APICs and 4 GiB.
pub const FIRMWARE_MAX: u64 = 16 << 20;

/// Where the loader puts what it hands to a kernel; images must not load over it.
pub mod boot_data {
    /// First byte.
    pub const START: u64 = 0x9_0000;
    /// The global descriptor table that the first segments came from.
    pub const GDT: u64 = START;
    /// Linux zero page, PVH start info or multiboot info, with its lists.
    pub const INFO: u64 = 0x9_1000;
    /// Page tables of the 64-bit boot protocol: six pages.
    pub const PAGE_TABLES: u64 = 0x9_2000;
    /// Command line, NUL-terminated.
    pub const CMDLINE: u64 = 0x9_8000;
    /// First byte behind the command line.
    pub const END: u64 = 0x9_f000;
}

/// RAM up to here stays below 4 GiB in one piece …
const LOW_MAX: u64 = 0xb000_0000;
/// … and more RAM is split here, so that guest and host agree on 1 GiB pages.
const LOW_SPLIT: u64 = 0x8000_0000;
/// The widest guest-physical address that x86 defines (52 bits) bounds every sum below.
const ADDRESS_LIMIT: u64 = 1 << 52;
/// Below this no image that we boot has a chance.
const MIN_RAM: u64 = 2 << 20;

/// Where the RAM of a guest of a given size lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLayout {
    low_end: u64,
    high_end: u64,
}

impl MemoryLayout {
    /// Lays out `ram` bytes. Like QEMU's q35, less than 2.75 GiB stay below 4 GiB; of more, 2 GiB do.
    ///
    /// # Errors
    /// Less than 2 MiB, more than 52 address bits reach, or no whole number of pages.
    pub fn new(ram: u64) -> Result<Self, LayoutError> {
        if !ram.is_multiple_of(PAGE_SIZE) {
            return Err(LayoutError::Unaligned { ram });
        }
        if ram < MIN_RAM {
            return Err(LayoutError::TooSmall { ram });
        }
        if ram > ADDRESS_LIMIT - FOUR_GIB {
            return Err(LayoutError::TooWide { end: u128::from(ram) + u128::from(FOUR_GIB), bits: 52 });
        }
        let low_end = if ram >= LOW_MAX { LOW_SPLIT } else { ram };
        Ok(Self { low_end, high_end: FOUR_GIB + (ram - low_end) })
    }

    /// Bytes of RAM that the guest was promised. What the VGA window covers of it is never seen, as on a PC.
    pub fn ram(&self) -> u64 {
        self.low_end + self.high_bytes()
    }

    /// First byte behind the RAM below 4 GiB.
    pub fn low_end(&self) -> u64 {
        self.low_end
    }

    /// First byte behind the RAM above 4 GiB; 4 GiB if there is none.
    pub fn high_end(&self) -> u64 {
        self.high_end
    }

    /// Bytes of RAM above 4 GiB.
    pub fn high_bytes(&self) -> u64 {
        self.high_end - FOUR_GIB
    }

    /// The pieces of RAM in ascending order.
    pub fn ram_ranges(&self) -> impl Iterator<Item = RamRange> + use<> {
        let below_vga = RamRange { start: 0, len: VGA_WINDOW, offset: 0 };
        let low = RamRange { start: VGA_WINDOW_END, len: self.low_end - VGA_WINDOW_END, offset: VGA_WINDOW_END };
        let high = RamRange { start: FOUR_GIB, len: self.high_bytes(), offset: self.low_end };
        [below_vga, low, high].into_iter().filter(|range| range.len != 0)
    }

    /// Where `len` bytes of RAM lie whose first is `first` bytes into it: one range or two, below and above 4 GiB. What the VGA window
    /// covers counts, as in [`MemoryLayout::ram`].
    pub fn ranges_of(&self, first: u64, len: u64) -> Vec<AddressRange> {
        let last = first.saturating_add(len).min(self.ram());
        let low = AddressRange { start: first, len: last.min(self.low_end).saturating_sub(first) };
        let high = first.max(self.low_end);
        let high = AddressRange { start: FOUR_GIB + (high - self.low_end), len: last.saturating_sub(high) };
        [low, high].into_iter().filter(|range| range.len != 0).collect()
    }

    /// Whether `[start, start + len)` is all RAM below 4 GiB.
    pub fn is_low_ram(&self, start: u64, len: u64) -> bool {
        let Some(end) = start.checked_add(len) else { return false };
        end <= VGA_WINDOW || (start >= VGA_WINDOW_END && end <= self.low_end)
    }

    /// Checks that a guest with `bits` physical address bits (CPUID 0x80000008 EAX\[7:0\]) can name all of its RAM.
    ///
    /// # Errors
    /// It can't.
    pub fn check_address_width(&self, bits: u8) -> Result<(), LayoutError> {
        if bits < 64 && self.high_bytes() != 0 && self.high_end > 1 << bits {
            return Err(LayoutError::TooWide { end: u128::from(self.high_end), bits });
        }
        Ok(())
    }
}

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRange {
    /// The first.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// One contiguous piece of RAM: a memslot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Offset of the first byte in the guest's memory file. The bytes behind the VGA window stay unused, so that a huge page of
    /// the file is a huge page of the guest.
    pub offset: u64,
}

/// Why RAM of that size can't be laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Not a whole number of pages.
    #[error("{ram} bytes of memory are no whole number of 4 KiB pages: round the size")]
    Unaligned {
        /// Bytes asked for.
        ram: u64,
    },
    /// Nothing boots in so little.
    #[error("{} KiB of memory are too little: give the guest at least 2 MiB", ram >> 10)]
    TooSmall {
        /// Bytes asked for.
        ram: u64,
    },
    /// The CPU's physical addresses don't reach the last byte.
    #[error("the guest's memory would end at {end:#x}, beyond its {bits} physical address bits: give it less")]
    TooWide {
        /// First address behind the RAM.
        end: u128,
        /// Physical address bits.
        bits: u8,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn splits_as_q35_does() {
        for (ram, low_end, high_end) in [
            (512 << 20, 512 << 20, FOUR_GIB),
            (2 * GIB + GIB / 2, 2 * GIB + GIB / 2, FOUR_GIB),
            (0xb000_0000 - PAGE_SIZE, 0xb000_0000 - PAGE_SIZE, FOUR_GIB),
            (0xb000_0000, 0x8000_0000, FOUR_GIB + 0x3000_0000),
            (8 * GIB, 2 * GIB, 10 * GIB),
        ] {
            let layout = MemoryLayout::new(ram).unwrap();
            assert_eq!((layout.low_end(), layout.high_end(), layout.ram()), (low_end, high_end, ram));
        }
    }

    #[test]
    fn ranges_hold_all_ram_but_the_vga_window() {
        for ram in [2 << 20, 512 << 20, 0xb000_0000, 64 * GIB] {
            let layout = MemoryLayout::new(ram).unwrap();
            let ranges: Vec<_> = layout.ram_ranges().collect();
            assert_eq!(ranges.iter().map(|range| range.len).sum::<u64>(), ram - (VGA_WINDOW_END - VGA_WINDOW));
            assert!(ranges.windows(2).all(|pair| pair[0].start + pair[0].len <= pair[1].start));
            assert!(ranges.windows(2).all(|pair| pair[0].offset + pair[0].len <= pair[1].offset));
            assert!(ranges.iter().all(|range| range.offset + range.len <= ram));
        }
    }

    #[test]
    fn a_stretch_of_ram_straddles_the_hole_in_two_ranges() {
        let layout = MemoryLayout::new(4 * GIB).unwrap();
        let ranges =
            |first, len| layout.ranges_of(first, len).iter().map(|range| (range.start, range.len)).collect::<Vec<_>>();
        assert_eq!(ranges(0, GIB), [(0, GIB)]);
        assert_eq!(ranges(GIB, 2 * GIB), [(GIB, GIB), (FOUR_GIB, GIB)]);
        assert_eq!(ranges(2 * GIB, GIB), [(FOUR_GIB, GIB)]);
        assert_eq!(ranges(3 * GIB, 5 * GIB), [(FOUR_GIB + GIB, GIB)], "no more than there is");
        assert!(ranges(4 * GIB, u64::MAX).is_empty());
    }

    #[test]
    fn low_ram_excludes_holes() {
        let layout = MemoryLayout::new(16 << 20).unwrap();
        assert!(layout.is_low_ram(0, VGA_WINDOW));
        assert!(!layout.is_low_ram(0, VGA_WINDOW + 1));
        assert!(!layout.is_low_ram(VGA_WINDOW, 1));
        assert!(layout.is_low_ram(VGA_WINDOW_END, (16 << 20) - VGA_WINDOW_END));
        assert!(!layout.is_low_ram(ONE_MIB, 16 << 20));
        assert!(!layout.is_low_ram(ONE_MIB, u64::MAX));
    }

    #[test]
    fn refuses_what_no_guest_can_have() {
        assert_eq!(MemoryLayout::new(1), Err(LayoutError::Unaligned { ram: 1 }));
        assert_eq!(MemoryLayout::new(0), Err(LayoutError::TooSmall { ram: 0 }));
        assert_eq!(MemoryLayout::new(1 << 20), Err(LayoutError::TooSmall { ram: 1 << 20 }));
        assert!(matches!(MemoryLayout::new(!0xfff), Err(LayoutError::TooWide { .. })));
        let layout = MemoryLayout::new(8 * GIB).unwrap();
        assert!(layout.check_address_width(36).is_ok());
        assert_eq!(layout.check_address_width(33), Err(LayoutError::TooWide { end: u128::from(10 * GIB), bits: 33 }));
        assert!(MemoryLayout::new(GIB).unwrap().check_address_width(32).is_ok());
    }
}
