//! What a balloon does with its queues (virtio 1.2 §5.5.6).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use nix::sys::epoll::EpollFlags;

use super::pages::runs_of;
use super::{
    ACTUAL, BalloonConfig, BalloonEvents, BalloonHandle, DEFLATE, F_PAGE_POISON, F_PAGE_REPORTING, F_STATS_VQ,
    GuestStats, INFLATE, NUM_PAGES, PAGE, POISON, PageRun, Pages, PagesError, STATISTICS, Words,
};
use crate::persist::{StateError, States};
use crate::virtio::complaint::Complaints;
use crate::virtio::session::Control;
use crate::virtio::watch::Watch;
use crate::virtio::word::DriverWord;
use crate::virtio::{Chain, Config, Engine, Lease, Queue, QueueError, Session, Wait};

/// Chains of a queue before the next one has its turn.
const TURN: usize = 64;
/// Page numbers that are read at once, and bytes of one.
const PART: usize = 1024;
const NUMBER: usize = 4;
/// Bytes of a statistic, and of all that are looked at.
const STATISTIC: usize = 10;
const STATISTICS_MAX: usize = 64 * STATISTIC;

/// A balloon's engine.
pub struct BalloonEngine {
    name: String,
    pages: Box<dyn Pages>,
    pub(super) handle: Arc<BalloonHandle>,
    events: Arc<dyn BalloonEvents>,
    words: Words,
    watch: Watch,
    /// The session that was served last.
    pub(super) control: Option<Arc<Control>>,
    /// What the configuration says that the guest shall give.
    pub(super) told: u32,
    /// The buffer by which the driver is asked for statistics, and since when it is here.
    pub(super) statistics: Option<(u16, Instant)>,
    chain: Chain,
    bytes: Vec<u8>,
    numbers: Vec<u64>,
    runs: Vec<PageRun>,
    complaints: Complaints,
}

impl BalloonEngine {
    /// The engine of that balloon, with no driver that writes its configuration.
    ///
    /// # Errors
    /// This process can have no more descriptors.
    pub fn new(balloon: BalloonConfig) -> io::Result<Self> {
        let word = |at| DriverWord::new(at).map(Arc::new);
        let words = Words { actual: word(ACTUAL)?, poison: word(POISON)? };
        Self::with_words(balloon, words)
    }

    pub(super) fn with_words(balloon: BalloonConfig, words: Words) -> io::Result<Self> {
        let watch = Watch::new()?;
        watch.add(balloon.handle.bell(), 0)?;
        watch.add(&*words.actual, 0)?;
        Ok(Self {
            name: balloon.name,
            pages: balloon.pages,
            handle: balloon.handle,
            events: balloon.events,
            words,
            watch,
            control: None,
            told: 0,
            statistics: None,
            chain: Chain::default(),
            bytes: vec![0; PART * NUMBER],
            numbers: Vec::with_capacity(PART),
            runs: Vec::new(),
            complaints: Complaints::default(),
        })
    }

    fn meet(&mut self, session: &Session) {
        if self.control.as_ref().is_none_or(|control| !Arc::ptr_eq(control, &session.control)) {
            self.control = Some(session.control.clone());
            self.statistics = None;
        }
    }

    /// Tells the guest what it shall give, and the others what it gave.
    fn compare(&mut self, session: &Session) {
        let actual = self.words.actual.get();
        let (wanted, changed) = {
            let mut state = self.handle.state();
            (state.wanted, std::mem::replace(&mut state.actual, actual) != actual)
        };
        if changed {
            self.events.changed(self.handle.memory());
        }
        if wanted != self.told {
            self.told = wanted;
            session.config.change(NUM_PAGES, &wanted.to_le_bytes());
        }
    }

    /// Takes frames that the guest gives, or hears of those that it takes back; whether there are more.
    fn frames(&mut self, queue: &mut Queue, given: bool) -> Result<bool, QueueError> {
        queue.hold_kicks()?;
        for _ in 0..TURN {
            if !queue.pop(&mut self.chain)? {
                queue.publish()?;
                return queue.allow_kicks();
            }
            if self.chain.writable() > 0 || !self.chain.readable().is_multiple_of(NUMBER as u64) {
                return Err(QueueError::Broken("what is no list of pages"));
            }
            // Of what it takes back there is nothing to do: it is there when it is touched.
            while given && self.chain.readable() > 0 {
                let part = self.chain.readable().min(self.bytes.len() as u64) as usize;
                self.chain.read(queue.lease(), &mut self.bytes[..part])?;
                let numbers = self.bytes[..part].as_chunks::<NUMBER>().0;
                self.numbers.extend(numbers.iter().map(|number| u64::from(u32::from_le_bytes(*number))));
                runs_of(&mut self.numbers, &mut self.runs);
                self.give_back(queue.lease())?;
            }
            queue.push(self.chain.head(), 0)?;
        }
        queue.publish()?;
        Ok(true)
    }

