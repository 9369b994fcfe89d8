//! What a file whose pages have places begins with, behind its preamble. It is written twice: at first it says that the rest isn't there,
//! and when all of that is on the disk, where it is. So half a guest is never taken for a whole one.

use std::ops::Range;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{StreamError, preamble};

/// Where in such a file what is, in bytes from its preamble.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedHead {
    /// The records, from the description to the end; none: they were not all written.
    pub records: Option<Range<u64>>,
}

/// The form in the file. The checksum is of the bytes before it, those of the preamble not among them.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Wire {
    at: [u8; 8],
    len: [u8; 8],
    reserved: [u8; 4],
    checksum: [u8; 4],
}

const _: () = assert!(PlacedHead::BYTES == 24);

impl PlacedHead {
    /// Where it stands: behind the preamble.
    pub const AT: u64 = preamble::BYTES as u64;
    /// How long it is.
    pub const BYTES: usize = size_of::<Wire>();
    /// Where pages and records may begin.
    pub const END: u64 = Self::AT + Self::BYTES as u64;

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> [u8; Self::BYTES] {
        let Range { start, end } = self.records.clone().unwrap_or(0..0);
        let mut wire = Wire {
            at: start.to_le_bytes(),
            len: end.saturating_sub(start).to_le_bytes(),
            reserved: [0; 4],
            checksum: [0; 4],
        };
        wire.checksum = checksum(&wire);
        zerocopy::transmute!(wire)
    }

    /// What such bytes say.
    ///
    /// # Errors
    /// They are damaged, or no such bytes.
    pub fn read(bytes: [u8; Self::BYTES]) -> Result<Self, StreamError> {
        let wire: Wire = zerocopy::transmute!(bytes);
        if wire.checksum != checksum(&wire) {
            return Err(StreamError::Damaged { sequence: 0 });
        }
        let malformed = |why| StreamError::Malformed { sequence: 0, why };
        if wire.reserved != [0; 4] {
            return Err(malformed("a reserved field is not 0"));
        }
        let (at, len) = (u64::from_le_bytes(wire.at), u64::from_le_bytes(wire.len));
        if (at, len) == (0, 0) {
            return Ok(Self { records: None });
        }
        let end = at.checked_add(len).filter(|_| at >= Self::END && len > 0);
        let end = end.ok_or_else(|| malformed("its records are nowhere"))?;
        Ok(Self { records: Some(at..end) })
    }
}

fn checksum(wire: &Wire) -> [u8; 4] {
    let bytes = wire.as_bytes();
    crc32fast::hash(&bytes[..bytes.len() - 4]).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_specification() {
        let head = PlacedHead { records: Some(0x5000..0x5123) };
        assert_eq!(head.bytes().to_vec(), wire_kit::golden("migration/placed-head"), "{:02x?}", head.bytes());
        assert_eq!(PlacedHead::read(head.bytes()).unwrap(), head);
        let unfinished = PlacedHead { records: None };
        assert_eq!(PlacedHead::read(unfinished.bytes()).unwrap(), unfinished);
        assert!(PlacedHead::read([0; PlacedHead::BYTES]).is_err(), "a hole is no head");
    }

    proptest! {
        #[test]
        fn whatever_it_says_is_a_place_behind_it(at: u64, len: u64, at_bit in 0..24 * 8usize) {
            let mut wire = Wire { at: at.to_le_bytes(), len: len.to_le_bytes(), reserved: [0; 4], checksum: [0; 4] };
            wire.checksum = checksum(&wire);
            let mut bytes: [u8; PlacedHead::BYTES] = zerocopy::transmute!(wire);
            if let Ok(PlacedHead { records: Some(records) }) = PlacedHead::read(bytes) {
                prop_assert!(records.start >= PlacedHead::END && records.end > records.start);
            }
            bytes[at_bit / 8] ^= 1 << (at_bit % 8);
            prop_assert!(PlacedHead::read(bytes).is_err());
        }
    }
}
