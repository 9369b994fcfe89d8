//! Whatever both sides do, each sees what the other sent up to some point, in order, and no earlier than it can be there.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::clock::Clock;
use super::super::link::Side;
use super::{Ends, Hands, Latencies, ns, signals};
use crate::{Bell, BusMemory, Doorbell, HostFunction, SocFunction};

/// Words that are written, from the start of either memory: two lines.
const WORDS: usize = 16;

#[derive(Clone, Debug)]
enum Step {
    /// Writes so many words from a word, all within a line.
    Write {
        from: Side,
        how: How,
        word: usize,
        count: usize,
    },
    /// The doorbell or the vector.
    Signal(Side),
    /// A side looks at its own memory.
    Look(Side),
    /// A side reads a word of the other's.
    Read(Side, usize),
    Flush(Side),
    Pass(u64),
}

#[derive(Clone, Copy, Debug)]
enum How {
    Word,
    Line,
    Bytes,
    /// A transfer that the SoC waits for; the host's bytes.
    Transfer,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let side = || prop_oneof![Just(Side::Host), Just(Side::Soc)];
    let how = prop_oneof![Just(How::Word), Just(How::Line), Just(How::Bytes), Just(How::Transfer)];
    let write = (side(), how, 0..WORDS, 1..=8usize).prop_map(|(from, how, word, count)| {
        let count = if matches!(how, How::Word) { 1 } else { count.min(8 - word % 8) };
        Step::Write { from, how, word, count }
    });
    let step = prop_oneof![
        8 => write,
        2 => side().prop_map(Step::Signal),
        3 => side().prop_map(Step::Look),
        1 => (side(), 0..WORDS).prop_map(|(side, word)| Step::Read(side, word)),
        1 => side().prop_map(Step::Flush),
        5 => (0..1500u64).prop_map(Step::Pass),
    ];
    vec(step, 1..60)
}

fn latencies() -> impl Strategy<Value = Latencies> {
    let some = || prop_oneof![Just(0), 1..2000u64].prop_map(ns);
    (some(), some(), some(), some(), some(), some()).prop_map(
        |(posted_write, read, dma_write, dma_read, doorbell, vector)| Latencies {
            posted_write,
            read,
            dma_write,
            dma_read,
            doorbell,
            vector,
        },
    )
}

/// What one side sent: when each can be there at the earliest, and the words that it changes; none for a signal.
#[derive(Default)]
struct Sent(Vec<(Duration, Option<(usize, usize)>)>);

impl Sent {
    /// How many have arrived by `now`: none before one that was sent earlier.
    fn arrived(&self, now: Duration) -> usize {
        self.0.iter().position(|(earliest, _)| *earliest > now).unwrap_or(self.0.len())
    }

    fn last(&self) -> Duration {
        self.0.iter().map(|(earliest, _)| *earliest).max().unwrap_or_default()
    }

    /// Memory, and signals so far, when the first `count` have arrived. The nth writes n.
    fn after(&self, count: usize) -> ([u64; WORDS], u64) {
        let (mut words, mut signals) = ([0; WORDS], 0);
        for (n, (_, what)) in self.0[..count].iter().enumerate() {
            match *what {
                Some((word, count)) => words[word..word + count].fill(n as u64 + 1),
                None => signals += 1,
            }
        }
        (words, signals)
    }
}

/// The ends, and what is known of them.
struct Trial {
    ends: Ends,
    clock: Hands,
    latencies: Latencies,
    /// By the host, by the SoC.
    sent: [Sent; 2],
    signalled: [u64; 2],
}

impl Trial {
    fn new(latencies: Latencies) -> Self {
        let (ends, clock) = Ends::by_hand(latencies);
        Self { ends, clock, latencies, sent: Default::default(), signalled: [0; 2] }
    }

