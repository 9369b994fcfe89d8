//! The host bridge of a q35: 8086:29c0, with the registers that firmware of QEMU's machine sets (Intel 3 Series datasheet §5.1;
//! QEMU hw/pci-host/q35.c has the same): ECAM, PAM, SMRAM and TSEG.

use super::config::{ConfigSpace, ConfigState, Identity};
use crate::layout::{ECAM, ECAM_SIZE};

/// Offsets.
const PCIEXBAR: u16 = 0x60;
const PAM0: u16 = 0x90;
const SMRAM: u16 = 0x9d;
const ESMRAMC: u16 = 0x9e;

/// SMRAM: legacy SMRAM is open, closed for data, locked, enabled; it is always at 0xa0000.
const D_OPEN: u8 = 1 << 6;
const D_CLOSED: u8 = 1 << 5;
const D_LOCK: u8 = 1 << 4;
const G_ENABLE: u8 = 1 << 3;
const BASE_SEGMENT: u8 = 0b010;
/// ESMRAMC: TSEG's size and whether there is one. The rest is fixed.
const TSEG_SIZE: u8 = 0b11 << 1;
const TSEG_ENABLE: u8 = 1;
const ESMRAMC_FIXED: u8 = 0x38;

/// Segments that PAM registers switch.
pub const PAM_SEGMENTS: usize = 13;

/// What the guest sees in a segment below 1 MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shadow {
    /// What is on the bus: firmware's ROM, or nothing. Writes vanish.
    #[default]
    Bus,
    /// RAM, read-only.
    ReadOnly,
    /// RAM.
    Ram,
}

/// What the chipset's registers make of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryView {
    /// Twelve segments of 16 KiB from 0xc0000 on, then one of 64 KiB at 0xf0000.
    pub shadows: [Shadow; PAM_SEGMENTS],
    /// RAM, not the VGA window, is at 0xa0000.
    pub smram_open: bool,
    /// So many bytes at the end of low RAM are hidden.
    pub tseg: u64,
}

impl MemoryView {
    /// Everything RAM: what firmware leaves, and what a kernel without one finds.
    pub const SHADOWED: Self = Self { shadows: [Shadow::Ram; PAM_SEGMENTS], smram_open: false, tseg: 0 };

    /// First address and bytes of a segment.
    pub fn segment(index: usize) -> (u64, u64) {
        match index as u64 {
            12 => (0xf_0000, 0x1_0000),
            n => (0xc_0000 + n * 0x4000, 0x4000),
        }
    }
}

/// The host bridge.
#[derive(Debug)]
pub struct HostBridge {
    config: ConfigSpace,
    /// The registers are after a reset as firmware leaves them.
    prepared: bool,
}

