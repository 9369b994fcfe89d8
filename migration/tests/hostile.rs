//! Streams that nobody should send, and answers that nobody should give.

mod rig;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use migration::stream::{Features, Preamble, Record, Sender, StreamError, VERSIONS};
use migration::{Connection, Control, MigrationError, Parameters, receive, send};
use proptest::prelude::*;
use rig::roads::{accepts, once, unix};
use rig::tape::{PAGES, Tape, play};
use rig::{Destination, Ram, Source};

static TAPES: LazyLock<[Tape; 6]> = LazyLock::new(|| {
    let two_way = [Tape::two_way(None), Tape::two_way(Some(3)), Tape::post_copy()];
    let [plain, squeezed, post_copy] = two_way;
    [Tape::one_way(None), Tape::one_way(Some(1)), plain, squeezed, post_copy, Tape::mapped()]
});

/// Whether the source of that tape listens.
fn answers(which: usize) -> bool {
    (2..5).contains(&which)
}

/// The records that end a tape, and come when the guest runs already.
fn after_go(which: usize) -> usize {
    TAPES[which].records.iter().rev().position(|(kind, _)| *kind == 8).unwrap()
}

#[test]
fn real_streams_are_received() {
    for (which, tape) in TAPES.iter().enumerate() {
        let (destination, received) = play(tape.bytes(), answers(which));
        received.unwrap();
        assert_eq!(Ram::filled(&PAGES).differs(&destination.ram), []);
        assert_eq!(*destination.loaded.lock().unwrap(), Some(rig::state()));
    }
}

