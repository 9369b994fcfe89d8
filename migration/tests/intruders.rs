//! Sources and destinations that keep to the form of the protocol, and mean no good by it.

mod rig;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use migration::stream::{Features, Kind, Preamble, Record, Run, StreamError, VERSIONS};
use migration::{Connection, Control, Event, MigrationError, Parameters, Summary, receive, send};
use nix::errno::Errno;
use rig::peer::{Host, Peer, zeros};
use rig::roads::{Accepts, once, travel, unix};
use rig::watched::Watched;
use rig::{Destination, Ram, Source};

/// Nothing here takes longer, unless something is waited for that never comes.
const LIMIT: Duration = Duration::from_secs(5);

fn parameters() -> Parameters {
    Parameters { stall_limit: LIMIT, connect_limit: LIMIT, fate_limit: LIMIT, ..Parameters::default() }
}

/// What becomes of a destination of 128 pages at such a source, which has two connections.
fn received(features: Features, source: impl FnOnce(&Peer)) -> Result<Summary, MigrationError> {
    let (peer, mut accepts) = Peer::new(2, features);
    let destination = Destination::new(&[128]).waiting();
    thread::scope(|scope| {
        let receives = scope.spawn(|| receive(&destination, &mut accepts, &Control::new(parameters())));
        source(&peer);
        receives.join().unwrap()
    })
}

/// Otherwise it would be several connections.
#[test]
fn a_connection_has_one_last_page_before_the_guest_runs() {
    let received = received(Features::POST_COPY, |peer| {
        let mut lines = peer.begins();
        lines[1].say(&[Record::LastPage, Record::LastPage]);
        lines[0].hears_refusal();
    });
    let Err(MigrationError::Unexpected { connection: 1, kind: Kind::LastPage, .. }) = received else {
        panic!("{received:?}");
    };
}

/// A page that was put off comes once the guest runs: before that nobody asked for it.
#[test]
fn no_page_comes_between_the_last_one_and_the_start() {
    let received = received(Features::POST_COPY, |peer| {
        let mut lines = peer.begins();
        lines[0].say(&[zeros(0, 64), Record::LastPage]);
        lines[1].say(&[zeros(64, 64), Record::LastPage]);
        lines[0].say(&[Record::Missing(vec![Run { region: 0, first: 64, pages: 1 }])]);
        lines[1].say(&[zeros(64, 1)]);
        lines[0].hears_refusal();
    });
    let Err(MigrationError::Unexpected { connection: 1, kind: Kind::Zeros, .. }) = received else {
        panic!("{received:?}");
    };
}

/// Too many files are open for a while, before a source comes and between its connections: it is told once, and nothing has happened.
#[test]
fn a_door_that_fails_for_a_while_stays_open() {
    let source = Source::new(Ram::filled(&[128]));
    let destination = Destination::like(&source);
    let (opens, mut accepts) = unix();
    let mut calls = 0;
    let failing: Accepts = Box::new(move |time| {
        calls += 1;
        match calls {
            1..=3 => Err(Errno::EMFILE.into()),
            4 => Err(Errno::ECONNABORTED.into()),
            even if even % 2 == 0 => Err(Errno::EMFILE.into()),
            _ => accepts(time),
        }
    });
    let controls = (Control::new(Parameters { connections: 3, ..parameters() }), Watched::new(parameters()));
    let (sent, received) = travel(&source, &destination, (opens, failing), (&controls.0, &controls.1));
    sent.unwrap();
    received.unwrap();
    let is_telling = |event: &Event| matches!(event, Event::TurnedAway(why) if why.starts_with("nobody can be let in"));
    assert_eq!(controls.1.events().iter().filter(|event| is_telling(event)).count(), 2);
}

/// What becomes of a source of 128 pages, which take hours, at such a destination.
fn sent(destination: impl FnOnce(&Host, &Watched), source: &Source) -> Result<Summary, MigrationError> {
    let (host, mut opens) = Host::new();
    let control = Watched::new(Parameters { max_bandwidth: 64, ..parameters() });
    thread::scope(|scope| {
        let sends = scope.spawn(|| send(source, &mut opens, &control));
        destination(&host, &control);
        sends.join().unwrap()
    })
}

