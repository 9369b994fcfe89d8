//! Descriptor table and page tables for the first instructions of a kernel.

use super::entry::{DescriptorTable, Segment, Segments};
use crate::layout::boot_data;

/// Selector of the code segment: Linux's `__BOOT_CS`.
pub(super) const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segments: Linux's `__BOOT_DS`.
pub(super) const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task register.
pub(super) const TSS_SELECTOR: u16 = 0x20;
/// Limit of the task state segment, the least that the processor accepts. Nothing ever switches to it.
pub(super) const TSS_LIMIT: u32 = 0x67;

/// Entries: null, unused, code, data, and a TSS descriptor, which has two slots in 64-bit mode.
const GDT_ENTRIES: usize = 6;
/// Value of the GDT register for [`gdt`].
pub(super) const GDT_REGISTER: DescriptorTable =
    DescriptorTable { base: boot_data::GDT, limit: GDT_ENTRIES as u16 * 8 - 1 };

/// The descriptor table that `segments` were loaded from; it goes to [`boot_data::GDT`].
pub(super) fn gdt(segments: &Segments) -> [u8; GDT_ENTRIES * 8] {
    let mut table = [0; GDT_ENTRIES * 8];
    for segment in [&segments.cs, &segments.data, &segments.tr] {
        let at = usize::from(segment.selector);
        table[at..at + 8].copy_from_slice(&descriptor(segment).to_le_bytes());
    }
    table
}

/// A segment descriptor (Intel SDM volume 3A figure 3-8).
fn descriptor(segment: &Segment) -> u64 {
    let limit = u64::from(if segment.granularity { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.kind) | u64::from(segment.code_or_data) << 4 | u64::from(segment.present) << 7;
    let flags =
        u64::from(segment.long) << 1 | u64::from(segment.default_big) << 2 | u64::from(segment.granularity) << 3;
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// Page directories: one for each GiB below 4 GiB.
const DIRECTORIES: usize = 4;
/// Bytes of the page tables.
const PAGE_TABLES_LEN: usize = (2 + DIRECTORIES) * 4096;
const _: () = assert!(boot_data::PAGE_TABLES + PAGE_TABLES_LEN as u64 <= boot_data::CMDLINE);

/// Page tables that map the first 4 GiB to themselves by 2 MiB pages (1 GiB pages are not on every CPU); they go to
/// [`boot_data::PAGE_TABLES`].
pub(super) fn page_tables() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let page = |index: usize| boot_data::PAGE_TABLES + index as u64 * 4096;
    let mut words = vec![0u64; PAGE_TABLES_LEN / 8];
    words[0] = page(1) | PRESENT_WRITABLE;
    for directory in 0..DIRECTORIES {
        words[512 + directory] = page(2 + directory) | PRESENT_WRITABLE;
    }
    for (index, word) in words[2 * 512..].iter_mut().enumerate() {
        *word = (index as u64) << 21 | LARGE | PRESENT_WRITABLE;
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::entry::Entry;

    /// Looks `linear` up as the processor does.
    fn translate(tables: &[u8], linear: u64) -> Option<u64> {
        let word = |table: u64, index: u64| {
            let at = usize::try_from(table - boot_data::PAGE_TABLES + index * 8).unwrap();
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let mut table = boot_data::PAGE_TABLES;
        for shift in [39, 30, 21] {
            let entry = word(table, linear >> shift & 0x1ff);
            if entry & 1 == 0 {
                return None;
            }
            if entry & 1 << 7 != 0 {
                return Some((entry & !0x1f_ffff) | (linear & 0x1f_ffff));
            }
            table = entry & !0xfff;
        }
        None
    }

    #[test]
    fn the_first_four_gib_are_mapped_to_themselves() {
        let tables = page_tables();
        for linear in [0, 0x1000, 0x9_1234, 0x100_0000, 0x7fff_ffff, 0xfee0_0000, 0xffff_ffff] {
            assert_eq!(translate(&tables, linear), Some(linear));
        }
        assert_eq!(translate(&tables, 1 << 32), None);
    }

    #[test]
    fn descriptors_are_those_that_linux_asks_for() {
        let protected = gdt(&Entry::protected(0, GDT_REGISTER).segments);
        let word =
            |table: &[u8], selector: u16| u64::from_le_bytes(table[usize::from(selector)..][..8].try_into().unwrap());
        assert_eq!(word(&protected, CODE_SELECTOR), 0x00cf_9b00_0000_ffff);
        assert_eq!(word(&protected, DATA_SELECTOR), 0x00cf_9300_0000_ffff);
        assert_eq!(word(&protected, TSS_SELECTOR), 0x0000_8b00_0000_0067);
        let long = gdt(&Entry::long(0, 0, GDT_REGISTER).segments);
        assert_eq!(word(&long, CODE_SELECTOR), 0x00af_9b00_0000_ffff);
    }
}
