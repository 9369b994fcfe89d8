//! Guests that move, by every kind of connection.

mod rig;

use std::fs::File;
use std::io::{Seek, Write};
use std::thread;
use std::time::Duration;

use migration::stream::Features;
use migration::{Connection, Control, Event, Parameters, Phase};
use rig::roads::{Accepts, Opens, once, tcp, travel, unix};
use rig::watched::Watched;
use rig::{Destination, Halts, Ram, Source, Writer};

const PAGES: [u64; 3] = [1000, 64, 7];

/// A guest that writes while it moves; everything that it wrote is there, and nothing else is.
fn moves(roads: (Opens, Accepts), parameters: Parameters) -> (Watched, Watched) {
    let source = Source::new(Ram::filled(&PAGES));
    let destination = Destination::like(&source);
    let controls = (Watched::new(parameters), Watched::new(Parameters::default()));
    let writer = Writer { pages: 300, burst: 20, sleep: Duration::from_micros(200) };
    thread::scope(|scope| {
        scope.spawn(|| source.write_on(writer));
        let halts = Halts(&source);
        let (sent, received) = travel(&source, &destination, roads, (&*controls.0, &*controls.1));
        drop(halts);
        let (sent, received) = (sent.unwrap(), received.unwrap());
        assert_eq!((sent.version, sent.features), (received.version, received.features));
        let progress = sent.progress;
        assert_eq!(progress.remaining, 0);
        assert_eq!(progress.total, PAGES.iter().sum::<u64>() * 4096);
        assert!(progress.normal_pages + progress.zero_pages >= PAGES.iter().sum::<u64>());
        assert_eq!(progress.normal_pages, received.progress.normal_pages);
        assert_eq!(progress.zero_pages, received.progress.zero_pages);
    });
    assert!(source.writes() > 0 && destination.runs() && !source.runs());
    assert!(source.gone.load(std::sync::atomic::Ordering::Relaxed));
    source.check_counts(&destination.ram);
    assert_eq!(source.ram.differs(&destination.ram), []);
    assert_eq!(*destination.loaded.lock().unwrap(), Some(rig::state()));
    controls
}

#[test]
fn over_one_socket() {
    let (source, destination) = moves(unix(), Parameters::default());
    assert_eq!(source.phases(), [Phase::Setup, Phase::Active, Phase::Device, Phase::Completed]);
    assert_eq!(destination.phases(), [Phase::Setup, Phase::Active, Phase::Completed]);
    let passes = source.events().iter().filter(|event| matches!(event, Event::Pass(_))).count();
    assert_eq!(passes as u64, source.progress().rounds);
}

#[test]
fn over_four_sockets() {
    moves(unix(), Parameters { connections: 4, ..Parameters::default() });
}

#[test]
fn over_tcp() {
    moves(tcp(), Parameters::default());
}

#[test]
fn over_sixteen_tcp_connections() {
    moves(tcp(), Parameters { connections: 16, ..Parameters::default() });
}

#[test]
fn compressed() {
    let parameters = Parameters { connections: 2, zstd: Some(1), ..Parameters::default() };
    let (source, destination) = moves(unix(), parameters);
    let (sent, received) = (source.progress(), destination.progress());
    assert!(sent.compressed_pages >= 300 && sent.compressed_bytes < sent.compressed_pages * 2048, "{sent:?}");
    assert_eq!((sent.compressed_pages, sent.compressed_bytes), (received.compressed_pages, received.compressed_bytes));
}

/// Rounds until next to nothing is left, so that the guest stands still for no longer than that takes.
#[test]
fn in_rounds() {
    let parameters = Parameters { downtime_limit: Duration::from_micros(200), ..Parameters::default() };
    let (source, _) = moves(unix(), parameters);
    assert!(source.progress().rounds > 1);
}

#[test]
fn by_a_pipe() {
    let (ours, theirs) = std::io::pipe().unwrap();
    let (ours, theirs) = (File::from(std::os::fd::OwnedFd::from(ours)), File::from(std::os::fd::OwnedFd::from(theirs)));
    let mut into = Some(theirs);
    let opens = move |_| Connection::into_file(into.take().unwrap());
    let parameters = Parameters { connections: 4, zstd: Some(3), ..Parameters::default() };
    moves((Box::new(opens), once(Connection::out_of_file(ours).unwrap())), parameters);
}