fn kinds() -> impl Strategy<Value = u16> {
    prop_oneof![4 => 1..=11u16, 2 => 16..=20u16, 1 => Just(32u16), 1 => any::<u16>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_flipped_bit_is_seen(which in 0..5usize, at: prop::sample::Index, bit in 0..8) {
        let tape = &TAPES[which];
        let mut bytes = tape.bytes();
        let ends = tape.ends();
        let at = at.index(ends[ends.len() - 1 - after_go(which)]);
        bytes[at] ^= 1u8 << bit;
        let (destination, received) = play(bytes, answers(which));
        prop_assert!(received.is_err() && !destination.runs());
    }

    #[test]
    fn what_ends_too_early_is_no_guest(which in 0..6usize, at: prop::sample::Index) {
        let tape = &TAPES[which];
        let ends = tape.ends();
        let at = at.index(ends[ends.len() - 1 - after_go(which)]);
        let (destination, received) = play(tape.bytes()[..at].to_vec(), answers(which));
        prop_assert!(received.is_err() && !destination.runs());
    }

    /// Moved or doubled, as a network would: the sequence tells.
    #[test]
    fn records_elsewhere_are_seen(which in 0..6usize, from: prop::sample::Index, to: prop::sample::Index, keeps: bool) {
        let tape = &TAPES[which];
        let (bytes, ends) = (tape.bytes(), tape.ends());
        // But what gives the guest away: twice is as good as once.
        let count = ends.len() - 2 - after_go(which);
        let mut records: Vec<_> = (0..count).map(|index| &bytes[ends[index]..ends[index + 1]]).collect();
        let (from, to) = (from.index(count), to.index(count));
        let record = if keeps { records[from] } else { records.remove(from) };
        records.insert(to.min(records.len()), record);
        prop_assume!(keeps || from != to);
        let bytes = [&bytes[..ends[0]], &records.concat(), &bytes[ends[count]..]].concat();
        let (destination, received) = play(bytes, answers(which));
        prop_assert!(received.is_err() && !destination.runs(), "{received:?}");
    }

    /// The same from somebody who means it, and numbers the records anew: whatever starts is whole.
    #[test]
    fn no_order_of_records_makes_half_a_guest(
        which in 0..6usize,
        edits in prop::collection::vec((0..4u8, any::<prop::sample::Index>(), any::<prop::sample::Index>(), kinds()), 1..4),
    ) {
        let mut tape = TAPES[which].clone();
        for (edit, from, to, kind) in edits {
            if tape.records.is_empty() {
                break;
            }
            let (from, to) = (from.index(tape.records.len()), to.index(tape.records.len()));
            match edit {
                0 => drop(tape.records.remove(from)),
                1 => tape.records.swap(from, to),
                2 => tape.records.insert(to, tape.records[from].clone()),
                _ => tape.records[from].0 = kind,
            }
        }
        let (destination, received) = play(tape.bytes(), answers(which));
        if received.is_ok() {
            prop_assert!(destination.loaded.lock().unwrap().is_some());
        }
    }

    #[test]
    fn payloads_may_be_anything(
        which in 0..6usize, record: prop::sample::Index, at: prop::sample::Index, bytes in prop::collection::vec(any::<u8>(), 1..40),
    ) {
        let mut tape = TAPES[which].clone();
        let payload = &mut record.get_mut(&mut tape.records).1;
        let at = at.index(payload.len() + 1);
        payload.splice(at..payload.len().min(at + bytes.len()), bytes);
        _ = play(tape.bytes(), answers(which));
    }

    /// A destination that answers whatever it likes: the source keeps the guest unless it was told that it runs there.
    #[test]
    fn answers_may_be_anything(said in prop::collection::vec(0..7u8, 0..6), right in 0..4usize) {
        let script: Vec<_> = [2, 3, 4][..right.min(3)].iter().copied().chain(said).collect();
        let source = Source::new(Ram::filled(&PAGES));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let parameters = Parameters { stall_limit: Duration::from_secs(5), ..Parameters::default() };
        let control = Control::new(parameters);
        let mut ours = Some(ours);
        let mut opens = |_| ours.take().map_or_else(|| Err(std::io::ErrorKind::Unsupported.into()), Connection::unix);
        let sent = thread::scope(|scope| {
            scope.spawn(|| pretend(theirs, &script));
            send(&source, &mut opens, &control)
        });
        let told: Vec<_> = script.iter().copied().filter(|say| *say != 0).collect();
        match sent {
            Ok(_) => prop_assert!(told.starts_with(&[2, 3, 4]) && source.gone.load(Ordering::Relaxed)),
            Err(MigrationError::Unknown) => prop_assert!(told.starts_with(&[2, 3]) && !source.runs()),
            Err(_) => prop_assert!(source.runs()),
        }
    }
}

/// A destination that says these things, whatever it hears.
fn pretend(mut socket: UnixStream, script: &[u8]) {
    let offer = Preamble::read_from(&mut socket).unwrap();
    offer.answer(&VERSIONS, Features::ZSTD).unwrap().write_to(&mut socket).unwrap();
    let mut sender = Sender::new(socket.try_clone().unwrap());
    for say in script {
        let record = match say {
            0 => Record::Alive,
            1 => Record::Refused("no"),
            2 => Record::Ready,
            3 => Record::Loaded,
            4 => Record::Runs,
            5 => Record::Description(b"{}"),
            _ => Record::Go,
        };
        if sender.send(&record).is_err() {
            return;
        }
    }
    let heard: Vec<_> = script.iter().filter(|say| **say != 0).collect();
    if !heard.starts_with(&[&2, &3, &4]) {
        // There is nothing to wait for.
        socket.shutdown(std::net::Shutdown::Write).unwrap();
    }
    // Until the source has enough of it.
    _ = std::io::copy(&mut socket, &mut std::io::sink());
}

#[test]
fn what_is_refused_says_why() {
    let tape = Tape::two_way(None);
    let refused = |edit: &dyn Fn(&mut Tape)| {
        let mut tape = tape.clone();
        edit(&mut tape);
        let (destination, received) = play(tape.bytes(), true);
        assert!(!destination.runs());
        received.unwrap_err()
    };
    let at = |kind: u16| tape.records.iter().position(|(one, _)| *one == kind).unwrap();
    // Pages first.
    let error = refused(&|tape| drop(tape.records.remove(at(1))));
    assert!(matches!(error, MigrationError::Unexpected { .. }), "{error}");
    let error = refused(&|tape| tape.records[at(1)].1 = b"another machine".to_vec());
    assert_eq!(error.one_line(), "preparing the machine failed: no such machine");
    let error = refused(&|tape| tape.records[at(2)].1[0] = 9);
    assert!(matches!(error, MigrationError::NoSuchPages { region: 9, .. }), "{error}");
    let error = refused(&|tape| tape.records[at(2)].1[9] = 1);
    assert!(matches!(error, MigrationError::NoSuchPages { region: 0, .. }), "{error}");
    let error = refused(&|tape| drop(tape.records.remove(at(2))));
    assert!(matches!(error, MigrationError::Missing { region: 0, .. }), "{error}");
    let error = refused(&|tape| tape.records.insert(at(4), tape.records[at(4)].clone()));
    assert!(matches!(&error, MigrationError::Twice { name } if name == "rtc"), "{error}");
    let error = refused(&|tape| {
        let guest = (5, [&u32::MAX.to_le_bytes()[..], &[0; 4], &vec![0; (1 << 20) - 8]].concat());
        tape.records.splice(at(4)..at(4), vec![guest; 64]);
    });
    assert!(matches!(error, MigrationError::TooMuchState { .. }), "{error}");
    let error = refused(&|tape| drop(tape.records.remove(at(8))));
    assert!(matches!(error, MigrationError::Unexpected { .. }), "{error}");
    let error = refused(&|tape| tape.set_preamble(0, b'Q'));
    assert!(matches!(error, MigrationError::Stream { source: StreamError::NoStream, .. }), "{error}");
}

#[test]
fn a_pipe_cannot_carry_answers() {
    let (_, received) = play(Tape::two_way(None).bytes(), false);
    assert!(matches!(received, Err(MigrationError::NoWayBack)), "{received:?}");
}

/// A source that says nothing, after its preamble, or not even that; and one that never makes its other connections.
#[test]
fn whoever_stalls_is_let_go() {
    let limit = Duration::from_millis(300);
    let parameters =
        Parameters { stall_limit: limit, connect_limit: limit, fate_limit: limit, ..Parameters::default() };
    let tape = Tape::two_way(None);
    for says in [0, 20, tape.preamble.len(), tape.ends()[1] + 5] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&tape.bytes()[..says]).unwrap();
        let mut accepts = once(Connection::unix(theirs).unwrap());
        let received = receive(&Destination::new(&PAGES), &mut accepts, &Control::new(parameters.clone()));
        assert!(received.is_err());
        if says >= tape.preamble.len() {
            assert!(matches!(received, Err(MigrationError::Stalled { .. })), "{received:?}");
        }
    }
    let (mut opens, accepts) = unix();
    let announced = Parameters { connections: 3, ..Parameters::default() };
    let source = Source::new(Ram::filled(&PAGES));
    let control = Control::new(parameters);
    let (received, sent) = thread::scope(|scope| {
        let receives = scope.spawn(|| {
            let mut accepts = accepts;
            // The door stays: at one that is gone the source might fail before it has read why it is refused.
            (receive(&Destination::new(&PAGES), &mut accepts, &control), accepts)
        });
        let mut opens = |number| {
            if number == 1 {
                // It takes its time over the second.
                thread::sleep(limit * 4);
            }
            opens(number)
        };
        let sent = send(&source, &mut opens, &Control::new(announced));
        (receives.join().unwrap().0, sent)
    });
    assert!(matches!(received, Err(MigrationError::Connections { came: 1, announced: 3, .. })), "{received:?}");
    assert!(matches!(&sent, Err(MigrationError::Refused(why)) if why.contains("1 of 3")), "{sent:?}");
    assert!(source.runs());
}

