//! The link between the two ends: a queue each way, and how long everything takes.
//!
//! PCI Express Base §2.4 (transaction ordering), with no relaxed ordering: what is posted arrives in order, signals too. A read
//! arrives behind what its side posted before it, and its completion behind what the other side posted before that.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::clock::{Clock, Monotonic};
use super::courier::{Courier, Notice};
use super::latency::Latencies;
use super::queue::{Posted, Queue};
use crate::FunctionError;

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Host,
    Soc,
}

/// The link of one function, whose ends are both in this process. Cheap to clone; one clone goes to each end.
///
/// The default takes no time: what is sent is stored at once, as if there were no link.
#[derive(Clone, Debug, Default)]
pub struct Link {
    slow: Option<Arc<Slow>>,
}

impl Link {
    /// A link on which crossings take so long. It has a thread of its own, unless nothing takes any time.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn new(latencies: Latencies) -> Result<Self, FunctionError> {
        if latencies == Latencies::default() {
            return Ok(Self::default());
        }
        let wire = Arc::new(Wire::new(latencies, Box::new(Monotonic::new())));
        let courier = Courier::start(wire.clone())?;
        Ok(Self { slow: Some(Arc::new(Slow { wire, _courier: Some(courier) })) })
    }

    /// A link whose clock a test moves: signals arrive when somebody looks.
    #[cfg(test)]
    pub(super) fn with_clock(latencies: Latencies, clock: Box<dyn Clock>) -> Self {
        Self { slow: Some(Arc::new(Slow { wire: Arc::new(Wire::new(latencies, clock)), _courier: None })) }
    }

    /// One end of it, if it takes time.
    pub(super) fn end(&self, side: Side) -> Option<End> {
        self.slow.clone().map(|slow| End { slow, side })
    }
}

/// A link that takes time, for as long as anything holds it.
struct Slow {
    wire: Arc<Wire>,
    /// Held for its thread, which ends with it. None where a test moves the clock.
    _courier: Option<Courier>,
}

impl std::fmt::Debug for Slow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.wire.latencies.fmt(f)
    }
}

/// What the ends and the courier share.
pub(super) struct Wire {
    latencies: Latencies,
    to_card: Queue,
    to_host: Queue,
    pub(super) clock: Box<dyn Clock>,
    pub(super) notice: Notice,
}

impl Wire {
    fn new(latencies: Latencies, clock: Box<dyn Clock>) -> Self {
        Self { latencies, to_card: Queue::default(), to_host: Queue::default(), clock, notice: Notice::default() }
    }

    /// When the next signal arrives, at either end.
    pub(super) fn next_signal(&self) -> Option<Duration> {
        let (card, host) = (self.to_card.next_signal(), self.to_host.next_signal());
        card.into_iter().chain(host).min()
    }

    /// Lets all that is due land, at both ends.
    pub(super) fn arrive(&self) {
        let now = self.clock.now();
        self.to_card.arrive(now);
        self.to_host.arrive(now);
    }
}

/// One side's end of a link that takes time.
#[derive(Clone, Debug)]
pub(super) struct End {
    slow: Arc<Slow>,
    side: Side,
}

impl End {
    /// Sends a write; its side goes on at once.
    pub(super) fn write(&self, posted: Posted) {
        let wire = &self.slow.wire;
        self.outbound().send(wire.clock.now(), wire.latencies.write(self.side), posted);
    }

    /// Sends a doorbell or a vector.
    pub(super) fn signal(&self, signal: impl FnOnce() + Send + 'static) {
        let wire = &self.slow.wire;
        let (now, latency) = (wire.clock.now(), wire.latencies.signal(self.side));
        if self.outbound().send(now, latency, Posted::Signal(Box::new(signal))) > now {
            wire.notice.give();
        }
    }

    /// Sends a write that its side waits for: what came of it when it arrived. `None` if it panicked.
    pub(super) fn transfer<T: Send + 'static>(&self, write: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let Wire { clock, latencies, .. } = &*self.slow.wire;
        let (done, result) = mpsc::channel();
        let transfer = Box::new(move || drop(done.send(write())));
        let due = self.outbound().send(clock.now(), latencies.write(self.side), Posted::Transfer(transfer));
        clock.wait_until(due);
        self.outbound().arrive(clock.now());
        result.recv().ok()
    }

    /// Reads `times` times across the bus, one after another: `look` looks at the far end's memory when the first has arrived there.
    ///
    /// What the other side posts after that look may be late for the answer, what it posted before is not. So of two sides that each
    /// post a word and then look for the other's, one across the bus, at least one sees it.
    pub(super) fn read<T>(&self, times: u64, look: impl FnOnce() -> T) -> T {
        let Wire { clock, latencies, .. } = &*self.slow.wire;
        let one = latencies.read(self.side);
        let all = one.saturating_mul(times.try_into().unwrap_or(u32::MAX));
        let there = self.outbound().behind_all(clock.now().saturating_add(one / 2));
        clock.wait_until(there);
        self.outbound().arrive(clock.now());
        let seen = look();
        let back = self.inbound().behind_all(there.saturating_add(all.saturating_sub(one / 2)));
        clock.wait_until(back);
        self.inbound().arrive(clock.now());
        seen
    }

    /// Returns when everything that this side sent has arrived.
    pub(super) fn flush(&self) {
        self.settle(self.outbound());
    }

    /// Returns when everything that the other side has sent so far has arrived.
    pub(super) fn quiesce(&self) {
        self.settle(self.inbound());
    }

    /// Lets what has arrived land in this side's memory: before every look at it.
    pub(super) fn arrivals(&self) {
        let clock = &self.slow.wire.clock;
        if self.inbound().is_waiting(|| clock.now()) {
            self.inbound().arrive(clock.now());
        }
    }

    fn settle(&self, queue: &Queue) {
        let clock = &self.slow.wire.clock;
        clock.wait_until(queue.behind_all(Duration::ZERO));
        queue.arrive(clock.now());
    }

    fn outbound(&self) -> &Queue {
        match self.side {
            Side::Host => &self.slow.wire.to_card,
            Side::Soc => &self.slow.wire.to_host,
        }
    }

    fn inbound(&self) -> &Queue {
        match self.side {
            Side::Host => &self.slow.wire.to_host,
            Side::Soc => &self.slow.wire.to_card,
        }
    }
}
