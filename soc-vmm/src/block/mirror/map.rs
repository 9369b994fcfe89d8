//! Which clusters of a disk its copy lacks, and which are just being copied.
//!
//! A cluster is dirty from the moment a write to it is over until somebody begins to copy it. While it is copied nobody else copies it, so
//! that an older copy never comes after a newer one; what is written meanwhile makes it dirty again.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// The map of one disk.
#[derive(Debug)]
pub(super) struct Map {
    size: u64,
    /// Bytes of a cluster.
    cluster: u64,
    dirty: Bits,
    copied: Bits,
    /// Where the search goes on.
    cursor: usize,
    /// Clusters that are to be copied first: somebody waits for them.
    urgent: VecDeque<Range<usize>>,
    /// Changes that somebody waits for, by their numbers.
    tickets: BTreeMap<u64, Range<usize>>,
    next_ticket: u64,
}

impl Map {
    /// Of a disk of which nothing is dirty.
    pub(super) fn new(size: u64, cluster: u64) -> Self {
        let clusters = size.div_ceil(cluster) as usize;
        Self {
            size,
            cluster,
            dirty: Bits::new(clusters),
            copied: Bits::new(clusters),
            cursor: 0,
            urgent: VecDeque::new(),
            tickets: BTreeMap::new(),
            next_ticket: 0,
        }
    }

    /// These bytes are not what the copy has.
    pub(super) fn mark(&mut self, offset: u64, len: u64) {
        let clusters = self.clusters(offset, len);
        self.dirty.set(clusters);
    }

    /// The same, and somebody waits for them; the number that he waits by.
    pub(super) fn mark_and_wait(&mut self, offset: u64, len: u64) -> Option<u64> {
        let clusters = self.clusters(offset, len);
        if clusters.is_empty() {
            return None;
        }
        self.dirty.set(clusters.clone());
        self.urgent.push_back(clusters.clone());
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.tickets.insert(ticket, clusters);
        Some(ticket)
    }

    /// Whether nobody need wait by that number any more.
    pub(super) fn is_settled(&self, ticket: u64) -> bool {
        !self.tickets.contains_key(&ticket)
    }

    /// Takes dirty clusters that follow each other, `most` at most, to copy them: what is read of them from now on is new enough.
    pub(super) fn take(&mut self, most: usize) -> Option<Range<usize>> {
        let first = self.next_urgent().or_else(|| self.next())?;
        let count = (first..self.dirty.len).take(most).take_while(|at| self.is_free(*at)).count();
        let taken = first..first + count;
        self.dirty.clear(taken.clone());
        self.copied.set(taken.clone());
        self.cursor = taken.end;
        Some(taken)
    }

    /// Gives clusters back that were taken: copied, or still dirty. Whether somebody need not wait any more.
    pub(super) fn give_back(&mut self, clusters: Range<usize>, copied: bool) -> bool {
        self.copied.clear(clusters.clone());
        if !copied {
            self.dirty.set(clusters);
            return false;
        }
        let before = self.tickets.len();
        let (dirty, copied) = (&self.dirty, &self.copied);
        self.tickets.retain(|_, waits| waits.clone().any(|at| dirty.has(at) || copied.has(at)));
        self.tickets.len() < before
    }

    /// Whether the copy has everything.
    pub(super) fn is_clean(&self) -> bool {
        self.dirty.count == 0 && self.copied.count == 0
    }

    /// Bytes that the copy lacks.
    pub(super) fn lacking(&self) -> u64 {
        ((self.dirty.count + self.copied.count) as u64 * self.cluster).min(self.size)
    }

    /// The bytes of clusters.
    pub(super) fn bytes(&self, clusters: &Range<usize>) -> Range<u64> {
        clusters.start as u64 * self.cluster..(clusters.end as u64 * self.cluster).min(self.size)
    }

    /// The clusters that these bytes touch.
    pub(super) fn clusters(&self, offset: u64, len: u64) -> Range<usize> {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return 0..0;
        }
        (offset / self.cluster) as usize..end.div_ceil(self.cluster) as usize
    }

    fn is_free(&self, at: usize) -> bool {
        self.dirty.has(at) && !self.copied.has(at)
    }

    fn next_urgent(&mut self) -> Option<usize> {
        let (dirty, copied) = (&self.dirty, &self.copied);
        // Those that are being copied now stay: they may be dirty again.
        self.urgent.retain(|clusters| clusters.clone().any(|at| dirty.has(at)));
        let mut all = self.urgent.iter().flat_map(Clone::clone);
        all.find(|at| dirty.has(*at) && !copied.has(*at))
    }

    fn next(&self) -> Option<usize> {
        let find = |range: Range<usize>| self.dirty.find(range, |at| !self.copied.has(at));
        find(self.cursor.min(self.dirty.len)..self.dirty.len).or_else(|| find(0..self.cursor.min(self.dirty.len)))
    }
}

/// Bits that are counted.
#[derive(Debug)]
struct Bits {
    words: Vec<u64>,
    len: usize,
    count: usize,
}

