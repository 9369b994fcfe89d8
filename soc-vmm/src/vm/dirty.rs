//! Which pages of guest memory this side has written: what KVM's dirty log doesn't see (`docs/design.md`).

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use api_channel::call::{DirtyRun, Extent, PAGE};
use vm_memory::bitmap::AtomicBitmap;

/// The written pages of each allocation, by its id. Marks are made behind the bytes, so that who takes a mark finds them.
#[derive(Debug)]
pub(super) struct WriteLog(BTreeMap<u32, AtomicBitmap>);

impl WriteLog {
    /// Nothing is written yet, of these allocations.
    pub(super) fn new(allocations: &[(u32, Vec<Extent>)]) -> Self {
        let page = NonZeroUsize::new(PAGE as usize).unwrap_or(NonZeroUsize::MIN);
        let bytes = |extents: &[Extent]| extents.iter().map(|extent| extent.len as usize).sum();
        Self(allocations.iter().map(|(ram, extents)| (*ram, AtomicBitmap::new(bytes(extents), page))).collect())
    }

    /// These bytes of an allocation were written.
    pub(super) fn mark(&self, ram: u32, offset: u64, len: u64) {
        if let Some(bitmap) = self.0.get(&ram) {
            bitmap.set_addr_range(offset as usize, len as usize);
        }
    }

    /// The pages of an allocation that were written since the last call, in ascending order.
    pub(super) fn take(&self, ram: u32) -> Vec<DirtyRun> {
        let words = self.0.get(&ram).map(AtomicBitmap::get_and_reset).unwrap_or_default();
        let mut runs = Vec::<DirtyRun>::new();
        for (first, mut word) in (0u64..).step_by(64).zip(words) {
            while word != 0 {
                let at = word.trailing_zeros();
                let pages = (word >> at).trailing_ones();
                word &= !(u64::MAX >> (64 - pages) << at);
                let first = first + u64::from(at);
                match runs.last_mut() {
                    Some(last) if last.first + last.pages == first => last.pages += u64::from(pages),
                    _ => runs.push(DirtyRun { first, pages: pages.into() }),
                }
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 300;

    proptest! {
        #[test]
        fn what_was_written_is_told_once(writes in prop::collection::vec((0..PAGES * PAGE, 1..80 * PAGE), 0..6)) {
            let extent = |offset, pages| Extent { offset, iova: 0, len: pages * PAGE };
            let log = WriteLog::new(&[(7, vec![extent(0, 100), extent(100 * PAGE, PAGES - 100)])]);
            let mut written = BTreeSet::new();
            for (offset, len) in writes {
                let len = len.min(PAGES * PAGE - offset);
                log.mark(7, offset, len);
                log.mark(8, offset, len);
                written.extend(offset / PAGE..(offset + len).div_ceil(PAGE));
            }
            let runs = log.take(7);
            prop_assert!(runs.windows(2).all(|pair| pair[0].first + pair[0].pages < pair[1].first), "{:?}", runs);
            let told: BTreeSet<u64> = runs.iter().flat_map(|run| run.first..run.first + run.pages).collect();
            prop_assert_eq!(told, written);
            prop_assert!(log.take(7).is_empty() && log.take(8).is_empty());
        }
    }
}
