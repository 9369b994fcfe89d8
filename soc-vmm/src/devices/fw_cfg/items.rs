//! Keys and encodings of what SeaBIOS and OVMF read.

/// Keys of items that have no name (QEMU include/standard-headers/linux/qemu_fw_cfg.h has the same numbers).
pub mod key {
    /// `QEMU`.
    pub const SIGNATURE: u16 = 0x00;
    /// Which interfaces there are.
    pub const ID: u16 = 0x01;
    /// The machine's UUID.
    pub const UUID: u16 = 0x02;
    /// Bytes of RAM, 8 bytes.
    pub const RAM_SIZE: u16 = 0x03;
    /// No display, 2 bytes.
    pub const NO_GRAPHIC: u16 = 0x04;
    /// Processors that start, 2 bytes.
    pub const CPUS: u16 = 0x05;
    /// NUMA nodes: their number, the node of each APIC ID, the bytes of each, 8 bytes each.
    pub const NUMA: u16 = 0x0d;
    /// Whether firmware shows a menu, 2 bytes.
    pub const BOOT_MENU: u16 = 0x0e;
    /// One more than the largest APIC ID, 2 bytes.
    pub const MAX_CPUS: u16 = 0x0f;
    /// The directory of files.
    pub const DIRECTORY: u16 = 0x19;
    /// The first file's key.
    pub const FIRST_FILE: u16 = 0x20;
    /// The PIT is at GSI 2, 4 bytes.
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
}

/// The ID: the data port, and DMA.
pub(super) const INTERFACES: u32 = 1 | 1 << 1;

/// What a range of the memory map is for (ACPI 6.5 table 15.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum E820Kind {
    /// RAM.
    Ram = 1,
    /// To be left alone.
    Reserved = 2,
}

/// A range of the memory map. Firmware adds its own, the legacy windows for instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// What it is for.
    pub kind: E820Kind,
}

/// `etc/e820`: 20 bytes a range.
pub(super) fn e820(map: &[E820Entry]) -> Vec<u8> {
    let entry = |entry: &E820Entry| {
        [&entry.start.to_le_bytes()[..], &entry.len.to_le_bytes(), &(entry.kind as u32).to_le_bytes()].concat()
    };
    map.iter().flat_map(entry).collect()
}

/// `etc/system-states`: for S0 to S5 whether the machine has it (bit 7), and its SLP_TYP.
pub(super) fn system_states(s5: u8) -> Vec<u8> {
    const HAS: u8 = 1 << 7;
    vec![HAS, 0, 0, 0, 0, HAS | s5]
}

/// The NUMA item. `nodes_of`: the node of each APIC ID from 0 on.
pub(super) fn numa(nodes_of: &[u32], sizes: &[u64]) -> Vec<u8> {
    let words = std::iter::once(sizes.len() as u64).chain(nodes_of.iter().map(|&node| node.into()));
    words.chain(sizes.iter().copied()).flat_map(u64::to_le_bytes).collect()
}
