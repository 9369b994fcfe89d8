//! ACPI tables (ACPI 6.5) of a machine that boots without firmware: they describe the platform devices, the interrupt controllers and
//! the processors. PCI comes with its own tables.

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::layout::{BIOS_WINDOW, ONE_MIB, PAGE_SIZE};

mod dsdt;
mod fadt;
mod madt;
#[cfg(test)]
mod tests;

/// The most vCPUs that the tables describe.
pub const MAX_CPUS: usize = 1024;

const OEM_ID: [u8; 6] = *b"OUTBRD";
const OEM_TABLE_ID: [u8; 8] = *b"OUTBOARD";
const OEM_REVISION: u32 = 1;

/// What the tables tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// APIC ID of each vCPU, the boot processor first; the index is its ACPI processor UID.
    pub apic_ids: Vec<u32>,
    /// How many serial ports there are: of COM1 to COM4 the first so many.
    pub serial_ports: u8,
    /// Whether the i8042's keyboard port is there (I/O 0x60 and 0x64, IRQ 1).
    pub keyboard: bool,
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
        // Lengths don't depend on addresses, so that a dry run tells how long everything is.
        let need = Self::build(config, 0).1.len() as u64;
        let pages = need.next_multiple_of(PAGE_SIZE);
        let start = (end & !(PAGE_SIZE - 1)).checked_sub(pages).filter(|start| *start >= ONE_MIB + PAGE_SIZE);
        let start = start.ok_or(AcpiError::NoRoom { need: pages + PAGE_SIZE, end })?;
        let (xsdt, tables) = Self::build(config, start);
        Ok(Self {
            rsdp: bytes_of(&Rsdp::new(OEM_ID, xsdt)),
            nvs: start - PAGE_SIZE,
            facs: bytes_of(&FACS::new()),
            start,
            tables,
        })
    }

    /// Address of the RSDP.
    pub fn rsdp(&self) -> u64 {
        BIOS_WINDOW
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
        [(self.rsdp(), &self.rsdp[..]), (self.nvs, &self.facs), (self.start, &self.tables)].into_iter()
    }

    /// The tables from `start` on, the FACS lying one page before; and where the XSDT is.
    fn build(config: &AcpiConfig, start: u64) -> (u64, Vec<u8>) {
        let mut block = Block { start, bytes: Vec::new() };
        let dsdt = block.add(&dsdt::build(config));
        let fadt = block.add(&bytes_of(&fadt::build(config, start.wrapping_sub(PAGE_SIZE), dsdt)));
        let madt = block.add(&madt::build(config));
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        xsdt.add_entry(fadt);
        xsdt.add_entry(madt);
        let xsdt = block.add(&bytes_of(&xsdt));
        (xsdt, block.bytes)
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

/// Tables behind each other.
struct Block {
    start: u64,
    bytes: Vec<u8>,
}

impl Block {
    /// Appends a table and gives its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        const ALIGN: usize = 64;
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        let at = self.start + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        at
    }
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
