//! Which pages of a queue's bounce buffers are free.

use std::ops::Range;

/// Bytes of a page: what is given out, and to what a buffer is aligned, so that a back end can hand it to a disk as it is.
pub(super) const PAGE: usize = 4096;

/// Pages, given out in runs.
#[derive(Debug)]
pub(super) struct Pool {
    /// A bit a page: whether it is taken.
    taken: Vec<u64>,
    pages: usize,
    free: usize,
    /// Where to look first: behind what was given out last.
    next: usize,
}

impl Pool {
    /// Of so many pages, a multiple of 64.
    pub(super) fn new(pages: usize) -> Self {
        Self { taken: vec![0; pages / 64], pages, free: pages, next: 0 }
    }

    /// How many there are.
    pub(super) fn pages(&self) -> usize {
        self.pages
    }

    /// Takes a run of `count` pages, at least one; its first page.
    pub(super) fn take(&mut self, count: usize) -> Option<usize> {
        if count > self.free {
            return None;
        }
        // Whatever is not more than all pages fits then, in however many runs.
        if self.free == self.pages {
            self.next = 0;
        }
        let first = self.find(self.next..self.pages, count).or_else(|| self.find(0..self.pages, count))?;
        self.mark(first..first + count, true);
        self.free -= count;
        self.next = (first + count) % self.pages;
        Some(first)
    }

    /// Gives a run back that was taken.
    pub(super) fn give_back(&mut self, run: Range<usize>) {
        self.free += run.len();
        self.mark(run, false);
    }

    /// The first run of free pages within `range`.
    fn find(&self, range: Range<usize>, count: usize) -> Option<usize> {
        let (mut first, mut page) = (range.start, range.start);
        while first + count <= range.end {
            if page == first + count {
                return Some(first);
            }
            let (word, bit) = (self.taken[page / 64], page % 64);
            if word >> bit & 1 == 0 {
                page += 1;
                continue;
            }
            // Past all that is taken from here on in this word.
            page += (!(word >> bit)).trailing_zeros().min(64 - bit as u32) as usize;
            first = page;
        }
        None
    }

    fn mark(&mut self, run: Range<usize>, taken: bool) {
        for page in run {
            let bit = 1 << (page % 64);
            if taken {
                self.taken[page / 64] |= bit;
            } else {
                self.taken[page / 64] &= !bit;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_taken_is_taken_once_and_all_comes_back(steps in prop::collection::vec((1usize..90, any::<bool>()), 1..200)) {
            let mut pool = Pool::new(256);
            let mut taken: Vec<Range<usize>> = Vec::new();
            for (count, give_back) in steps {
                if give_back && !taken.is_empty() {
                    pool.give_back(taken.remove(count % taken.len()));
                    continue;
                }
                let had_room = (0..=256 - count).any(|first| {
                    taken.iter().all(|run| first + count <= run.start || run.end <= first)
                });
                let got = pool.take(count);
                prop_assert_eq!(got.is_some(), had_room);
                if let Some(first) = got {
                    prop_assert!(first + count <= 256);
                    prop_assert!(taken.iter().all(|run| first + count <= run.start || run.end <= first));
                    taken.push(first..first + count);
                }
            }
            taken.drain(..).for_each(|run| pool.give_back(run));
            prop_assert_eq!(pool.take(256), Some(0));
        }
    }
}
