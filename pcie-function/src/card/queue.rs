//! The DMA queue's wire form (docs/card.md §4): descriptors and done records, both in SoC memory.

use core::mem::offset_of;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The fewest entries a ring may have.
pub const ENTRIES_MIN: u32 = 2;
/// The most entries a ring may have.
pub const ENTRIES_MAX: u32 = 4096;
/// Alignment of both rings, in bytes.
pub const RING_ALIGN: u64 = 64;
/// The most bytes one descriptor copies.
pub const LENGTH_MAX: u32 = 16 << 20;
/// The most bytes that are stored as one line: ascending words, the last after all others.
pub const LINE: usize = 64;

/// Descriptor flags.
pub mod flag {
    /// Raise SoC vector 1 behind the done record.
    pub const INTERRUPT: u16 = 1 << 0;
    /// Done only if the descriptor before it was.
    pub const LINKED: u16 = 1 << 1;
    /// All that are defined.
    pub const ALL: u16 = INTERRUPT | LINKED;
}

/// One work item of the DMA queue, as it stands in the submission ring: 64 bytes (docs/card.md §4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Descriptor {
    opcode: U16,
    flags: U16,
    generation: U32,
    host: U64,
    soc: U64,
    length: U32,
    vector: U32,
    reserved: [U64; 3],
    sequence: U64,
}

const _: () = {
    assert!(size_of::<Descriptor>() == 64);
    assert!(offset_of!(Descriptor, flags) == 0x02);
    assert!(offset_of!(Descriptor, generation) == 0x04);
    assert!(offset_of!(Descriptor, host) == 0x08);
    assert!(offset_of!(Descriptor, soc) == 0x10);
    assert!(offset_of!(Descriptor, length) == 0x18);
    assert!(offset_of!(Descriptor, vector) == 0x1c);
    assert!(offset_of!(Descriptor, reserved) == 0x20);
    assert!(offset_of!(Descriptor, sequence) == 0x38);
};

/// What a descriptor asks for, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// SoC memory → host memory.
    ToHost(Transfer),
    /// Host memory → SoC memory.
    FromHost(Transfer),
    /// An MSI-X vector of the host function.
    RaiseVector(u32),
}

/// The two addresses of a transfer, and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// IOVA in the host function's domain.
    pub host: u64,
    /// IOVA in the SoC function's domain.
    pub soc: u64,
    /// Bytes, 1 to [`LENGTH_MAX`].
    pub length: u32,
}

const TO_HOST: u16 = 1;
const FROM_HOST: u16 = 2;
const RAISE_VECTOR: u16 = 3;

impl Descriptor {
    /// Encodes `operation` with [`flag`] bits, the generation it belongs to, and a sequence that is not 0.
    pub fn new(operation: Operation, flags: u16, generation: u32, sequence: u64) -> Self {
        let (opcode, copy, vector) = match operation {
            Operation::ToHost(copy) => (TO_HOST, copy, 0),
            Operation::FromHost(copy) => (FROM_HOST, copy, 0),
            Operation::RaiseVector(vector) => (RAISE_VECTOR, Transfer { host: 0, soc: 0, length: 0 }, vector),
        };
        Self {
            opcode: opcode.into(),
            flags: flags.into(),
            generation: generation.into(),
            host: copy.host.into(),
            soc: copy.soc.into(),
            length: copy.length.into(),
            vector: vector.into(),
            reserved: [U64::ZERO; 3],
            sequence: sequence.into(),
        }
    }

