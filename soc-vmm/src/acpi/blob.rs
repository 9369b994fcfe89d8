//! Tables behind each other, with offsets where addresses belong: whoever places them adds where they begin.

use acpi_tables::facs::FACS;

use super::{AcpiConfig, OEM_ID, bytes_of, dmar, dsdt, fadt, madt, mcfg, srat, table};
use crate::layout::PAGE_SIZE;

/// Where the FACS ends: it has a page of its own, which stays when the tables' memory is freed.
pub(super) const FACS_PAGE: u64 = PAGE_SIZE;

/// A system description table's checksum (ACPI 6.5 §5.2.6).
const CHECKSUM: usize = 9;
const HEADER_LEN: usize = 36;

/// The tables, and what is left to do once their address is known.
#[derive(Clone, Debug)]
pub(super) struct Blob {
    /// FACS first.
    pub(super) bytes: Vec<u8>,
    /// Where addresses are.
    pub(super) pointers: Vec<Pointer>,
    /// Tables whose checksum is wrong (its byte is zero) until the addresses are right.
    pub(super) open: Vec<Span>,
    /// Offsets.
    pub(super) rsdt: u32,
    pub(super) xsdt: u32,
}

/// A little-endian offset into the tables, to become an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pointer {
    pub(super) at: u32,
    /// 4 or 8.
    pub(super) len: u8,
}

/// A range of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: u32,
    pub(super) len: u32,
}

impl Span {
    /// Where the checksum is of the table here.
    pub(super) fn checksum(&self) -> u32 {
        self.start + CHECKSUM as u32
    }
}

impl Blob {
    pub(super) fn new(config: &AcpiConfig) -> Self {
        let mut blob = Self { bytes: bytes_of(&FACS::new()), pointers: Vec::new(), open: Vec::new(), rsdt: 0, xsdt: 0 };
        let facs = 0;
        blob.bytes.resize(FACS_PAGE as usize, 0);
        let dsdt = blob.add(&dsdt::build(config), &[]);
        let mut tables = vec![
            blob.add(&fadt::build(config, facs, dsdt), &fadt::POINTERS),
            blob.add(&madt::build(config), &[]),
            blob.add(&emulated_devices(), &[]),
        ];
        if let Some(ecam) = config.pci.as_ref().and_then(|pci| pci.ecam()) {
            tables.push(blob.add(&mcfg::build(ecam), &[]));
        }
        if config.iommu {
            tables.push(blob.add(&dmar::build(), &[]));
        }
        if !config.numa.is_empty() {
            tables.push(blob.add(&srat::build(config), &[]));
            tables.push(blob.add(&srat::distances(config), &[]));
        }
        let entries = |len: u8| {
            let at = |n: usize| (HEADER_LEN + n * usize::from(len), len);
            (0..tables.len()).map(at).collect::<Vec<_>>()
        };
        let wide: Vec<u8> = tables.iter().flat_map(|&at| u64::from(at).to_le_bytes()).collect();
        let narrow: Vec<u8> = tables.iter().flat_map(|&at| at.to_le_bytes()).collect();
        blob.rsdt = blob.add(&table(*b"RSDT", 1, &narrow), &entries(4));
        blob.xsdt = blob.add(&table(*b"XSDT", 1, &wide), &entries(8));
        blob
    }

    /// Appends a table in which `pointers` (offset, bytes) are offsets into the blob, and gives its offset.
    fn add(&mut self, table: &[u8], pointers: &[(usize, u8)]) -> u32 {
        const ALIGN: usize = 64;
        let start = self.bytes.len().next_multiple_of(ALIGN);
        self.bytes.resize(start, 0);
        self.bytes.extend_from_slice(table);
        let start = start as u32;
        if !pointers.is_empty() {
            let span = Span { start, len: table.len() as u32 };
            self.bytes[span.checksum() as usize] = 0;
            self.open.push(span);
        }
        self.pointers.extend(pointers.iter().map(|&(at, len)| Pointer { at: start + at as u32, len }));
        start
    }

    /// The tables as they are at guest-physical `base`, below 4 GiB.
    pub(super) fn placed(&self, base: u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for &Pointer { at, len } in &self.pointers {
            add_base(&mut bytes[at as usize..][..len.into()], base);
        }
        for span in &self.open {
            let table = &bytes[span.start as usize..][..span.len as usize];
            bytes[span.checksum() as usize] = checksum(table);
        }
        bytes
    }
}

/// WAET (Windows ACPI Emulated Devices Table 1.0): one read of the PM timer is right, so that Windows need not read it thrice.
fn emulated_devices() -> Vec<u8> {
    const PM_TIMER_GOOD: u32 = 1 << 1;
    table(*b"WAET", 1, &PM_TIMER_GOOD.to_le_bytes())
}

/// Adds `base` to a little-endian number.
fn add_base(number: &mut [u8], base: u64) {
    let mut wide = [0; 8];
    wide[..number.len()].copy_from_slice(number);
    let sum = u64::from_le_bytes(wide).wrapping_add(base).to_le_bytes();
    number.copy_from_slice(&sum[..number.len()]);
}

/// The byte that makes the sum of `bytes` zero, if it goes where a zero is.
pub(super) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// Offsets in the RSDP.
pub(super) mod rsdp {
    pub(in crate::acpi) const CHECKSUM: usize = 8;
    pub(in crate::acpi) const RSDT: usize = 16;
    pub(in crate::acpi) const XSDT: usize = 24;
    pub(in crate::acpi) const EXTENDED_CHECKSUM: usize = 32;
    /// What the first checksum is of.
    pub(in crate::acpi) const LEN_1: usize = 20;
    pub(in crate::acpi) const LEN: usize = 36;
}

/// The RSDP (§5.2.5.3) without its checksums.
pub(super) fn root_pointer(rsdt: u32, xsdt: u64) -> Vec<u8> {
    const REVISION: u8 = 2;
    let len = rsdp::LEN as u32;
    [
        &b"RSD PTR "[..],
        &[0],
        &OEM_ID,
        &[REVISION],
        &rsdt.to_le_bytes(),
        &len.to_le_bytes(),
        &xsdt.to_le_bytes(),
        &[0; 4],
    ]
    .concat()
}

/// The RSDP of tables at guest-physical `base`.
pub(super) fn placed_root_pointer(blob: &Blob, base: u64) -> Vec<u8> {
    let mut bytes = root_pointer((base + u64::from(blob.rsdt)) as u32, base + u64::from(blob.xsdt));
    bytes[rsdp::CHECKSUM] = checksum(&bytes[..rsdp::LEN_1]);
    bytes[rsdp::EXTENDED_CHECKSUM] = checksum(&bytes);
    bytes
}
