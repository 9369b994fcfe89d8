//! The tables for firmware: files of fw_cfg, and the script that says how to place them (QEMU's table loader; its
//! hw/acpi/bios-linker-loader.c names the commands).
//!
//! An entry of the script has 128 bytes, little-endian: the command (4), then
//!
//! | command | fields (offset: bytes) |
//! | --- | --- |
//! | 1 allocate | 4: file name (56) · 60: alignment (4) · 64: zone (1): 1 anywhere below 4 GiB, 2 the last 64 KiB below 1 MiB |
//! | 2 add pointer | 4: file with the pointer (56) · 60: file whose address is added to it (56) · 116: offset (4) · 120: its bytes (1) |
//! | 3 add checksum | 4: file (56) · 60: offset of the checksum (4) · 64: first byte (4) · 68: bytes (4) |
//!
//! Firmware skips entries of other commands, zero among them.

use super::blob::{Blob, root_pointer, rsdp};
use super::{AcpiConfig, AcpiError, MAX_CPUS};
use crate::devices::fw_cfg::Builder;
use crate::layout::{ECAM, ECAM_SIZE, PAGE_SIZE};

/// Name of the file with the tables.
pub const TABLES_FILE: &str = "etc/acpi/tables";
/// Name of the file with the RSDP.
pub const RSDP_FILE: &str = "etc/acpi/rsdp";
/// Name of the file with the script.
pub const LOADER_FILE: &str = "etc/table-loader";

const ENTRY_LEN: usize = 128;
const NAME_LEN: usize = 56;

#[derive(Clone, Copy)]
enum Zone {
    High = 1,
    Segment = 2,
}

/// The files' bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirmwareTables {
    /// All tables but the RSDP.
    pub tables: Vec<u8>,
    /// The RSDP.
    pub rsdp: Vec<u8>,
    /// The script.
    pub script: Vec<u8>,
}

impl FirmwareTables {
    /// The files for a machine of `config`.
    ///
    /// # Errors
    /// There are more than [`MAX_CPUS`].
    pub fn new(config: &AcpiConfig) -> Result<Self, AcpiError> {
        let count = config.apic_ids.len();
        if count > MAX_CPUS {
            return Err(AcpiError::TooManyProcessors { count });
        }
        Ok(Self::build(config))
    }

    fn build(config: &AcpiConfig) -> Self {
        let blob = Blob::new(config);
        let mut script = Script::default();
        // Tables need no more than the FACS's 64 bytes; whole pages keep it apart from the rest.
        script.allocate(TABLES_FILE, PAGE_SIZE as u32, Zone::High);
        script.allocate(RSDP_FILE, 16, Zone::Segment);
        for pointer in &blob.pointers {
            script.add_pointer(TABLES_FILE, pointer.at, pointer.len);
        }
        for span in &blob.open {
            script.add_checksum(TABLES_FILE, span.checksum(), span.start, span.len);
        }
        script.add_pointer(RSDP_FILE, rsdp::RSDT as u32, 4);
        script.add_pointer(RSDP_FILE, rsdp::XSDT as u32, 8);
        script.add_checksum(RSDP_FILE, rsdp::CHECKSUM as u32, 0, rsdp::LEN_1 as u32);
        script.add_checksum(RSDP_FILE, rsdp::EXTENDED_CHECKSUM as u32, 0, rsdp::LEN as u32);
        let rsdp = root_pointer(blob.rsdt, blob.xsdt.into());
        Self { tables: blob.bytes, rsdp, script: script.bytes }
    }
}

/// Adds the files to a fw_cfg. They are made when firmware asks for them, of `config` as `update` changes it: by then it has put the
/// configuration space's window where it wants it, and there may be other processors than at the start.
///
/// # Errors
/// There are more than [`MAX_CPUS`].
pub fn add_files(
    builder: Builder,
    config: &AcpiConfig,
    update: impl Fn(&mut AcpiConfig) + Clone + Send + 'static,
) -> Result<Builder, AcpiError> {
    // The tables are longest where there is a window to tell of.
    let mut longest = config.clone();
    if let Some(pci) = &mut longest.pci {
        pci.ecam = Some((ECAM, ECAM_SIZE));
    }
    let longest = FirmwareTables::new(&longest)?;
    let now = {
        let config = config.clone();
        move || {
            let mut config = config.clone();
            update(&mut config);
            FirmwareTables::build(&config)
        }
    };
    let (tables, rsdp, script) = (now.clone(), now.clone(), now);
    Ok(builder
        .made(TABLES_FILE, longest.tables.len(), move || tables().tables)
        .made(RSDP_FILE, longest.rsdp.len(), move || rsdp().rsdp)
        .made(LOADER_FILE, longest.script.len(), move || script().script))
}

#[derive(Default)]
struct Script {
    bytes: Vec<u8>,
}

impl Script {
    fn allocate(&mut self, file: &str, align: u32, zone: Zone) {
        self.entry(1, &[&name(file), &align.to_le_bytes(), &[zone as u8]]);
    }

    /// The tables' address is added to the pointer.
    fn add_pointer(&mut self, file: &str, at: u32, len: u8) {
        self.entry(2, &[&name(file), &name(TABLES_FILE), &at.to_le_bytes(), &[len]]);
    }

    fn add_checksum(&mut self, file: &str, at: u32, start: u32, len: u32) {
        self.entry(3, &[&name(file), &at.to_le_bytes(), &start.to_le_bytes(), &len.to_le_bytes()]);
    }

    fn entry(&mut self, command: u32, fields: &[&[u8]]) {
        let end = self.bytes.len() + ENTRY_LEN;
        self.bytes.extend(command.to_le_bytes());
        self.bytes.extend(fields.concat());
        self.bytes.resize(end, 0);
    }
}

fn name(file: &str) -> [u8; NAME_LEN] {
    let mut name = [0; NAME_LEN];
    name[..file.len()].copy_from_slice(file.as_bytes());
    name
}