    fn step(&mut self, step: &Step) {
        let began = self.clock.now();
        let mut ended = began;
        match *step {
            Step::Write { from, how, word, count } => {
                let n = self.sent[from as usize].0.len() as u64 + 1;
                self.sent[from as usize].0.push((began + self.latencies.write(from), Some((word, count))));
                let (words, bytes) = (vec![n; count], n.to_le_bytes().repeat(count));
                match (from, how) {
                    (Side::Soc, How::Transfer) => {
                        self.ends.soc.write(self.ends.iova + word as u64 * 8, &bytes).unwrap();
                        ended = began.max(self.sent[from as usize].last());
                    }
                    (Side::Host, How::Bytes | How::Transfer) => self.ends.bar.copy_in(word * 8, &bytes),
                    (Side::Soc, How::Bytes) => self.ends.remote.copy_in(word * 8, &bytes),
                    (Side::Host, How::Word) => self.ends.bar.store(word * 8, n),
                    (Side::Soc, How::Word) => self.ends.remote.store(word * 8, n),
                    (Side::Host, How::Line) => self.ends.bar.store_line(word * 8, &words),
                    (Side::Soc, How::Line) => self.ends.remote.store_line(word * 8, &words),
                }
            }
            Step::Signal(from) => {
                self.sent[from as usize].0.push((began + self.latencies.signal(from), None));
                match from {
                    Side::Host => self.ends.host.bell().ring(Doorbell::Lanes),
                    Side::Soc => self.ends.soc.raise(1),
                }
            }
            Step::Look(side) => {
                let from = other(side);
                let words = words(|offset| match side {
                    Side::Host => self.ends.inbox.load(offset),
                    Side::Soc => self.ends.card.load(offset),
                });
                let sent = &self.sent[from as usize];
                assert_eq!(words, sent.after(sent.arrived(began)).0, "all that has arrived, and nothing else");
                self.all_landed(from, began);
            }
            Step::Read(side, word) => {
                let found = match side {
                    Side::Host => self.ends.bar.load(word * 8),
                    Side::Soc => self.ends.remote.load(word * 8),
                };
                let [own, others] = [side, other(side)].map(|side| &self.sent[side as usize]);
                assert_eq!(found, own.after(own.0.len()).0[word], "what its own side wrote last");
                let there = own.last().max(began + self.latencies.read(side) / 2);
                let back = there + (self.latencies.read(side) - self.latencies.read(side) / 2);
                ended = back.max(others.last());
                // Both sides' writes were sent before the answer.
                self.all_landed(side, Duration::MAX);
                self.all_landed(other(side), Duration::MAX);
            }
            Step::Flush(Side::Host) => self.step(&Step::Read(Side::Host, 0)),
            Step::Flush(Side::Soc) => {
                self.ends.remote.flush().unwrap();
                ended = began.max(self.sent[Side::Soc as usize].last());
                self.all_landed(Side::Soc, Duration::MAX);
            }
            Step::Pass(time) => {
                self.clock.advance(time);
                ended = began + ns(time);
            }
        }
        if !matches!(step, Step::Flush(Side::Host)) {
            assert_eq!(self.clock.now(), ended, "who posts goes on at once, who reads waits just as long as it takes");
        }
        self.nothing_early(Side::Host);
        self.nothing_early(Side::Soc);
    }

    /// What a side sent and has arrived by `now` has landed, and nothing else.
    fn all_landed(&mut self, from: Side, now: Duration) {
        let sent = &self.sent[from as usize];
        let expected = sent.after(sent.arrived(now));
        assert_eq!(self.landed(from), expected);
    }

    /// What of a side's has landed is what it sent first, all of it due.
    fn nothing_early(&mut self, from: Side) {
        let landed = self.landed(from);
        let sent = &self.sent[from as usize];
        let arrived = sent.arrived(self.clock.now());
        assert!((0..=arrived).any(|count| sent.after(count) == landed), "{landed:?} of {arrived} that are due");
    }

    /// What stands in memory by itself, and how often it was signalled.
    fn landed(&mut self, from: Side) -> ([u64; WORDS], u64) {
        let (memory, event) = match from {
            Side::Host => (words(|offset| self.ends.card_itself.load(offset)), self.ends.soc.doorbell(Doorbell::Lanes)),
            Side::Soc => (words(|offset| self.ends.inbox_itself.load(offset)), self.ends.host.vector(1).unwrap()),
        };
        self.signalled[from as usize] += signals(event);
        (memory, self.signalled[from as usize])
    }
}

fn words(load: impl Fn(usize) -> u64) -> [u64; WORDS] {
    std::array::from_fn(|i| load(i * 8))
}

fn other(side: Side) -> Side {
    match side {
        Side::Host => Side::Soc,
        Side::Soc => Side::Host,
    }
}

proptest! {
    #[test]
    fn each_side_sees_a_prefix_of_what_was_sent(latencies in latencies(), steps in steps()) {
        let mut trial = Trial::new(latencies);
        for step in &steps {
            trial.step(step);
        }
    }
}