/// A destination that takes nothing, and one that doesn't answer.
#[test]
fn a_source_waits_for_no_one_for_ever() {
    let limit = Duration::from_millis(300);
    let parameters = Parameters { stall_limit: limit, connect_limit: limit, ..Parameters::default() };
    for greets in [false, true] {
        let source = Source::new(Ram::filled(&[3000]));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut ours = Some(ours);
        let mut opens = |_| Connection::unix(ours.take().unwrap());
        let sent = thread::scope(|scope| {
            let control = Control::new(parameters.clone());
            let sends = scope.spawn(|| send(&source, &mut opens, &Control::new(parameters.clone())));
            let offer = Preamble::read_from(&mut theirs).unwrap();
            if greets {
                offer.answer(&VERSIONS, Features::ZSTD).unwrap().write_to(&mut theirs).unwrap();
                let mut sender = Sender::new(&mut theirs);
                sender.send(&Record::Ready).unwrap();
                // Talks, but doesn't listen.
                while !sends.is_finished() && sender.send(&Record::Alive).is_ok() {
                    thread::sleep(limit / 10);
                }
            }
            drop(control);
            sends.join().unwrap()
        });
        assert!(source.runs());
        let error = sent.unwrap_err();
        assert_eq!(matches!(error, MigrationError::Stalled { what: "has taken nothing", .. }), greets, "{error}");
    }
}

