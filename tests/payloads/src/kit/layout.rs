//! Guest-physical memory of a long-mode payload. All of it is mapped one to one.
//!
//! | from | what |
//! | --- | --- |
//! | `0x8000` | the start of the other processors, copied there by the first one |
//! | `0x100000` | the multiboot header, in the multiboot form only |
//! | `0x101000` | 32-bit entry and the original of the code at `0x8000` |
//! | `0x102000` | GDT, IDT, a TSS a vCPU, I/O bitmap, page tables |
//! | `0x10f000` | words that vCPUs share, one a cache line |
//! | `0x111000` | 64-bit code |
//! | `0x120000` | constants |
//! | `0x130000` | stacks, 4 KiB a vCPU |
//! | `0x200000` | free: each payload says what it does with it |

/// Most vCPUs that a payload can bring up.
pub const MAX_VCPUS: u8 = 64;

/// First byte that a payload may use as it likes.
pub const FREE: u32 = 0x20_0000;

pub(crate) const AP_START: u32 = 0x8000;
pub(crate) const START: u32 = 0x10_1000;
pub(crate) const AP_START_ORIGINAL: u32 = START + 0x800;
/// Length of each start.
pub(crate) const START_SIZE: u32 = 0x100;
pub(crate) const GDT: u32 = 0x10_2000;
pub(crate) const IDT: u32 = 0x10_3000;
pub(crate) const TSS: u32 = 0x10_4000;
pub(crate) const IO_BITMAP: u32 = 0x10_6000;
pub(crate) const PAGE_TABLES: u32 = 0x10_9000;
pub(crate) const SHARED: u32 = 0x10_f000;
pub(crate) const CODE: u32 = 0x11_1000;
pub(crate) const DATA: u32 = 0x12_0000;
pub(crate) const STACKS: u32 = 0x13_0000;
pub(crate) const STACK_SIZE: u32 = 0x1000;

/// Distance of one vCPU's TSS to the next.
pub(crate) const TSS_STRIDE: u32 = 0x80;

/// Other vCPUs that have come up.
pub(crate) const ONLINE: u32 = SHARED;
/// The lock around the debug console.
pub(crate) const CONSOLE_LOCK: u32 = SHARED + 0x40;
/// First shared word of the payload itself.
pub(crate) const PAYLOAD_WORDS: u32 = SHARED + 0x80;

/// A payload's `index`-th shared word, alone on its cache line.
pub(crate) const fn word(index: u32) -> u32 {
    PAYLOAD_WORDS + index * 0x40
}

const _: () = assert!(TSS + MAX_VCPUS as u32 * TSS_STRIDE <= IO_BITMAP);
const _: () = assert!(IO_BITMAP + 8192 < PAGE_TABLES);
const _: () = assert!(PAGE_TABLES + 6 * 4096 <= SHARED);
const _: () = assert!(word(1 + MAX_VCPUS as u32) < CODE);
const _: () = assert!(STACKS + MAX_VCPUS as u32 * STACK_SIZE <= FREE);
