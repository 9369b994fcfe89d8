//! PCI configuration space of a function: registers, what of them can be written, and what a write sets off.

use pcie_function::card::{bar, id};

/// Bytes of configuration space.
pub(crate) const SIZE: usize = 4096;

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES: usize = 0x34;
const EXPRESS: usize = 0x40;
const EXPRESS_CONTROL: usize = EXPRESS + 0x08;
const EXPRESS_FLR: u16 = 1 << 15;
const MSIX: usize = 0x80;
const MSIX_CONTROL: usize = MSIX + 0x02;

/// BAR registers: offset, size in bytes (0: there is none), type bits.
fn bars(memory: u64, notify: u64) -> [(usize, u64, u32); 4] {
    const PREFETCHABLE_64_BIT: u32 = 0b1100;
    [(0x10, bar::REGISTERS_SIZE, 0), (0x18, memory, PREFETCHABLE_64_BIT), (0x20, bar::MSIX_SIZE, 0), (0x24, notify, 0)]
}

/// A function's configuration space.
#[derive(Debug)]
pub(crate) struct ConfigSpace {
    bytes: Box<[u8; SIZE]>,
    /// Bits that a write changes.
    writable: Box<[u8; SIZE]>,
    device: u16,
    vectors: u16,
    memory: u64,
    notify: u64,
}

/// What a write asks of the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing but what is now read back.
    None,
    /// Function Level Reset.
    Reset,
}

impl ConfigSpace {
    /// A function as it comes out of reset. `vectors` ≤ 2048; `memory` and `notify`, in bytes, are powers of two, or for `notify` 0.
    pub(crate) fn new(device: u16, vectors: u16, memory: u64, notify: u64) -> Self {
        let (bytes, writable) = (Box::new([0; SIZE]), Box::new([0; SIZE]));
        let mut space = Self { bytes, writable, device, vectors, memory, notify };
        space.reset();
        space
    }

    /// Everything as after a Function Level Reset.
    pub(crate) fn reset(&mut self) {
        self.bytes.fill(0);
        self.writable.fill(0);
        self.set(0x00, id::VENDOR.to_le_bytes());
        self.set(0x02, self.device.to_le_bytes());
        self.allow(COMMAND, (COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE).to_le_bytes());
        self.set(0x06, [STATUS_CAPABILITIES, 0]);
        self.set(0x08, (id::CLASS << 8 | u32::from(id::REVISION)).to_le_bytes());
        self.allow(0x0c, [0xff]); // cache line size: no function, but software expects to find what it wrote
        for (offset, size, kind) in bars(self.memory, self.notify).into_iter().filter(|(_, size, _)| *size != 0) {
            self.set(offset, kind.to_le_bytes());
            let address = !(size - 1);
            self.allow(offset, (address as u32).to_le_bytes());
            if kind != 0 {
                self.allow(offset + 4, ((address >> 32) as u32).to_le_bytes());
            }
        }
        self.set(0x2c, id::VENDOR.to_le_bytes());
        self.set(0x2e, self.device.to_le_bytes());
        self.set(CAPABILITIES, [EXPRESS as u8]);
        self.allow(0x3c, [0xff]); // interrupt line: a scratch byte

        // PCI Express: version 2, endpoint; role-based errors, FLR; 128-byte payload; one lane of 2.5 GT/s, up. Relaxed ordering and no-snoop
        // stay clear.
        self.set(EXPRESS, [0x10, MSIX as u8, 0x02, 0x00]);
        self.set(EXPRESS + 0x04, (1u32 << 28 | 1 << 15).to_le_bytes());
        self.allow(EXPRESS_CONTROL, 0x700fu16.to_le_bytes());
        self.set(EXPRESS + 0x0c, 0x11u32.to_le_bytes());
        self.set(EXPRESS + 0x12, 0x11u16.to_le_bytes());

        let (table, pending) = (bar::MSIX, bar::MSIX_PBA | bar::MSIX);
        self.set(MSIX, [0x11, 0x00]);
        self.set(MSIX_CONTROL, (self.vectors - 1).to_le_bytes());
        self.allow(MSIX_CONTROL, 0xc000u16.to_le_bytes());
        self.set(MSIX + 0x04, table.to_le_bytes());
        self.set(MSIX + 0x08, pending.to_le_bytes());
    }

