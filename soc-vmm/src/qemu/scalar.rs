//! Values that QEMU has a notation of its own for.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{Deserialize, Deserializer, Error, Visitor};

/// A number of bytes: in text with a unit, `128K`, `1G`, `0x10`; in JSON a number. Without a unit it is [`Size::Plain`]: what that means is
/// the option's matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// A number without a unit.
    Plain(u64),
    /// Bytes.
    Bytes(u64),
}

impl Size {
    /// Bytes, a number without a unit being bytes.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Plain(bytes) | Self::Bytes(bytes) => bytes,
        }
    }

    /// Bytes, a number without a unit being MiB; none: more than 64 bits.
    pub fn bytes_of_mib(self) -> Option<u64> {
        match self {
            Self::Plain(mib) => mib.checked_mul(1 << 20),
            Self::Bytes(bytes) => Some(bytes),
        }
    }

    /// Reads one from text.
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(hex) = text.strip_prefix("0x").or(text.strip_prefix("0X")) {
            let sound = !hex.is_empty() && hex.bytes().all(|b| b.is_ascii_hexdigit());
            return sound.then(|| u64::from_str_radix(hex, 16).ok()).flatten().map(Self::Plain);
        }
        let units = [(b'B', 0), (b'K', 10), (b'M', 20), (b'G', 30), (b'T', 40), (b'P', 50), (b'E', 60)];
        let last = text.as_bytes().last().map(u8::to_ascii_uppercase);
        let unit = units.iter().find(|(unit, _)| Some(*unit) == last);
        let digits = unit.map_or(text, |_| &text[..text.len() - 1]);
        let sound = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let number = sound.then(|| digits.parse::<u64>().ok()).flatten()?;
        match unit {
            None => Some(Self::Plain(number)),
            Some((_, shift)) => number.checked_mul(1 << shift).map(Self::Bytes),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SizeVisitor)
    }
}

struct SizeVisitor;

impl Visitor<'_> for SizeVisitor {
    type Value = Size;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size")
    }

    fn visit_u64<E: Error>(self, bytes: u64) -> Result<Size, E> {
        Ok(Size::Plain(bytes))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Size, E> {
        let wrong =
            || E::custom(format!("'{}' is no size: write a number, or one with K, M, G or T", text.escape_default()));
        Size::parse(text).ok_or_else(wrong)
    }
}

/// QMP `OnOffAuto`; a boolean is as good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
    /// As it is without it.
    #[default]
    Auto,
}

impl<'de> Deserialize<'de> for Switch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SwitchVisitor)
    }
}

struct SwitchVisitor;

impl Visitor<'_> for SwitchVisitor {
    type Value = Switch;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("on, off or auto")
    }

    fn visit_bool<E: Error>(self, on: bool) -> Result<Switch, E> {
        Ok(if on { Switch::On } else { Switch::Off })
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Switch, E> {
        match text {
            "on" | "yes" | "true" => Ok(Switch::On),
            "off" | "no" | "false" => Ok(Switch::Off),
            "auto" => Ok(Switch::Auto),
            other => Err(E::custom(format!("'{}': write on, off or auto", other.escape_default()))),
        }
    }
}

/// A place on a PCI bus: `SLOT[.FUNCTION]`, both hexadecimal, with or without `0x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciAddress {
    /// Slot, 0 to 31.
    pub slot: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl PciAddress {
    /// Slot × 8 + function.
    pub fn devfn(self) -> u8 {
        self.slot << 3 | self.function
    }
}

impl<'de> Deserialize<'de> for PciAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let hex = |part: &str, below: u8| {
            let digits = part.strip_prefix("0x").unwrap_or(part);
            let sound = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
            sound.then(|| u8::from_str_radix(digits, 16).ok()).flatten().filter(|n| *n < below)
        };
        let (slot, function) = text.split_once('.').unwrap_or((&text, "0"));
        match (hex(slot, 32), hex(function, 8)) {
            (Some(slot), Some(function)) => Ok(Self { slot, function }),
            _ => {
                let text = text.escape_default();
                Err(D::Error::custom(format!("'{text}' is no place on a PCI bus: write SLOT[.FUNCTION], hexadecimal")))
            }
        }
    }
}

/// A UUID, as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uuid(pub [u8; 16]);

impl std::str::FromStr for Uuid {
    type Err = super::Wrong;

    fn from_str(text: &str) -> Result<Self, super::Wrong> {
        let wrong = || super::Wrong::new(format!("'{}' is no UUID", text.escape_default()));
        let groups: Vec<&str> = text.split('-').collect();
        let sound = groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12])
            && text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit());
        if !sound {
            return Err(wrong());
        }
        let number = u128::from_str_radix(&groups.concat(), 16).map_err(|_| wrong())?;
        Ok(Self(number.to_be_bytes()))
    }
}

impl<'de> Deserialize<'de> for Uuid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// Types that are written as strings.
macro_rules! written_as_string {
    ($($type:ty),*) => {$(
        impl JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                String::schema_name()
            }

            fn json_schema(generator: &mut SchemaGenerator) -> Schema {
                String::json_schema(generator)
            }
        }
    )*};
}

written_as_string!(PciAddress, Uuid);

/// How a [`Switch`] is written.
#[derive(JsonSchema)]
#[serde(untagged)]
#[schemars(rename = "OnOffAuto")]
#[expect(dead_code, reason = "it only describes")]
enum SwitchWritten {
    Truth(bool),
    Word(String),
}

impl JsonSchema for Switch {
    fn schema_name() -> Cow<'static, str> {
        SwitchWritten::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        SwitchWritten::json_schema(generator)
    }
}

impl JsonSchema for Size {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        u64::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        u64::json_schema(generator)
    }
}