impl HostBridge {
    /// The bridge. `prepared`: no firmware will set it up.
    pub(super) fn new(prepared: bool) -> Self {
        let identity =
            Identity { vendor: 0x8086, device: 0x29c0, revision: 0, class: 0x06_0000, subsystem: (0x1af4, 0x1100) };
        let mut config = ConfigSpace::endpoint(&identity);
        config.set(PCIEXBAR, &ECAM.to_le_bytes());
        config.allow(PCIEXBAR, &0x0000_000f_fc00_0007u64.to_le_bytes());
        config.allow(PAM0, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
        config.set(SMRAM, &[BASE_SEGMENT]);
        config.set(ESMRAMC, &[ESMRAMC_FIXED]);
        config.own(SMRAM, &[D_OPEN | D_CLOSED | D_LOCK | G_ENABLE, TSEG_SIZE | TSEG_ENABLE]);
        let mut bridge = Self { config, prepared };
        bridge.prepare();
        bridge
    }

    fn prepare(&mut self) {
        if self.prepared {
            self.config.put(PCIEXBAR, &(ECAM | 1).to_le_bytes());
            self.config.put(PAM0, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
        }
    }

    pub(super) fn config(&self) -> &ConfigSpace {
        &self.config
    }

    pub(super) fn write_config(&mut self, offset: u16, len: u8, value: u32) {
        self.config.write(offset, len, value);
        for (at, byte) in (offset..).zip(value.to_le_bytes()).take(len.into()) {
            self.write_smram(at, byte);
        }
    }

    /// A byte to one of the two registers that a lock guards.
    fn write_smram(&mut self, at: u16, byte: u8) {
        let old = self.config.read(SMRAM, 1) as u8;
        if old & D_LOCK != 0 {
            // Until the next reset; only closing is still possible.
            if at == SMRAM {
                self.config.put(SMRAM, &[old & !D_CLOSED | byte & D_CLOSED]);
            }
            return;
        }
        match at {
            SMRAM => {
                let mut new = byte & (D_OPEN | D_CLOSED | D_LOCK | G_ENABLE) | BASE_SEGMENT;
                if new & D_LOCK != 0 {
                    new &= !D_OPEN;
                }
                self.config.put(SMRAM, &[new]);
            }
            ESMRAMC => self.config.put(ESMRAMC, &[byte & (TSEG_SIZE | TSEG_ENABLE) | ESMRAMC_FIXED]),
            _ => {}
        }
    }

    /// Its state.
    pub(super) fn save(&self) -> ConfigState {
        self.config.save()
    }

    /// Puts it back; whether it is a host bridge's.
    #[must_use]
    pub(super) fn restore(&mut self, state: &ConfigState) -> bool {
        self.config.restore(state)
    }

    pub(super) fn reset(&mut self) {
        self.config.reset();
        self.prepare();
    }

    /// First address and bytes of the configuration window, if it is open.
    pub fn ecam(&self) -> Option<(u64, u64)> {
        let register = u64::from(self.config.read(PCIEXBAR, 4)) | u64::from(self.config.read(PCIEXBAR + 4, 4)) << 32;
        let len = match register >> 1 & 3 {
            0 => ECAM_SIZE,
            1 => ECAM_SIZE / 2,
            2 => ECAM_SIZE / 4,
            _ => return None,
        };
        (register & 1 != 0).then_some((register & 0xf_fc00_0000 & !(len - 1), len))
    }

    /// What the guest sees of its memory.
    pub fn view(&self) -> MemoryView {
        let mut shadows = [Shadow::Bus; PAM_SEGMENTS];
        for (index, shadow) in shadows.iter_mut().enumerate() {
            // PAM0's upper half is the last segment; the others have two each, the lower half first.
            let (register, upper) = if index == 12 { (0, true) } else { (1 + index as u16 / 2, index % 2 == 1) };
            let bits = self.config.read(PAM0 + register, 1) >> if upper { 4 } else { 0 } & 3;
            *shadow = match bits {
                0b11 => Shadow::Ram,
                0b01 => Shadow::ReadOnly,
                // Writes to RAM, reads from the bus: nobody can tell before the segment is read.
                _ => Shadow::Bus,
            };
        }
        let smram = self.config.read(SMRAM, 1) as u8;
        let tseg = self.config.read(ESMRAMC, 1) as u8;
        let size = match tseg >> 1 & 3 {
            0 => 1 << 20,
            1 => 2 << 20,
            2 => 8 << 20,
            _ => 0,
        };
        MemoryView {
            shadows,
            smram_open: smram & D_OPEN != 0 && smram & G_ENABLE != 0,
            tseg: if tseg & TSEG_ENABLE != 0 && smram & G_ENABLE != 0 { size } else { 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pam_shadows_the_segments_that_it_names() {
        let mut bridge = HostBridge::new(false);
        assert_eq!(bridge.view(), MemoryView::default());
        bridge.write_config(PAM0, 1, 0x10);
        bridge.write_config(PAM0 + 1, 2, 0x0130);
        let view = bridge.view();
        let seen: Vec<_> = view.shadows.iter().enumerate().filter(|(_, s)| **s != Shadow::Bus).collect();
        assert_eq!(seen, [(1, &Shadow::Ram), (2, &Shadow::ReadOnly), (12, &Shadow::ReadOnly)]);
        assert_eq!((MemoryView::segment(1), MemoryView::segment(12)), ((0xc_4000, 0x4000), (0xf_0000, 0x1_0000)));
        bridge.reset();
        assert_eq!(bridge.view(), MemoryView::default());
        assert_eq!(HostBridge::new(true).view(), MemoryView::SHADOWED);
    }

    #[test]
    fn ecam_moves_and_shrinks() {
        let mut bridge = HostBridge::new(false);
        assert_eq!(bridge.ecam(), None);
        bridge.write_config(PCIEXBAR, 4, 0xe000_0001);
        assert_eq!(bridge.ecam(), Some((0xe000_0000, 256 << 20)));
        bridge.write_config(PCIEXBAR, 4, 0xec00_0005);
        assert_eq!(bridge.ecam(), Some((0xec00_0000, 64 << 20)));
        bridge.write_config(PCIEXBAR, 4, 7);
        assert_eq!(bridge.ecam(), None);
        assert_eq!(HostBridge::new(true).ecam(), Some((ECAM, ECAM_SIZE)));
    }

    #[test]
    fn smram_and_tseg_lock() {
        let mut bridge = HostBridge::new(false);
        bridge.write_config(SMRAM, 2, 0x0348);
        let view = bridge.view();
        assert_eq!((view.smram_open, view.tseg), (true, 2 << 20));
        bridge.write_config(SMRAM, 1, 0x58);
        bridge.write_config(SMRAM, 2, 0x0040);
        let view = bridge.view();
        assert_eq!((view.smram_open, view.tseg, bridge.config().read(SMRAM, 1)), (false, 2 << 20, 0x1a));
        bridge.reset();
        assert_eq!(bridge.view(), MemoryView::default());
    }
}
