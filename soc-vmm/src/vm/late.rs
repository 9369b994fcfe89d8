//! Post-copy at the destination: the pages of a running guest that have not come. Whoever reaches for guest memory by this process asks here
//! first, and waits; what vCPUs wait for the host tells. Everything is said to the source once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api_channel::call::{LateRun, PAGE};

use crate::link::WantedSink;

/// Which pages have not come, and who waits.
#[derive(Debug, Default)]
pub(super) struct Late {
    state: Mutex<State>,
    /// Pages came, or never will.
    came: Condvar,
    /// Somebody wants one.
    asked: Condvar,
}

#[derive(Debug, Default)]
struct State {
    areas: BTreeMap<u32, Area>,
    /// What somebody waits for, and the source was not told of.
    wanted: BTreeSet<(u32, u64)>,
    /// What it was told of.
    told: BTreeSet<(u32, u64)>,
    /// Pages that have not come, or of which the host does not know that.
    untold: u64,
    /// Nothing comes any more: whoever waits fails.
    is_over: bool,
}

/// An allocation.
#[derive(Debug)]
struct Area {
    /// A bit a page.
    missing: Vec<u64>,
    /// Pages of the host's, of so many of ours, that it is told of as one.
    unit: u64,
}

/// What was waited for never comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Never;

impl Late {
    /// These pages of an allocation of so many come later. The host shows that in units of `unit` pages.
    pub(super) fn lacks(&self, run: LateRun, pages: u64, unit: u64) {
        let mut state = self.state();
        let new = || Area { missing: vec![0; pages.div_ceil(64) as usize], unit };
        let area = state.areas.entry(run.ram).or_insert_with(new);
        let added = (run.first..run.first + run.pages).map(|page| u64::from(area.change(page, true))).sum::<u64>();
        state.untold += added;
    }

    /// What the host has to know of that: runs of whole units.
    pub(super) fn of_host(&self) -> Vec<LateRun> {
        let state = self.state();
        let mut runs: Vec<LateRun> = Vec::new();
        for (&ram, area) in &state.areas {
            for page in area.pages_missing() {
                let first = page / area.unit * area.unit;
                match runs.last_mut() {
                    Some(last) if last.ram == ram && page < last.first + last.pages => {}
                    Some(last) if last.ram == ram && last.first + last.pages == first => last.pages += area.unit,
                    _ => runs.push(LateRun { ram, reserved: 0, first, pages: area.unit }),
                }
            }
        }
        runs
    }

    /// The first page of the bytes from `offset` of an allocation that has not come.
    pub(super) fn missing(&self, ram: u32, offset: u64, len: u64) -> Option<LateRun> {
        let state = self.state();
        let area = state.areas.get(&ram)?;
        let mut pages = offset / PAGE..(offset + len).div_ceil(PAGE);
        let first = pages.find(|page| area.has(*page))?;
        Some(LateRun { ram, reserved: 0, first, pages: 1 })
    }

    /// Waits until it has.
    pub(super) fn wait(&self, page: LateRun) -> Result<(), Never> {
        let misses = |state: &State| state.areas.get(&page.ram).is_some_and(|area| area.has(page.first));
        let mut state = self.state();
        if misses(&state) && state.want(page.ram, page.first) {
            self.asked.notify_all();
        }
        let state = self.came.wait_while(state, |state| misses(state) && !state.is_over);
        if misses(&state.unwrap_or_else(PoisonError::into_inner)) { Err(Never) } else { Ok(()) }
    }

    /// What somebody has begun to wait for, once; nothing after `at_most`.
    pub(super) fn wanted(&self, at_most: Duration) -> Vec<LateRun> {
        let nothing = |state: &mut State| state.wanted.is_empty();
        let waited = self.asked.wait_timeout_while(self.state(), at_most, nothing);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        let wanted = std::mem::take(&mut state.wanted);
        let mut runs: Vec<LateRun> = Vec::new();
        for &(ram, page) in &wanted {
            match runs.last_mut() {
                Some(last) if last.ram == ram && last.first + last.pages == page => last.pages += 1,
                _ => runs.push(LateRun { ram, reserved: 0, first: page, pages: 1 }),
            }
        }
        state.told.extend(wanted);
        runs
    }

    /// These pages have come, their bytes are there: what of it the host can show now.
    pub(super) fn came(&self, run: LateRun) -> Vec<LateRun> {
        let mut state = self.state();
        let State { areas, wanted, told, .. } = &mut *state;
        let Some(area) = areas.get_mut(&run.ram) else { return Vec::new() };
        let end = run.first + run.pages;
        let units = run.first / area.unit * area.unit..end.next_multiple_of(area.unit);
        for page in run.first..end {
            area.change(page, false);
            wanted.remove(&(run.ram, page));
            told.remove(&(run.ram, page));
        }
        let whole: Vec<LateRun> = if area.unit == 1 {
            vec![run]
        } else {
            let firsts = units.step_by(area.unit as usize).filter(|first| !area.has_in(*first, area.unit));
            firsts.map(|first| LateRun { first, pages: area.unit, ..run }).collect()
        };
        self.came.notify_all();
        whole
    }

