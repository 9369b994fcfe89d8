//! ACPI tables (ACPI 6.5): the platform devices, the interrupt controllers, the processors and their nodes, PCI.
//!
//! The tables are built once, with offsets for addresses, and leave by two ways: placed in guest memory for a kernel that boots without
//! firmware ([`AcpiTables`]), or as files of fw_cfg with a script by which firmware places them ([`FirmwareTables`], [`add_files`]).

use std::collections::BTreeSet;

use acpi_tables::Aml;
use acpi_tables::sdt::Sdt;

use crate::layout::{BIOS_WINDOW, ONE_MIB, PAGE_SIZE};
use blob::{Blob, FACS_PAGE};

mod aml;
mod blob;
mod dmar;
mod dsdt;
mod fadt;
mod loader;
mod madt;
mod mcfg;
mod pci;
mod srat;
#[cfg(test)]
mod tests;

pub use loader::{FirmwareTables, LOADER_FILE, RSDP_FILE, TABLES_FILE, add_files};
pub use pci::{Hotplug, PciConfig, PortConfig};

/// The most vCPUs that the tables describe.
pub const MAX_CPUS: usize = 1024;

const OEM_ID: [u8; 6] = *b"OUTBRD";
const OEM_TABLE_ID: [u8; 8] = *b"OUTBOARD";
const OEM_REVISION: u32 = 1;

/// What the tables tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AcpiConfig {
    /// APIC ID of each vCPU that there can be, the boot processor first; the index is its ACPI processor UID.
    pub apic_ids: Vec<u32>,
    /// vCPUs that are not there yet: indices into `apic_ids`. The tables are as long with as without them.
    pub absent: BTreeSet<usize>,
    /// How many serial ports there are: of COM1 to COM4 the first so many.
    pub serial_ports: u8,
    /// Whether the i8042's keyboard port is there (I/O 0x60 and 0x64, IRQ 1).
    pub keyboard: bool,
    /// Whether fw_cfg is there.
    pub fw_cfg: bool,
    /// Whether pvpanic is there.
    pub pvpanic: bool,
    /// PCI; none: there is none.
    pub pci: Option<PciConfig>,
    /// Whether there is an Intel IOMMU. Then there are no 8259s.
    pub iommu: bool,
    /// NUMA nodes; none: nothing is told of them.
    pub numa: Vec<NumaNode>,
}

/// A NUMA node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NumaNode {
    /// Its processors: indices into [`AcpiConfig::apic_ids`].
    pub processors: Vec<usize>,
    /// Its memory: first address, bytes.
    pub memory: Vec<(u64, u64)>,
    /// How far it is to each node, 10 being here; 20 for those of which nothing is said.
    pub distances: Vec<u8>,
}

/// The tables with their guest-physical addresses: the RSDP where guests look for it below 1 MiB, the FACS in a page of its own,
/// the rest behind it.
#[derive(Clone, Debug)]
pub struct AcpiTables {
    rsdp: Vec<u8>,
    nvs: u64,
    facs: Vec<u8>,
    start: u64,
    tables: Vec<u8>,
}

impl AcpiTables {
    /// Builds the tables so that they end before `end`, the end of low RAM.
    ///
    /// # Errors
    /// They don't fit between 1 MiB and `end`, or there are more than [`MAX_CPUS`].
    pub fn new(config: &AcpiConfig, end: u64) -> Result<Self, AcpiError> {
        if config.apic_ids.len() > MAX_CPUS {
            return Err(AcpiError::TooManyProcessors { count: config.apic_ids.len() });
        }
        let blob = Blob::new(config);
        let need = (blob.bytes.len() as u64).next_multiple_of(PAGE_SIZE);
        let nvs = (end & !(PAGE_SIZE - 1)).checked_sub(need).filter(|nvs| *nvs >= ONE_MIB);
        let nvs = nvs.ok_or(AcpiError::NoRoom { need, end })?;
        let rsdp = blob::placed_root_pointer(&blob, nvs);
        let mut facs = blob.placed(nvs);
        let tables = facs.split_off(FACS_PAGE as usize);
        Ok(Self { rsdp, nvs, facs, start: nvs + FACS_PAGE, tables })
    }

    /// No tables, in a machine whose low RAM ends at `end`.
    pub fn none(end: u64) -> Self {
        Self { rsdp: Vec::new(), nvs: end, facs: Vec::new(), start: end, tables: Vec::new() }
    }

    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        self.rsdp.is_empty()
    }

    /// Address of the RSDP; 0: there is none.
    pub fn rsdp(&self) -> u64 {
        if self.is_none() { 0 } else { BIOS_WINDOW }
    }

    /// Where the page of the FACS begins (AddressRangeNVS).
    pub fn nvs(&self) -> u64 {
        self.nvs
    }

    /// Where the tables begin (AddressRangeACPI).
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Everything, with its address.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let all = [(self.rsdp(), &self.rsdp[..]), (self.nvs, &self.facs), (self.start, &self.tables)];
        all.into_iter().filter(|(_, bytes)| !bytes.is_empty())
    }
}

/// Why there are no tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// More vCPUs than the tables describe.
    #[error("{count} vCPUs are more than the {MAX_CPUS} that the ACPI tables can describe: give the guest fewer")]
    TooManyProcessors {
        /// vCPUs asked for.
        count: usize,
    },
    /// RAM ends too early.
    #[error("the guest's memory ends at {end:#x} and has no room for {need} bytes of ACPI tables: give it more memory")]
    NoRoom {
        /// Bytes needed above 1 MiB.
        need: u64,
        /// First address behind low RAM.
        end: u64,
    },
}

/// A system description table of `body` behind its header.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    const HEADER_LEN: u32 = 36;
    let mut table = Sdt::new(signature, HEADER_LEN, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table.as_slice().to_vec()
}

fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}
