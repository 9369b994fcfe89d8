//! Which memslots make the guest's memory what the chipset's registers say it is.

use api_channel::call::{Memslot, SlotFlags};

use crate::layout::{ONE_MIB, VGA_WINDOW, VGA_WINDOW_END};
use crate::pci::{MemoryView, PAM_SEGMENTS, Shadow};

/// A piece of guest-physical memory and the allocation that is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Backing {
    /// First guest-physical address.
    pub(super) base: u64,
    /// Bytes.
    pub(super) len: u64,
    /// The allocation.
    pub(super) ram: u32,
    /// Offset of the first byte in it.
    pub(super) offset: u64,
}

/// All memory that a guest can be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Memory {
    /// RAM in ascending order, from 0; what the chipset hides of it included.
    pub(super) ram: Vec<Backing>,
    /// First address behind RAM below 4 GiB.
    pub(super) low_end: u64,
    /// Read-only memory below 4 GiB, by bank; the first ends there, and its end shows below 1 MiB too.
    pub(super) roms: Vec<Backing>,
}

/// Bytes of firmware that are on the bus below 1 MiB, as on QEMU's PCs.
const LOW_FIRMWARE: u64 = 128 << 10;

impl Memory {
    /// The memslots, in ascending order. `shown` says of each ROM whether reads find it.
    pub(super) fn slots(&self, view: &MemoryView, shown: &[bool]) -> Vec<Memslot> {
        let mut slots = Vec::new();
        self.ram_slots(&mut slots, 0, VGA_WINDOW, 0);
        if view.smram_open {
            self.ram_slots(&mut slots, VGA_WINDOW, VGA_WINDOW_END, 0);
        }
        for (index, shadow) in view.shadows.iter().enumerate().take(PAM_SEGMENTS) {
            let (base, len) = MemoryView::segment(index);
            match shadow {
                Shadow::Ram => self.ram_slots(&mut slots, base, base + len, 0),
                Shadow::ReadOnly => self.ram_slots(&mut slots, base, base + len, SlotFlags::READ_ONLY),
                Shadow::Bus => self.firmware_slot(&mut slots, base, len, shown),
            }
        }
        // Apart from what changes below: the large slot stays as it is.
        let tseg = self.low_end.saturating_sub(view.tseg).max(ONE_MIB);
        slots.extend(self.ram_between(ONE_MIB, tseg).map(|piece| slot(&piece, 0)));
        slots.extend(self.ram_between(self.low_end, u64::MAX).map(|piece| slot(&piece, 0)));
        let roms = self.roms.iter().zip(shown).filter(|(_, shown)| **shown);
        slots.extend(roms.map(|(rom, _)| slot(rom, SlotFlags::READ_ONLY)));
        slots.sort_by_key(|slot| slot.base);
        slots
    }

    fn ram_between(&self, start: u64, end: u64) -> impl Iterator<Item = Backing> {
        self.ram.iter().filter_map(move |piece| cut(piece, start, end))
    }

    fn ram_slots(&self, slots: &mut Vec<Memslot>, start: u64, end: u64, flags: u32) {
        for piece in self.ram_between(start, end) {
            join(slots, slot(&piece, flags));
        }
    }

    /// What of the firmware's end is on the bus in a segment.
    fn firmware_slot(&self, slots: &mut Vec<Memslot>, base: u64, len: u64, shown: &[bool]) {
        let (Some(rom), Some(true)) = (self.roms.first(), shown.first()) else { return };
        let low = rom.len.min(LOW_FIRMWARE);
        let at_bus = Backing { base: ONE_MIB - low, len: low, offset: rom.offset + (rom.len - low), ..*rom };
        if let Some(piece) = cut(&at_bus, base, base + len) {
            join(slots, slot(&piece, SlotFlags::READ_ONLY));
        }
    }
}

fn slot(piece: &Backing, flags: u32) -> Memslot {
    let Backing { base, len, ram, offset } = *piece;
    Memslot { base, len, offset, ram, flags }
}