    /// Reads from `offset`; the range lies within [`SIZE`].
    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) {
        data.copy_from_slice(&self.bytes[offset..offset + data.len()]);
    }

    /// Writes from `offset`; the range lies within [`SIZE`].
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) -> Effect {
        for (at, new) in (offset..).zip(data) {
            self.bytes[at] = self.bytes[at] & !self.writable[at] | new & self.writable[at];
        }
        let flr = EXPRESS_CONTROL + 1;
        let asked = flr.checked_sub(offset).and_then(|at| data.get(at)).is_some_and(|byte| {
            let [_, mask] = EXPRESS_FLR.to_le_bytes();
            byte & mask != 0
        });
        if asked { Effect::Reset } else { Effect::None }
    }

    /// Whether the function may master the bus.
    pub(crate) fn is_master(&self) -> bool {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]]) & COMMAND_MASTER != 0
    }

    fn set<const N: usize>(&mut self, offset: usize, value: [u8; N]) {
        self.bytes[offset..offset + N].copy_from_slice(&value);
    }

    fn allow<const N: usize>(&mut self, offset: usize, mask: [u8; N]) {
        self.writable[offset..offset + N].copy_from_slice(&mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(id::HOST_VM, 128, 16 << 20, 0x2_0000)
    }

    fn word(space: &ConfigSpace, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        space.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn bars_size_themselves() {
        const BARS: [usize; 7] = [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30];
        let mut space = space();
        for offset in BARS {
            space.write(offset, &[0xff; 4]);
        }
        let found = BARS.map(|offset| word(&space, offset));
        assert_eq!(found, [0xffff_0000, 0, 0xff00_000c, 0xffff_ffff, 0xffff_0000, 0xfffe_0000, 0]);
        let mut without = ConfigSpace::new(id::SOC_VM, 8, 16 << 20, 0);
        without.write(0x24, &[0xff; 4]);
        assert_eq!(word(&without, 0x24), 0);
    }

    #[test]
    fn the_capability_list_is_express_then_msix() {
        let space = space();
        assert_eq!(word(&space, CAPABILITIES) & 0xff, 0x40);
        assert_eq!(word(&space, 0x40), 0x0002_8010);
        assert_eq!(word(&space, 0x80), 0x007f_0011);
        assert_eq!((word(&space, 0x84), word(&space, 0x88)), (4, 0x8004));
        assert_eq!(word(&space, 0x08), 0x1200_0001);
    }

    #[test]
    fn flr_is_seen_in_every_width_and_never_read_back() {
        let mut space = space();
        assert_eq!(space.write(0x48, &0x8000u16.to_le_bytes()), Effect::Reset);
        assert_eq!(space.write(0x48, &0x8000u32.to_le_bytes()), Effect::Reset);
        assert_eq!(space.write(0x49, &[0x80]), Effect::Reset);
        assert_eq!(space.write(0x48, &[0xff]), Effect::None);
        assert_eq!(space.write(0x4a, &[0xff; 2]), Effect::None);
        assert_eq!(word(&space, 0x48) & 0x8000, 0);
    }

    #[test]
    fn reset_ends_bus_mastering() {
        let mut space = space();
        assert!(!space.is_master());
        space.write(COMMAND, &0xffffu16.to_le_bytes());
        assert!(space.is_master());
        assert_eq!(word(&space, COMMAND) & 0xffff, 0x0406);
        space.reset();
        assert!(!space.is_master());
    }
}