    /// Checks every field; `vectors` is how many the host function has. `None`: the descriptor is [`status::MALFORMED`].
    pub fn operation(&self, vectors: u32) -> Option<Operation> {
        let reserved_clear = self.reserved == [U64::ZERO; 3] && self.flags.get() & !flag::ALL == 0;
        if !reserved_clear || self.sequence.get() == 0 {
            return None;
        }
        let copy = Transfer { host: self.host.get(), soc: self.soc.get(), length: self.length.get() };
        let vector = self.vector.get();
        match self.opcode.get() {
            TO_HOST | FROM_HOST => {
                let bytes = u64::from(copy.length.checked_sub(1)?);
                let in_range = copy.length <= LENGTH_MAX
                    && copy.host.checked_add(bytes).is_some()
                    && copy.soc.checked_add(bytes).is_some();
                if !in_range || vector != 0 {
                    return None;
                }
                Some(if self.opcode.get() == TO_HOST { Operation::ToHost(copy) } else { Operation::FromHost(copy) })
            }
            RAISE_VECTOR if copy == (Transfer { host: 0, soc: 0, length: 0 }) && vector < vectors => {
                Some(Operation::RaiseVector(vector))
            }
            _ => None,
        }
    }

    /// The [`flag`] bits, unknown ones too.
    pub fn flags(&self) -> u16 {
        self.flags.get()
    }

    /// The generation under which it was submitted.
    pub fn generation(&self) -> u32 {
        self.generation.get()
    }

    /// The driver's number for it.
    pub fn sequence(&self) -> u64 {
        self.sequence.get()
    }
}

/// How a descriptor ended, as it stands in the done ring: 32 bytes (docs/card.md §4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Done {
    status: U32,
    transferred: U32,
    fault: U64,
    reserved: U64,
    sequence: U64,
}

const _: () = {
    assert!(size_of::<Done>() == 32);
    assert!(offset_of!(Done, transferred) == 0x04);
    assert!(offset_of!(Done, fault) == 0x08);
    assert!(offset_of!(Done, reserved) == 0x10);
    assert!(offset_of!(Done, sequence) == 0x18);
};

impl Done {
    /// Encodes a record: a [`status`], bytes transferred, the IOVA that faulted (else 0), the descriptor's sequence.
    pub fn new(status: u32, transferred: u32, fault: u64, sequence: u64) -> Self {
        Self {
            status: status.into(),
            transferred: transferred.into(),
            fault: fault.into(),
            reserved: U64::ZERO,
            sequence: sequence.into(),
        }
    }

    /// One of [`status`]. The peer's word: it may be anything.
    pub fn status(&self) -> u32 {
        self.status.get()
    }

    /// Bytes that reached their destination.
    pub fn transferred(&self) -> u32 {
        self.transferred.get()
    }

    /// The IOVA that faulted, else 0.
    pub fn fault(&self) -> u64 {
        self.fault.get()
    }

    /// The sequence of the descriptor that this record answers.
    pub fn sequence(&self) -> u64 {
        self.sequence.get()
    }

    /// Whether reserved words are clear.
    pub fn is_well_formed(&self) -> bool {
        self.reserved == U64::ZERO && self.status.get() <= status::SKIPPED
    }
}

/// Values of [`Done::status`].
pub mod status {
    /// Carried out.
    pub const OK: u32 = 0;
    /// A field is illegal; nothing was done.
    pub const MALFORMED: u32 = 1;
    /// Of another generation than the card's.
    pub const STALE: u32 = 2;
    /// A host IOVA isn't mapped for this direction.
    pub const HOST_FAULT: u32 = 3;
    /// A SoC IOVA isn't mapped for this direction.
    pub const SOC_FAULT: u32 = 4;
    /// The link to the host is down, or the host function removed.
    pub const LINK_DOWN: u32 = 5;
    /// The host function's Bus Master Enable is clear.
    pub const NOT_MASTER: u32 = 6;
    /// Ended midway.
    pub const ABORTED: u32 = 7;
    /// Linked to one that did not end in [`OK`].
    pub const SKIPPED: u32 = 8;
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;

    const VECTORS: u32 = 128;

    /// `tests/golden/card/NAME.hex`: bytes in hex, `#` starts a comment.
    fn golden(text: &str) -> Vec<u8> {
        let digits: String =
            text.lines().flat_map(|line| line.split('#').next()).flat_map(str::split_whitespace).collect();
        assert!(digits.len().is_multiple_of(2), "odd number of hex digits");
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hex")).collect()
    }

