//! vCPUs: which, their CPUID, their state, their posted ranges.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Instead of a vCPU's number: every vCPU.
pub const VCPU_ALL: u32 = u32::MAX;
/// Instead of a vCPU's number: the VM (IOAPIC, PIC, PIT, clock).
pub const VM: u32 = u32::MAX - 1;

/// An entry of a CPUID table.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct CpuidEntry {
    /// EAX on input.
    pub function: u32,
    /// ECX on input, where it counts.
    pub index: u32,
    /// 1: the index counts.
    pub flags: u32,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
    /// Reserved, 0.
    pub reserved: u32,
}

/// Which groups of records are read, as bits: bit n is the record type n of [`crate::state`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups;

impl Groups {
    /// Every record that the target has.
    pub const ALL: u64 = u64::MAX;
}

/// Reads state.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct StateRequest {
    /// A vCPU or [`VM`].
    pub target: u32,
    /// Reserved, 0.
    pub reserved: u32,
    /// [`Groups`].
    pub groups: u64,
}

/// Addresses whose writes nobody waits for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct PostedRange {
    /// First address.
    pub base: u64,
    /// Addresses.
    pub len: u64,
    /// 1: ports; 0: memory.
    pub ports: u64,
}
