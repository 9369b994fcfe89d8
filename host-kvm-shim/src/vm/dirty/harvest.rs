//! Dirty pages that KVM doesn't tell of any more, as bitmaps by allocation; and what is done with bitmaps.

use std::collections::BTreeMap;
use std::ops::Range;

use api_channel::bulk;
use api_channel::call::DirtyRun;

use super::{Found, Window};

/// Dirty pages by allocation.
#[derive(Debug, Default)]
pub(in crate::vm) struct Harvest(BTreeMap<u32, Vec<u64>>);

/// Most runs of one fetch: what the bulk holds after its count.
const MOST_RUNS: usize = (bulk::MOST - 8) / size_of::<DirtyRun>();

impl Harvest {
    /// Adds the pages of an allocation from `first` on whose bits are set.
    pub(super) fn add(&mut self, ram: u32, first: u64, bits: &[u64]) {
        ones(bits).for_each(|page| self.mark(ram, first + page));
    }

    /// Adds a page.
    pub(super) fn mark(&mut self, ram: u32, page: u64) {
        let mine = self.0.entry(ram).or_default();
        let (word, bit) = split(page);
        if mine.len() <= word {
            mine.resize(word + 1, 0);
        }
        mine[word] |= 1 << bit;
    }

    /// Adds pages in a row, of which there may be very many.
    pub(super) fn mark_all(&mut self, ram: u32, pages: &Range<u64>) {
        self.reserve(ram, pages.end);
        let mine = self.0.entry(ram).or_default();
        for (i, word) in mine.iter_mut().enumerate().skip((pages.start / 64) as usize) {
            *word |= mask(i as u64, pages.start, pages.end);
        }
    }

    /// Takes the memory for an allocation's pages before `end`, so that nobody takes it when they are added.
    pub(super) fn reserve(&mut self, ram: u32, end: u64) {
        let mine = self.0.entry(ram).or_default();
        let words = end.div_ceil(64) as usize;
        if mine.len() < words {
            mine.resize(words, 0);
        }
    }

    /// The pages that somebody looks at.
    pub(super) fn pages(&self, window: &Window) -> impl Iterator<Item = u64> + '_ {
        let mine = self.0.get(&window.ram).map_or(&[][..], Vec::as_slice);
        let words = (window.first / 64) as usize..mine.len().min(window.end.div_ceil(64) as usize);
        let first = words.start as u64 * 64;
        let range = window.first..window.end;
        mine.get(words)
            .into_iter()
            .flat_map(ones)
            .map(move |page| first + page)
            .filter(move |page| range.contains(page))
    }

    /// Forgets the pages that were told.
    pub(super) fn forget(&mut self, window: &Window, found: &Found) {
        if let Some(mine) = self.0.get_mut(&window.ram) {
            keep_outside(mine, window.first, found.next);
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// The runs of set bits, where bit 0 is page `first`, up to page `end` or as many as a reply holds.
pub(super) fn runs(bits: &[u64], first: u64, end: u64) -> Found {
    let mut runs: Vec<DirtyRun> = Vec::new();
    for page in ones(bits).map(|p| first + p).take_while(|&p| p < end) {
        let full = runs.len() == MOST_RUNS;
        match runs.last_mut() {
            Some(run) if run.first + run.pages == page => run.pages += 1,
            _ if full => return Found { runs, next: page },
            _ => runs.push(DirtyRun { first: page, pages: 1 }),
        }
    }
    Found { runs, next: end }
}

fn split(page: u64) -> (usize, u32) {
    ((page / 64) as usize, (page % 64) as u32)
}

/// Positions of set bits, ascending.
pub(super) fn ones(bits: &[u64]) -> impl Iterator<Item = u64> + '_ {
    bits.iter().enumerate().filter(|(_, w)| **w != 0).flat_map(|(i, &word)| {
        let mut left = word;
        std::iter::from_fn(move || {
            let bit = (left != 0).then(|| left.trailing_zeros())?;
            left &= left - 1;
            Some(i as u64 * 64 + u64::from(bit))
        })
    })
}

/// Clears all bits but those from `from` to before `to`.
pub(super) fn keep_inside(bits: &mut [u64], from: u64, to: u64) {
    for (i, word) in bits.iter_mut().enumerate() {
        *word &= mask(i as u64, from, to);
    }
}

/// Clears the bits from `from` to before `to`.
fn keep_outside(bits: &mut [u64], from: u64, to: u64) {
    for (i, word) in bits.iter_mut().enumerate() {
        *word &= !mask(i as u64, from, to);
    }
}

/// The bits of word `i` that stand for pages from `from` to before `to`.
fn mask(i: u64, from: u64, to: u64) -> u64 {
    let below = |page: u64| match page.saturating_sub(i * 64) {
        0 => 0,
        n if n >= 64 => u64::MAX,
        n => (1 << n) - 1,
    };
    below(to) & !below(from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_set_bits_and_end_where_the_range_ends() {
        let bits = [0b1011 | 1 << 63, 1, 0, u64::MAX];
        let found = runs(&bits, 100, 100 + 200);
        let expected = [(100, 2), (103, 1), (163, 2), (292, 8)].map(|(first, pages)| DirtyRun { first, pages });
        assert_eq!(found, Found { runs: expected.to_vec(), next: 300 });
    }

    #[test]
    fn a_reply_takes_no_more_runs_than_the_bulk_holds() {
        let bits = vec![0x5555_5555_5555_5555; MOST_RUNS / 32 + 2];
        let found = runs(&bits, 0, bits.len() as u64 * 64);
        assert_eq!(found.runs.len(), MOST_RUNS);
        assert_eq!(found.next, MOST_RUNS as u64 * 2);
    }

    #[test]
    fn masks_keep_what_they_say() {
        let mut bits = [u64::MAX; 3];
        keep_inside(&mut bits, 3, 130);
        assert_eq!(bits, [!0b111, u64::MAX, 0b11]);
        keep_outside(&mut bits, 64, 129);
        assert_eq!(bits, [!0b111, 0, 0b10]);
        keep_inside(&mut bits, 5, 5);
        assert_eq!(bits, [0; 3]);
    }

    #[test]
    fn a_harvest_adds_up_at_any_offset() {
        let mut harvest = Harvest::default();
        harvest.add(3, 70, &[0b101]);
        harvest.add(3, 1, &[1 << 63, 1]);
        harvest.reserve(3, 200);
        let window = |first, end| Window { ram: 3, first, end, clear: true };
        assert_eq!(harvest.pages(&window(0, 1000)).collect::<Vec<_>>(), [64, 65, 70, 72]);
        assert_eq!(harvest.pages(&window(65, 72)).collect::<Vec<_>>(), [65, 70]);
        harvest.forget(&window(65, 72), &Found { runs: Vec::new(), next: 66 });
        assert_eq!(harvest.pages(&window(0, 1000)).collect::<Vec<_>>(), [64, 70, 72]);
        harvest.mark_all(4, &(60..200));
        assert!(harvest.pages(&Window { ram: 4, ..window(0, 1000) }).eq(60..200));
        assert_eq!(harvest.pages(&Window { ram: 5, ..window(0, 1000) }).count(), 0);
    }
}
