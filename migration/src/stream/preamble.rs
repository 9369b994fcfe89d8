//! How a connection begins: who speaks which versions, and to which migration it belongs.

use std::io::{Read, Write};
use std::ops::RangeInclusive;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::StreamError;

/// Versions of the stream that this build reads and writes.
pub const VERSIONS: RangeInclusive<u16> = 1..=1;
/// Most connections of a migration, the main one among them.
pub const MOST_CONNECTIONS: u16 = 16;
const MAGIC: [u8; 8] = *b"OUTBOARD";

/// What both sides must know of to use it. Bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// Pages may be compressed by zstd (RFC 8878).
    pub const ZSTD: Self = Self(1);
    /// The guest may run at the destination before all pages are there.
    pub const POST_COPY: Self = Self(1 << 1);
    /// Nothing comes back, not even a preamble: a file, or a pipe.
    pub const ONE_WAY: Self = Self(1 << 2);
    /// No migration, but a question: what has become of the guest of that id?
    pub const FATE: Self = Self(1 << 3);
    /// No new migration, but what is left of one whose guest runs at the destination without all of its pages.
    pub const RECOVERY: Self = Self(1 << 4);
    /// A file in which pages have places of their own: [`super::PlacedHead`].
    pub const MAPPED: Self = Self(1 << 5);

    /// Those of either.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those of both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all of these are there.
    #[must_use]
    pub fn has(self, all: Self) -> bool {
        self.0 & all.0 == all.0
    }
}

/// The first 48 bytes of each connection, in either direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// The versions that the source can write, or the one that the destination chose.
    pub versions: RangeInclusive<u16>,
    /// Which connection it is; 0 is the main one.
    pub connection: u16,
    /// How many there are.
    pub connections: u16,
    /// Which migration: random bytes, those of all its connections.
    pub id: [u8; 16],
    /// What the source offers, or what the destination chose of that.
    pub features: Features,
}

/// The form on the wire. The checksum is of the bytes before it.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Wire {
    magic: [u8; 8],
    low: [u8; 2],
    high: [u8; 2],
    connection: [u8; 2],
    connections: [u8; 2],
    id: [u8; 16],
    features: [u8; 8],
    reserved: [u8; 4],
    checksum: [u8; 4],
}

pub(super) const BYTES: usize = size_of::<Wire>();
/// Bytes before the contents of a record of TLS.
const TLS_HEAD: usize = 5;
const _: () = assert!(BYTES == 48);

/// Why two sides can't talk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// There is no version that both know.
    #[error(
        "the source writes versions {} to {} of the stream, the destination reads {} to {}: upgrade the older side",
        source_s.start(), source_s.end(), destination_s.start(), destination_s.end()
    )]
    Versions {
        /// Those of the source.
        source_s: RangeInclusive<u16>,
        /// Those of the destination.
        destination_s: RangeInclusive<u16>,
    },
    /// A stream that nobody can ask to do without.
    #[error("the stream uses features {0:#x}, which this version doesn't know: upgrade it")]
    Features(u64),
    /// The destination chose what was not offered.
    #[error("the destination chose what this source did not offer: it is none of Outboard's")]
    Choice,
}

impl Preamble {
    /// The destination's answer: the highest version that both know, and of the features those that it supports too.
    ///
    /// # Errors
    /// There is no such version.
    pub fn answer(&self, ours: &RangeInclusive<u16>, features: Features) -> Result<Self, Mismatch> {
        let high = *self.versions.end().min(ours.end());
        if high < *self.versions.start() || high < *ours.start() {
            return Err(Mismatch::Versions { source_s: self.versions.clone(), destination_s: ours.clone() });
        }
        Ok(Self { versions: high..=high, features: self.features.and(features), ..self.clone() })
    }

    /// The destination's answer where there is no such version: those that it knows.
    #[must_use]
    pub fn refusal(&self, ours: &RangeInclusive<u16>) -> Self {
        Self { versions: ours.clone(), features: Features::default(), ..self.clone() }
    }

    /// Whether that is an answer to this one; the version that was chosen.
    ///
    /// # Errors
    /// It isn't, or a refusal.
    pub fn accept(&self, answer: &Self) -> Result<u16, Mismatch> {
        let (version, high) = (*answer.versions.start(), *answer.versions.end());
        if version > *self.versions.end() || high < *self.versions.start() {
            return Err(Mismatch::Versions { source_s: self.versions.clone(), destination_s: answer.versions.clone() });
        }
        let echo = Self { versions: self.versions.clone(), features: self.features, ..answer.clone() };
        let is_one = high == version;
        (is_one && echo == *self && self.features.has(answer.features)).then_some(version).ok_or(Mismatch::Choice)
    }

    /// Writes it.
    ///
    /// # Errors
    /// The connection fails.
    pub fn write_to(&self, to: &mut impl Write) -> Result<(), StreamError> {
        let mut wire = Wire {
            magic: MAGIC,
            low: self.versions.start().to_le_bytes(),
            high: self.versions.end().to_le_bytes(),
            connection: self.connection.to_le_bytes(),
            connections: self.connections.to_le_bytes(),
            id: self.id,
            features: self.features.0.to_le_bytes(),
            reserved: [0; 4],
            checksum: [0; 4],
        };
        wire.checksum = checksum(&wire).to_le_bytes();
        to.write_all(wire.as_bytes())?;
        Ok(to.flush()?)
    }