/// What of a piece lies in `[start, end)`.
fn cut(piece: &Backing, start: u64, end: u64) -> Option<Backing> {
    let first = piece.base.max(start);
    let end = (piece.base + piece.len).min(end);
    (first < end).then(|| Backing {
        base: first,
        len: end - first,
        ram: piece.ram,
        offset: piece.offset + (first - piece.base),
    })
}

/// Adds a slot, to the last one where it goes on.
fn join(slots: &mut Vec<Memslot>, next: Memslot) {
    match slots.last_mut() {
        Some(last)
            if (last.base + last.len, last.offset + last.len, last.ram, last.flags)
                == (next.base, next.offset, next.ram, next.flags) =>
        {
            last.len += next.len;
        }
        _ => slots.push(next),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn memory(rom: u64) -> Memory {
        Memory {
            ram: vec![
                Backing { base: 0, len: 64 * MIB, ram: 0, offset: 0 },
                Backing { base: 4096 * MIB, len: 64 * MIB, ram: 1, offset: 0 },
            ],
            low_end: 64 * MIB,
            roms: vec![Backing { base: (4 << 30) - rom, len: rom, ram: 2, offset: 0 }],
        }
    }

    fn shown(memory: &Memory, view: &MemoryView) -> Vec<(u64, u64, u64, u32, u32)> {
        memory.slots(view, &[true]).iter().map(|s| (s.base, s.len, s.offset, s.ram, s.flags)).collect()
    }

    #[test]
    fn firmware_starts_with_its_end_on_the_bus() {
        assert_eq!(
            shown(&memory(256 << 10), &MemoryView::default()),
            [
                (0, 0xa_0000, 0, 0, 0),
                (0xe_0000, 0x2_0000, 0x2_0000, 2, 1),
                (MIB, 63 * MIB, MIB, 0, 0),
                ((4 << 30) - (256 << 10), 256 << 10, 0, 2, 1),
                (4096 * MIB, 64 * MIB, 0, 1, 0),
            ]
        );
    }

    #[test]
    fn a_shadowed_machine_is_all_ram() {
        let slots = shown(&Memory { roms: vec![], ..memory(0) }, &MemoryView::SHADOWED);
        assert_eq!(
            slots[..3],
            [(0, 0xa_0000, 0, 0, 0), (0xc_0000, 0x4_0000, 0xc_0000, 0, 0), (MIB, 63 * MIB, MIB, 0, 0)]
        );
    }

    #[test]
    fn segments_smram_and_tseg_are_switched_one_by_one() {
        let mut view = MemoryView { smram_open: true, tseg: 8 * MIB, ..MemoryView::SHADOWED };
        view.shadows[12] = Shadow::ReadOnly;
        view.shadows[0] = Shadow::Bus;
        assert_eq!(
            shown(&memory(4096), &view)[..4],
            [
                (0, 0xc_0000, 0, 0, 0),
                (0xc_4000, 0x2_c000, 0xc_4000, 0, 0),
                (0xf_0000, 0x1_0000, 0xf_0000, 0, 1),
                (MIB, 55 * MIB, MIB, 0, 0),
            ]
        );
    }

    #[test]
    fn a_bank_in_command_mode_is_not_memory() {
        let slots = memory(128 << 10).slots(&MemoryView::default(), &[false]);
        assert!(slots.iter().all(|slot| slot.ram != 2));
    }

    proptest! {
        #[test]
        fn slots_never_overlap(
            modes in proptest::collection::vec(0u8..3, PAM_SEGMENTS),
            smram_open: bool,
            tseg in 0u64..70,
            rom in 1u64..40,
            rom_shown: bool,
        ) {
            let mut view = MemoryView { smram_open, tseg: tseg * MIB, ..MemoryView::default() };
            for (shadow, mode) in view.shadows.iter_mut().zip(modes) {
                *shadow = [Shadow::Bus, Shadow::ReadOnly, Shadow::Ram][usize::from(mode)];
            }
            let slots = memory(rom * 4096).slots(&view, &[rom_shown]);
            prop_assert!(slots.windows(2).all(|pair| pair[0].base + pair[0].len <= pair[1].base));
            prop_assert!(slots.iter().all(|slot| slot.len != 0));
        }
    }
}
