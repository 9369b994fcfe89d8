//! A migration that comes in: a stream of a real source with whatever was done to it, or any bytes.
#![no_main]

use std::sync::LazyLock;

use fuzz::is_one_line;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use rig::tape::{Tape, play};

#[allow(dead_code, reason = "shared with the protocol's own tests")]
#[path = "../../../../migration/tests/rig/mod.rs"]
mod rig;

/// One way and both ways, with pages as they are and compressed, and with most of them after the guest has started;
/// and a file in which pages have places.
static TAPES: LazyLock<[Tape; 6]> = LazyLock::new(|| {
    let [plain, squeezed, post_copy] = [Tape::two_way(None), Tape::two_way(Some(3)), Tape::post_copy()];
    [Tape::one_way(None), Tape::one_way(Some(1)), plain, squeezed, post_copy, Tape::mapped()]
});

#[derive(Arbitrary, Debug)]
enum Edit<'a> {
    Remove(u8),
    Double { from: u8, to: u8 },
    Swap(u8, u8),
    Kind { record: u8, kind: u16 },
    Payload { record: u8, at: u16, bytes: &'a [u8] },
    Shorten { record: u8, len: u16 },
    Preamble { at: u8, byte: u8 },
    Insert { record: u8, kind: u8, payload: &'a [u8] },
}

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    /// Records of a real stream, done something to; numbers and checksums are right.
    Edited { tape: u8, edits: Vec<Edit<'a>> },
    /// Bytes of a real stream.
    Damaged { tape: u8, at: u32, byte: u8, end: u32 },
    /// Any bytes behind a preamble, or without.
    Bytes { tape: u8, greets: bool, bytes: &'a [u8] },
}

fuzz_target!(|input: Input<'_>| {
    let (tape, bytes) = match input {
        Input::Edited { tape, edits } => {
            let mut edited = TAPES[usize::from(tape % 6)].clone();
            edits.iter().for_each(|edit| edit.apply(&mut edited));
            (tape, edited.bytes())
        }
        Input::Damaged { tape, at, byte, end } => {
            let mut bytes = TAPES[usize::from(tape % 6)].bytes();
            let at = at as usize % bytes.len();
            bytes[at] ^= byte;
            bytes.truncate(end as usize);
            (tape, bytes)
        }
        Input::Bytes { tape, greets, bytes } => {
            let preamble = if greets { &TAPES[usize::from(tape % 6)].preamble[..] } else { &[] };
            (tape, [preamble, bytes].concat())
        }
    };
    // Whatever was written, it was in the machine's memory, and what was cleared had been written: the machine looks.
    let (destination, received) = play(bytes, (2..5).contains(&(tape % 6)));
    match received {
        Ok(_) => assert!(destination.loaded.lock().unwrap().is_some()),
        Err(error) => assert!(is_one_line(&error.one_line())),
    }
});

impl Edit<'_> {
    fn apply(&self, tape: &mut Tape) {
        let count = tape.records.len();
        if count == 0 {
            return;
        }
        let index = |index: u8| usize::from(index) % count;
        match *self {
            Self::Remove(record) => drop(tape.records.remove(index(record))),
            Self::Double { from, to } => tape.records.insert(index(to), tape.records[index(from)].clone()),
            Self::Swap(one, other) => tape.records.swap(index(one), index(other)),
            Self::Kind { record, kind } => tape.records[index(record)].0 = kind,
            Self::Payload { record, at, bytes } => {
                let payload = &mut tape.records[index(record)].1;
                let at = usize::from(at) % (payload.len() + 1);
                let end = payload.len().min(at + bytes.len());
                payload.splice(at..end, bytes.iter().copied());
            }
            Self::Shorten { record, len } => tape.records[index(record)].1.truncate(len.into()),
            Self::Preamble { at, byte } => tape.set_preamble(at.into(), byte),
            Self::Insert { record, kind, payload } => {
                tape.records.insert(index(record), (u16::from(kind), payload.to_vec()));
            }
        }
    }
}
