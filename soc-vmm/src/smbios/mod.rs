//! SMBIOS (DMTF DSP0134 3.x): what inventories and licences read about the machine.
//!
//! Firmware takes the structures and an entry point from fw_cfg, puts them where it likes, and adds a structure about itself (type 0).
//! A kernel without firmware finds the 64-bit entry point in the last 64 KiB below 1 MiB (§5.2.2), the structures behind it.

mod structure;
mod tables;
#[cfg(test)]
mod tests;

use crate::devices::fw_cfg::Builder;
use crate::layout::{MemoryLayout, ONE_MIB};

/// Where the entry point of a kernel without firmware is.
pub const SMBIOS_START: u64 = 0xf_0000;
const ROOM: usize = (ONE_MIB - SMBIOS_START) as usize;

/// Bytes of the 64-bit entry point (§5.2.2), and where its parts are.
const ENTRY_LEN: usize = 24;
const CHECKSUM: usize = 5;
const ADDRESS: usize = 16;
/// Where the structures begin behind it.
const TABLE: usize = 32;
/// The version of the specification whose structures these are.
const VERSION: [u8; 3] = [3, 0, 0];

/// What the structures tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmbiosConfig {
    /// The machine's UUID, as it is written.
    pub uuid: [u8; 16],
    /// The machine's names.
    pub system: SystemNames,
    /// The processors.
    pub processors: Processors,
    /// RAM.
    pub memory: MemoryLayout,
}

/// Names of a machine (§7.2). Empty ones are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemNames {
    /// Who made it.
    pub manufacturer: String,
    /// What it is.
    pub product: String,
    /// Which version of that.
    pub version: String,
    /// Its serial number.
    pub serial: String,
    /// What it is sold as.
    pub sku: String,
    /// What kind of machine it is.
    pub family: String,
}

impl Default for SystemNames {
    fn default() -> Self {
        Self {
            manufacturer: "Outboard".into(),
            product: "Outboard VM".into(),
            version: "q35".into(),
            serial: String::new(),
            sku: String::new(),
            family: String::new(),
        }
    }
}

/// The processors of a machine, one as the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Processors {
    /// Sockets.
    pub sockets: u16,
    /// Cores of a socket.
    pub cores: u16,
    /// Threads of a socket, all cores together.
    pub threads: u16,
    /// CPUID leaf 1: EAX, EDX.
    pub signature: [u32; 2],
    /// CPUID's vendor.
    pub manufacturer: String,
    /// CPUID's brand.
    pub version: String,
}

/// Structures and entry point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Smbios {
    structures: Vec<u8>,
}

/// The structures need more room than there is below 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "SMBIOS would need {need} bytes for that many sockets, and has {ROOM}: give the guest fewer sockets of more cores"
)]
pub struct SmbiosError {
    /// Bytes needed.
    need: usize,
}

impl Smbios {
    /// What firmware is given.
    ///
    /// # Errors
    /// There are too many sockets.
    pub fn for_firmware(config: &SmbiosConfig) -> Result<Self, SmbiosError> {
        Self::new(tables::structures(config, false))
    }

    /// What a kernel without firmware finds.
    ///
    /// # Errors
    /// There are too many sockets.
    pub fn for_kernel(config: &SmbiosConfig) -> Result<Self, SmbiosError> {
        Self::new(tables::structures(config, true))
    }

    fn new(structures: Vec<u8>) -> Result<Self, SmbiosError> {
        let need = TABLE + structures.len();
        if need > ROOM { Err(SmbiosError { need }) } else { Ok(Self { structures }) }
    }

    /// Adds the files that firmware reads.
    #[must_use]
    pub fn add_files(&self, builder: Builder) -> Builder {
        builder
            .file("etc/smbios/smbios-anchor", self.entry_point(0))
            .file("etc/smbios/smbios-tables", self.structures.clone())
    }

    /// Everything, for [`SMBIOS_START`].
    pub fn placed(&self) -> Vec<u8> {
        let mut bytes = self.entry_point(SMBIOS_START + TABLE as u64).to_vec();
        bytes.resize(TABLE, 0);
        bytes.extend_from_slice(&self.structures);
        bytes
    }

    /// The entry point of structures at `address`.
    fn entry_point(&self, address: u64) -> [u8; ENTRY_LEN] {
        const ENTRY_REVISION: u8 = 1;
        let mut bytes = [0; ENTRY_LEN];
        bytes[..5].copy_from_slice(b"_SM3_");
        bytes[6] = ENTRY_LEN as u8;
        bytes[7..10].copy_from_slice(&VERSION);
        bytes[10] = ENTRY_REVISION;
        bytes[12..16].copy_from_slice(&(self.structures.len() as u32).to_le_bytes());
        bytes[ADDRESS..].copy_from_slice(&address.to_le_bytes());
        bytes[CHECKSUM] = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
        bytes
    }
}
