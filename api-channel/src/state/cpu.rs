//! State of a vCPU.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// General registers, Intel SDM vol. 1 §3.4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Regs {
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// RSI.
    pub rsi: u64,
    /// RDI.
    pub rdi: u64,
    /// RSP.
    pub rsp: u64,
    /// RBP.
    pub rbp: u64,
    /// R8–R15.
    pub r8_r15: [u64; 8],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Segment {
    /// Base.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Selector.
    pub selector: u16,
    /// Type (bits 0–3), S (4), DPL (5–6), P (7), AVL (8), L (9), D/B (10), G (11), unusable (12).
    pub attributes: u16,
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Table {
    /// Base.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u64,
}

/// Segments, control registers, paging: KVM's SREGS2.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Sregs {
    /// CS.
    pub cs: Segment,
    /// DS.
    pub ds: Segment,
    /// ES.
    pub es: Segment,
    /// FS.
    pub fs: Segment,
    /// GS.
    pub gs: Segment,
    /// SS.
    pub ss: Segment,
    /// TR.
    pub tr: Segment,
    /// LDTR.
    pub ldt: Segment,
    /// GDTR.
    pub gdt: Table,
    /// IDTR.
    pub idt: Table,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8.
    pub cr8: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// Bit 0: the PDPTRs below count.
    pub flags: u64,
    /// PDPTRs of PAE paging.
    pub pdptrs: [u64; 4],
}

/// An extended control register.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Xcr {
    /// Its number.
    pub number: u64,
    /// Its value.
    pub value: u64,
}

/// Debug registers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct DebugRegs {
    /// DR0–DR3.
    pub addresses: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
}

/// The local APIC's register page, Intel SDM vol. 3 table 11-1: 64 registers at 16-byte steps.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Lapic {
    /// The page's first 1024 bytes.
    pub registers: [u8; 1024],
}

/// A model-specific register.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// Reserved, 0.
    pub reserved: u32,
    /// Its value.
    pub value: u64,
}

/// Whether a vCPU runs at all.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct MpState {
    /// 0 runnable, 1 uninitialized (waits for INIT and SIPI), 2 INIT received, 3 halted, 4 SIPI received: KVM api.rst §4.38.
    pub state: u64,
}

impl MpState {
    /// Runs.
    pub const RUNNABLE: Self = Self { state: 0 };
    /// Waits to be started by another vCPU.
    pub const UNINITIALIZED: Self = Self { state: 1 };
}

/// Pending exceptions, interrupts and NMIs: KVM api.rst §4.31.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Events {
    /// Exception: injected, number, has error code, pending.
    pub exception: [u8; 4],
    /// Its error code.
    pub error_code: u32,
    /// Interrupt: injected, number, soft, shadow.
    pub interrupt: [u8; 4],
    /// NMI: injected, pending, masked, 0.
    pub nmi: [u8; 4],
    /// Vector of a SIPI.
    pub sipi_vector: u32,
    /// Which fields count: KVM_VCPUEVENT_VALID_*.
    pub flags: u32,
    /// SMI: smm, pending, smm inside NMI, latched INIT.
    pub smi: [u8; 4],
    /// Triple fault pending, exception has payload, 0, 0.
    pub more: [u8; 4],
    /// The exception's payload.
    pub payload: u64,
}

const _: () = assert!(size_of::<Regs>() == 144 && size_of::<Segment>() == 16 && size_of::<Sregs>() == 256);
const _: () = assert!(size_of::<Events>() == 40 && size_of::<DebugRegs>() == 48 && size_of::<Lapic>() == 1024);

/// How a vCPU's TSC stands to its host's.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Tsc {
    /// What is added to the host's, modulo 2⁶⁴ (KVM_VCPU_TSC_OFFSET).
    pub offset: u64,
}
