//! The tables of 64-bit mode as bytes (Intel SDM volume 3, chapters 3, 5, 6, 8).
//!
//! Accessed and dirty bits, and the accessed bits of descriptors, are set beforehand: a processor that finds them set
//! writes nothing, so a dirty log shows the payload's own stores alone.

use super::layout::{self, MAX_VCPUS, TSS_STRIDE};

/// Selectors, in the order that SYSRET wants them.
pub(super) const KERNEL_CODE: u16 = 0x10;
pub(super) const KERNEL_DATA: u16 = 0x18;
pub(super) const USER_DATA: u16 = 0x28 | 3;
pub(super) const USER_CODE: u16 = 0x30 | 3;
pub(super) const FIRST_TSS: u16 = 0x40;

const BITMAP_BYTES: usize = 8192;

/// The global descriptor table, with a TSS descriptor a vCPU.
pub(super) fn gdt() -> Vec<u8> {
    let flat = |access: u64, flags: u64| 0x000f_0000_0000_ffff | access << 40 | flags << 52;
    let mut table = vec![0u64; 8];
    table[usize::from(KERNEL_CODE) / 8] = flat(0x9b, 0xa);
    table[usize::from(KERNEL_DATA) / 8] = flat(0x93, 0xc);
    table[usize::from(USER_DATA) / 8] = flat(0xf3, 0xc);
    table[usize::from(USER_CODE) / 8] = flat(0xfb, 0xa);
    for vcpu in 0..u32::from(MAX_VCPUS) {
        let base = u64::from(layout::TSS + vcpu * TSS_STRIDE);
        // The bitmap is one for all, and ends with the byte of ones that the processor may read past its last.
        let limit = u64::from(bitmap_offset(vcpu)) + BITMAP_BYTES as u64;
        table.push(limit & 0xffff | (base & 0xff_ffff) << 16 | 0x89 << 40 | (limit >> 16) << 48 | (base >> 24) << 56);
        table.push(base >> 32);
    }
    table.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// All task-state segments: where an interrupt at CPL3 finds its stack, and where the I/O bitmap is.
pub(super) fn tss() -> Vec<u8> {
    let mut bytes = vec![0; usize::from(MAX_VCPUS) * TSS_STRIDE as usize];
    for (vcpu, tss) in (0u32..).zip(bytes.chunks_exact_mut(TSS_STRIDE as usize)) {
        tss[4..12].copy_from_slice(&u64::from(stack_top(vcpu)).to_le_bytes());
        tss[0x66..0x68].copy_from_slice(&bitmap_offset(vcpu).to_le_bytes());
    }
    bytes
}

/// The I/O permission bitmap that opens every port to CPL3, and its closing byte of ones.
pub(super) fn io_bitmap() -> Vec<u8> {
    let mut bytes = vec![0; BITMAP_BYTES];
    bytes.push(0xff);
    bytes
}

/// The interrupt descriptor table, all gates present and reachable from CPL3's interrupts.
pub(super) fn idt(handlers: &[u64; 256]) -> Vec<u8> {
    let gate = |handler: u64| {
        let low = handler & 0xffff | u64::from(KERNEL_CODE) << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        [low, handler >> 32]
    };
    handlers.iter().flat_map(|&handler| gate(handler)).flat_map(u64::to_le_bytes).collect()
}

/// Four levels that map the first 4 GiB one to one by 2 MiB pages, for CPL3 too.
pub(super) fn page_tables() -> Vec<u8> {
    const PRESENT_WRITABLE_USER_ACCESSED: u64 = 0x27;
    const DIRTY_LARGE: u64 = 0xc0;
    let table = |index: u64| u64::from(layout::PAGE_TABLES) + index * 4096;

    let mut entries = vec![0u64; 6 * 512];
    entries[0] = table(1) | PRESENT_WRITABLE_USER_ACCESSED;
    for directory in 0..4 {
        entries[512 + directory as usize] = table(2 + directory) | PRESENT_WRITABLE_USER_ACCESSED;
    }
    for (page, entry) in (0u64..).zip(&mut entries[1024..]) {
        *entry = page << 21 | PRESENT_WRITABLE_USER_ACCESSED | DIRTY_LARGE;
    }
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// The stack of a vCPU grows down from here.
pub(super) fn stack_top(vcpu: u32) -> u32 {
    layout::STACKS + (vcpu + 1) * layout::STACK_SIZE
}

fn bitmap_offset(vcpu: u32) -> u16 {
    (layout::IO_BITMAP - layout::TSS - vcpu * TSS_STRIDE) as u16
}
