//! Connections that come: the main one, those for pages, and questions.

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{self, Scope};
use std::time::Duration;

use nix::errno::Errno;

use super::Accept;
use super::fate::Fate;
use super::hall::{Hall, Open, Visit};
use super::pages::Putter;
use crate::ending::{caught, lock};
use crate::progress::Meter;
use crate::session::Session;
use crate::stream::{Features, Kind, Preamble, Record, Sender, VERSIONS};
use crate::watch::{LineReceiver, within};
use crate::{Connection, Control, MigrationError, Parameters};

/// How long nobody notices that no connection is wanted any more.
const SLICE: Duration = Duration::from_millis(50);
/// When it is tried again to let somebody in.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a stranger may take to say who they are.
const GREETING: Duration = Duration::from_secs(10);

/// Who stands at the door.
#[derive(Clone)]
pub(super) struct Door<'s, 'e, 'v> {
    pub(super) scope: &'s Scope<'s, 'e>,
    pub(super) hall: &'e Hall<'v>,
    pub(super) fate: Arc<Fate>,
    pub(super) control: &'e Control,
    pub(super) parameters: Parameters,
}

impl<'s, 'e: 's, 'v: 's> Door<'s, 'e, 'v> {
    /// Until the hall is shut, or nobody can come.
    pub(super) fn stand(&self, accept: &mut Accept<'_>) {
        let mut told = HashSet::new();
        // Who is here, and has no thread yet.
        let mut waits = None;
        while let Some(visit) = self.hall.admits() {
            let came = match waits.take().map_or_else(|| accept(SLICE), |connection| Ok(Some(connection))) {
                Ok(Some(connection)) => self.welcome(connection, visit).map_err(|(error, connection)| {
                    waits = connection;
                    error
                }),
                Ok(None) => Ok(()),
                Err(error) => {
                    drop(visit);
                    Err(error)
                }
            };
            match came {
                Ok(()) => {}
                Err(source) if passes(&source) => {
                    if told.insert(source.raw_os_error()) {
                        self.control.turned_away(&MigrationError::NoRoom { source });
                    }
                    self.hall.wait_until_shut(PAUSE);
                }
                Err(source) => {
                    // Somebody who is here already may be the source.
                    self.hall.wait_for_visitors();
                    self.hall.brings(Err(MigrationError::Open { connection: 0, source }));
                    self.hall.shut();
                }
            }
        }
    }

    /// Has a thread of its own find out who that is: nobody waits for a stranger who says nothing. Where there is none for it, the
    /// connection is given back.
    fn welcome(&self, connection: Connection, visit: Visit<'e, 'v>) -> Result<(), (io::Error, Option<Connection>)> {
        let door = self.clone();
        let here = Arc::new(Mutex::new(Some(connection)));
        let came = Arc::clone(&here);
        let greets = move || {
            // Whoever is let in has somebody who notices.
            _ = caught(|| {
                let connection = lock(&came).take();
                // It was given back where there is no thread for this.
                if let Some(connection) = connection {
                    door.greet(connection, visit);
                }
                Ok(())
            });
        };
        let spawned = thread::Builder::new().spawn_scoped(self.scope, greets);
        spawned.map(drop).map_err(|error| (error, lock(&here).take()))
    }

    /// Strangers are let go: they have no part in the migration, so they don't end it either.
    fn greet(&self, mut connection: Connection, visit: Visit<'e, 'v>) {
        let limit = match (connection.answers, connection.others_come) {
            (false, _) => Duration::MAX,
            (true, false) => self.parameters.connect_limit,
            (true, true) => self.parameters.connect_limit.min(GREETING),
        };
        let cut = Arc::clone(&connection.cut);
        let read = || within(limit, &cut, || Preamble::read_from(&mut connection.reader));
        match self.hall.as_stranger(&cut, read) {
            Ok(offer) if offer.features.has(Features::FATE) => self.tell_fate(connection, &offer),
            Ok(offer) if connection.others_come && !begins(&offer) && self.hall.awaits_first() => {
                self.control.turned_away(&MigrationError::NotBegun);
            }
            // They would be waited for without limit, whoever they are: of a file everybody knows where it ends.
            Ok(offer) if connection.others_come && offer.features.has(Features::ONE_WAY) => {
                if self.hall.awaits_first() {
                    self.control.turned_away(&MigrationError::Mute);
                }
            }
            Ok(offer) => {
                if let Some(Ok((connection, offer))) = self.hall.brings(Ok((connection, offer))) {
                    self.let_in(connection, offer, visit);
                }
            }
            Err(error) if self.hall.awaits_first() => {
                let error = MigrationError::stream(0)(error);
                if connection.others_come {
                    self.control.turned_away(&error);
                } else {
                    self.hall.brings(Err(error));
                }
            }
            Err(_) => {}
        }
    }