    fn to_host() -> Descriptor {
        let copy = Transfer { host: 0x1_2345_6780, soc: 0x40_0010_0000, length: 0x1040 };
        Descriptor::new(Operation::ToHost(copy), flag::LINKED, 7, 0x0102_0304_0506_0708)
    }

    #[test]
    fn descriptors_have_their_golden_bytes() {
        let from_host = Transfer { host: 0xfee0, soc: 0x9000, length: 8 };
        let cases = [
            (include_str!("../../../tests/golden/card/descriptor-to-host.hex"), to_host()),
            (
                include_str!("../../../tests/golden/card/descriptor-from-host.hex"),
                Descriptor::new(Operation::FromHost(from_host), flag::INTERRUPT, u32::MAX, 1),
            ),
            (
                include_str!("../../../tests/golden/card/descriptor-raise-vector.hex"),
                Descriptor::new(Operation::RaiseVector(127), flag::INTERRUPT | flag::LINKED, 1, u64::MAX),
            ),
        ];
        for (text, descriptor) in cases {
            let bytes = golden(text);
            assert_eq!(bytes, descriptor.as_bytes());
            let read = Descriptor::read_from_bytes(&bytes).expect("64 bytes");
            let operation = read.operation(VECTORS).expect("well-formed");
            assert_eq!(Descriptor::new(operation, read.flags(), read.generation(), read.sequence()), descriptor);
        }
    }

    #[test]
    fn done_records_have_their_golden_bytes() {
        let cases = [
            (include_str!("../../../tests/golden/card/done-ok.hex"), Done::new(status::OK, 0x1040, 0, 0x55)),
            (
                include_str!("../../../tests/golden/card/done-host-fault.hex"),
                Done::new(status::HOST_FAULT, 0x1000, 0x1_2345_7000, 0x0102_0304_0506_0708),
            ),
        ];
        for (text, done) in cases {
            let bytes = golden(text);
            assert_eq!(bytes, done.as_bytes());
            assert_eq!(Done::read_from_bytes(&bytes).expect("32 bytes"), done);
            assert!(done.is_well_formed());
        }
    }

    #[test]
    fn zeroed_memory_is_no_descriptor() {
        assert_eq!(Descriptor::new_zeroed().operation(VECTORS), None);
    }

    #[test]
    fn every_illegal_field_is_refused() {
        let raise = Descriptor::new(Operation::RaiseVector(3), 0, 1, 1);
        let copy = |host, soc, length| Descriptor::new(Operation::ToHost(Transfer { host, soc, length }), 0, 1, 1);
        let illegal = [
            Descriptor { opcode: 0.into(), ..to_host() },
            Descriptor { opcode: 4.into(), ..to_host() },
            Descriptor { flags: 4.into(), ..to_host() },
            Descriptor { vector: 1.into(), ..to_host() },
            Descriptor { reserved: [U64::ZERO, U64::ZERO, U64::new(1)], ..to_host() },
            Descriptor { sequence: U64::ZERO, ..to_host() },
            copy(0, 0, 0),
            copy(0, 0, LENGTH_MAX + 1),
            copy(u64::MAX, 0, 2),
            copy(0, u64::MAX - 6, 8),
            Descriptor { vector: VECTORS.into(), ..raise },
            Descriptor { host: 1.into(), ..raise },
            Descriptor { soc: 1.into(), ..raise },
            Descriptor { length: 1.into(), ..raise },
        ];
        for descriptor in illegal {
            assert_eq!(descriptor.operation(VECTORS), None, "{descriptor:x?}");
        }
        assert!(copy(u64::MAX, u64::MAX, 1).operation(VECTORS).is_some());
        assert!(copy(0, 0, LENGTH_MAX).operation(VECTORS).is_some());
    }
}