/// Into a file, behind what somebody else wrote there, and twice out of it.
#[test]
fn through_a_file() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"a header of libvirt's").unwrap();
    let source = Source::new(Ram::filled(&PAGES));
    let into = file.try_clone().unwrap();
    let mut opens = |_| Connection::into_file(into.try_clone()?);
    let control = Control::new(Parameters::default());
    let sent = migration::send(&source, &mut opens, &control).unwrap();
    assert_eq!(sent.features, Features::ONE_WAY);
    assert!(!source.runs());
    for _ in 0..2 {
        file.seek(std::io::SeekFrom::Start(21)).unwrap();
        let destination = Destination::like(&source);
        let mut accepts = once(Connection::out_of_file(file.try_clone().unwrap()).unwrap());
        migration::receive(&destination, &mut accepts, &Control::new(Parameters::default())).unwrap();
        assert!(destination.runs());
        assert_eq!(source.ram.differs(&destination.ram), []);
        assert_eq!(*destination.loaded.lock().unwrap(), Some(rig::state()));
    }
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed() {
    let source = Source::new(Ram::filled(&[1000]));
    let destination = Destination::like(&source);
    let parameters = Parameters {
        downtime_limit: Duration::from_millis(10),
        auto_converge: true,
        max_bandwidth: 60 << 20,
        ..Parameters::default()
    };
    let controls = (Control::new(parameters), Control::new(Parameters::default()));
    // Faster than the limit by far: 1000 pages in some milliseconds.
    let writer = Writer { pages: 1000, burst: 200, sleep: Duration::from_micros(500) };
    let (sent, received) = thread::scope(|scope| {
        scope.spawn(|| source.write_on(writer));
        let _halts = Halts(&source);
        travel(&source, &destination, unix(), (&controls.0, &controls.1))
    });
    let progress = sent.unwrap().progress;
    received.unwrap();
    let throttled = source.throttled.lock().unwrap().clone();
    assert_eq!(throttled.first(), Some(&20), "{progress:?}");
    assert!(throttled.is_sorted() && progress.throttle == *throttled.last().unwrap());
    source.check_counts(&destination.ram);
    assert_eq!(source.ram.differs(&destination.ram), []);
}

#[test]
fn it_waits_before_the_switch_if_asked() {
    let source = Source::new(Ram::filled(&PAGES));
    let destination = Destination::like(&source);
    // Silence is no stall: both sides say that they are there.
    let stall_limit = Duration::from_millis(400);
    let parameters = Parameters { pause_before_switchover: true, stall_limit, ..Parameters::default() };
    let (watched, other) = (Watched::new(parameters.clone()), Control::new(parameters));
    let controls = (&*watched, &other);
    let (sent, received) = thread::scope(|scope| {
        scope.spawn(|| {
            while controls.0.phase() != Phase::PreSwitchover {
                assert!(!controls.0.go_on());
                thread::sleep(Duration::from_millis(1));
            }
            assert!(!source.runs());
            thread::sleep(stall_limit * 4);
            assert!(!destination.runs());
            assert!(controls.0.go_on());
        });
        travel(&source, &destination, unix(), controls)
    });
    sent.unwrap();
    received.unwrap();
    let expected = [Phase::Setup, Phase::Active, Phase::PreSwitchover, Phase::Device, Phase::Completed];
    assert_eq!(watched.phases(), expected);
    assert_eq!(source.ram.differs(&destination.ram), []);
}

#[test]
fn the_limit_may_change_on_the_way() {
    let source = Source::new(Ram::filled(&[8000]));
    let destination = Destination::like(&source);
    // A day.
    let parameters = Parameters { max_bandwidth: 400, ..Parameters::default() };
    let controls = (Control::new(parameters), Control::new(Parameters::default()));
    let (sent, received) = thread::scope(|scope| {
        scope.spawn(|| {
            while controls.0.phase() != Phase::Active {
                thread::sleep(Duration::from_millis(1));
            }
            controls.0.set_parameters(Parameters::default()).unwrap();
        });
        travel(&source, &destination, unix(), (&controls.0, &controls.1))
    });
    sent.unwrap();
    received.unwrap();
    assert_eq!(source.ram.differs(&destination.ram), []);
}

#[test]
fn a_handle_is_for_one_migration() {
    let (source, _) = moves(unix(), Parameters::default());
    assert!(!source.cancel());
    let again = Source::new(Ram::filled(&PAGES));
    let error = migration::send(&again, &mut |_| panic!("nothing is opened"), &source).unwrap_err();
    assert!(matches!(error, migration::MigrationError::Busy), "{error}");
    assert!(again.runs());
}