/// Answers that nobody has asked for are not kept until somebody does.
#[test]
fn answers_before_their_time_take_no_memory() {
    let missing = || Record::Missing(vec![Run { region: 0, first: 0, pages: 128 }]);
    for said in [Record::Ready, Record::Loaded, Record::Runs, Record::Complete, missing()] {
        let source = Source::new(Ram::filled(&[128]));
        let sent = sent(
            |host, control| {
                let mut line = host.greets();
                line.say(&[Record::Ready]);
                control.reaches("active");
                line.floods(&said);
            },
            &source,
        );
        let Err(MigrationError::Unexpected { kind, .. }) = sent else { panic!("{sent:?}") };
        assert!(kind == said.kind() && source.runs());
    }
}

/// What is missing may be said as often as one likes: it is a set of pages.
#[test]
fn what_is_missing_is_no_more_than_there_is() {
    let source = Source::new(Ram::filled(&[128]));
    let (host, mut opens) = Host::new();
    let control = Watched::new(Parameters { post_copy: true, ..parameters() });
    assert!(control.start_post_copy());
    thread::scope(|scope| {
        let sends = scope.spawn(|| send(&source, &mut opens, &control));
        let mut line = host.greets();
        line.say(&[Record::Ready]);
        line.until(Kind::StateEnds);
        line.say(&[Record::Loaded]);
        line.until(Kind::Go);
        line.say(&[Record::Runs]);
        drop(line);
        control.reaches("postcopy-paused");
        assert!(control.recover(|| ()));
        let mut line = host.greets();
        let run = Run { region: 0, first: 1, pages: 127 };
        line.say(&[Record::Missing(vec![run; 4000]), Record::Missing(vec![run; 4000]), Record::Ready]);
        control.reaches("postcopy-recover");
        line.until(Kind::LastPage);
        line.say(&[Record::Complete]);
        line.until(Kind::Gone);
        sends.join().unwrap().unwrap();
    });
    assert_eq!(control.progress().remaining, 0);
}

/// Strangers who say nothing, at the front and between a source's connections: each is waited for beside the others, so the source, whose
/// connections have less time than one stranger, comes through.
#[test]
fn silent_strangers_hold_up_nobody() {
    let (peer, mut accepts) = Peer::new(2, Features::default());
    let destination = Destination::new(&[128]);
    let control = Control::new(parameters());
    let mut strangers: Vec<_> = (0..20).map(|_| peer.knocks()).collect();
    thread::scope(|scope| {
        let receives = scope.spawn(|| receive(&destination, &mut accepts, &control));
        let mut lines = vec![peer.starts()];
        strangers.extend((0..4).map(|_| peer.knocks()));
        lines.push(peer.connects(1, Features::default()));
        lines[0].say(&[zeros(0, 64), Record::LastPage, Record::StateEnds]);
        lines[1].say(&[zeros(64, 64), Record::LastPage]);
        lines[0].hands_over();
        receives.join().unwrap().unwrap();
    });
    // They are gone with it.
    for mut stranger in strangers {
        assert_eq!(stranger.read(&mut [0]).unwrap(), 0);
    }
}

/// A page connection, or a recovery, of a migration whose destination was another process; somebody who can't be answered.
#[test]
fn who_begins_no_migration_ends_no_wait() {
    let (peer, mut accepts) = Peer::new(1, Features::default());
    let destination = Destination::new(&[128]);
    let control = Watched::new(parameters());
    thread::scope(|scope| {
        let receives = scope.spawn(|| receive(&destination, &mut accepts, &control));
        for (connection, features) in [(1, Features::default()), (0, Features::RECOVERY), (0, Features::ONE_WAY)] {
            let mut other = peer.knocks();
            let offer = Preamble { versions: VERSIONS, connection, connections: 2, id: [9; 16], features };
            offer.write_to(&mut other).unwrap();
            assert_eq!(other.read(&mut [0]).unwrap(), 0);
        }
        let mut line = peer.starts();
        line.say(&[zeros(0, 128), Record::LastPage, Record::StateEnds]);
        line.hands_over();
        receives.join().unwrap().unwrap();
    });
    assert_eq!(control.events().iter().filter(|event| matches!(event, Event::TurnedAway(_))).count(), 3);
}

