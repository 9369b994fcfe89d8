//! A function's configuration space (PCI Express Base §7.5; PCI Local Bus 3.0 §6): 4096 bytes, of which a guest may write some, clear
//! some, and only read the rest.

use serde::{Deserialize, Serialize};

use super::bar::{Bar, Space};
use crate::persist::Hex;

/// Bytes of a function's configuration space.
pub const CONFIG_SIZE: usize = 4096;

/// Offsets within the header.
pub mod header {
    /// Command (2 bytes).
    pub const COMMAND: u16 = 0x04;
    /// Status (2 bytes).
    pub const STATUS: u16 = 0x06;
    /// Header type.
    pub const TYPE: u16 = 0x0e;
    /// The first BAR.
    pub const BAR0: u16 = 0x10;
    /// Type 0: subsystem vendor and device.
    pub const SUBSYSTEM: u16 = 0x2c;
    /// Where the list of capabilities begins.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line, which only software uses.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt pin: 1 is INTA.
    pub const INTERRUPT_PIN: u16 = 0x3d;
    /// Where the extended capabilities begin.
    pub const EXTENDED: u16 = 0x100;
}

/// Bits of the command register.
pub mod command {
    /// I/O windows answer.
    pub const IO: u16 = 1 << 0;
    /// Memory windows answer.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may use DMA and send MSIs.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// INTx is held low.
    pub const INTX_DISABLE: u16 = 1 << 10;
    /// What software may write: the four above, parity error response and SERR#.
    pub(super) const WRITABLE: u16 = IO | MEMORY | BUS_MASTER | 1 << 6 | 1 << 8 | INTX_DISABLE;
}

/// Status: INTx is asserted.
const STATUS_INTERRUPT: u16 = 1 << 3;
/// Status: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Capability: PCI Express.
pub const CAP_EXPRESS: u8 = 0x10;

/// Who a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass, programming interface, as `0xccsspp`.
    pub class: u32,
    /// Subsystem vendor and subsystem.
    pub subsystem: (u16, u16),
}

/// A function's configuration space.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    data: Box<[u8; CONFIG_SIZE]>,
    /// What it is after a reset.
    initial: Box<[u8; CONFIG_SIZE]>,
    /// Bits that a guest writes.
    writable: Box<[u8; CONFIG_SIZE]>,
    /// Bits that a guest clears by writing ones.
    clearable: Box<[u8; CONFIG_SIZE]>,
    /// Bits that the device itself changes, whatever the guest may do with them.
    owned: Box<[u8; CONFIG_SIZE]>,
    bars: [Option<Bar>; 6],
    /// Where the next capability goes, and where the pointer to it is.
    next: u16,
    link: u16,
    /// The same of extended capabilities.
    next_extended: u16,
    link_extended: u16,
}

/// A configuration space's bytes, without the zeros at their end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState(Hex);

impl ConfigSpace {
    /// A function with a type 0 header.
    pub fn endpoint(identity: &Identity) -> Self {
        let mut config = Self::with_header(identity);
        config.set_u16(header::SUBSYSTEM, identity.subsystem.0);
        config.set_u16(header::SUBSYSTEM + 2, identity.subsystem.1);
        config
    }

    /// A bridge, with a type 1 header; its windows are 32-bit I/O and memory, 64-bit prefetchable memory.
    pub fn bridge(identity: &Identity) -> Self {
        let mut config = Self::with_header(identity);
        config.set(header::TYPE, &[1]);
        // Bus numbers; I/O base and limit (32-bit); secondary status; memory; prefetchable (64-bit); bridge control.
        config.allow(0x18, &[0xff; 3]);
        config.set(0x1c, &[1, 1]);
        config.allow(0x1c, &[0xf0, 0xf0]);
        config.allow(0x20, &[0xf0, 0xff, 0xf0, 0xff]);
        config.set(0x24, &[1, 0, 1, 0]);
        config.allow(0x24, &[0xf0, 0xff, 0xf0, 0xff]);
        config.allow(0x28, &[0xff; 12]);
        config.allow(0x3e, &[0x43, 0]);
        config
    }

