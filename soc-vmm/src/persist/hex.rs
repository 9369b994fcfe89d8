//! Bytes in a state.

use std::borrow::Cow;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes, which are a string of hexadecimal digits in JSON: half as long as a list of numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hex(pub Vec<u8>);

impl Hex {
    /// `bytes` without the zeros at their end.
    pub fn trimmed(bytes: &[u8]) -> Self {
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        Self(bytes[..end].to_vec())
    }

    /// The bytes, with zeros at their end; none: they are more than `N`.
    pub fn padded<const N: usize>(&self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        bytes.get_mut(..self.0.len())?.copy_from_slice(&self.0);
        Some(bytes)
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = String::with_capacity(2 * self.0.len());
        for byte in &self.0 {
            text.extend([byte >> 4, byte & 0xf].map(|digit| char::from(DIGITS[usize::from(digit)])));
        }
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
            return Err(D::Error::custom("half a byte at the end of hexadecimal digits"));
        };
        let digit = |c: u8| char::from(c).to_digit(16).map(|digit| digit as u8);
        let byte = |[high, low]: &[u8; 2]| Some(digit(*high)? << 4 | digit(*low)?);
        let bytes = pairs.iter().map(byte).collect::<Option<_>>();
        bytes.map(Self).ok_or_else(|| D::Error::custom("what are no hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_digits_and_nothing_else_is_bytes() {
        let bytes = Hex(vec![0, 0x1f, 0xa0]);
        assert_eq!(serde_json::to_string(&bytes).unwrap(), r#""001fa0""#);
        let read = |text: &str| serde_json::from_str::<Hex>(text).ok();
        assert_eq!(read(r#""001FA0""#), Some(bytes));
        assert_eq!(read(r#""""#), Some(Hex::default()));
        for wrong in [r#""0""#, r#""0g""#, r#""é""#, "[0]", "null"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        assert_eq!(Hex::trimmed(&[1, 0, 2, 0, 0]), Hex(vec![1, 0, 2]));
        assert_eq!(Hex(vec![1, 2]).padded(), Some([1, 2, 0]));
        assert_eq!(Hex(vec![1, 2]).padded::<1>(), None);
    }
}