    /// Of so many pages that came the host was told, if it had to be; of how many it is still to be told.
    pub(super) fn told(&self, pages: u64) -> u64 {
        let mut state = self.state();
        state.untold -= pages;
        state.untold
    }

    /// Nothing comes any more.
    pub(super) fn give_up(&self) {
        self.state().is_over = true;
        self.came.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WantedSink for Late {
    fn wanted(&self, run: LateRun) {
        let mut state = self.state();
        // A host may say anything.
        let Some(area) = state.areas.get(&run.ram) else { return };
        let end = run.first.saturating_add(run.pages).min(area.pages());
        let missing: Vec<u64> = (run.first..end).filter(|page| area.has(*page)).collect();
        let mut news = false;
        for page in missing {
            news |= state.want(run.ram, page);
        }
        if news {
            self.asked.notify_all();
        }
    }
}

impl State {
    /// Somebody waits for that; whether that is new.
    fn want(&mut self, ram: u32, page: u64) -> bool {
        !self.told.contains(&(ram, page)) && self.wanted.insert((ram, page))
    }
}

impl Area {
    fn pages(&self) -> u64 {
        self.missing.len() as u64 * 64
    }

    fn has(&self, page: u64) -> bool {
        self.missing.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// Whether one of so many pages is missing.
    fn has_in(&self, first: u64, pages: u64) -> bool {
        (first..first + pages).any(|page| self.has(page))
    }

    /// What is missing, in ascending order.
    fn pages_missing(&self) -> impl Iterator<Item = u64> {
        let words = (0..).zip(&self.missing).filter(|(_, word)| **word != 0);
        words.flat_map(|(index, word)| (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| index * 64 + bit))
    }

    /// Whether that is a change.
    fn change(&mut self, page: u64, missing: bool) -> bool {
        let Some(word) = self.missing.get_mut((page / 64) as usize) else { return false };
        let changes = (*word >> (page % 64) & 1 != 0) != missing;
        *word ^= u64::from(changes) << (page % 64);
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64) -> LateRun {
        LateRun { ram: 3, reserved: 0, first, pages }
    }

    #[test]
    fn who_reaches_for_a_page_waits_until_it_has_come() {
        let late = Late::default();
        late.lacks(run(5, 3), 100, 1);
        assert_eq!(late.missing(3, 0, 5 * PAGE), None);
        assert_eq!(late.missing(3, 4 * PAGE, PAGE + 1), Some(run(5, 1)));
        assert_eq!(late.missing(4, 5 * PAGE, 1), None);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| late.wait(run(6, 1)));
            assert_eq!(late.wanted(Duration::from_secs(60)), [run(6, 1)]);
            // Somebody else wants it too, and another one, and one that is there, and one that there is not.
            for run in [run(6, 1), run(7, 1), run(8, 1), run(u64::MAX, 2), LateRun { ram: 9, ..run(6, 1) }] {
                WantedSink::wanted(&late, run);
            }
            assert_eq!(late.wanted(Duration::ZERO), [run(7, 1)]);
            assert_eq!(late.came(run(6, 2)), [run(6, 2)]);
            assert_eq!(waits.join().unwrap(), Ok(()));
            assert_eq!((late.wait(run(7, 1)), late.told(2)), (Ok(()), 1));
            let waits = scope.spawn(|| late.wait(run(5, 1)));
            assert_eq!(late.wanted(Duration::from_secs(60)), [run(5, 1)]);
            late.give_up();
            assert_eq!(waits.join().unwrap(), Err(Never));
        });
    }

    #[test]
    fn the_host_is_told_of_whole_huge_pages() {
        let late = Late::default();
        late.lacks(run(3, 2), 4096, 512);
        late.lacks(run(700, 1), 4096, 512);
        late.lacks(run(2048, 1), 4096, 512);
        assert_eq!(late.of_host(), [run(0, 1024), run(2048, 512)]);
        assert_eq!(late.came(run(3, 1)), []);
        assert_eq!(late.came(run(4, 1)), [run(0, 512)]);
        assert_eq!(late.came(run(700, 1)), [run(512, 512)]);
        assert_eq!(late.of_host(), [run(2048, 512)]);
        // What a vCPU waits for is asked for page by page, of those that are missing.
        WantedSink::wanted(&late, run(2048, 512));
        assert_eq!(late.wanted(Duration::ZERO), [run(2048, 1)]);
    }
}
