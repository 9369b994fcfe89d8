//! Streams as they are, as they were, and as nobody should send them.

use std::io::Read;

use migration::stream::{MOST_PAGES, PAGE, Pages, Receiver, Record, Run, Sender, StreamError};
use proptest::prelude::*;

/// A record that owns its bytes.
#[derive(Clone, Debug)]
struct Owned {
    which: u8,
    bytes: Vec<u8>,
    text: String,
    runs: Vec<Run>,
    number: u64,
}

impl Owned {
    fn record(&self) -> Record<'_> {
        let number = self.number as u32;
        match self.which {
            0 => Record::Description(&self.bytes),
            1 => {
                let pages = 1 + self.number % 3;
                let run = Run { first: self.runs[0].first / 64 * 64, pages, ..self.runs[0] };
                let len = (pages * PAGE) as usize;
                let compressed = self.bytes.len() < len && !self.bytes.is_empty();
                let bytes = if compressed { &self.bytes } else { &[0xa5; 3 * PAGE as usize][..len] };
                Record::Pages(Pages { run, compressed, bytes })
            }
            2 => Record::Zeros(self.runs.clone()),
            3 => Record::Device { name: &self.text, version: number, state: &self.bytes },
            4 => Record::Guest { vcpu: (number != u32::MAX).then_some(number), records: &self.bytes },
            5 => Record::RoundEnds(self.number),
            6 => Record::LastPage,
            7 => Record::Go,
            8 => Record::Ready,
            9 => Record::Refused(&self.text),
            10 => Record::Runs,
            11 => Record::Loaded,
            12 => Record::StateEnds,
            13 => Record::Gone,
            14 => Record::Alive,
            15 => Record::Complete,
            16 => Record::Missing(self.runs.clone()),
            17 => {
                let pages = self.bytes.len() as u64 / 4;
                let run = Run { pages: pages.max(1), ..self.runs[0] };
                let sums = if pages == 0 { &[7; 4] } else { &self.bytes[..pages as usize * 4] };
                Record::Placed { run, at: self.number, sums }
            }
            _ => Record::Wanted(self.runs.clone()),
        }
    }
}

fn owned() -> impl Strategy<Value = Owned> {
    let run = (any::<u32>(), 0..1u64 << 40, 1..1u64 << 20);
    let runs = prop::collection::vec(run.prop_map(|(region, first, pages)| Run { region, first, pages }), 1..5);
    (0..19u8, prop::collection::vec(any::<u8>(), 0..300), "[a-z0-9é./]{0,20}", runs, any::<u64>())
        .prop_map(|(which, bytes, text, runs, number)| Owned { which, bytes, text, runs, number })
}

fn stream(records: &[Owned]) -> Vec<u8> {
    let mut sender = Sender::new(Vec::new());
    for record in records {
        sender.send(&record.record()).unwrap();
    }
    assert_eq!(sender.sent(), sender.connection().len() as u64);
    sender.connection().clone()
}

/// A connection that gives its bytes in pieces.
struct Dripping<'a>(&'a [u8], usize);

impl Read for Dripping<'_> {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        let most = to.len().min(self.1);
        self.0.read(&mut to[..most])
    }
}

fn received(from: impl Read) -> Result<usize, StreamError> {
    let mut receiver = Receiver::new(from);
    let mut count = 0;
    while receiver.receive()?.is_some() {
        count += 1;
    }
    Ok(count)
}