    /// Somebody beside the first.
    fn let_in(&self, connection: Connection, offer: Preamble, visit: Visit<'e, 'v>) {
        if begins(&offer) {
            self.control.turned_away(&MigrationError::Taken);
            return;
        }
        let Some(open) = self.hall.job() else { return };
        let main = &open.main;
        if offer.id != main.id || offer.connections != main.connections {
            return;
        }
        if offer.connection > 0 {
            drop(visit);
            self.add(open, connection, offer.connection);
        } else if offer.features.has(Features::RECOVERY) && open.job.runs() {
            // Whoever has a new connection has lost the old one.
            open.session.ending.fail(MigrationError::GivenUpConnection);
            self.hall.recovers(connection, offer);
        }
    }

    /// A question: once it is answered, the answer stands.
    fn tell_fate(&self, mut connection: Connection, offer: &Preamble) {
        let Some(open) = self.hall.job().filter(|open| open.main.id == offer.id) else { return };
        let Some(runs) = self.fate.runs(GREETING) else { return };
        if !runs {
            // Whoever still waits for the source to say more need not.
            open.session.ending.fail(MigrationError::GivenUp);
        }
        let Ok(answer) = offer.answer(&VERSIONS, open.main.features.or(Features::FATE)) else { return };
        let record = if runs { Record::Runs } else { Record::Refused("the guest did not start, and never will") };
        let cut = Arc::clone(&connection.cut);
        let told = within(GREETING, &cut, || {
            answer.write_to(&mut connection.writer)?;
            let mut sender = Sender::new(&mut connection.writer);
            sender.send(&record)?;
            sender.flush()
        });
        if told.is_ok() {
            self.hall.was_asked();
        }
    }

    /// A connection for pages.
    fn add(&self, open: Open<'v>, mut connection: Connection, number: u16) {
        let Open { job, main, session, number: set } = open;
        if !self.hall.came(number) {
            return;
        }
        let Session { ending, watchman } = session;
        ending.cuts(&connection.cut);
        let answer = Preamble { connection: number, ..main.clone() };
        let putter = Putter::new(job, number, main.features.has(Features::ZSTD));
        match (answer.write_to(&mut connection.writer).map_err(MigrationError::stream(number)), putter) {
            (Ok(()), Ok(putter)) => {
                let receiver = watchman.receiver(number, connection.reader, true);
                let receiver = receiver.with_most(Kind::Pages.most_bytes());
                let more = main.features.has(Features::POST_COPY);
                ending.guards(|| take(putter, receiver, number, more, || self.hall.done(Some(set))));
            }
            (Err(error), _) | (_, Err(error)) => ending.fail(error),
        }
    }
}

/// Whether a migration begins with it; others belong to one that somebody else knew of.
fn begins(offer: &Preamble) -> bool {
    offer.connection == 0 && !offer.features.has(Features::RECOVERY)
}

/// Whether others may still come (accept(2)): it is this one connection that failed, or there is too little of something now.
fn passes(error: &io::Error) -> bool {
    use Errno::{
        EAGAIN, ECONNABORTED, EHOSTDOWN, EHOSTUNREACH, EINTR, EMFILE, ENETDOWN, ENETUNREACH, ENFILE, ENOBUFS, ENOMEM,
        ENONET, ENOPROTOOPT, EOPNOTSUPP, EPERM, EPROTO,
    };
    let lack = [EAGAIN, EMFILE, ENFILE, ENOBUFS, ENOMEM];
    let this_one = [
        ECONNABORTED,
        EINTR,
        EPROTO,
        ENOPROTOOPT,
        EOPNOTSUPP,
        ENONET,
        ENETDOWN,
        ENETUNREACH,
        EHOSTDOWN,
        EHOSTUNREACH,
        EPERM,
    ];
    let errno = error.raw_os_error().map(Errno::from_raw);
    errno.is_some_and(|errno| lack.contains(&errno) || this_one.contains(&errno))
}

/// Takes the pages of a connection, until its last; `more`: others follow once the guest runs, but none before.
fn take(
    mut putter: Putter<'_>,
    mut receiver: LineReceiver,
    connection: u16,
    more: bool,
    done: impl Fn(),
) -> Result<(), MigrationError> {
    let mut counted = 0;
    let mut rests = false;
    loop {
        let Some(record) = receiver.receive().map_err(MigrationError::stream(connection))? else {
            return Err(MigrationError::Lost { connection, when: "before its last page came" });
        };
        let unexpected = |when| Err(MigrationError::Unexpected { connection, kind: record.kind(), when });
        let runs = putter.job().runs();
        match &record {
            Record::Alive => {}
            _ if rests && !runs => return unexpected("comes after the last page, and the guest doesn't run yet"),
            Record::LastPage => {
                done();
                if runs || !more {
                    return Ok(());
                }
                rests = true;
            }
            record if putter.put(record)? => {}
            _ => return unexpected("is for the main connection"),
        }
        Meter::add(&putter.job().meter().transferred, receiver.received() - counted);
        counted = receiver.received();
    }
}