/// Connections of somebody else, on the way: they are let go, and the guest moves.
#[test]
fn strangers_change_nothing() {
    let (gives, takes) = std::sync::mpsc::channel();
    let source = Source::new(Ram::filled(&PAGES));
    let destination = Destination::like(&source);
    let tape = Tape::two_way(None);
    let mut first = true;
    let mut opens = |_| {
        let pair = || UnixStream::pair();
        let (ours, theirs) = pair()?;
        let strangers = [&b"GET / HTTP/1.1\r\n\r\n"[..], &[], &tape.preamble, &[0; 3000]];
        let strange = |bytes: &[u8]| {
            let (mut ours, theirs) = pair()?;
            ours.write_all(bytes)?;
            ours.shutdown(std::net::Shutdown::Write)?;
            Connection::unix(theirs)
        };
        let late: Vec<_> = strangers.into_iter().map(strange).collect::<std::io::Result<_>>()?;
        if !std::mem::take(&mut first) {
            late.into_iter().for_each(|stranger| gives.send(stranger).unwrap());
        }
        gives.send(Connection::unix(theirs)?).unwrap();
        Connection::unix(ours)
    };
    let mut accepts = accepts(takes);
    let control = Control::new(Parameters { connections: 3, ..Parameters::default() });
    thread::scope(|scope| {
        let receives = scope.spawn(|| receive(&destination, &mut accepts, &Control::new(Parameters::default())));
        send(&source, &mut opens, &control).unwrap();
        receives.join().unwrap().unwrap();
    });
    assert_eq!(source.ram.differs(&destination.ram), []);
}

/// A build of another time.
#[test]
fn another_version_is_refused_by_name() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let future =
        Preamble { versions: 7..=9, connection: 0, connections: 1, id: [3; 16], features: Features::default() };
    future.write_to(&mut ours).unwrap();
    let mut accepts = once(Connection::unix(theirs).unwrap());
    let error = receive(&Destination::new(&PAGES), &mut accepts, &Control::new(Parameters::default())).unwrap_err();
    assert!(error.to_string().contains("7 to 9"), "{error}");
    // And the other side hears why.
    let said = future.accept(&Preamble::read_from(&mut ours).unwrap()).unwrap_err();
    assert_eq!(said.to_string(), error.to_string());
    let mut rest = Vec::new();
    assert_eq!(ours.read_to_end(&mut rest).unwrap(), 0);
}
