//! A bit a page.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::stream::Run;

/// Pages that one word stands for: those that go by the same connection, so that a word is changed by one thread at a time. (Which is
/// why nothing here has an order; what has is whatever hands the threads their work.)
const WORD: u64 = 64;

/// A bit for each page of a region.
pub(crate) struct Bitmap {
    words: Vec<AtomicU64>,
    pages: u64,
}

impl Bitmap {
    pub(crate) fn new(pages: u64) -> Self {
        let words = (0..pages.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect();
        Self { words, pages }
    }

    /// Sets the bits of a run that is in it.
    pub(crate) fn set(&self, run: Run) {
        for (word, bits) in masks(run) {
            self.words[word].fetch_or(bits, Ordering::Relaxed);
        }
    }

    /// Sets them; the parts that were clear.
    pub(crate) fn claim(&self, run: Run) -> impl Iterator<Item = Run> + '_ {
        masks(run).flat_map(move |(index, mask)| {
            let before = self.words[index].fetch_or(mask, Ordering::Relaxed);
            runs(run.region, index, mask & !before)
        })
    }

    /// All runs of set (or of clear) bits, as long as they get.
    pub(crate) fn list(&self, region: u32, set: bool) -> Vec<Run> {
        let mut list: Vec<Run> = Vec::new();
        for index in 0..self.words() {
            let bits = if set { self.word(index) } else { !self.word(index) & self.valid(index) };
            for run in runs(region, index, bits) {
                match list.last_mut() {
                    Some(last) if last.first + last.pages == run.first => last.pages += run.pages,
                    _ => list.push(run),
                }
            }
        }
        list
    }

    /// The bits of a word that are pages.
    fn valid(&self, index: usize) -> u64 {
        ones((self.pages - index as u64 * WORD).min(WORD) as u32)
    }

    /// Clears them.
    pub(crate) fn clear(&self, run: Run) {
        for (word, bits) in masks(run) {
            self.words[word].fetch_and(!bits, Ordering::Relaxed);
        }
    }

    /// Sets all of them.
    pub(crate) fn fill(&self) {
        if self.pages > 0 {
            self.set(Run { region: 0, first: 0, pages: self.pages });
        }
    }

    /// How many are set.
    pub(crate) fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// How many are set here or there, of the same region.
    pub(crate) fn count_or(&self, other: &Self) -> u64 {
        (0..self.words()).map(|index| u64::from((self.word(index) | other.word(index)).count_ones())).sum()
    }

    /// How many words there are.
    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }

    /// The bits of pages 64 × `index` and on.
    pub(crate) fn word(&self, index: usize) -> u64 {
        self.words[index].load(Ordering::Relaxed)
    }

    /// Replaces them.
    pub(crate) fn set_word(&self, index: usize, bits: u64) {
        self.words[index].store(bits, Ordering::Relaxed);
    }

    /// Of a run that is in it, the parts whose bits are clear.
    pub(crate) fn clear_parts(&self, run: Run) -> impl Iterator<Item = Run> + '_ {
        masks(run).flat_map(move |(index, mask)| runs(run.region, index, !self.word(index) & mask))
    }

    /// Of a run that is in it, the parts whose bits are set.
    pub(crate) fn set_parts(&self, run: Run) -> impl Iterator<Item = Run> + '_ {
        masks(run).flat_map(move |(index, mask)| runs(run.region, index, self.word(index) & mask))
    }
}

/// The runs of a word's bits.
pub(crate) fn runs(region: u32, index: usize, mut bits: u64) -> impl Iterator<Item = Run> {
    std::iter::from_fn(move || {
        let first = bits.trailing_zeros();
        if first == u64::BITS {
            return None;
        }
        let pages = (bits >> first).trailing_ones();
        bits &= !(ones(pages) << first);
        Some(Run { region, first: index as u64 * WORD + u64::from(first), pages: pages.into() })
    })
}

/// The words of a run, and its bits in each.
fn masks(run: Run) -> impl Iterator<Item = (usize, u64)> {
    run.parts(WORD).map(|part| ((part.first / WORD) as usize, ones(part.pages as u32) << (part.first % WORD)))
}

fn ones(count: u32) -> u64 {
    u64::MAX.checked_shr(u64::BITS - count).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 500;

    proptest! {
        #[test]
        fn it_is_a_set_of_pages(steps in prop::collection::vec((any::<bool>(), 0..PAGES, 1..PAGES), 0..20)) {
            let bitmap = Bitmap::new(PAGES);
            let mut set = BTreeSet::new();
            for (sets, first, pages) in steps {
                let run = Run { region: 7, first, pages: pages.min(PAGES - first) };
                let pages = first..first + run.pages;
                if sets {
                    bitmap.set(run);
                    set.extend(pages);
                } else {
                    bitmap.clear(run);
                    set.retain(|page| !pages.contains(page));
                }
                prop_assert_eq!(bitmap.count(), set.len() as u64);
                let listed = bitmap.set_parts(run).flat_map(|part| part.first..part.first + part.pages);
                prop_assert_eq!(listed.count() as u64, if sets { run.pages } else { 0 });
            }
            let all = (0..bitmap.words()).flat_map(|index| runs(7, index, bitmap.word(index)));
            let listed: BTreeSet<u64> = all.flat_map(|run| run.first..run.first + run.pages).collect();
            prop_assert_eq!(listed, set);
        }
    }

    #[test]
    fn what_is_in_both_counts_once() {
        let (one, other) = (Bitmap::new(PAGES), Bitmap::new(PAGES));
        one.set(Run { region: 7, first: 10, pages: 100 });
        other.set(Run { region: 7, first: 100, pages: 20 });
        assert_eq!(one.count_or(&other), 110);
    }

    #[test]
    fn all_of_it_is_its_pages() {
        for pages in [0, 1, 63, 64, 65, 500] {
            let bitmap = Bitmap::new(pages);
            bitmap.fill();
            assert_eq!(bitmap.count(), pages);
        }
    }
}
