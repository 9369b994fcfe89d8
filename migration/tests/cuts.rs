//! Connections that break: whatever breaks and whenever, the guest runs in one place, or stands still and somebody says that nobody knows.

mod rig;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use migration::{Control, MigrationError, Parameters, Phase, Summary};
use rig::roads::{Breaks, Opens, Toll, breaking, travel, unix};
use rig::{Destination, Halts, Ram, Random, Source, Writer};

const PAGES: [u64; 2] = [20, 3];

fn parameters() -> Parameters {
    Parameters { connections: 2, fate_limit: Duration::from_millis(400), ..Parameters::default() }
}

/// Where the guest is after a journey; panics where it is in two places, or in none and nobody says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Here,
    There,
    /// It stands still here and may run there.
    Unknown {
        there: bool,
    },
}

fn place(
    source: &Source,
    destination: &Destination,
    (sent, received): &(Result<Summary, MigrationError>, Result<Summary, MigrationError>),
) -> Place {
    let (here, there) = (source.runs(), destination.runs());
    assert!(!(here && there), "it runs twice: {sent:?} {received:?}");
    assert_eq!(received.is_ok(), there, "{received:?}");
    if there {
        assert_eq!(source.ram.differs(&destination.ram), []);
        assert_eq!(*destination.loaded.lock().unwrap(), Some(rig::state()));
    }
    assert_eq!(source.doubts.load(Ordering::Relaxed), matches!(sent, Err(MigrationError::Unknown)));
    match sent {
        Ok(_) => {
            assert!(there && !here && source.gone.load(Ordering::Relaxed), "{received:?}");
            Place::There
        }
        Err(MigrationError::Unknown) => {
            assert!(!here && !source.gone.load(Ordering::Relaxed));
            Place::Unknown { there }
        }
        Err(error) => {
            assert!(here && !there, "{error}, {received:?}");
            assert!(!error.one_line().is_empty() && !error.one_line().contains('\n'));
            Place::Here
        }
    }
}

/// A journey whose connection of number `which` breaks; whether questions come through.
fn journey(which: u16, breaks: Breaks, asks: bool) -> (Place, Arc<Toll>) {
    let source = Source::new(Ram::filled(&PAGES));
    let destination = Destination::like(&source);
    let toll = Arc::new(Toll::default());
    let (mut opens, accepts) = unix();
    let counted = Arc::clone(&toll);
    let mut opened = 0;
    let breaking: Opens = Box::new(move |number| {
        opened += 1;
        if opened > 2 && !asks {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let connection = opens(number)?;
        // A question's connection has the main one's number, and is whole.
        let breaks = if opened <= 2 && number == which { breaks } else { return Ok(connection) };
        Ok(breaking(connection, breaks, &counted))
    });
    let controls = (Control::new(parameters()), Control::new(parameters()));
    let ends = travel(&source, &destination, (breaking, accepts), (&controls.0, &controls.1));
    let place = place(&source, &destination, &ends);
    for (control, end) in [(&controls.0, &ends.0), (&controls.1, &ends.1)] {
        match end {
            Ok(_) => assert_eq!(control.phase(), Phase::Completed),
            Err(error) => assert_eq!(control.phase(), Phase::Failed(error.one_line())),
        }
    }
    (place, toll)
}

/// Every end of a call of a whole journey, the bytes beside it, and some in between.
fn points(ends: &[u64]) -> Vec<u64> {
    let total = ends.last().copied().unwrap_or(0);
    let mut random = Random(total + 1);
    let beside = ends.iter().flat_map(|end| [end.saturating_sub(1), *end, end + 1, end.saturating_sub(9)]);
    let mut points: Vec<u64> = beside.chain((0..40).map(|_| random.next() % (total + 1))).collect();
    // The end is where it matters.
    points.extend((0..60).map(|back| total.saturating_sub(back)));
    points.sort_unstable();
    points.dedup();
    points
}

/// All of `points`, on as many threads as they need to be done soon: most of each is waiting.
fn each(points: &[u64], journey: impl Fn(u64) -> Place + Sync) -> Vec<(u64, Place)> {
    let next = AtomicU64::new(0);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let mut places = Vec::new();
                    while let Some(point) = points.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                        places.push((*point, journey(*point)));
                    }
                    places
                })
            })
            .collect();
        let mut places: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        places.sort_unstable_by_key(|(point, _)| *point);
        places
    })
}