    /// Gives pages back that the guest reports to be free (§5.5.6.7): the buffers are the pages.
    fn reports(&mut self, queue: &mut Queue, keep: bool) -> Result<bool, QueueError> {
        queue.hold_kicks()?;
        for _ in 0..TURN {
            if !queue.pop(&mut self.chain)? {
                queue.publish()?;
                return queue.allow_kicks();
            }
            if self.chain.readable() > 0 {
                return Err(QueueError::Broken("a report of pages that it has written"));
            }
            if !keep {
                self.runs.clear();
                let whole = self.chain.writable_pieces().filter_map(|(addr, len)| {
                    // A buffer is within 64 bits, a page at its very end isn't needed.
                    let start = addr.checked_next_multiple_of(PAGE)?;
                    let end = (addr + u64::from(len)) / PAGE * PAGE;
                    (start < end).then(|| PageRun { addr: start, len: end - start })
                });
                self.runs.extend(whole);
                self.give_back(queue.lease())?;
            }
            // Nothing is written: the pages are what they were, or zeros.
            queue.push(self.chain.head(), 0)?;
        }
        queue.publish()?;
        Ok(true)
    }

    /// The two phases (`docs/design.md`): this side revokes, then the host frees.
    fn give_back(&mut self, lease: &Lease) -> Result<(), QueueError> {
        // What a guest gives though nobody asked stays as it is.
        if self.runs.is_empty() || self.handle.is_pinned() {
            return Ok(());
        }
        let pages = &mut self.pages;
        // Whoever took the device back has the memory: nothing begins then, and what has begun can be waited for.
        let revoked = lease.during(|| pages.revoke(&self.runs))?;
        match revoked.and_then(|()| pages.free(&self.runs)) {
            Ok(freed) => self.handle.state().freed += freed,
            Err(PagesError::NotRam { .. }) => return Err(QueueError::Broken("pages to give back that are no RAM")),
            // The guest has given them all the same; they cost the host what they did.
            Err(error @ PagesError::Refused(_)) => self.complaints.say(&self.name, error),
        }
        Ok(())
    }

    /// Reads statistics, and gives the buffer back when it is time for the next ones (§5.5.6.3).
    fn statistics(&mut self, queue: &mut Queue) -> Result<(), QueueError> {
        let interval = self.handle.interval();
        let due = |since: &(u16, Instant)| interval.is_some_and(|interval| since.1.elapsed() >= interval);
        if let Some((head, _)) = self.statistics.take_if(|since| due(since)) {
            queue.push(head, 0)?;
            queue.publish()?;
        }
        // One is enough; what else there is waits for its turn.
        if self.statistics.is_none()
            && (queue.pop(&mut self.chain)? || queue.allow_kicks()? && queue.pop(&mut self.chain)?)
        {
            let len = self.chain.readable().min(STATISTICS_MAX as u64) as usize;
            let bytes = &mut self.bytes[..len];
            self.chain.read(queue.lease(), bytes)?;
            let mut stats = GuestStats::default();
            stats.updated = Some(SystemTime::now());
            for [a, b, value @ ..] in bytes.as_chunks::<STATISTIC>().0 {
                stats.set(u16::from_le_bytes([*a, *b]), u64::from_le_bytes(*value));
            }
            self.handle.state().stats = stats;
            self.statistics = Some((self.chain.head(), Instant::now()));
        }
        Ok(())
    }
}

impl Engine for BalloonEngine {
    fn serve(&mut self, session: &mut Session) -> Result<Wait, QueueError> {
        self.meet(session);
        // Whatever it is, all is looked at.
        let mut more = !self.watch.changes(|_| {});
        self.compare(session);
        let has = |feature| session.features >> feature & 1 != 0;
        let (statistics, reporting) = (has(F_STATS_VQ), has(F_PAGE_REPORTING));
        // What it expects in a free page isn't what it would find there.
        let keep = has(F_PAGE_POISON) && self.words.poison.get() != 0;
        for (index, queue) in session.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            match index {
                INFLATE | DEFLATE => more |= self.frames(queue, index == INFLATE)?,
                STATISTICS if statistics => self.statistics(queue)?,
                _ if reporting => more |= self.reports(queue, keep)?,
                _ => {}
            }
        }
        if more {
            return Ok(Wait::NOTHING);
        }
        let interval = self.handle.interval().filter(|_| statistics);
        let since = self.statistics.as_ref().map(|(_, since)| *since);
        let timeout = interval.zip(since).map(|(interval, since)| interval.saturating_sub(since.elapsed()));
        Ok(Wait { source: EpollFlags::EPOLLIN, timeout })
    }

    /// What was taken is given back before anything else is done, but for the buffer of statistics.
    fn halt(&mut self, session: &mut Session) -> Result<Option<Wait>, QueueError> {
        self.meet(session);
        Ok(None)
    }

    fn save_into(&self, at: &str, states: &mut States, session: Option<&Session>) {
        self.save(at, states, session.is_some());
    }

    fn load(
        &mut self,
        at: &str,
        states: &mut States,
        config: &Config,
        session: Option<&mut Session>,
    ) -> Result<(), StateError> {
        self.restore(at, states, config, session.as_deref())
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.watch.as_fd())
    }
}
