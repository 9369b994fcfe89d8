//! Typed values from properties: a serde deserializer that knows how QEMU writes switches and numbers in text.

use serde::de::value::StringDeserializer;
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, IntoDeserializer, MapAccess, SeqAccess, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::{Map, Value};

use super::Wrong;

/// A value, and whether it was written as text, where all values are words.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    value: What<'a>,
    text: bool,
}

#[derive(Clone, Copy)]
enum What<'a> {
    Value(&'a Value),
    Object(&'a Map<String, Value>),
}

impl<'a> Reader<'a> {
    pub(super) fn of_object(object: &'a Map<String, Value>, text: bool) -> Self {
        Self { value: What::Object(object), text }
    }

    fn object(&self) -> Option<&'a Map<String, Value>> {
        match self.value {
            What::Object(object) | What::Value(Value::Object(object)) => Some(object),
            What::Value(_) => None,
        }
    }

    /// A word of text.
    fn word(&self) -> Option<&'a str> {
        match self.value {
            What::Value(Value::String(word)) if self.text => Some(word),
            _ => None,
        }
    }

    fn unsigned(&self) -> Result<Option<u64>, Wrong> {
        self.word().map(|word| number(word).ok_or_else(|| no_number(word))).transpose()
    }

    fn signed(&self) -> Result<Option<i64>, Wrong> {
        let read = |word: &str| match word.strip_prefix('-') {
            Some(digits) => number(digits).and_then(|n| 0i64.checked_sub_unsigned(n)),
            None => number(word).and_then(|n| n.try_into().ok()),
        };
        self.word().map(|word| read(word).ok_or_else(|| no_number(word))).transpose()
    }
}

/// Decimal, or hexadecimal behind `0x`.
fn number(word: &str) -> Option<u64> {
    let (digits, radix) = word.strip_prefix("0x").or(word.strip_prefix("0X")).map_or((word, 10), |hex| (hex, 16));
    let sound = !digits.is_empty() && digits.chars().all(|c| c.is_digit(radix));
    sound.then(|| u64::from_str_radix(digits, radix).ok()).flatten()
}

fn no_number(word: &str) -> Wrong {
    Wrong::new(format!("'{}' is no number", word.escape_default()))
}

macro_rules! numbers {
    ($($method:ident $ask:ident $visit:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
            match self.$ask()? {
                Some(number) => visitor.$visit(number),
                None => self.deserialize_any(visitor),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for Reader<'de> {
    type Error = Wrong;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        if let Some(object) = self.object() {
            return visitor.visit_map(Members { members: object.iter(), value: None, text: self.text });
        }
        match self.value {
            What::Value(Value::Null) => visitor.visit_unit(),
            What::Value(Value::Bool(on)) => visitor.visit_bool(*on),
            What::Value(Value::String(word)) => visitor.visit_borrowed_str(word),
            What::Value(Value::Array(list)) => {
                visitor.visit_seq(Items { items: list.iter().collect(), text: self.text })
            }
            What::Value(Value::Number(number)) => match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => visitor.visit_u64(number),
                (_, Some(number)) => visitor.visit_i64(number),
                _ => visitor.visit_f64(number.as_f64().unwrap_or_default()),
            },
            What::Value(Value::Object(_)) | What::Object(_) => Err(Wrong::new("an object")),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match self.word() {
            None => self.deserialize_any(visitor),
            Some("on" | "yes" | "true" | "y") => visitor.visit_bool(true),
            Some("off" | "no" | "false" | "n") => visitor.visit_bool(false),
            Some(other) => Err(Wrong::new(format!("'{}': write on or off", other.escape_default()))),
        }
    }

    numbers! {
        deserialize_u8 unsigned visit_u64 deserialize_u16 unsigned visit_u64 deserialize_u32 unsigned visit_u64
        deserialize_u64 unsigned visit_u64 deserialize_i8 signed visit_i64 deserialize_i16 signed visit_i64
        deserialize_i32 signed visit_i64 deserialize_i64 signed visit_i64
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        // In text a list is `key.0=…,key.1=…`.
        match self.object().filter(|_| self.text) {
            None => self.deserialize_any(visitor),
            Some(object) => {
                let items: Option<Vec<&Value>> =
                    (0..object.len()).map(|index| object.get(&index.to_string())).collect();
                let items = items.ok_or_else(|| Wrong::new("a list's keys count from 0, without a gap"))?;
                visitor.visit_seq(Items { items, text: true })
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match self.value {
            What::Value(Value::Null) => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Wrong> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        match self.value {
            What::Value(Value::String(word)) => visitor.visit_enum(Word(word)),
            _ => Err(Wrong::new("a word is wanted")),
        }
    }

    forward_to_deserialize_any! {
        f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct map struct identifier ignored_any
    }
}

struct Members<'a> {
    members: serde_json::map::Iter<'a>,
    value: Option<(&'a String, &'a Value)>,
    text: bool,
}

impl<'de> MapAccess<'de> for Members<'de> {
    type Error = Wrong;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Wrong> {
        self.value = self.members.next();
        let key = self.value.map(|(key, _)| -> StringDeserializer<Wrong> { key.clone().into_deserializer() });
        key.map(|key| seed.deserialize(key)).transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Wrong> {
        let (key, value) = self.value.take().ok_or_else(|| Wrong::custom("a value before its key"))?;
        seed.deserialize(Reader { value: What::Value(value), text: self.text }).map_err(|wrong| wrong.at(key))
    }
}

struct Items<'a> {
    items: Vec<&'a Value>,
    text: bool,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = Wrong;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Wrong> {
        if self.items.is_empty() {
            return Ok(None);
        }
        let value = self.items.remove(0);
        seed.deserialize(Reader { value: What::Value(value), text: self.text }).map(Some)
    }
}

/// A word that names a variant.
struct Word<'a>(&'a str);

impl<'de> EnumAccess<'de> for Word<'de> {
    type Error = Wrong;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Wrong> {
        let name: serde::de::value::BorrowedStrDeserializer<'de, Wrong> =
            serde::de::value::BorrowedStrDeserializer::new(self.0);
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de> VariantAccess<'de> for Word<'de> {
    type Error = Wrong;

    fn unit_variant(self) -> Result<(), Wrong> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, Wrong> {
        Err(Wrong::new("a word alone can't be meant"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Wrong> {
        Err(Wrong::new("a word alone can't be meant"))
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], _: V) -> Result<V::Value, Wrong> {
        Err(Wrong::new("a word alone can't be meant"))
    }
}
