//! QEMU's notations of properties: `a=b,c.d=e`, a comma in a value doubled, with a first word whose key is understood; or JSON, if the
//! text begins with `{`.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::Wrong;
use super::read::Reader;
use crate::qmp::json;

/// Deepest nesting of keys.
const DEPTH: usize = 8;

/// Properties by key, as they were written: in text every value is a string, or an object where keys have dots.
#[derive(Clone, Debug, PartialEq)]
pub struct Properties {
    values: Map<String, Value>,
    text: bool,
}

impl Properties {
    /// Reads either notation. `implied` is the key of a first word without `=`; later words without one are switches that are on.
    ///
    /// # Errors
    /// It is neither, or a key is there twice.
    pub fn parse(text: &str, implied: Option<&str>) -> Result<Self, Wrong> {
        Self::parse_lists(text, implied, &[])
    }

    /// The same; what is said several times of keys in `lists` counts together.
    ///
    /// # Errors
    /// As [`Properties::parse`].
    pub fn parse_lists(text: &str, implied: Option<&str>, lists: &[&str]) -> Result<Self, Wrong> {
        if text.starts_with('{') {
            let values = json::object(text.as_bytes()).map_err(|e| Wrong::new(format!("no sound JSON: {e}")))?;
            return Ok(Self { values, text: false });
        }
        let mut values = Map::new();
        for (index, part) in split(text).into_iter().enumerate() {
            let (key, value) = match (part.split_once('='), implied) {
                (Some((key, value)), _) => (key.to_owned(), value.to_owned()),
                (None, Some(implied)) if index == 0 => (implied.to_owned(), part),
                (None, _) => (part, "on".to_owned()),
            };
            insert(&mut values, &key, value, lists)?;
        }
        Ok(Self { values, text: true })
    }

    /// What QMP's arguments say.
    pub fn of_json(values: Map<String, Value>) -> Self {
        Self { values, text: false }
    }

    /// The value of a key, as a word; none: it isn't there, or is more than a word.
    pub fn word(&self, key: &str) -> Option<String> {
        match self.values.get(key)? {
            Value::String(word) => Some(word.clone()),
            Value::Bool(on) => Some(if *on { "on" } else { "off" }.to_owned()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        }
    }

    /// Takes a key away; its value, as a word.
    ///
    /// # Errors
    /// It isn't there, or is no word.
    pub fn take(&mut self, key: &str) -> Result<String, Wrong> {
        let word = self.word(key).ok_or_else(|| Wrong::new(format!("it needs '{key}'")))?;
        self.values.remove(key);
        Ok(word)
    }

    /// The keys that are there.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// Takes a key away, if it is there.
    pub fn remove(&mut self, key: &str) {
        self.values.remove(key);
    }

    /// Those of the keys that are in `keys`, which are not here any more.
    #[must_use]
    pub fn split_off(&mut self, keys: &[&str]) -> Self {
        let found = keys.iter().filter_map(|key| self.values.remove_entry(*key)).collect();
        Self { values: found, text: self.text }
    }

    /// `Ok` if a part of them can be meant; `T` lets others pass.
    ///
    /// # Errors
    /// As [`Properties::read`].
    pub(super) fn only<T: DeserializeOwned>(&self) -> Result<(), Wrong> {
        self.read::<T>().map(drop)
    }

    /// What they say.
    ///
    /// # Errors
    /// A key is unknown or missing, or a value can't be meant: which, and why.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, Wrong> {
        T::deserialize(Reader::of_object(&self.values, self.text))
    }
}

/// The parts between single commas, a double one being one of a part.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match parts.last_mut() {
            Some(last) if c != ',' || chars.next_if_eq(&',').is_some() => last.push(c),
            _ => parts.push(String::new()),
        }
    }
    parts
}

/// Puts `value` where `key`, whose parts stand between dots, says.
fn insert(values: &mut Map<String, Value>, key: &str, value: String, lists: &[&str]) -> Result<(), Wrong> {
    let parts: Vec<&str> = key.split('.').collect();
    let (last, path) = parts.split_last().expect("a part at least");
    if parts.iter().any(|part| part.is_empty()) || parts.len() > DEPTH {
        let key = key.escape_default();
        return Err(Wrong::new(format!("'{key:.60}' is no key: write key=value, with ',,' for a comma in a value")));
    }
    let mut place = values;
    for part in path {
        let inner = place.entry(*part).or_insert_with(|| Value::Object(Map::new()));
        place = inner.as_object_mut().ok_or_else(|| Wrong::new(format!("'{part}' is a value and has parts")))?;
    }
    match place.get_mut(*last) {
        None if lists.contains(last) => drop(place.insert((*last).to_owned(), Value::Array(vec![value.into()]))),
        None => drop(place.insert((*last).to_owned(), value.into())),
        Some(Value::Array(list)) => list.push(value.into()),
        Some(_) => return Err(Wrong::new(format!("'{key}' is there twice"))),
    }
    Ok(())
}
