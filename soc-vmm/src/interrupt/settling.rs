//! How far the host is with what it was told of messages.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bus::{Answer, Deferred, Ticket};

/// How far the host is with the changes of routes. A route that was changed works at once; but the host reports the end of a
/// level-triggered interrupt only where it knows the route, and an invalidation of the guest's is complete only when nothing goes by
/// the old one any more.
#[derive(Debug, Default)]
pub struct Settling {
    made: AtomicU64,
    settled: AtomicU64,
}

impl Settling {
    /// One more change.
    pub fn change(&self) {
        self.made.fetch_add(1, Ordering::AcqRel);
    }

    /// The changes so far.
    pub fn mark(&self) -> u64 {
        self.made.load(Ordering::Acquire)
    }

    /// The host has the changes up to `mark`.
    pub fn settle(&self, mark: u64) {
        self.settled.fetch_max(mark, Ordering::AcqRel);
    }

    /// Whether the host has the changes up to `mark`.
    pub fn is_past(&self, mark: u64) -> bool {
        self.settled.load(Ordering::Acquire) >= mark
    }
}

/// Accesses that are finished once the host has the changes that they made. There is at most one a vCPU.
#[derive(Debug)]
pub struct Waiters {
    settling: Arc<Settling>,
    waiting: Vec<(u64, Ticket)>,
}

impl Waiters {
    /// Nobody waits yet.
    pub fn new(settling: Arc<Settling>) -> Self {
        Self { settling, waiting: Vec::new() }
    }

    /// See [`Settling::mark`].
    pub fn mark(&self) -> u64 {
        self.settling.mark()
    }

    /// See [`Settling::is_past`].
    pub fn is_past(&self, mark: u64) -> bool {
        self.settling.is_past(mark)
    }

    /// Finishes a write before which the mark was `before`: now, or when the host has what changed since.
    pub fn answer(&mut self, before: u64, reply: Deferred<'_>) -> Answer {
        let mark = self.mark();
        if mark == before || self.is_past(mark) {
            return Answer::Done(0);
        }
        self.waiting.push((mark, reply.ticket()));
        Answer::Deferred
    }

    /// Finishes those whose changes the host has.
    pub fn poll(&mut self) {
        for (_, ticket) in self.waiting.extract_if(.., |(mark, _)| self.settling.is_past(*mark)) {
            ticket.done(0);
        }
    }
}
