//! What ACPI tells of PCI.

use crate::layout::{IO_APIC, ONE_MIB};

/// Addresses above these bits are no window's, whatever the processor has: guests don't map them.
const WINDOW_BITS: u8 = 46;
const GIB: u64 = 1 << 30;

/// The PCI host bridge and what is behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciConfig {
    /// First byte behind the RAM below 4 GiB.
    pub low_end: u64,
    /// First byte behind the RAM above 4 GiB; 4 GiB if there is none.
    pub high_end: u64,
    /// Configuration space in memory: base, bytes.
    pub ecam: Option<(u64, u64)>,
    /// The guest's physical address bits.
    pub physical_bits: u8,
    /// Root ports.
    pub ports: Vec<PortConfig>,
    /// Who tells the guest of what is plugged in.
    pub hotplug: Hotplug,
}

/// A root port with a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// Slot × 8 + function on bus 0.
    pub devfn: u8,
    /// The number of its slot, which the user knows.
    pub slot: u16,
}

/// Who tells the guest of what is plugged in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hotplug {
    /// The root ports themselves (PCI Express Base §6.7): `_OSC` grants it.
    #[default]
    Native,
    /// ACPI ([`crate::devices::PciHotplug`]): `_OSC` keeps the ports' own from the guest.
    Acpi,
}

/// Configuration space in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ecam {
    pub(super) base: u64,
    pub(super) len: u64,
}

impl Ecam {
    pub(super) fn last_bus(&self) -> u8 {
        (self.len / ONE_MIB).clamp(1, 256).wrapping_sub(1) as u8
    }

    fn end(&self) -> u64 {
        self.base + self.len
    }
}

impl PciConfig {
    /// Configuration space in memory, if it is where 32-bit windows are: a guest may put it anywhere.
    pub(super) fn ecam(&self) -> Option<Ecam> {
        let (base, len) = self.ecam?;
        let end = base.checked_add(len)?;
        (len >= ONE_MIB && base >= self.low_end && end <= IO_APIC).then_some(Ecam { base, len })
    }

    pub(super) fn last_bus(&self) -> u8 {
        self.ecam().map_or(u8::MAX, |ecam| ecam.last_bus())
    }

    /// Windows below 4 GiB: first and last address.
    pub(super) fn low_windows(&self) -> impl Iterator<Item = (u32, u32)> {
        let all = match self.ecam() {
            Some(ecam) => [(self.low_end, ecam.base), (ecam.end(), IO_APIC)],
            None => [(self.low_end, IO_APIC), (0, 0)],
        };
        all.into_iter().filter(|(start, end)| start < end).map(|(start, end)| (start as u32, (end - 1) as u32))
    }

    /// The window above 4 GiB, likewise.
    pub(super) fn high_window(&self) -> Option<(u64, u64)> {
        let start = self.high_end.next_multiple_of(GIB);
        let end = 1 << self.physical_bits.min(WINDOW_BITS);
        (start < end).then(|| (start, end - 1))
    }
}
