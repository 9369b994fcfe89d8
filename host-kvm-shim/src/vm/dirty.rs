//! The dirty log: which pages of an allocation the guest wrote.

use std::collections::BTreeMap;

use api_channel::bulk;
use api_channel::call::{DirtyFetch, DirtyRun, PAGE};
use kvm_ioctls::VmFd;

use super::slots::Slots;
use crate::error::Refusal;
use crate::kvm::{clear_dirty_log, get_dirty_log};

/// Dirty pages of slots that are gone, by allocation, as bitmaps.
#[derive(Debug, Default)]
pub(crate) struct Harvest(BTreeMap<u32, Vec<u64>>);

/// Most pages that one fetch looks at: 1 GiB.
const MOST_PAGES: u64 = 1 << 18;
/// Most runs of one fetch: what the bulk holds after its count.
const MOST_RUNS: usize = (bulk::MOST - 8) / size_of::<DirtyRun>();

impl Harvest {
    /// Adds the pages of an allocation from `first` on whose bits are set.
    pub(crate) fn add(&mut self, ram: u32, first: u64, bits: &[u64]) {
        let mine = self.0.entry(ram).or_default();
        for page in ones(bits) {
            let (word, bit) = split(first + page);
            if mine.len() <= word {
                mine.resize(word + 1, 0);
            }
            mine[word] |= 1 << bit;
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

/// What a fetch found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// The runs, ascending.
    pub(crate) runs: Vec<DirtyRun>,
    /// The first page that was not looked at.
    pub(crate) next: u64,
}

/// Fetches dirty pages of an allocation of `ram_pages` pages; with `clear`, their next write is logged again before this returns.
pub(crate) fn fetch(
    vm: &VmFd,
    slots: &Slots,
    harvest: &mut Harvest,
    ram_pages: u64,
    wanted: &DirtyFetch,
) -> Result<Found, Refusal> {
    let DirtyFetch { ram, clear, first, pages } = *wanted;
    if clear > 1 || first > ram_pages {
        return Err(Refusal::argument(format!("page {first} of RAM {ram}, which has {ram_pages}")));
    }
    let end = first.saturating_add(pages.min(MOST_PAGES)).min(ram_pages);
    let mut bits = vec![0u64; (end - first).div_ceil(64) as usize];
    let mut mark = |page: u64| {
        if (first..end).contains(&page) {
            let (word, bit) = split(page - first);
            bits[word] |= 1 << bit;
        }
    };
    if let Some(old) = harvest.0.get(&ram) {
        ones(old).for_each(&mut mark);
    }
    let mut logs = Vec::new();
    for (number, slot) in slots.of_ram(ram) {
        let (start, count) = (slot.offset / PAGE, slot.len / PAGE);
        if start >= end || start + count <= first {
            continue;
        }
        let mut log = vec![0; count.div_ceil(64) as usize];
        get_dirty_log(vm, number, &mut log).map_err(Refusal::nix("read the dirty log"))?;
        ones(&log).for_each(|page| mark(start + page));
        logs.push((number, start, count, log));
    }
    let found = runs(&bits, first, end);
    if clear == 1 {
        if let Some(old) = harvest.0.get_mut(&ram) {
            keep_outside(old, first, found.next);
        }
        for (number, start, count, mut log) in logs {
            // What is told is cleared, and nothing else: bits beyond the last run told stay for the next fetch.
            let told = first.max(start) - start..found.next.min(start + count).max(start) - start;
            keep_inside(&mut log, told.start, told.end);
            clear_words(vm, number, count, &log)?;
        }
    }
    Ok(found)
}

/// Clears the set bits of a slot's log of `count` pages, word ranges that hold any alone.
fn clear_words(vm: &VmFd, number: u32, count: u64, log: &[u64]) -> Result<(), Refusal> {
    let Some(from) = log.iter().position(|&w| w != 0) else { return Ok(()) };
    let to = log.iter().rposition(|&w| w != 0).map_or(log.len(), |last| last + 1);
    let first = from as u64 * 64;
    let pages = (to as u64 * 64).min(count) - first;
    clear_dirty_log(vm, number, first, pages as u32, &log[from..to]).map_err(Refusal::nix("clear the dirty log"))
}

/// The runs of set bits, where bit 0 is page `first`, up to page `end` or as many as a reply holds.
fn runs(bits: &[u64], first: u64, end: u64) -> Found {
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
fn ones(bits: &[u64]) -> impl Iterator<Item = u64> + '_ {
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
fn keep_inside(bits: &mut [u64], from: u64, to: u64) {
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
        assert_eq!(ones(&harvest.0[&3]).collect::<Vec<_>>(), [64, 65, 70, 72]);
    }
}
