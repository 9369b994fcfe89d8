//! Streams as bytes: those of real migrations, taken apart and put together otherwise.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, Write};
use std::sync::{Arc, Mutex};

use migration::stream::PlacedHead;
use migration::{Connection, Control, Parameters, send};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::roads::{Opens, into, once, travel, unix};
use super::{Destination, Ram, Source};

/// Bytes of a preamble, and of a record's header.
pub(crate) const PREAMBLE: usize = 48;
const HEADER: usize = 16;

/// Regions of the machine whose streams these are.
pub(crate) const PAGES: [u64; 2] = [70, 3];

/// A stream: a preamble and records, of which neither sequence nor checksum is kept.
#[derive(Clone, Debug)]
pub(crate) struct Tape {
    pub(crate) preamble: Vec<u8>,
    /// What is between it and the records of a file in which pages have places.
    pub(crate) pages: Vec<u8>,
    /// Kind and payload.
    pub(crate) records: Vec<(u16, Vec<u8>)>,
}

impl Tape {
    /// What a source writes into a file.
    pub(crate) fn one_way(zstd: Option<u8>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&bytes);
        let mut opens = move |_| {
            Ok(Connection {
                reader: Box::new(io::empty()),
                writer: Box::new(Tee(Arc::clone(&into), None)),
                cut: Arc::new(|| ()),
                answers: false,
                others_come: false,
                place: None,
            })
        };
        let control = Control::new(Parameters { zstd, ..Parameters::default() });
        send(&Source::new(Ram::filled(&PAGES)), &mut opens, &control).unwrap();
        Self::of(&bytes.lock().unwrap())
    }

    /// What a source writes into a file in which pages have places.
    pub(crate) fn mapped() -> Self {
        let mut file = empty();
        let control = Control::new(Parameters { mapped: true, ..Parameters::default() });
        send(&Source::new(Ram::filled(&PAGES)), &mut into(&file), &control).unwrap();
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        let head = PlacedHead::read(bytes[PREAMBLE..PREAMBLE + PlacedHead::BYTES].try_into().unwrap()).unwrap();
        let records = head.records.unwrap();
        assert_eq!(records.end, bytes.len() as u64);
        let (before, records) = bytes.split_at(records.start as usize);
        let tape = Self::of(&[&before[..PREAMBLE], records].concat());
        Self { pages: before[PREAMBLE + PlacedHead::BYTES..].to_vec(), ..tape }
    }

    /// What a source says to a destination that answers.
    pub(crate) fn two_way(zstd: Option<u8>) -> Self {
        Self::taped(Parameters { zstd, ..Parameters::default() }, false)
    }

    /// The same of a guest that starts with next to nothing of its memory.
    pub(crate) fn post_copy() -> Self {
        Self::taped(Parameters { post_copy: true, ..Parameters::default() }, true)
    }

    fn taped(parameters: Parameters, post_copy: bool) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&bytes);
        let (mut opens, accepts) = unix();
        let taped: Opens = Box::new(move |number| {
            let connection = opens(number)?;
            let writer = Box::new(Tee(Arc::clone(&into), Some(connection.writer)));
            Ok(Connection { writer, ..connection })
        });
        let source = Source::new(Ram::filled(&PAGES));
        let controls = (Control::new(parameters), Control::new(Parameters::default()));
        assert_eq!(controls.0.start_post_copy(), post_copy);
        let (sent, received) =
            travel(&source, &Destination::like(&source).waiting(), (taped, accepts), (&controls.0, &controls.1));
        sent.unwrap();
        received.unwrap();
        Self::of(&bytes.lock().unwrap())
    }

    fn of(bytes: &[u8]) -> Self {
        let (preamble, mut rest) = bytes.split_at(PREAMBLE);
        let mut records = Vec::new();
        while !rest.is_empty() {
            let len = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
            let kind = u16::from_le_bytes(rest[..2].try_into().unwrap());
            records.push((kind, rest[HEADER..HEADER + len].to_vec()));
            rest = &rest[HEADER + len..];
        }
        Self { preamble: preamble.to_vec(), pages: Vec::new(), records }
    }

    /// The stream, with right sequences and checksums.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.preamble.clone();
        if !self.pages.is_empty() {
            let start = (PREAMBLE + PlacedHead::BYTES + self.pages.len()) as u64;
            let end = start + self.records.iter().map(|(_, payload)| (HEADER + payload.len()) as u64).sum::<u64>();
            bytes.extend(PlacedHead { records: Some(start..end.max(start + 1)) }.bytes());
            bytes.extend(&self.pages);
        }
        for (sequence, (kind, payload)) in self.records.iter().enumerate() {
            let at = bytes.len();
            bytes.extend([kind.to_le_bytes(), [0; 2]].concat());
            bytes.extend([(payload.len() as u32).to_le_bytes(), (sequence as u32).to_le_bytes()].concat());
            let mut hasher = crc32fast::Hasher::new();
            hasher.update(&bytes[at..]);
            hasher.update(payload);
            bytes.extend(hasher.finalize().to_le_bytes());
            bytes.extend(payload);
        }
        bytes
    }

    /// Changes a byte of the preamble, whose checksum stays right.
    pub(crate) fn set_preamble(&mut self, at: usize, byte: u8) {
        let checked = PREAMBLE - 4;
        self.preamble[at % checked] = byte;
        let sum = crc32fast::hash(&self.preamble[..checked]);
        self.preamble[checked..].copy_from_slice(&sum.to_le_bytes());
    }

    /// Where its records begin, and where the last one ends.
    pub(crate) fn ends(&self) -> Vec<usize> {
        let head = if self.pages.is_empty() { 0 } else { PlacedHead::BYTES };
        let first = self.preamble.len() + head + self.pages.len();
        let mut at = first;
        let ends = self.records.iter().map(|(_, payload)| {
            at += HEADER + payload.len();
            at
        });
        std::iter::once(first).chain(ends).collect()
    }
}

