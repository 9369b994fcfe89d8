//! Payloads: records of fixed size and lists of them, in order, nothing left over.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A payload that can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Writes a payload.
#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// Appends a record.
    #[must_use]
    pub fn put<T: IntoBytes + Immutable>(mut self, record: &T) -> Self {
        self.0.extend_from_slice(record.as_bytes());
        self
    }

    /// Appends a list: its count as 8 bytes, then its records.
    #[must_use]
    pub fn list<T: IntoBytes + Immutable>(self, records: &[T]) -> Self {
        let mut this = self.put(&(records.len() as u64));
        this.0.extend_from_slice(records.as_bytes());
        this
    }

    /// Appends bytes as they are.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// The payload.
    #[must_use]
    pub fn done(self) -> Vec<u8> {
        self.0
    }
}

/// Reads a payload.
#[derive(Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// A reader at the payload's start.
    #[must_use]
    pub fn new(payload: &'a [u8]) -> Self {
        Self(payload)
    }

    /// Takes a record.
    ///
    /// # Errors
    /// Too few bytes are left.
    pub fn take<T: FromBytes>(&mut self) -> Result<T, Malformed> {
        let (record, rest) = T::read_from_prefix(self.0).map_err(|_| Malformed)?;
        self.0 = rest;
        Ok(record)
    }

    /// Takes a list of at most `most` records.
    ///
    /// # Errors
    /// The count is higher, or too few bytes are left.
    pub fn list<T: FromBytes>(&mut self, most: usize) -> Result<Vec<T>, Malformed> {
        let count: u64 = self.take()?;
        if count > most as u64 || count * size_of::<T>() as u64 > self.0.len() as u64 {
            return Err(Malformed);
        }
        (0..count).map(|_| self.take()).collect()
    }

    /// Takes all that is left.
    #[must_use]
    pub fn rest(self) -> &'a [u8] {
        self.0
    }

    /// Ends the payload.
    ///
    /// # Errors
    /// Bytes are left.
    pub fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed) }
    }
}
