//! What a VMM loads: kernels for direct boot, and firmware.

mod elf;

/// A 32-bit flat program in guest RAM, in the forms that a VMM boots directly.
#[derive(Debug, Clone)]
pub struct Kernel {
    load_address: u32,
    entry: u32,
    memory_end: u32,
    bytes: Vec<u8>,
}

impl Kernel {
    /// Bytes that [`Kernel::multiboot`] puts before the program.
    const MULTIBOOT_HEADER_SPACE: u32 = 0x1000;

    pub(crate) fn new(load_address: u32, entry: u32, memory_end: u32) -> Self {
        Kernel { load_address, entry, memory_end, bytes: Vec::new() }
    }

    /// Puts bytes at an address; places come in ascending order and do not overlap.
    pub(crate) fn place(&mut self, address: u32, bytes: &[u8]) {
        let offset = (address - self.load_address) as usize;
        assert!(self.bytes.len() <= offset, "{address:#x} is taken");
        self.bytes.resize(offset, 0);
        self.bytes.extend(bytes);
        assert!(
            self.bytes.len() <= (self.memory_end - self.load_address) as usize,
            "{address:#x} runs out of its memory"
        );
    }

    /// Guest-physical address of the first byte.
    pub fn load_address(&self) -> u32 {
        self.load_address
    }

    /// Where execution begins, in 32-bit protected mode with flat segments and paging off.
    pub fn entry(&self) -> u32 {
        self.entry
    }

    /// What lies at [`Kernel::load_address`]; up to [`Kernel::memory_end`] the rest is zero.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// First address behind what the program needs.
    pub fn memory_end(&self) -> u32 {
        self.memory_end
    }

    /// ELF64 with the note of the PVH entry (Xen's x86/HVM direct boot ABI).
    pub fn pvh_elf(&self) -> Vec<u8> {
        elf::pvh(self)
    }

    /// Multiboot 1, §3.1.3: a flat image whose header carries the addresses.
    pub fn multiboot(&self) -> Vec<u8> {
        const MAGIC: u32 = 0x1bad_b002;
        const HEADER_HAS_ADDRESSES: u32 = 1 << 16;
        let load = self.load_address - Self::MULTIBOOT_HEADER_SPACE;
        let header = [
            MAGIC,
            HEADER_HAS_ADDRESSES,
            0u32.wrapping_sub(MAGIC).wrapping_sub(HEADER_HAS_ADDRESSES),
            load,
            load,
            self.load_address + self.bytes.len() as u32,
            self.memory_end,
            self.entry,
        ];
        let mut file: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.resize(Self::MULTIBOOT_HEADER_SPACE as usize, 0);
        file.extend(&self.bytes);
        file
    }
}

/// A 64 KiB firmware image: it ends at 4 GiB, and is seen at 0xf0000 too.
#[derive(Debug, Clone)]
pub struct Firmware {
    bytes: Vec<u8>,
}

impl Firmware {
    /// Length of the image in bytes.
    pub const SIZE: usize = 0x1_0000;
    /// Its real-mode segment below 1 MiB.
    pub(crate) const SEGMENT: u16 = 0xf000;
    /// Offset of the first instruction that a processor fetches after reset.
    pub(crate) const RESET_VECTOR: u64 = 0xfff0;

    pub(crate) fn new(code: &[u8], reset: &[u8]) -> Self {
        let reset_vector = Self::RESET_VECTOR as usize;
        assert!(code.len() <= reset_vector);
        let mut bytes = vec![0; Self::SIZE];
        bytes[..code.len()].copy_from_slice(code);
        bytes[reset_vector..reset_vector + reset.len()].copy_from_slice(reset);
        Firmware { bytes }
    }

    /// The image as a file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