/// Has a machine of [`PAGES`] receive these bytes; whether it runs.
pub(crate) fn play(
    bytes: Vec<u8>,
    answers: bool,
) -> (Destination, Result<migration::Summary, migration::MigrationError>) {
    let destination = Destination::new(&PAGES).waiting();
    let connection = if answers {
        let (reader, writer) = (Box::new(Cursor::new(bytes)), Box::new(io::sink()));
        Connection { reader, writer, cut: Arc::new(|| ()), answers, others_come: false, place: None }
    } else {
        let mut file = empty();
        file.write_all(&bytes).unwrap();
        file.rewind().unwrap();
        Connection::out_of_file(file).unwrap()
    };
    let received = migration::receive(&destination, &mut once(connection), &Control::new(Parameters::default()));
    // A guest that was started in time, and whose memory never came.
    use migration::MigrationError::{Lacking, Unreadable};
    let is_lost = matches!(received, Err(Lacking { pages: 1.. } | Unreadable { pages: 1.., .. }));
    assert_eq!(received.is_ok() || is_lost, destination.runs());
    if let Err(error) = &received {
        let line = error.one_line();
        assert!(!line.is_empty() && !line.contains(char::is_control), "{line:?}");
    }
    (destination, received)
}

/// A file of nobody else's.
fn empty() -> File {
    memfd_create("tape", MFdFlags::MFD_CLOEXEC).unwrap().into()
}

/// Keeps what is written.
struct Tee(Arc<Mutex<Vec<u8>>>, Option<Box<dyn Write + Send>>);

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.1.as_mut().map_or(Ok(bytes.len()), |to| to.write(bytes))?;
        self.0.lock().unwrap().extend(&bytes[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.as_mut().map_or(Ok(()), |to| to.flush())
    }
}
