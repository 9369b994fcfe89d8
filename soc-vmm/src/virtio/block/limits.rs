//! What a disk is held to: all that it does, and reads and writes apart.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::virtio::RateLimits;
use crate::virtio::limit::Limiter;

/// What a disk is held to. Each limit holds beside the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Everything.
    pub all: RateLimits,
    /// Reads.
    pub reads: RateLimits,
    /// Everything else.
    pub writes: RateLimits,
}

impl From<RateLimits> for DiskLimits {
    fn from(all: RateLimits) -> Self {
        Self { all, ..Self::default() }
    }
}

/// Which limits a request has beside those of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// Those of reads.
    Read,
    /// Those of writes.
    Write,
}

impl Direction {
    pub(super) const BOTH: [Self; 2] = [Self::Read, Self::Write];

    fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }
}

/// The limits at work, and the requests that they hold, in the order in which they came: reads pass writes that are held, and the other way round.
#[derive(Debug)]
pub(super) struct Gate {
    all: Limiter,
    apart: [Limiter; 2],
    /// Whether one direction may be held and the other not.
    is_apart: bool,
    held: [VecDeque<usize>; 2],
    /// Which direction has its turn where both could pass: what is left for all is for both.
    turn: Direction,
}

impl Gate {
    /// One that holds nothing yet.
    pub(super) fn new(limits: DiskLimits, now: Instant) -> Self {
        let DiskLimits { all, reads, writes } = limits;
        let is_apart = [reads, writes].iter().any(|apart| *apart != RateLimits::default());
        let apart = [reads, writes].map(|apart| Limiter::new(apart, now));
        Self { all: Limiter::new(all, now), apart, is_apart, held: Default::default(), turn: Direction::Read }
    }

    /// Holds requests to other limits, as if the disk had rested before.
    pub(super) fn change(&mut self, limits: DiskLimits, now: Instant) {
        let held = std::mem::take(&mut self.held);
        *self = Self { held, ..Self::new(limits, now) };
    }

    /// What it holds.
    pub(super) fn held(&self) -> impl Iterator<Item = usize> {
        self.held.iter().flatten().copied()
    }

    /// Forgets what it holds.
    pub(super) fn clear(&mut self) {
        self.held.iter_mut().for_each(VecDeque::clear);
    }

    /// Whether another request could pass, for all that is held.
    pub(super) fn is_open(&self) -> bool {
        let free = |held: &VecDeque<usize>| held.is_empty();
        if self.is_apart { self.held.iter().any(free) } else { self.held.iter().all(free) }
    }

    /// Lets a request of so many bytes pass, or keeps it for [`Gate::next`]; whether it passes.
    pub(super) fn pass(&mut self, index: usize, direction: Direction, bytes: u64, now: Instant) -> bool {
        // Others that only wait for their share of what is for all have waited longer.
        let other = direction.other();
        let is_next = self.held[other as usize].is_empty() || self.apart[other as usize].wait(now).is_some();
        let passes = is_next && self.held[direction as usize].is_empty() && self.wait(direction, now).is_none();
        if passes {
            self.take(direction, bytes);
        } else {
            self.held[direction as usize].push_back(index);
        }
        passes
    }

    /// The next request of those held that may pass now. `bytes`: how many each has.
    pub(super) fn next(&mut self, now: Instant, bytes: impl Fn(usize) -> u64) -> Option<usize> {
        [self.turn, self.turn.other()].into_iter().find_map(|direction| {
            let index = *self.held[direction as usize].front()?;
            if self.wait(direction, now).is_some() {
                return None;
            }
            self.held[direction as usize].pop_front();
            self.take(direction, bytes(index));
            self.turn = direction.other();
            Some(index)
        })
    }

    /// How long until something that is held may pass; none: nothing is.
    pub(super) fn patience(&mut self, now: Instant) -> Option<Duration> {
        let waits = Direction::BOTH.map(|direction| {
            let holds = !self.held[direction as usize].is_empty();
            holds.then(|| self.wait(direction, now).unwrap_or_default())
        });
        waits.into_iter().flatten().min()
    }

    fn wait(&mut self, direction: Direction, now: Instant) -> Option<Duration> {
        self.all.wait(now).max(self.apart[direction as usize].wait(now))
    }

    fn take(&mut self, direction: Direction, bytes: u64) {
        self.all.take(1, bytes);
        self.apart[direction as usize].take(1, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::Rate;

    #[test]
    fn neither_direction_has_all_that_is_for_both() {
        let rate = |per_second| RateLimits { operations: Some(Rate { per_second, burst: 1 }), ..RateLimits::default() };
        let limits = DiskLimits { all: rate(10), reads: rate(1000), writes: rate(1000) };
        let mut now = Instant::now();
        let mut gate = Gate::new(limits, now);
        // As many of both as there could ever be: a tenth of a second each is let pass.
        assert!(gate.pass(0, Direction::Read, 1, now));
        let mut passed = [0, 0];
        let mut index = 1;
        for _ in 0..100 {
            for direction in Direction::BOTH {
                assert!(!gate.pass(index, direction, 1, now), "who came before has its turn");
                index += 1;
            }
            now += Duration::from_millis(100);
            while let Some(index) = gate.next(now, |_| 1) {
                passed[index % 2] += 1;
            }
        }
        assert_eq!(passed, [50, 50]);
    }
}
