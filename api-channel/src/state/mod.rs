//! x86 guest state as records: what KVM keeps, in a form of our own.
//!
//! A list of records, each: type (u16), version (u16), length of the payload (u32), payload padded with zeros to 8 bytes. They
//! stand in the order in which they must be set; readers skip types that they don't know only where the writer marked them so
//! (bit 15 of the type). Reserved fields are 0.
//!
//! Order of setting, of a vCPU: SREGS (paging and APIC base first), XCRS (before the XSAVE area that depends on them), XSAVE, REGS,
//! DEBUG, LAPIC (before the MSRs: the TSC deadline needs the timer's mode), MSRS (TSC deadline last), TSC (says more exactly what the MSR says),
//! MP_STATE, EVENTS. Of the VM: PIC, IOAPIC, PIT, CLOCK.

mod chips;
mod cpu;

pub use chips::{Clock, IoApic, Pic, Pit, PitChannel};
pub use cpu::{DebugRegs, Events, Lapic, MpState, Msr, Regs, Segment, Sregs, Table, Tsc, Xcr};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::codec::Malformed;

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Type(pub u16);

impl Type {
    /// [`Regs`].
    pub const REGS: Self = Self(1);
    /// [`Sregs`].
    pub const SREGS: Self = Self(2);
    /// List of [`Xcr`].
    pub const XCRS: Self = Self(3);
    /// XSAVE area, standard format, Intel SDM vol. 1 §13.4, as long as CPUID leaf 0xd says.
    pub const XSAVE: Self = Self(4);
    /// [`DebugRegs`].
    pub const DEBUG: Self = Self(5);
    /// [`Lapic`].
    pub const LAPIC: Self = Self(6);
    /// List of [`Msr`].
    pub const MSRS: Self = Self(7);
    /// [`MpState`].
    pub const MP_STATE: Self = Self(8);
    /// [`Events`].
    pub const EVENTS: Self = Self(9);
    /// [`Tsc`]; there where KVM tells it.
    pub const TSC: Self = Self(10);
    /// [`Pic`], both chips.
    pub const PIC: Self = Self(16);
    /// [`IoApic`].
    pub const IOAPIC: Self = Self(17);
    /// [`Pit`].
    pub const PIT: Self = Self(18);
    /// [`Clock`].
    pub const CLOCK: Self = Self(19);

    /// The bit of [`crate::call::Groups`] that asks for it.
    #[must_use]
    pub fn group(self) -> u64 {
        1 << (self.0 & 63)
    }
}

/// Bit 15 of a type: whoever doesn't know it may skip it.
pub const OPTIONAL: u16 = 1 << 15;

/// A record, borrowed from the list it stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// What it holds.
    pub kind: Type,
    /// Version of the payload's layout.
    pub version: u16,
    /// The payload, without padding.
    pub payload: &'a [u8],
}

/// Writes a list of records.
#[derive(Clone, Debug, Default)]
pub struct Records(Vec<u8>);

impl Records {
    /// Appends a record of fixed size.
    #[must_use]
    pub fn put<T: IntoBytes + Immutable>(self, kind: Type, record: &T) -> Self {
        self.bytes(kind, record.as_bytes())
    }

    /// Appends a list record.
    #[must_use]
    pub fn list<T: IntoBytes + Immutable>(self, kind: Type, records: &[T]) -> Self {
        self.bytes(kind, records.as_bytes())
    }

    /// Appends a record of bytes.
    #[must_use]
    pub fn bytes(mut self, kind: Type, payload: &[u8]) -> Self {
        let head = u64::from(kind.0) | 1 << 16 | (payload.len() as u64) << 32;
        self.0.extend_from_slice(&head.to_le_bytes());
        self.0.extend_from_slice(payload);
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        self
    }

    /// The list.
    #[must_use]
    pub fn done(self) -> Vec<u8> {
        self.0
    }
}

/// Reads a list of records, in order.
///
/// # Errors
/// It ends within a record, or padding is not 0.
pub fn records(mut list: &[u8]) -> Result<Vec<Record<'_>>, Malformed> {
    let mut found = Vec::new();
    while let Some((head, rest)) = list.split_first_chunk::<8>() {
        let head = u64::from_le_bytes(*head);
        let len = (head >> 32) as usize;
        let padded = len.next_multiple_of(8);
        if padded > rest.len() || rest[len..padded].iter().any(|&b| b != 0) {
            return Err(Malformed);
        }
        found.push(Record { kind: Type(head as u16), version: (head >> 16) as u16, payload: &rest[..len] });
        list = &rest[padded..];
    }
    if list.is_empty() { Ok(found) } else { Err(Malformed) }
}

impl Record<'_> {
    /// The payload as the one record it should be.
    ///
    /// # Errors
    /// Another version, or another size.
    pub fn get<T: FromBytes>(&self) -> Result<T, Malformed> {
        if self.version != 1 {
            return Err(Malformed);
        }
        T::read_from_bytes(self.payload).map_err(|_| Malformed)
    }

    /// The payload as a list.
    ///
    /// # Errors
    /// Another version, or not a whole number of records.
    pub fn get_list<T: FromBytes>(&self) -> Result<Vec<T>, Malformed> {
        let size = size_of::<T>();
        if self.version != 1 || !self.payload.len().is_multiple_of(size) {
            return Err(Malformed);
        }
        self.payload.chunks_exact(size).map(|c| T::read_from_bytes(c).map_err(|_| Malformed)).collect()
    }
}
