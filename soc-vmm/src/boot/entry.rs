//! The state in which a vCPU starts, in plain words of ours: no build of `soc-vmm` follows the architecture it runs on.

/// State of a vCPU's registers before its first instruction. What is not named here has its reset value (Intel SDM volume 3A
/// table 10-1): debug registers, XCR0, MSRs, FPU and vector state, local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// General registers.
    pub regs: Regs,
    /// Segments.
    pub segments: Segments,
    /// Global descriptor table register.
    pub gdt: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idt: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR3; CR2 and CR8 are 0.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// Whether it runs or waits.
    pub start: Start,
}

/// What a vCPU does when it is first entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It runs: the boot processor (KVM: `KVM_MP_STATE_RUNNABLE`).
    Running,
    /// It waits for INIT and SIPI: an application processor (KVM: `KVM_MP_STATE_UNINITIALIZED`).
    WaitForSipi,
}

/// General registers; those that are not named are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Regs {
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RDX.
    pub rdx: u64,
    /// RSI.
    pub rsi: u64,
    /// RIP: offset in the code segment.
    pub rip: u64,
    /// RFLAGS; bit 1 is always set.
    pub rflags: u64,
}

/// The segment registers with their hidden parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// CS.
    pub cs: Segment,
    /// DS, ES, FS, GS and SS.
    pub data: Segment,
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldt: Segment,
}

/// A segment register with its hidden part (Intel SDM volume 3A §3.4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Linear address of its first byte.
    pub base: u64,
    /// Last valid offset, in bytes whatever `granularity` says.
    pub limit: u32,
    /// Visible part.
    pub selector: u16,
    /// Type field, 4 bits.
    pub kind: u8,
    /// S: code or data (true), or system (false).
    pub code_or_data: bool,
    /// L: 64-bit code.
    pub long: bool,
    /// D/B: 32-bit.
    pub default_big: bool,
    /// G: the descriptor's limit counts pages.
    pub granularity: bool,
    /// P. What is not present is unusable. All segments here have privilege level 0.
    pub present: bool,
}

/// A descriptor table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Last valid offset.
    pub limit: u16,
}

/// CR0: protection enable.
pub const CR0_PE: u64 = 1 << 0;
/// CR0: extension type, always set.
pub const CR0_ET: u64 = 1 << 4;
/// CR0: not write-through.
pub const CR0_NW: u64 = 1 << 29;
/// CR0: cache disable.
pub const CR0_CD: u64 = 1 << 30;
/// CR0: paging.
pub const CR0_PG: u64 = 1 << 31;
/// CR4: physical address extension.
pub const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enable.
pub const EFER_LME: u64 = 1 << 8;
/// EFER: long mode active.
pub const EFER_LMA: u64 = 1 << 10;
/// RFLAGS: the bit that is always set.
const RFLAGS_FIXED: u64 = 1 << 1;

/// Type field: code, execute and read, accessed.
const CODE: u8 = 0xb;
/// Type field: data, read and write, accessed.
const DATA: u8 = 0x3;
/// Type field: 32-bit or 64-bit TSS, busy.
const TSS_BUSY: u8 = 0xb;
/// Type field: local descriptor table.
const LDT: u8 = 0x2;

impl Entry {
    /// The state after reset (Intel SDM volume 3A table 10-1): real mode at 0xfffffff0, where firmware starts. `signature` is what
    /// CPUID 1 gives in EAX; the reset state has it in EDX.
    pub fn reset(signature: u32) -> Self {
        let real = Segment {
            base: 0,
            limit: 0xffff,
            selector: 0,
            kind: DATA,
            code_or_data: true,
            long: false,
            default_big: false,
            granularity: false,
            present: true,
        };
        Self {
            regs: Regs { rip: 0xfff0, rdx: signature.into(), rflags: RFLAGS_FIXED, ..Regs::default() },
            segments: Segments {
                cs: Segment { base: 0xffff_0000, selector: 0xf000, kind: CODE, ..real },
                data: real,
                tr: Segment { kind: TSS_BUSY, code_or_data: false, ..real },
                ldt: Segment { kind: LDT, code_or_data: false, ..real },
            },
            gdt: DescriptorTable { base: 0, limit: 0xffff },
            idt: DescriptorTable { base: 0, limit: 0xffff },
            cr0: CR0_CD | CR0_NW | CR0_ET,
            cr3: 0,
            cr4: 0,
            efer: 0,
            start: Start::Running,
        }
    }

    /// The state in which a waking processor starts (ACPI 6.5 §16.3.2): real mode at the FACS's waking vector.
    pub fn waking(signature: u32, vector: u32) -> Self {
        let mut entry = Self::reset(signature);
        entry.regs.rip = (vector & 0xf).into();
        entry.segments.cs.selector = (vector >> 4) as u16;
        entry.segments.cs.base = u64::from(vector & !0xf);
        entry
    }

    /// The state of an application processor: as after reset, and it waits.
    pub fn application_processor(signature: u32) -> Self {
        Self { start: Start::WaitForSipi, ..Self::reset(signature) }
    }

    /// Flat 32-bit protected mode without paging, interrupts off: what PVH and multiboot 1 promise. Its segments are those of
    /// [`super::tables::gdt`].
    pub(super) fn protected(eip: u32, gdt: DescriptorTable) -> Self {
        let code = Segment {
            base: 0,
            limit: u32::MAX,
            selector: super::tables::CODE_SELECTOR,
            kind: CODE,
            code_or_data: true,
            long: false,
            default_big: true,
            granularity: true,
            present: true,
        };
        let reset = Self::reset(0);
        Self {
            regs: Regs { rip: eip.into(), rflags: RFLAGS_FIXED, ..Regs::default() },
            segments: Segments {
                cs: code,
                data: Segment { selector: super::tables::DATA_SELECTOR, kind: DATA, ..code },
                tr: Segment {
                    limit: super::tables::TSS_LIMIT,
                    selector: super::tables::TSS_SELECTOR,
                    ..reset.segments.tr
                },
                ldt: Segment { limit: 0, present: false, ..reset.segments.ldt },
            },
            gdt,
            idt: DescriptorTable::default(),
            cr0: CR0_PE | CR0_ET,
            ..reset
        }
    }

    /// 64-bit mode with the page tables at `cr3`, interrupts off: what Linux's 64-bit boot protocol promises.
    pub(super) fn long(rip: u64, cr3: u64, gdt: DescriptorTable) -> Self {
        let flat = Self::protected(0, gdt);
        let cs = Segment { long: true, default_big: false, ..flat.segments.cs };
        Self {
            regs: Regs { rip, ..flat.regs },
            segments: Segments { cs, ..flat.segments },
            cr0: CR0_PG | CR0_PE | CR0_ET,
            cr3,
            cr4: CR4_PAE,
            efer: EFER_LME | EFER_LMA,
            ..flat
        }
    }
}
