//! A side that says what a test has it say.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use migration::Connection;
use migration::stream::{Features, Kind, Preamble, Receiver, Record, Run, Sender, VERSIONS};

use super::DESCRIPTION;
use super::roads::{Accepts, accepts};

/// One connection, past its preambles.
pub(crate) struct Line {
    /// The other side's.
    pub(crate) preamble: Preamble,
    pub(crate) sender: Sender<UnixStream>,
    pub(crate) receiver: Receiver<UnixStream>,
}

impl Line {
    fn new(preamble: Preamble, socket: UnixStream) -> Self {
        Self { preamble, sender: Sender::new(socket.try_clone().unwrap()), receiver: Receiver::new(socket) }
    }

    pub(crate) fn say(&mut self, records: &[Record<'_>]) {
        records.iter().for_each(|record| self.sender.send(record).unwrap());
    }

    /// Waits until the other side says that.
    pub(crate) fn hears(&mut self, expected: &Record<'_>) {
        loop {
            let record = self.receiver.receive().unwrap().expect("something else than its end");
            if record == *expected {
                return;
            }
            assert_eq!(record, Record::Alive);
        }
    }

    /// Waits for a record of that kind.
    pub(crate) fn until(&mut self, kind: Kind) {
        while self.receiver.receive().unwrap().expect("something else than its end").kind() != kind {}
    }

    /// Gives the guest away, once everything was said, and goes.
    pub(crate) fn hands_over(&mut self) {
        self.hears(&Record::Loaded);
        self.say(&[Record::Go]);
        self.hears(&Record::Runs);
        self.say(&[Record::Gone]);
    }

    /// Says that again and again, until nobody takes it, or it is clear that somebody takes all of it.
    pub(crate) fn floods(&mut self, record: &Record<'_>) {
        for _ in 0..100_000 {
            if self.sender.send(record).is_err() {
                return;
            }
        }
    }

    /// Waits until the other side refuses, or is gone.
    pub(crate) fn hears_refusal(&mut self) {
        while let Ok(Some(record)) = self.receiver.receive() {
            if matches!(record, Record::Refused(_)) {
                return;
            }
        }
    }
}

/// A source of a guest of one region.
pub(crate) struct Peer {
    gives: mpsc::Sender<Connection>,
    pub(crate) offer: Preamble,
}

impl Peer {
    /// And the door that it comes by.
    pub(crate) fn new(connections: u16, features: Features) -> (Self, Accepts) {
        let (gives, takes) = mpsc::channel();
        let offer = Preamble { versions: VERSIONS, connection: 0, connections, id: *b"sixteen bytes id", features };
        (Self { gives, offer }, accepts(takes))
    }

    /// Goes there, and says nothing.
    pub(crate) fn knocks(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connection = Connection { others_come: true, ..Connection::unix(theirs).unwrap() };
        self.gives.send(connection).unwrap();
        ours
    }

    /// A connection of these features.
    pub(crate) fn connects(&self, connection: u16, features: Features) -> Line {
        let mut socket = self.knocks();
        Preamble { connection, features, ..self.offer.clone() }.write_to(&mut socket).unwrap();
        let preamble = Preamble::read_from(&mut socket).unwrap();
        Line::new(preamble, socket)
    }

    /// The main connection, until the machine is there.
    pub(crate) fn starts(&self) -> Line {
        let mut line = self.connects(0, self.offer.features);
        line.say(&[Record::Description(DESCRIPTION)]);
        line.hears(&Record::Ready);
        line
    }

    /// It and the others.
    pub(crate) fn begins(&self) -> Vec<Line> {
        let mut lines = vec![self.starts()];
        lines.extend((1..self.offer.connections).map(|number| self.connects(number, self.offer.features)));
        lines
    }
}

/// A destination.
pub(crate) struct Host(mpsc::Receiver<UnixStream>);

impl Host {
    /// And the way to it.
    pub(crate) fn new() -> (Self, impl FnMut(u16) -> io::Result<Connection> + Send) {
        let (gives, takes) = mpsc::channel();
        let opens = move |_| {
            let (ours, theirs) = UnixStream::pair()?;
            gives.send(theirs).map_err(|_| io::ErrorKind::ConnectionRefused)?;
            Connection::unix(ours)
        };
        (Self(takes), opens)
    }

    /// The next that comes; it may use all that it offers.
    pub(crate) fn greets(&self) -> Line {
        let mut socket = self.0.recv_timeout(Duration::from_secs(10)).expect("somebody who comes");
        let offer = Preamble::read_from(&mut socket).unwrap();
        offer.answer(&VERSIONS, offer.features).unwrap().write_to(&mut socket).unwrap();
        Line::new(offer, socket)
    }
}

/// Pages of zeros.
pub(crate) fn zeros(first: u64, pages: u64) -> Record<'static> {
    Record::Zeros(vec![Run { region: 0, first, pages }])
}