fn calls(which: u16) -> [Vec<u64>; 2] {
    let (place, toll) = journey(which, Breaks::NEVER, true);
    assert_eq!(place, Place::There);
    let mut ends = toll.ends.lock().unwrap().clone();
    ends.iter_mut().for_each(|ends| ends.sort_unstable());
    ends
}

/// With a network that comes back nothing stays unknown.
#[test]
fn on_the_way_there_and_the_network_comes_back() {
    for which in [0, 1] {
        let places = each(&points(&calls(which)[0]), |sent| journey(which, Breaks { sent, ..Breaks::NEVER }, true).0);
        assert!(places.iter().all(|(_, place)| matches!(place, Place::Here | Place::There)), "{places:?}");
        let [here, there] =
            [Place::Here, Place::There].map(|one| places.iter().filter(|(_, place)| *place == one).count());
        assert!(here > 10 && there > 0, "{places:?}");
    }
}

#[test]
fn on_the_way_back_and_the_network_comes_back() {
    let places = each(&points(&calls(0)[1]), |received| journey(0, Breaks { received, ..Breaks::NEVER }, true).0);
    assert!(places.iter().all(|(_, place)| matches!(place, Place::Here | Place::There)), "{places:?}");
    assert!(places.iter().any(|(_, place)| *place == Place::Here), "{places:?}");
    assert!(places.iter().any(|(_, place)| *place == Place::There), "{places:?}");
}

/// With one that doesn't: it is unknown where it has to be, and only there.
#[test]
fn on_the_way_there_for_good() {
    let places = each(&points(&calls(0)[0]), |sent| journey(0, Breaks { sent, ..Breaks::NEVER }, false).0);
    let unknown: Vec<_> = places.iter().filter(|(_, place)| matches!(place, Place::Unknown { .. })).collect();
    let (last, _) = places.last().unwrap();
    // Within the last record but one, which gives the guest away (and the last).
    assert!(unknown.iter().all(|(point, _)| *point >= last - 40), "{unknown:?}");
}

#[test]
fn on_the_way_back_for_good() {
    let places = each(&points(&calls(0)[1]), |received| journey(0, Breaks { received, ..Breaks::NEVER }, false).0);
    let unknown = places.iter().filter(|(_, place)| matches!(place, Place::Unknown { .. })).count();
    let there = places.iter().filter(|(_, place)| matches!(place, Place::Unknown { there: true })).count();
    assert!(unknown > 0 && there > 0, "{places:?}");
}

#[test]
fn whatever_fails_at_the_source() {
    for what in ["start_log", "take_dirty", "read", "pause", "state"] {
        let source = Source::new(Ram::filled(&PAGES));
        *source.fails.write().unwrap() = Some(what);
        let destination = Destination::like(&source);
        let controls = (Control::new(parameters()), Control::new(parameters()));
        let ends = travel(&source, &destination, unix(), (&controls.0, &controls.1));
        assert_eq!(place(&source, &destination, &ends), Place::Here, "{what}");
        let line = ends.0.unwrap_err().one_line();
        assert!(line.contains(what), "{line}");
    }
}

#[test]
fn whatever_fails_at_the_destination_is_told_at_the_source() {
    for what in ["prepare", "write", "load", "start"] {
        let source = Source::new(Ram::filled(&PAGES));
        let destination = Destination::like(&source).failing(what);
        let controls = (Control::new(parameters()), Control::new(parameters()));
        let ends = travel(&source, &destination, unix(), (&controls.0, &controls.1));
        assert_eq!(place(&source, &destination, &ends), Place::Here, "{what}");
        let (sent, received) = (ends.0.unwrap_err().one_line(), ends.1.unwrap_err().one_line());
        assert!(sent.starts_with("the destination refused: ") && sent.contains(what), "{sent}");
        assert!(received.contains(what), "{received}");
        assert_eq!(source.logged.load(Ordering::Relaxed) > 0, what != "prepare");
    }
}

/// A defect of either side's, in whichever thread: both end, and the guest is where it was.
#[test]
fn whatever_panics() {
    for (here, what) in ["start_log", "take_dirty", "read", "pause", "state"]
        .map(|what| (true, what))
        .into_iter()
        .chain(["prepare", "write", "load", "start"].map(|what| (false, what)))
    {
        let source = Source::new(Ram::filled(&[300]));
        let destination = Destination::like(&source);
        *source.panics.write().unwrap() = Some(what).filter(|_| here);
        let destination = if here { destination } else { destination.panicking(what) };
        let controls = (Control::new(parameters()), Control::new(parameters()));
        let ends = travel(&source, &destination, unix(), (&controls.0, &controls.1));
        assert_eq!(place(&source, &destination, &ends), Place::Here, "{what}");
        let (end, control) = if here { (ends.0.err(), &controls.0) } else { (ends.1.err(), &controls.1) };
        assert!(matches!(end, Some(MigrationError::Panicked)), "{what}: {end:?}");
        assert!(matches!(control.phase(), Phase::Failed(_)), "{what}");
    }
}