/// A door is one guest's: the source of a second one learns why nobody answers it, and the destination's log has it.
#[test]
fn a_second_guest_is_told_apart_and_the_first_comes() {
    let (peer, mut accepts) = Peer::new(1, Features::default());
    let control = Watched::new(parameters());
    thread::scope(|scope| {
        let receives = scope.spawn(|| receive(&Destination::new(&[128]), &mut accepts, &control));
        let mut line = peer.starts();
        let second = Source::new(Ram::filled(&[128]));
        let sent = send(&second, &mut |_| Connection::unix(peer.knocks()), &Control::new(parameters()));
        let Err(error @ MigrationError::Lost { connection: 0, .. }) = sent else { panic!("{sent:?}") };
        assert!(error.one_line().contains("another guest may be on its way there") && second.runs(), "{error}");
        line.say(&[zeros(0, 128), Record::LastPage, Record::StateEnds]);
        line.hands_over();
        receives.join().unwrap().unwrap();
    });
    let events = control.events();
    let told: Vec<_> = events.iter().filter(|event| matches!(event, Event::TurnedAway(_))).collect();
    assert!(matches!(told[..], [Event::TurnedAway(why)] if why.starts_with("the source of another guest")), "{told:?}");
}

/// However many knock, few are let in at a time: the others wait where they cost nothing.
#[test]
fn few_are_let_in_at_a_time() {
    let (peer, mut accepts) = Peer::new(1, Features::default());
    let control = Watched::new(Parameters { connect_limit: Duration::from_millis(200), ..parameters() });
    let strangers: Vec<_> = (0..100).map(|_| peer.knocks()).collect();
    let (mut let_in, mut most) = (0, 0);
    let mut counting = |time| {
        let accepted = accepts(time)?;
        let_in += usize::from(accepted.is_some());
        most = most.max(let_in - control.events().iter().filter(|e| matches!(e, Event::TurnedAway(_))).count());
        Ok(accepted)
    };
    thread::scope(|scope| {
        let receives = scope.spawn(|| receive(&Destination::new(&[128]), &mut counting, &control));
        // The source that is behind them is heard.
        let mut line = peer.starts();
        line.say(&[Record::Go]);
        line.hears_refusal();
        receives.join().unwrap().unwrap_err();
    });
    drop(strangers);
    assert!(most <= 32, "{most} at a time");
}

/// Whoever says nothing is said to have said nothing, not to have ended too early.
#[test]
fn a_preamble_that_is_late_is_called_late() {
    let limit = Duration::from_millis(100);
    let parameters = Parameters { connect_limit: limit, ..parameters() };
    for said in [0, 20] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&[b"OUTBOARD", &[0; 12][..]].concat()[..said]).unwrap();
        let mut accepts = once(Connection::unix(theirs).unwrap());
        let received = receive(&Destination::new(&[128]), &mut accepts, &Control::new(parameters.clone()));
        let Err(MigrationError::Stream { source: StreamError::Late { limit: told }, .. }) = received else {
            panic!("{received:?}");
        };
        assert_eq!(told, limit);
    }
    let source = Source::new(Ram::filled(&[128]));
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut ours = Some(ours);
    let mut opens = |_| Connection::unix(ours.take().unwrap());
    let sent = send(&source, &mut opens, &Control::new(parameters));
    let Err(MigrationError::Stream { source: StreamError::Late { .. }, .. }) = sent else { panic!("{sent:?}") };
    assert!(source.runs());
}