    fn with_header(identity: &Identity) -> Self {
        let zero = || Box::new([0; CONFIG_SIZE]);
        let mut config = Self {
            data: zero(),
            initial: zero(),
            writable: zero(),
            clearable: zero(),
            owned: zero(),
            bars: [None; 6],
            next: 0x40,
            link: header::CAPABILITIES,
            next_extended: header::EXTENDED,
            link_extended: 0,
        };
        config.set_u16(0, identity.vendor);
        config.set_u16(2, identity.device);
        let class = identity.class << 8 | u32::from(identity.revision);
        config.set(8, &class.to_le_bytes());
        config.allow(header::COMMAND, &command::WRITABLE.to_le_bytes());
        // Master data parity, signalled and received aborts, SERR#, parity error.
        config.allow_clear(header::STATUS, &0xf900u16.to_le_bytes());
        config.own(header::STATUS, &STATUS_INTERRUPT.to_le_bytes());
        // Cache line size.
        config.allow(0x0c, &[0xff]);
        config.allow(header::INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Gives the function interrupt pin INTA.
    #[must_use]
    pub fn with_pin(mut self) -> Self {
        self.set(header::INTERRUPT_PIN, &[1]);
        self
    }

    /// Says that the slot has more functions than this one.
    pub(super) fn set_multifunction(&mut self) {
        let kind = self.data[usize::from(header::TYPE)] | 0x80;
        self.set(header::TYPE, &[kind]);
    }

    /// Puts `bytes` at `offset`, now and after each reset.
    pub fn set(&mut self, offset: u16, bytes: &[u8]) {
        let at = usize::from(offset);
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
        self.initial[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Puts `value` at `offset`, now and after each reset.
    pub fn set_u16(&mut self, offset: u16, value: u16) {
        self.set(offset, &value.to_le_bytes());
    }

    /// Lets a guest write the bits of `mask`.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        let at = usize::from(offset);
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Lets a guest clear the bits of `mask` by writing ones.
    pub fn allow_clear(&mut self, offset: u16, mask: &[u8]) {
        let at = usize::from(offset);
        self.clearable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Says that the device itself changes the bits of `mask` ([`ConfigSpace::put`]), beside those that a guest can change.
    pub fn own(&mut self, offset: u16, mask: &[u8]) {
        let at = usize::from(offset);
        self.owned[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Adds BAR `index`; a 64-bit one takes the next index too.
    ///
    /// # Panics
    /// The index is none, or taken: a mistake in a device's table.
    pub fn add_bar(&mut self, index: usize, bar: Bar) {
        let wide = bar.space == Space::Memory64;
        assert!(index + usize::from(wide) < 6 && self.bars[index].is_none(), "BAR {index} can't be had");
        assert!(bar.size.is_power_of_two() && bar.size >= 16, "a BAR of {} bytes", bar.size);
        let at = header::BAR0 + 4 * index as u16;
        let mask = !(bar.size - 1);
        self.set(at, &bar.flags().to_le_bytes());
        self.allow(at, &(mask as u32).to_le_bytes());
        if wide {
            self.allow(at + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        self.bars[index] = Some(bar);
    }

    /// Adds a capability of `body` behind its two bytes, of which a guest may write the bits of `writable`; its offset.
    ///
    /// # Panics
    /// There is no more room: a mistake in a device's table.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.next;
        let end = usize::from(at) + 2 + body.len();
        assert!(end <= usize::from(header::EXTENDED), "no room for capability {id:#x}");
        self.set(self.link, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        self.link = at + 1;
        self.next = end.next_multiple_of(4) as u16;
        let status = u16::from_le_bytes([self.data[6], self.data[7]]) | STATUS_CAPABILITIES;
        self.set_u16(header::STATUS, status);
        at
    }

    /// Adds an extended capability of `body` behind its header; its offset.
    ///
    /// # Panics
    /// There is no more room: a mistake in a device's table.
    pub fn add_extended(&mut self, id: u16, version: u8, body: &[u8]) -> u16 {
        let at = self.next_extended;
        let end = usize::from(at) + 4 + body.len();
        assert!(end <= CONFIG_SIZE, "no room for extended capability {id:#x}");
        if self.link_extended != 0 {
            let link = usize::from(self.link_extended) + 2;
            let version = u16::from(self.data[link]) & 0xf;
            self.set_u16(link as u16, at << 4 | version);
        }
        self.set(at, &(u32::from(version) << 16 | u32::from(id)).to_le_bytes());
        self.set(at + 4, body);
        self.link_extended = at;
        self.next_extended = end.next_multiple_of(4) as u16;
        at
    }

    /// Reads `len` bytes, 1–4, from `offset`; zeros from the end on.
    pub fn read(&self, offset: u16, len: u8) -> u32 {
        let mut value = [0; 4];
        let from = self.data.iter().skip(offset.into()).take(len.into());
        for (to, byte) in value.iter_mut().zip(from) {
            *to = *byte;
        }
        u32::from_le_bytes(value)
    }

    /// A guest's write of the low `len` bytes, 1–4, of `value` at `offset`.
    pub fn write(&mut self, offset: u16, len: u8, value: u32) {
        for (at, byte) in (usize::from(offset)..CONFIG_SIZE).zip(value.to_le_bytes()).take(len.into()) {
            let kept = self.data[at] & !(byte & self.clearable[at]);
            self.data[at] = kept & !self.writable[at] | byte & self.writable[at];
        }
    }

    /// The device's own write, until the next reset: of bits that a guest can change, or that the device owns ([`ConfigSpace::own`]).
    pub fn put(&mut self, offset: u16, bytes: &[u8]) {
        let at = usize::from(offset);
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Two bytes at `offset`.
    pub fn u16(&self, offset: u16) -> u16 {
        self.read(offset, 2) as u16
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.u16(header::COMMAND)
    }

    /// Shows in the status register whether INTx is asserted; whether the pin is to be high.
    pub fn show_interrupt(&mut self, asserted: bool) -> bool {
        let status = self.u16(header::STATUS) & !STATUS_INTERRUPT;
        let status = if asserted { status | STATUS_INTERRUPT } else { status };
        self.put(header::STATUS, &status.to_le_bytes());
        asserted && self.command() & command::INTX_DISABLE == 0
    }

    /// The BARs with where they are, whether or not the command register lets them answer.
    pub fn bars(&self) -> impl Iterator<Item = (usize, Bar, u64)> {
        self.bars.iter().enumerate().filter_map(|(index, bar)| {
            let bar = (*bar)?;
            let at = header::BAR0 + 4 * index as u16;
            let low = u64::from(self.read(at, 4));
            let high = if bar.space == Space::Memory64 { u64::from(self.read(at + 4, 4)) } else { 0 };
            Some((index, bar, (high << 32 | low) & !(bar.size - 1)))
        })
    }

    /// As after power on.
    pub fn reset(&mut self) {
        *self.data = *self.initial;
    }

    /// Takes the state.
    pub fn save(&self) -> ConfigState {
        ConfigState(Hex::trimmed(&*self.data))
    }

    /// Puts a state back; whether it can be this function's: what neither the guest nor the device can change must be the same. What the
    /// device's own words say is for the device to judge.
    #[must_use]
    pub fn restore(&mut self, state: &ConfigState) -> bool {
        let Some(data) = state.0.padded::<CONFIG_SIZE>() else { return false };
        let changeable = |at: usize| self.writable[at] | self.clearable[at] | self.owned[at];
        let same = (0..CONFIG_SIZE).all(|at| (data[at] ^ self.initial[at]) & !changeable(at) == 0);
        if same {
            *self.data = data;
        }
        same
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity =
        Identity { vendor: 0x8086, device: 0x2918, revision: 2, class: 0x06_0100, subsystem: (0x1af4, 0x1100) };

    #[test]
    fn the_header_is_where_it_belongs() {
        let config = ConfigSpace::endpoint(&IDENTITY).with_pin();
        assert_eq!(config.read(0, 4), 0x2918_8086);
        assert_eq!(config.read(8, 4), 0x0601_0002);
        assert_eq!(config.read(0x2c, 4), 0x1100_1af4);
        assert_eq!(config.read(0x3c, 4), 0x100);
        assert_eq!(config.read(4094, 4), 0);
    }

    #[test]
    fn a_bar_tells_its_size() {
        let mut config = ConfigSpace::endpoint(&IDENTITY);
        config.add_bar(0, Bar { space: Space::Memory32, size: 0x1000, prefetchable: false });
        config.add_bar(1, Bar { space: Space::Io, size: 0x20, prefetchable: false });
        config.add_bar(2, Bar { space: Space::Memory64, size: 1 << 33, prefetchable: true });
        for bar in 0..6 {
            config.write(header::BAR0 + 4 * bar, 4, u32::MAX);
        }
        let sizes: Vec<_> = (0..6).map(|bar| config.read(header::BAR0 + 4 * bar, 4)).collect();
        assert_eq!(sizes, [0xffff_f000, 0xffff_ffe1, 0xc, 0xffff_fffe, 0, 0]);
        config.write(0x10, 4, 0xfe00_0123);
        config.write(0x1c, 1, 0x6);
        config.write(0x18, 4, 0);
        config.write(0x1d, 1, 0);
        config.write(0x1e, 2, 0);
        let bars: Vec<_> = config.bars().map(|(index, _, base)| (index, base)).collect();
        assert_eq!(bars, [(0, 0xfe00_0000), (1, 0xffff_ffe0), (2, 0x6_0000_0000)]);
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut config = ConfigSpace::endpoint(&IDENTITY);
        assert_eq!(config.u16(header::STATUS), 0);
        let first = config.add_capability(0x11, &[1, 2, 3], &[0, 0xff]);
        let second = config.add_capability(0x05, &[0; 10], &[]);
        assert_eq!(config.u16(header::STATUS), STATUS_CAPABILITIES);
        assert_eq!((config.read(0x34, 1), config.u16(first), config.u16(second)), (0x40, 0x4811, 0x0005));
        config.write(first + 2, 4, u32::MAX);
        assert_eq!(config.read(first + 2, 3), 0x03_ff01);
        config.reset();
        assert_eq!(config.read(first + 2, 3), 0x03_0201);
        let first = config.add_extended(1, 2, &[0; 8]);
        let second = config.add_extended(0x1e, 1, &[0; 4]);
        assert_eq!((config.read(first, 4), config.read(second, 4)), (0x10c2_0001, 0x0001_001e));
    }

    #[test]
    fn status_bits_are_cleared_by_ones() {
        let mut config = ConfigSpace::endpoint(&IDENTITY);
        config.put(header::STATUS, &[0, 0xff]);
        config.write(header::STATUS, 2, 0x8000);
        assert_eq!(config.u16(header::STATUS), 0x7f00);
        assert!(!config.show_interrupt(false));
        assert!(config.show_interrupt(true));
        assert_eq!(config.u16(header::STATUS), 0x7f08);
        config.write(header::COMMAND, 2, 0xffff);
        assert!(!config.show_interrupt(true));
        assert_eq!(config.command(), command::WRITABLE);
    }

    #[test]
    fn a_state_of_another_function_is_refused() {
        let mut config = ConfigSpace::endpoint(&IDENTITY);
        config.write(header::COMMAND, 2, 7);
        assert!(config.show_interrupt(true));
        let state = config.save();
        assert!(serde_json::to_string(&state).unwrap().starts_with("\"8680182907000800"));
        config.reset();
        assert!(config.restore(&state));
        assert_eq!((config.command(), config.u16(header::STATUS)), (7, STATUS_INTERRUPT));
        let mut other = ConfigSpace::endpoint(&Identity { device: 1, ..IDENTITY });
        assert!(!other.restore(&state));
        // A capability that is not there, a byte too much, none at all.
        let with = |at: usize, byte| {
            let mut bytes = state.0.0.clone();
            bytes.resize(bytes.len().max(at + 1), 0);
            bytes[at] = byte;
            ConfigState(Hex(bytes))
        };
        for wrong in [with(0x40, 5), with(CONFIG_SIZE - 1, 1), with(CONFIG_SIZE, 0), ConfigState(Hex::default())] {
            assert!(!config.restore(&wrong));
        }
        assert!(config.restore(&with(0x3c, 11)));
        assert_eq!(config.command(), 7);
    }
}