    /// Reads one.
    ///
    /// # Errors
    /// See [`StreamError`].
    pub fn read_from(from: &mut impl Read) -> Result<Self, StreamError> {
        let mut bytes = [0; BYTES];
        let (head, rest) = bytes.split_at_mut(TLS_HEAD);
        // No more follows the least that a side with TLS says to one without.
        from.read_exact(head)?;
        if is_tls(head) {
            return Err(StreamError::Tls);
        }
        from.read_exact(rest)?;
        let wire = Wire::read_from_bytes(&bytes).map_err(|_| StreamError::NoStream)?;
        if wire.magic != MAGIC {
            return Err(StreamError::NoStream);
        }
        if wire.checksum != checksum(&wire).to_le_bytes() {
            return Err(StreamError::Damaged { sequence: 0 });
        }
        let malformed = |why| StreamError::Malformed { sequence: 0, why };
        let [low, high] = [wire.low, wire.high].map(u16::from_le_bytes);
        let [connection, connections] = [wire.connection, wire.connections].map(u16::from_le_bytes);
        if low == 0 || low > high || wire.reserved != [0; 4] {
            return Err(malformed("its versions are none"));
        }
        if connection >= connections || connections > MOST_CONNECTIONS {
            return Err(malformed("there is no such connection"));
        }
        let features = Features(u64::from_le_bytes(wire.features));
        Ok(Self { versions: low..=high, connection, connections, id: wire.id, features })
    }
}

/// Whether these are the first bytes of a record of TLS (RFC 8446 §5.1): of a handshake or an alert, and a version.
fn is_tls(head: &[u8]) -> bool {
    matches!(head, [21 | 22, 3, 0..=4, ..])
}

fn checksum(wire: &Wire) -> u32 {
    crc32fast::hash(&wire.as_bytes()[..BYTES - 4])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offer() -> Preamble {
        Preamble {
            versions: 2..=5,
            connection: 1,
            connections: 4,
            id: *b"sixteen bytes id",
            features: Features(0b1011),
        }
    }

    #[test]
    fn the_highest_version_that_both_know_is_chosen() {
        for (ours, chosen) in [(1..=9, Some(5)), (1..=3, Some(3)), (5..=5, Some(5)), (6..=9, None), (1..=1, None)] {
            let answer = offer().answer(&ours, Features(0b0110));
            assert_eq!(answer.as_ref().ok().map(|answer| answer.versions.clone()), chosen.map(|one| one..=one));
            let Ok(answer) = answer else { continue };
            assert_eq!(answer.features, Features(0b0010));
            assert_eq!(offer().accept(&answer).ok(), chosen);
        }
        let why = offer().answer(&(6..=9), Features(0)).unwrap_err().to_string();
        assert!(why.contains("2 to 5") && why.contains("6 to 9"), "{why}");
    }

    #[test]
    fn what_was_not_offered_is_no_choice() {
        let answer = offer().answer(&(1..=9), Features(!0)).unwrap();
        for wrong in [
            Preamble { versions: 2..=3, ..answer.clone() },
            Preamble { features: Features(0b100), ..answer.clone() },
            Preamble { id: [0; 16], ..answer.clone() },
            Preamble { connection: 2, ..answer.clone() },
        ] {
            assert_eq!(offer().accept(&wrong), Err(Mismatch::Choice), "{wrong:?}");
        }
    }

    #[test]
    fn a_refusal_says_which_versions_there_are() {
        for ours in [6..=9, 1..=1] {
            let refusal = offer().refusal(&ours);
            assert_eq!(offer().accept(&refusal), Err(Mismatch::Versions { source_s: 2..=5, destination_s: ours }));
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_specification() {
        let mut bytes = Vec::new();
        offer().write_to(&mut bytes).unwrap();
        assert_eq!(bytes, wire_kit::golden("migration/preamble"));
        assert_eq!(Preamble::read_from(&mut &bytes[..]).unwrap(), offer());
        for end in 0..bytes.len() {
            assert!(matches!(Preamble::read_from(&mut &bytes[..end]), Err(StreamError::Truncated)));
        }
    }

    #[test]
    fn who_speaks_tls_is_told_apart() {
        let alert = [21, 3, 3, 0, 2, 2, 10];
        let hello = [[22, 3, 1, 2, 0].as_slice(), &[0; 512]].concat();
        for said in [&alert[..], &hello] {
            assert!(matches!(Preamble::read_from(&mut &said[..]), Err(StreamError::Tls)));
        }
    }

    proptest! {
        #[test]
        fn damage_is_seen(at in 0..48usize, flip in 1..=255u8) {
            let mut bytes = Vec::new();
            offer().write_to(&mut bytes).unwrap();
            bytes[at] ^= flip;
            prop_assert!(Preamble::read_from(&mut &bytes[..]).is_err());
        }

        #[test]
        fn whatever_comes_is_no_panic(bytes: [u8; 44]) {
            let mut bytes = [&bytes[..], &crc32fast::hash(&bytes).to_le_bytes()].concat();
            _ = Preamble::read_from(&mut &bytes[..]);
            bytes[..8].copy_from_slice(&MAGIC);
            let sum = crc32fast::hash(&bytes[..44]);
            bytes[44..].copy_from_slice(&sum.to_le_bytes());
            if let Ok(read) = Preamble::read_from(&mut &bytes[..]) {
                prop_assert!(read.connection < read.connections && read.connections <= MOST_CONNECTIONS);
            }
        }
    }
}
