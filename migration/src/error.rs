//! Why a migration failed.

use std::error::Error;
use std::fmt::Write as _;
use std::time::Duration;

use crate::VmError;
use crate::stream::{Kind, Mismatch, Run, StreamError};

/// Why a migration failed. The guest is where it was, but for [`Self::Unknown`].
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// Somebody asked for it.
    #[error("the migration was cancelled")]
    Cancelled,
    /// A defect of this program's.
    #[error("a thread of the migration panicked, which is a defect: report what it said")]
    Panicked,
    /// This handle has a migration.
    #[error("a migration is under way already: wait for its end, or cancel it")]
    Busy,
    /// A parameter makes no sense.
    #[error("{name} can't be {value}: {why}")]
    Parameter {
        /// Which.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        why: &'static str,
    },
    /// A side's VM couldn't do something.
    #[error("{doing} failed")]
    Vm {
        /// What.
        doing: &'static str,
        /// Why.
        #[source]
        source: VmError,
    },
    /// There is no connection.
    #[error("connection {connection} can't be opened")]
    Open {
        /// Which.
        connection: u16,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Somebody comes who goes on with a migration that is not this one.
    #[error("a connection of a migration that began elsewhere: its destination is another process, or is gone")]
    NotBegun,
    /// Somebody brings a guest where one comes already.
    #[error("the source of another guest, while one is on its way here already: it has to find a VM of its own")]
    Taken,
    /// Somebody comes who can't be answered, where who comes can be.
    #[error("a stream without a way back by a socket that others come to: pass a file, or a descriptor by fd:")]
    Mute,
    /// Somebody comes, and the system can't have another connection now.
    #[error("nobody can be let in for now, which is tried again until somebody is")]
    NoRoom {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A connection failed, or what came over it is no migration.
    #[error("connection {connection}")]
    Stream {
        /// Which.
        connection: u16,
        /// What is wrong.
        #[source]
        source: StreamError,
    },
    /// The other side ended a connection too early.
    #[error("connection {connection} was closed by the other side {when}")]
    Lost {
        /// Which.
        connection: u16,
        /// When.
        when: &'static str,
    },
    /// The other side says nothing, or takes nothing.
    #[error("connection {connection}: the other side {what} for {limit:?}: it is stuck, or the network is")]
    Stalled {
        /// Which.
        connection: u16,
        /// What it hasn't done.
        what: &'static str,
        /// For how long.
        limit: Duration,
    },
    /// The destination is there, but doesn't say what the source waits for.
    #[error("the destination did not say {kind:?} within {limit:?}, though it is there: look at what keeps it")]
    NoAnswer {
        /// What it should have said.
        kind: Kind,
        /// How long it had.
        limit: Duration,
    },
    /// The sides don't understand each other.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The source wants answers, and there is no way back.
    #[error("the source waits for answers, which a pipe or a file can't carry: have it write a one-way stream")]
    NoWayBack,
    /// Pages can have no places where the guest goes to, or comes from.
    #[error("pages can have places of their own (mapped-ram) in a file alone, which this is not: say file:FILE")]
    NoPlace,
    /// A guest that stays can't be sent to somebody who starts it.
    #[error("only a guest that is kept in a file can go on here too: say file:FILE")]
    Twins,
    /// The file can't be read or written.
    #[error("{doing} the file failed")]
    File {
        /// What.
        doing: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file has other bytes than were written.
    #[error("page {page} of region {region} is damaged in the file: restore an older one")]
    DamagedPage {
        /// The region.
        region: u32,
        /// The page.
        page: u64,
    },
    /// Pages that can't be where they are said to be.
    #[error("pages {first} to {last} of region {region} are said to be where they can't: {why}")]
    Misplaced {
        /// The region.
        region: u32,
        /// The first page.
        first: u64,
        /// The last one.
        last: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// A running guest's pages can't be read.
    #[error(
        "a page can't be read while {pages} of the running guest's are still to be: the guest is lost, its file is as it was"
    )]
    Unreadable {
        /// How many.
        pages: u64,
        /// Why.
        #[source]
        source: Box<MigrationError>,
    },
    /// Connections that the source announced and never made.
    #[error(
        "{came} of {announced} connections came within {} ms: is something between the sides that stops them, or does the destination lack threads or files, as its log says?",
        limit.as_millis()
    )]
    Connections {
        /// How many there are.
        came: u16,
        /// How many there should be.
        announced: u16,
        /// How long they were waited for.
        limit: Duration,
    },
    /// A record that has no business there.
    #[error("connection {connection}: a record of kind {kind:?} {when}")]
    Unexpected {
        /// Where it came.
        connection: u16,
        /// What it is.
        kind: Kind,
        /// Why it may not come.
        when: &'static str,
    },
    /// Pages of no region, or past its end.
    #[error("pages {first} to {last} of region {region} came, which this machine doesn't have")]
    NoSuchPages {
        /// The region.
        region: u32,
        /// The first page.
        first: u64,
        /// The last one.
        last: u64,
    },
    /// Compressed pages that are none.
    #[error("the compressed pages from {first} of region {region} on are damaged")]
    Compressed {
        /// The region.
        region: u32,
        /// The first page.
        first: u64,
    },
    /// Pages that never came.
    #[error("{pages} pages of region {region} never came")]
    Missing {
        /// The region.
        region: u32,
        /// How many.
        pages: u64,
    },
    /// A device twice.
    #[error("the state of {name} came twice")]
    Twice {
        /// Whose.
        name: String,
    },
    /// More state than a machine has.
    #[error("the state is longer than {most} bytes")]
    TooMuchState {
        /// The most.
        most: usize,
    },
    /// The guest can't run without all of its pages there.
    #[error("the destination can't run a guest before all of its pages are there: migrate without post-copy")]
    NoPostCopy,
    /// There are too many already.
    #[error("no thread can be started for it")]
    NoThread(#[source] std::io::Error),
    /// Somebody asked for the connection to be given up.
    #[error("the connection was given up")]
    GivenUpConnection,
    /// Pages will never come.
    #[error(
        "{pages} pages of the guest that runs here are missing, and no connection can bring them any more: the guest is lost"
    )]
    Lacking {
        /// How many.
        pages: u64,
    },
    /// The destination can't run the guest, and says why.
    #[error("the destination refused: {}", if .0.is_empty() { "it doesn't say why; look at its log" } else { .0 })]
    Refused(String),
    /// The destination had everything, but nobody told it to start.
    #[error("the source was lost before it gave the guest away: the guest did not start here, and never will")]
    GivenUp,
    /// The guest was given away, and nobody knows whether it runs.
    #[error(
        "the destination was told to start the guest and was lost before it said whether it did: the guest stays paused here; \
         look at the destination, and resume it here only if it doesn't run there"
    )]
    Unknown,
    /// All of the guest is in the file, and here it stands still against what was wanted.
    #[error("the file has the whole guest, which could not go on here: resume it, or start it from there")]
    StandsStill {
        /// Why it couldn't.
        #[source]
        source: VmError,
    },
    /// The migration failed, and then the guest couldn't go on.
    #[error("the guest stays paused ({resume}) after the migration failed")]
    StaysPaused {
        /// Why it couldn't be resumed.
        resume: String,
        /// Why the migration failed.
        #[source]
        source: Box<MigrationError>,
    },
}

