//! Guests that run at the destination before all of their pages are there.

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use migration::{Control, MigrationError, Parameters, Phase};
use rig::roads::{Breaks, Opens, Toll, breaking, travel, unix};
use rig::watched::Watched;
use rig::{Destination, Halts, Ram, Source, Writer};

const PAGES: [u64; 2] = [2000, 7];

fn parameters(connections: u16) -> Parameters {
    Parameters {
        connections,
        post_copy: true,
        // It would not end by itself.
        max_bandwidth: 4 << 20,
        max_post_copy_bandwidth: 30 << 20,
        downtime_limit: Duration::ZERO,
        fate_limit: Duration::from_secs(20),
        ..Parameters::default()
    }
}

/// A guest that writes without end until it is switched over, and then looks at all of its memory. The main connection breaks after
/// so many bytes, the first time after the first number, as long as there are numbers.
fn moves(parameters: Parameters, mut breaks: Vec<Breaks>) -> (Watched, Watched) {
    let source = Source::new(Ram::filled(&PAGES));
    let destination = Destination::like(&source).waiting();
    let ours = Parameters { fate_limit: parameters.fate_limit, ..Parameters::default() };
    let controls = (Watched::new(parameters), Watched::new(ours));
    let (mut opens, accepts) = unix();
    breaks.reverse();
    let breaks_at_all = !breaks.is_empty();
    let opens: Opens = Box::new(move |number| {
        let next = if number == 0 { breaks.pop() } else { None };
        Ok(breaking(opens(number)?, next.unwrap_or(Breaks::NEVER), &Arc::new(Toll::default())))
    });
    let writer = Writer { pages: 1500, burst: 20, sleep: Duration::from_micros(100) };
    if breaks_at_all {
        // What breaks before the guest was switched over is no post-copy.
        assert!(controls.0.start_post_copy());
    }
    thread::scope(|scope| {
        scope.spawn(|| source.write_on(writer));
        let _halts = Halts(&source);
        scope.spawn(|| destination.touch_all(&source.ram));
        scope.spawn(|| {
            controls.0.reaches("active");
            controls.0.start_post_copy();
            while !controls.0.phase().is_last() {
                controls.0.recover(|| {});
                thread::sleep(Duration::from_millis(1));
            }
        });
        let (sent, received) = travel(&source, &destination, (opens, accepts), (&*controls.0, &*controls.1));
        if received.is_err() {
            destination.end();
        }
        sent.unwrap();
        received.unwrap();
    });
    assert!(destination.runs() && !source.runs() && source.gone.load(Ordering::Relaxed));
    destination.check_touched(&source.ram);
    controls
}

#[test]
fn it_runs_there_before_its_pages_do() {
    for (connections, zstd) in [(1, None), (3, Some(1))] {
        let (source, destination) = moves(Parameters { zstd, ..parameters(connections) }, Vec::new());
        let expected = [Phase::Setup, Phase::Active, Phase::Device, Phase::PostcopyActive, Phase::Completed];
        assert_eq!(source.phases(), expected);
        assert_eq!(destination.phases(), [Phase::Setup, Phase::Active, Phase::PostcopyActive, Phase::Completed]);
        let (sent, received) = (source.progress(), destination.progress());
        assert!(sent.postcopy_requests > 0 && received.postcopy_requests > 0, "{sent:?} {received:?}");
        assert_eq!(sent.remaining, 0);
    }
}

/// Broken again and again, at either end of a record or within, in both directions: it recovers.
#[test]
fn a_lost_connection_is_waited_for() {
    let recovered = AtomicU64::new(0);
    thread::scope(|scope| {
        for turn in 0..4u64 {
            let recovered = &recovered;
            scope.spawn(move || {
                for point in 0..6 {
                    let sent = 300_000 + (turn * 6 + point) * 290_007;
                    let breaks = vec![
                        Breaks { sent, ..Breaks::NEVER },
                        // In the middle of saying what is missing, of the first pages, of asking for them.
                        Breaks { received: 48 + 30 * (point + 1), ..Breaks::NEVER },
                        Breaks { sent: 40 + 60_000 * point, ..Breaks::NEVER },
                        Breaks { received: 2_000 + 300 * turn, ..Breaks::NEVER },
                    ];
                    let connections = 1 + (turn % 3) as u16;
                    let (source, _) = moves(parameters(connections), breaks);
                    let paused = source.phases().iter().filter(|phase| phase.word() == "postcopy-paused").count();
                    recovered.fetch_add(paused as u64, Ordering::Relaxed);
                }
            });
        }
    });
    assert!(recovered.load(Ordering::Relaxed) > 20);
}

/// Connections that work are given up because somebody wants others.
#[test]
fn a_connection_may_be_given_up() {
    let source = Source::new(Ram::filled(&PAGES));
    let destination = Destination::like(&source).waiting();
    let controls = (Watched::new(parameters(2)), Control::new(Parameters::default()));
    thread::scope(|scope| {
        scope.spawn(|| {
            controls.0.reaches("active");
            assert!(controls.0.start_post_copy() && !controls.0.recover(|| {}));
            controls.0.reaches("postcopy-active");
            assert!(!controls.0.cancel());
            if controls.0.give_up_connection() {
                while !controls.0.phase().is_last() {
                    controls.0.recover(|| {});
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        let (sent, received) = travel(&source, &destination, unix(), (&*controls.0, &controls.1));
        sent.unwrap();
        received.unwrap();
    });
    assert_eq!(source.ram.differs(&destination.ram), []);
}

#[test]
fn a_destination_that_needs_its_memory_says_so_before_anything_moves() {
    let source = Source::new(Ram::filled(&PAGES));
    let destination = Destination::like(&source);
    let controls = (Control::new(parameters(1)), Control::new(Parameters::default()));
    let (sent, received) = travel(&source, &destination, unix(), (&controls.0, &controls.1));
    assert!(matches!(sent, Err(MigrationError::NoPostCopy)), "{sent:?}");
    assert!(received.is_err() && source.runs() && source.logged.load(Ordering::Relaxed) == 0);
}