proptest! {
    #[test]
    fn what_is_sent_is_received(records in prop::collection::vec(owned(), 0..8), drip in 1..200usize) {
        let bytes = stream(&records);
        let mut receiver = Receiver::new(Dripping(&bytes, drip));
        for sent in &records {
            prop_assert_eq!(receiver.receive().unwrap(), Some(sent.record()));
        }
        prop_assert!(receiver.receive().unwrap().is_none());
        prop_assert_eq!(receiver.received(), bytes.len() as u64);
    }

    #[test]
    fn one_flipped_bit_is_seen(records in prop::collection::vec(owned(), 1..4), at: prop::sample::Index, bit in 0..8) {
        let mut bytes = stream(&records);
        *at.get_mut(&mut bytes) ^= 1u8 << bit;
        prop_assert!(received(&bytes[..]).is_err());
    }

    #[test]
    fn a_cut_is_seen_but_between_records(records in prop::collection::vec(owned(), 1..4), at: prop::sample::Index) {
        let bytes = stream(&records);
        let cut = at.index(bytes.len());
        let whole = (0..=records.len()).find(|count| stream(&records[..*count]).len() == cut);
        match received(&bytes[..cut]) {
            Ok(count) => prop_assert_eq!(Some(count), whole),
            Err(e) => prop_assert!(matches!(e, StreamError::Truncated) && whole.is_none(), "{e}"),
        }
    }

    #[test]
    fn records_in_another_order_are_refused(records in prop::collection::vec(owned(), 2..5)) {
        let single = |count: usize| stream(&records[..count]).len();
        let bytes = stream(&records);
        let swapped = [&bytes[single(1)..single(2)], &bytes[..single(1)], &bytes[single(2)..]].concat();
        let is = |bytes: &[u8], pair| matches!(received(bytes), Err(StreamError::OutOfOrder { found, expected }) if (found, expected) == pair);
        prop_assert!(is(&swapped, (1, 0)));
        let doubled = [&bytes[..single(1)], &bytes[..]].concat();
        prop_assert!(is(&doubled, (0, 1)));
    }

    #[test]
    fn whatever_comes_is_no_panic(mut bytes in prop::collection::vec(any::<u8>(), 16..600), kind in 0..36u16) {
        _ = received(&bytes[..]);
        // The same with a header that is right.
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[2..4].fill(0);
        let len = bytes.len() as u32 - 16;
        bytes[4..8].copy_from_slice(&len.to_le_bytes());
        bytes[8..12].fill(0);
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&bytes[..12]);
        hasher.update(&bytes[16..]);
        bytes[12..16].copy_from_slice(&hasher.finalize().to_le_bytes());
        let mut receiver = Receiver::new(&bytes[..]);
        if let Ok(Some(Record::Pages(pages))) = receiver.receive() {
            prop_assert!(pages.run.pages <= MOST_PAGES && pages.bytes.len() as u64 <= pages.run.pages * PAGE);
        }
    }
}

/// A length that its sender never sends costs no memory.
#[test]
fn room_grows_as_bytes_come() {
    let mut header = [0; 16];
    header[0] = 4;
    header[4..8].copy_from_slice(&(16u32 << 20).to_le_bytes());
    assert!(matches!(received(&header[..]), Err(StreamError::Truncated)));
    header[4..8].copy_from_slice(&((16u32 << 20) + 1).to_le_bytes());
    assert!(matches!(received(&header[..]), Err(StreamError::TooLong { .. })));
    header[0] = 15;
    assert!(matches!(received(&header[..]), Err(StreamError::UnknownKind { kind: 15, .. })));
}

#[test]
fn what_is_too_long_is_not_sent() {
    let mut sender = Sender::new(Vec::new());
    let long = "x".repeat(5000);
    assert!(matches!(sender.send(&Record::Refused(&long)), Err(StreamError::TooLong { len: 5000, .. })));
    assert!(sender.connection().is_empty());
}

/// Version 1, as it was when it was first written.
#[test]
fn the_bytes_of_version_1_stay() {
    let run = |first, pages| Run { region: 1, first, pages };
    let records = [
        Record::Description(b"{}"),
        Record::Zeros(vec![run(0, 3), run(64, 1 << 20)]),
        Record::Pages(Pages { run: run(5, 2), compressed: true, bytes: b"zstd" }),
        Record::RoundEnds(7),
        Record::LastPage,
        Record::Guest { vcpu: None, records: b"vm" },
        Record::Guest { vcpu: Some(2), records: b"vcpu" },
        Record::Device { name: "rtc", version: 1, state: b"{\"index\":3}" },
        Record::Go,
        Record::Ready,
        Record::Wanted(vec![run(9, 1)]),
        Record::Refused("no"),
        Record::Runs,
        Record::StateEnds,
        Record::Loaded,
        Record::Gone,
        Record::Alive,
        Record::Missing(vec![run(3, 2)]),
        Record::Complete,
        Record::Placed { run: run(7, 2), at: 0x3000, sums: b"sum1sum2" },
    ];
    let mut sender = Sender::new(Vec::new());
    records.iter().for_each(|record| sender.send(record).unwrap());
    let bytes = sender.connection().clone();
    assert_eq!(bytes, wire_kit::golden("migration/stream-1"), "{bytes:02x?}");
    let mut receiver = Receiver::new(&bytes[..]);
    for record in records {
        assert_eq!(receiver.receive().unwrap(), Some(record));
    }
}