impl MigrationError {
    pub(crate) fn no_such_pages(run: Run) -> Self {
        Self::NoSuchPages { region: run.region, first: run.first, last: run.first.saturating_add(run.pages - 1) }
    }

    pub(crate) fn file(doing: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::File { doing, source }
    }

    pub(crate) fn stream(connection: u16) -> impl FnOnce(StreamError) -> Self {
        move |source| Self::Stream { connection, source }
    }

    pub(crate) fn vm(doing: &'static str) -> impl FnOnce(VmError) -> Self {
        move |source| Self::Vm { doing, source }
    }

    /// Whether it says no more than that a connection is gone, so that what the other side said about it says more.
    pub(crate) fn is_loss(&self) -> bool {
        match self {
            Self::Lost { .. } => true,
            Self::Stream { source, .. } => matches!(source, StreamError::Truncated | StreamError::Io(_)),
            _ => false,
        }
    }

    /// It and what is behind it, in one line.
    #[must_use]
    pub fn one_line(&self) -> String {
        let mut line = self.to_string();
        let mut next = self.source();
        while let Some(error) = next {
            // Writing to a string can't fail.
            _ = write!(line, ": {error}");
            next = error.source();
        }
        // A peer's sentence may be part of it.
        line.chars().map(|c| if c.is_control() || ends_or_turns(c) { ' ' } else { c }).collect()
    }
}

/// Whether it ends a line or turns the direction of what follows (Unicode's LS and PS; UAX #9 §2).
fn ends_or_turns(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{061c}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_refuses_without_a_reason_is_told_of_all_the_same() {
        assert_eq!(MigrationError::Refused("no".into()).one_line(), "the destination refused: no");
        assert!(MigrationError::Refused(String::new()).one_line().contains("look at its log"));
    }
}
