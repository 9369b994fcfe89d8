//! One direction of a link.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::{BusMemory, Windowed};

/// Memory at the far end, as who sends sees it.
pub(super) trait Landing: BusMemory + std::fmt::Debug + Send + Sync {}

impl<W: Windowed> Landing for W {}

/// What crosses without anyone waiting for it.
pub(super) enum Posted {
    /// 1–8 words of one line.
    Line { to: Arc<dyn Landing>, offset: usize, words: [u64; 8], count: usize },
    /// Bytes from a word's start.
    Bytes { to: Arc<dyn Landing>, offset: usize, data: Box<[u8]> },
    /// A transfer that somebody waits for.
    Transfer(Box<dyn FnOnce() + Send>),
    /// A doorbell or a vector.
    Signal(Box<dyn FnOnce() + Send>),
}

impl Posted {
    fn land(self) {
        match self {
            Self::Line { to, offset, words, count } => to.store_line(offset, &words[..count]),
            Self::Bytes { to, offset, data } => to.copy_in(offset, &data),
            Self::Transfer(act) | Self::Signal(act) => act(),
        }
    }
}

/// What was sent and has not arrived, in the order in which it was sent and will arrive.
///
/// Whoever looks at the far end's memory lets arrive what is due; so it changes when somebody looks, and at no cost while nobody does.
/// A sender does it too: no more is held than can be sent within the latency.
#[derive(Default)]
pub(super) struct Queue {
    /// What a poll looks at, without a lock: the first arrival in nanoseconds plus one; 0 while nothing is under way.
    first: AtomicU64,
    under_way: Mutex<UnderWay>,
}

#[derive(Default)]
struct UnderWay {
    posted: VecDeque<(Duration, Posted)>,
    /// When the last that was ever sent arrives. What is sent later arrives no earlier.
    last: Duration,
}

impl Queue {
    /// Sends, at `now`; when it arrives. What is due already lands before this returns.
    pub(super) fn send(&self, now: Duration, latency: Duration, posted: Posted) -> Duration {
        let mut under_way = self.lock();
        let due = under_way.last.max(now.saturating_add(latency));
        under_way.last = due;
        under_way.posted.push_back((due, posted));
        self.land(&mut under_way, now);
        due
    }

    /// `moment`, or when the last that was ever sent arrives, whichever is later. What is sent later may pass: nothing keeps a
    /// posted write behind a read.
    pub(super) fn behind_all(&self, moment: Duration) -> Duration {
        self.lock().last.max(moment)
    }

    /// Whether something may have arrived that has not landed.
    pub(super) fn is_waiting(&self, now: impl FnOnce() -> Duration) -> bool {
        match self.first.load(Ordering::Acquire) {
            0 => false,
            first => first <= nanos(now()).saturating_add(1),
        }
    }

    /// Lets all land that is due. When it returns, it has.
    pub(super) fn arrive(&self, now: Duration) {
        self.land(&mut self.lock(), now);
    }

    /// When the first signal that is under way arrives.
    pub(super) fn next_signal(&self) -> Option<Duration> {
        let under_way = self.lock();
        let signal = under_way.posted.iter().find(|(_, posted)| matches!(posted, Posted::Signal(_)));
        signal.map(|(due, _)| *due)
    }

    fn land(&self, under_way: &mut UnderWay, now: Duration) {
        while let Some((_, posted)) = under_way.posted.pop_front_if(|(due, _)| *due <= now) {
            posted.land();
        }
        let first = under_way.posted.front().map_or(0, |(due, _)| nanos(*due).saturating_add(1));
        self.first.store(first, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn nanos(moment: Duration) -> u64 {
    u64::try_from(moment.as_nanos()).unwrap_or(u64::MAX)
}
