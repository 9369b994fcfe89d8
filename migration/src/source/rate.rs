//! How fast pages leave.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use crate::ending::lock;
use crate::progress::per_second;

/// Time at work that the rate is an average over: longer than what sockets take in at once, shorter than a network's moods.
const WINDOW: Duration = Duration::from_secs(1);
/// Time at work that is one entry.
const SLOT: Duration = Duration::from_millis(20);

/// The rate of one connection while it has pages to send: zero pages and idle times don't count, waits for the bandwidth limit do.
#[derive(Default)]
pub(super) struct Rate(Mutex<VecDeque<(u64, Duration)>>);

impl Rate {
    /// So many bytes of pages took so long.
    pub(super) fn add(&self, bytes: u64, busy: Duration) {
        let mut slots = lock(&self.0);
        match slots.back_mut() {
            Some((sum, time)) if *time < SLOT => {
                *sum += bytes;
                *time += busy;
            }
            _ => slots.push_back((bytes, busy)),
        }
        let mut total: Duration = slots.iter().map(|(_, time)| *time).sum();
        while let Some((_, first)) = slots.front().filter(|(_, first)| total - *first > WINDOW) {
            total -= *first;
            slots.pop_front();
        }
    }

    /// Bytes a second; 0: it has sent none.
    pub(super) fn per_second(&self) -> u64 {
        let slots = lock(&self.0);
        let (bytes, time) = slots.iter().fold((0, Duration::ZERO), |(b, t), (bytes, time)| (b + bytes, t + *time));
        per_second(bytes, time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_the_last_second_of_work() {
        let rate = Rate::default();
        assert_eq!(rate.per_second(), 0);
        for _ in 0..5_000 {
            rate.add(1_000, Duration::from_millis(1));
        }
        assert_eq!(rate.per_second(), 1_000_000);
        for _ in 0..1_100 {
            rate.add(5_000, Duration::from_millis(1));
        }
        assert_eq!(rate.per_second(), 5_000_000);
        assert!(lock(&rate.0).len() < 60);
    }
}
