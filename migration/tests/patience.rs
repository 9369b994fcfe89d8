//! Destinations that are there and don't say what a source waits for while its guest stands still.

mod rig;

use std::thread;
use std::time::Duration;

use migration::stream::{Features, Kind, Record, Run};
use migration::{Control, MigrationError, Parameters, Phase, Summary, receive, send};
use rig::peer::{Host, Line, Peer, zeros};
use rig::watched::Watched;
use rig::{Destination, Ram, Source};

/// What nothing here waits for, and how long answers are waited for.
const LONG: Duration = Duration::from_secs(20);
const LIMIT: Duration = Duration::from_secs(2);

/// A source of 128 pages at such a destination.
fn sent(post_copy: bool, destination: impl FnOnce(&Host, &Watched)) -> (Source, Result<Summary, MigrationError>) {
    let (host, mut opens) = Host::new();
    let source = Source::new(Ram::filled(&[128]));
    let control = Watched::new(Parameters {
        post_copy,
        stall_limit: LONG,
        // That of a recovery's answer, too.
        connect_limit: if post_copy { LIMIT } else { LONG },
        answer_limit: LIMIT,
        fate_limit: LIMIT * 10,
        ..Parameters::default()
    });
    assert_eq!(control.start_post_copy(), post_copy);
    let sent = thread::scope(|scope| {
        let sends = scope.spawn(|| send(&source, &mut opens, &control));
        destination(&host, &control);
        sends.join().unwrap()
    });
    (source, sent)
}

/// Everything until the guest is given away.
fn until_go(host: &Host) -> Line {
    let mut line = host.greets();
    line.say(&[Record::Ready]);
    line.until(Kind::StateEnds);
    line.say(&[Record::Loaded]);
    line.until(Kind::Go);
    line
}

/// Says that it is there, until something is so, or will never be; whether it is.
fn is_there_until(line: &mut Line, over: impl Fn() -> bool) -> bool {
    for _ in 0..200 {
        if over() {
            return true;
        }
        // It may have been cut.
        _ = line.sender.send(&Record::Alive);
        thread::sleep(LIMIT / 10);
    }
    false
}

#[test]
fn a_guest_that_is_never_loaded_goes_on_here() {
    let (source, sent) = sent(false, |host, control| {
        let mut line = host.greets();
        line.say(&[Record::Ready]);
        line.until(Kind::StateEnds);
        is_there_until(&mut line, || control.phase().is_last());
    });
    let Err(MigrationError::NoAnswer { kind: Kind::Loaded, limit: LIMIT }) = sent else { panic!("{sent:?}") };
    assert!(source.runs());
}

/// It may have been started: the destination is asked, as if the connection had been lost, and it is.
#[test]
fn a_destination_that_does_not_say_that_it_runs_is_asked() {
    for runs in [true, false] {
        let (source, sent) = sent(false, |host, _| {
            let mut line = until_go(host);
            let mut question = host.greets();
            assert!(question.preamble.features.has(Features::FATE));
            question.say(&[if runs { Record::Runs } else { Record::Refused("it never will") }]);
            while line.receiver.receive().is_ok_and(|record| record.is_some()) {}
        });
        assert_eq!(sent.is_ok(), runs, "{sent:?}");
        assert_eq!(source.runs(), !runs);
    }
}

/// A recovery that the destination doesn't answer is given up, and the next one may be better.
#[test]
fn a_recovery_that_is_never_ready_is_given_up() {
    let mut why = String::new();
    let (_, sent) = sent(true, |host, control| {
        until_go(host).say(&[Record::Runs]);
        control.reaches("postcopy-paused");
        assert!(control.recover(|| ()));
        let mut silent = host.greets();
        control.reaches("postcopy-recover");
        assert!(is_there_until(&mut silent, || matches!(control.phase(), Phase::PostcopyPaused(_))));
        if let Phase::PostcopyPaused(said) = control.phase() {
            why = said;
        }
        drop(silent);
        while !control.recover(|| ()) {
            thread::sleep(Duration::from_millis(1));
        }
        let mut line = host.greets();
        line.say(&[Record::Missing(vec![Run { region: 0, first: 3, pages: 1 }]), Record::Ready]);
        line.until(Kind::LastPage);
        line.say(&[Record::Complete]);
        line.until(Kind::Gone);
    });
    sent.unwrap();
    assert_eq!(why, "the destination did not say Ready within 2s, though it is there: look at what keeps it");
}

/// Of what somebody offers who recovers or asks, a destination uses what was agreed on at first.
#[test]
fn nobody_agrees_to_what_they_do_not_know() {
    let (peer, mut accepts) = Peer::new(1, Features::POST_COPY);
    let destination = Destination::new(&[128]).waiting();
    let control = Control::new(Parameters::default());
    let answered = thread::scope(|scope| {
        let receives = scope.spawn(|| receive(&destination, &mut accepts, &control));
        let mut line = peer.starts();
        line.say(&[Record::LastPage, Record::Missing(vec![Run { region: 0, first: 0, pages: 128 }])]);
        line.say(&[Record::StateEnds]);
        line.hears(&Record::Loaded);
        line.say(&[Record::Go]);
        line.hears(&Record::Runs);
        let more = Features(1 << 40).or(Features::ZSTD).or(Features::POST_COPY);
        let mut question = peer.connects(0, more.or(Features::FATE));
        question.hears(&Record::Runs);
        let mut line = peer.connects(0, more.or(Features::RECOVERY));
        line.until(Kind::Ready);
        line.say(&[zeros(0, 128), Record::LastPage]);
        line.hears(&Record::Complete);
        line.say(&[Record::Gone]);
        receives.join().unwrap().unwrap();
        [question, line].map(|line| line.preamble.features)
    });
    assert_eq!(answered, [Features::FATE, Features::RECOVERY].map(|one| one.or(Features::POST_COPY)));
}