#[test]
fn a_guest_that_cannot_go_on_is_said_to_stand_still() {
    let source = Source::new(Ram::filled(&PAGES));
    *source.fails.write().unwrap() = Some("resume");
    let destination = Destination::like(&source).failing("load");
    let controls = (Control::new(parameters()), Control::new(parameters()));
    let (sent, _) = travel(&source, &destination, unix(), (&controls.0, &controls.1));
    let error = sent.unwrap_err();
    assert!(matches!(error, MigrationError::StaysPaused { .. }) && !source.runs(), "{error}");
    assert!(error.one_line().contains("resume does not work here") && error.one_line().contains("load"), "{error}");
}

/// A guest that writes all the time, and migrations that fail: it goes on, and the next migration starts anew, so nothing that was
/// written is missing where it ends up.
#[test]
fn a_failed_migration_loses_no_write() {
    let moments: Vec<u64> = (0..24).collect();
    each(&moments, |moment| {
        let source = Source::new(Ram::filled(&[400, 3]));
        let writer = Writer { pages: 200, burst: 10, sleep: Duration::from_micros(200) };
        thread::scope(|scope| {
            scope.spawn(|| source.write_on(writer));
            let _halts = Halts(&source);
            for attempt in 0..3 {
                let destination = Destination::like(&source);
                let toll = Arc::new(Toll::default());
                let (mut opens, accepts) = unix();
                let breaks = Breaks { sent: 40_000 * (moment + 1) + attempt * 300_000, ..Breaks::NEVER };
                let opens: Opens = Box::new(move |number| Ok(breaking(opens(number)?, breaks, &toll)));
                let controls = (Control::new(parameters()), Control::new(parameters()));
                let ends = travel(&source, &destination, (opens, accepts), (&controls.0, &controls.1));
                if place(&source, &destination, &ends) != Place::Here {
                    break;
                }
            }
            if source.runs() {
                let destination = Destination::like(&source);
                let controls = (Control::new(parameters()), Control::new(parameters()));
                let ends = travel(&source, &destination, unix(), (&controls.0, &controls.1));
                assert_eq!(place(&source, &destination, &ends), Place::There);
                source.check_counts(&destination.ram);
            }
        });
        Place::There
    });
}

/// At any moment, on either side.
#[test]
fn cancelled() {
    let cancelled = AtomicU64::new(0);
    let moments: Vec<u64> = (0..120).collect();
    each(&moments, |moment| {
        let source = Source::new(Ram::filled(&[300]));
        let destination = Destination::like(&source);
        let slow = Parameters { max_bandwidth: 20 << 20, zstd: (moment % 3 == 0).then_some(1), ..parameters() };
        let controls = (Control::new(slow), Control::new(parameters()));
        let (control, other) = if moment % 2 == 0 { (&controls.0, &controls.1) } else { (&controls.1, &controls.0) };
        let ends = thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_micros(moment * 700));
                if control.cancel() {
                    cancelled.fetch_add(1, Ordering::Relaxed);
                    // Twice is as good as once.
                    control.cancel();
                }
            });
            travel(&source, &destination, unix(), (&controls.0, &controls.1))
        });
        let place = place(&source, &destination, &ends);
        let is_cancelled = matches!(control.phase(), Phase::Cancelled);
        assert!(!is_cancelled || place == Place::Here, "{ends:?}");
        assert!(control.phase().is_last() && other.phase().is_last());
        place
    });
    assert!(cancelled.load(Ordering::Relaxed) > 20);
}

#[test]
fn before_it_began() {
    let source = Source::new(Ram::filled(&PAGES));
    let control = Control::new(parameters());
    assert!(control.cancel());
    let (mut opens, _accepts) = unix();
    let error = migration::send(&source, &mut opens, &control).unwrap_err();
    assert!(matches!(error, MigrationError::Cancelled) && source.runs(), "{error}");
    assert_eq!(control.phase(), Phase::Cancelled);
}
