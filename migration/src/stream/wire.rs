//! Records on a connection.

use std::io::{IoSlice, Read, Write};
use std::slice;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::StreamError;
use super::record::{Kind, MOST_PAGES, Record};

/// Room of a receiver that has received nothing large yet.
const PIECE: usize = 64 << 10;
/// Most records that leave by one call.
const AT_ONCE: usize = MOST_PAGES as usize;

#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: [u8; 2],
    reserved: [u8; 2],
    len: [u8; 4],
    sequence: [u8; 4],
    checksum: [u8; 4],
}

const BYTES: usize = size_of::<Header>();
const _: () = assert!(BYTES == 16);

impl Header {
    /// Of a payload in these parts.
    fn checksum(&self, payload: &[&[u8]]) -> [u8; 4] {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.as_bytes()[..BYTES - 4]);
        payload.iter().for_each(|part| hasher.update(part));
        hasher.finalize().to_le_bytes()
    }
}

/// Sends records.
#[derive(Debug)]
pub struct Sender<W> {
    to: W,
    sequence: u32,
    head: Vec<u8>,
    sent: u64,
}

impl<W: Write> Sender<W> {
    /// On a connection on which a [`super::Preamble`] was sent.
    pub fn new(to: W) -> Self {
        Self { to, sequence: 0, head: Vec::new(), sent: 0 }
    }

    /// Sends a record.
    ///
    /// # Errors
    /// See [`Self::send_all`].
    pub fn send(&mut self, record: &Record<'_>) -> Result<(), StreamError> {
        self.send_all(slice::from_ref(record))
    }

    /// Sends records, by one call of the connection's for every [`MOST_PAGES`] of them, if it takes them whole.
    ///
    /// # Errors
    /// The connection fails, or a record is longer than its kind may be: nothing can be sent after one.
    pub fn send_all(&mut self, records: &[Record<'_>]) -> Result<(), StreamError> {
        records.chunks(AT_ONCE).try_for_each(|records| self.send_some(records))
    }

    fn send_some(&mut self, records: &[Record<'_>]) -> Result<(), StreamError> {
        self.head.clear();
        let mut parts = [(0, &[][..]); AT_ONCE];
        for (record, part) in records.iter().zip(&mut parts) {
            *part = self.encode(record)?;
        }
        let mut slices = [IoSlice::new(&[]); 2 * AT_ONCE];
        let mut at = 0;
        for (index, (end, bytes)) in parts[..records.len()].iter().enumerate() {
            slices[2 * index] = IoSlice::new(&self.head[at..*end]);
            slices[2 * index + 1] = IoSlice::new(bytes);
            at = *end;
        }
        let slices = &mut slices[..2 * records.len()];
        let len: usize = slices.iter().map(|slice| slice.len()).sum();
        write_all(&mut self.to, slices)?;
        self.sent += len as u64;
        Ok(())
    }

    /// Appends a record's own bytes to `head`; where they end there, and the bytes that follow them.
    fn encode<'a>(&mut self, record: &Record<'a>) -> Result<(usize, &'a [u8]), StreamError> {
        let at = self.head.len();
        self.head.resize(at + BYTES, 0);
        let bytes = record.encode(&mut self.head);
        let len = self.head.len() - at - BYTES + bytes.len();
        let (kind, most) = (record.kind(), record.kind().most_bytes());
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        if len > most {
            return Err(StreamError::TooLong { sequence: self.sequence, len, most });
        }
        let mut header = Header {
            kind: (kind as u16).to_le_bytes(),
            len: len.to_le_bytes(),
            sequence: self.sequence.to_le_bytes(),
            ..Header::default()
        };
        header.checksum = header.checksum(&[&self.head[at + BYTES..], bytes]);
        self.head[at..at + BYTES].copy_from_slice(header.as_bytes());
        self.sequence = self.sequence.wrapping_add(1);
        Ok((self.head.len(), bytes))
    }

    /// Has all of it leave.
    ///
    /// # Errors
    /// The connection fails.
    pub fn flush(&mut self) -> Result<(), StreamError> {
        Ok(self.to.flush()?)
    }

    /// Bytes of all records.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// The connection.
    pub fn connection(&self) -> &W {
        &self.to
    }
}

/// Receives records.
#[derive(Debug)]
pub struct Receiver<R> {
    from: R,
    sequence: u32,
    most: u32,
    /// What has come and wasn't looked at is `start..end`.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    received: u64,
}

impl<R: Read> Receiver<R> {
    /// On a connection from which a [`super::Preamble`] was read.
    pub fn new(from: R) -> Self {
        Self { from, sequence: 0, most: u32::MAX, buffer: Vec::new(), start: 0, end: 0, received: 0 }
    }

    /// Where no payload is longer than that, whatever its kind.
    #[must_use]
    pub fn with_most(self, most: u32) -> Self {
        Self { most, ..self }
    }

    /// The next record; none: the stream has ended between two.
    ///
    /// # Errors
    /// See [`StreamError`]; nothing can be received after one.
    pub fn receive(&mut self) -> Result<Option<Record<'_>>, StreamError> {
        if !self.fill(BYTES)? {
            return Ok(None);
        }
        let header =
            self.buffer[self.start..].first_chunk::<BYTES>().and_then(|bytes| Header::read_from_bytes(bytes).ok());
        let header = header.ok_or(StreamError::Truncated)?;
        let expected = self.sequence;
        let found = u32::from_le_bytes(header.sequence);
        let number = u16::from_le_bytes(header.kind);
        let len = u32::from_le_bytes(header.len);
        // Before anybody has looked at the checksum: what can't be is either damage or a lie.
        let kind = Kind::of(number).ok_or(StreamError::UnknownKind { sequence: expected, kind: number })?;
        let most = kind.most_bytes().min(self.most);
        if len > most {
            return Err(StreamError::TooLong { sequence: expected, len, most });
        }
        let whole = BYTES + len as usize;
        self.fill(whole)?;
        let payload = self.start + BYTES..self.start + whole;
        if header.checksum != header.checksum(&[&self.buffer[payload.clone()]]) {
            return Err(StreamError::Damaged { sequence: expected });
        }
        if found != expected {
            return Err(StreamError::OutOfOrder { found, expected });
        }
        if header.reserved != [0; 2] {
            return Err(StreamError::Malformed { sequence: expected, why: "a reserved field is not 0" });
        }
        self.sequence = expected.wrapping_add(1);
        self.received += whole as u64;
        self.start += whole;
        let malformed = |why| StreamError::Malformed { sequence: expected, why };
        Record::decode(kind, &self.buffer[payload]).map_err(malformed).map(Some)
    }

    /// Bytes of all records.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// The connection.
    pub fn connection(&self) -> &R {
        &self.from
    }

    /// Reads until `bytes` are there; not: the stream has ended before the first of them.
    fn fill(&mut self, bytes: usize) -> Result<bool, StreamError> {
        while self.end - self.start < bytes {
            if self.start + bytes > self.buffer.len() {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            if self.end == self.buffer.len() {
                // As fast as bytes really come, and no further than anybody needs.
                let len = (2 * self.end).min(bytes).max(PIECE);
                self.buffer.resize(len, 0);
            }
            match self.from.read(&mut self.buffer[self.end..]) {
                Ok(0) if self.start == self.end && bytes == BYTES => return Ok(false),
                Ok(0) => return Err(StreamError::Truncated),
                Ok(read) => self.end += read,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }
}

fn write_all(to: &mut impl Write, mut slices: &mut [IoSlice<'_>]) -> std::io::Result<()> {
    while slices.iter().any(|slice| !slice.is_empty()) {
        match to.write_vectored(slices) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