impl Bits {
    fn new(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(64)], len, count: 0 }
    }

    fn has(&self, at: usize) -> bool {
        self.words[at / 64] >> (at % 64) & 1 != 0
    }

    fn set(&mut self, range: Range<usize>) {
        self.each(range, |word, mask| *word |= mask);
    }

    fn clear(&mut self, range: Range<usize>) {
        self.each(range, |word, mask| *word &= !mask);
    }

    fn each(&mut self, range: Range<usize>, change: impl Fn(&mut u64, u64)) {
        let mut at = range.start;
        while at < range.end {
            let (index, low) = (at / 64, at % 64);
            let bits = (64 - low).min(range.end - at);
            let mask = (u64::MAX >> (64 - bits)) << low;
            let word = &mut self.words[index];
            let before = word.count_ones() as usize;
            change(word, mask);
            self.count = self.count + word.count_ones() as usize - before;
            at += bits;
        }
    }

    /// The first one that is set, and wanted.
    fn find(&self, range: Range<usize>, wanted: impl Fn(usize) -> bool) -> Option<usize> {
        let mut at = range.start;
        while at < range.end {
            let rest = self.words[at / 64] >> (at % 64);
            if rest == 0 {
                at = (at / 64 + 1) * 64;
                continue;
            }
            at += rest.trailing_zeros() as usize;
            if at < range.end && wanted(at) {
                return Some(at);
            }
            at += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CLUSTERS: usize = 150;
    const CLUSTER: u64 = 4096;

    #[derive(Clone, Debug)]
    enum Step {
        Write { at: usize, count: usize, waits: bool },
        Take(usize),
        Finish { which: usize, copied: bool },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..CLUSTERS, 1..8usize, any::<bool>()).prop_map(|(at, count, waits)| Step::Write { at, count, waits }),
            (1..20usize).prop_map(Step::Take),
            (0..8usize, any::<bool>()).prop_map(|(which, copied)| Step::Finish { which, copied }),
        ]
    }

    proptest! {
        /// A disk and its copy as a version a cluster: whatever happens in whatever order, what is neither dirty nor being copied is the
        /// same on both, and who waits, waits for what isn't.
        #[test]
        fn what_is_clean_is_the_same(steps in prop::collection::vec(step(), 0..200)) {
            let mut map = Map::new(CLUSTERS as u64 * CLUSTER - 512, CLUSTER);
            let (mut disk, mut copy) = ([0u32; CLUSTERS], [0u32; CLUSTERS]);
            let mut under_way: Vec<(Range<usize>, Vec<u32>)> = Vec::new();
            let mut waits: Vec<(u64, Range<usize>)> = Vec::new();
            for (version, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Write { at, count, waits: false } => {
                        disk[at..(at + count).min(CLUSTERS)].fill(version as u32 + 1);
                        map.mark(at as u64 * CLUSTER + 7, count as u64 * CLUSTER - 7);
                    }
                    Step::Write { at, count, waits: true } => {
                        let range = at..(at + count).min(CLUSTERS);
                        disk[range.clone()].fill(version as u32 + 1);
                        let ticket = map.mark_and_wait(at as u64 * CLUSTER, count as u64 * CLUSTER).unwrap();
                        waits.push((ticket, range));
                    }
                    Step::Take(most) => if let Some(range) = map.take(most) {
                        prop_assert!(!range.is_empty() && range.len() <= most);
                        prop_assert!(under_way.iter().all(|(other, _)| other.end <= range.start || range.end <= other.start));
                        under_way.push((range.clone(), disk[range].to_vec()));
                    },
                    Step::Finish { which, copied } if which < under_way.len() => {
                        let (range, read) = under_way.remove(which);
                        if copied {
                            copy[range.clone()].copy_from_slice(&read);
                        }
                        map.give_back(range, copied);
                    }
                    Step::Finish { .. } => {}
                }
                for at in 0..CLUSTERS {
                    let clean = !map.dirty.has(at) && !map.copied.has(at);
                    prop_assert!(!clean || disk[at] == copy[at], "cluster {at}");
                }
                for (ticket, range) in &waits {
                    let same = disk[range.clone()] == copy[range.clone()];
                    prop_assert!(!map.is_settled(*ticket) || same || map.dirty.find(range.clone(), |_| true).is_some()
                        || range.clone().any(|at| map.copied.has(at)));
                }
                let lacking = (0..CLUSTERS).filter(|at| map.dirty.has(*at) || map.copied.has(*at)).count();
                prop_assert_eq!(map.is_clean(), lacking == 0);
            }
            // And it converges once nobody writes.
            for (range, read) in under_way {
                copy[range.clone()].copy_from_slice(&read);
                map.give_back(range, true);
            }
            while let Some(range) = map.take(9) {
                copy[range.clone()].copy_from_slice(&disk[range.clone()]);
                map.give_back(range, true);
            }
            prop_assert!(map.is_clean() && map.lacking() == 0);
            prop_assert_eq!(disk, copy);
            prop_assert!(waits.iter().all(|(ticket, _)| map.is_settled(*ticket)));
        }
    }
}
