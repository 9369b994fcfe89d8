//! What lies where in an IOMMU domain.

use std::collections::BTreeMap;

use crate::Iova;

/// Addresses from `first` to `last`, both within.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) first: Iova,
    pub(super) last: Iova,
}

/// Valid ranges of a domain, and what is mapped in them.
#[derive(Debug)]
pub(super) struct IovaSpace {
    page: u64,
    /// Ascending.
    valid: Vec<Range>,
    /// Length by first address.
    taken: BTreeMap<Iova, u64>,
}

/// Why a range can't be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Conflict {
    /// Not whole pages, or none.
    Misaligned,
    /// The IOMMU doesn't translate it, or it is reserved.
    Reserved,
    /// Something is mapped there.
    Taken,
}

impl IovaSpace {
    /// A domain of pages of `page` bytes with nothing in it.
    pub(super) fn new(page: u64, valid: Vec<Range>) -> Self {
        Self { page: page.max(4096), valid, taken: BTreeMap::new() }
    }

    /// Bytes of its smallest page.
    pub(super) fn page(&self) -> u64 {
        self.page
    }

    /// Whether `len` bytes at `iova` are free.
    pub(super) fn check(&self, iova: Iova, len: u64) -> Result<(), Conflict> {
        if len == 0 || !iova.is_multiple_of(self.page) || !len.is_multiple_of(self.page) {
            return Err(Conflict::Misaligned);
        }
        let last = iova.checked_add(len - 1).ok_or(Conflict::Reserved)?;
        if !self.valid.iter().any(|range| range.first <= iova && last <= range.last) {
            return Err(Conflict::Reserved);
        }
        match self.taken.range(..=last).next_back() {
            Some((at, taken)) if at + (taken - 1) >= iova => Err(Conflict::Taken),
            _ => Ok(()),
        }
    }

    /// Notes what is mapped, after [`IovaSpace::check`].
    pub(super) fn insert(&mut self, iova: Iova, len: u64) {
        self.taken.insert(iova, len);
    }

    /// How long what is mapped at `iova` is.
    pub(super) fn len_at(&self, iova: Iova) -> Option<u64> {
        self.taken.get(&iova).copied()
    }

    /// Notes that nothing is mapped at `iova` any more.
    pub(super) fn remove(&mut self, iova: Iova) {
        self.taken.remove(&iova);
    }

    /// The highest free place for `len` bytes with a free page before and behind it: a transfer that runs past either end faults.
    pub(super) fn highest(&self, len: u64) -> Option<Iova> {
        let room = len.checked_add(2 * self.page)?;
        let mut best = None;
        for range in self.valid.iter().rev() {
            // Candidates end at the range's end, or where something begins.
            let ends = std::iter::once(range.last.wrapping_add(1)).chain(self.taken.keys().rev().copied());
            for end in ends {
                // A range that goes to the end of 64 bits ends at 0: the last page stays unused.
                let end = if end == 0 { end.wrapping_sub(self.page) } else { end };
                let place = end.checked_sub(room).map(|at| at / self.page * self.page);
                let free = place.filter(|at| self.check(*at, room).is_ok());
                best = best.max(free);
            }
            if best.is_some() {
                break;
            }
        }
        best.map(|at| at + self.page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As behind an IOMMU of 39 bits on x86: the interrupt window is reserved.
    fn space() -> IovaSpace {
        let valid = vec![Range { first: 0, last: 0xfedf_ffff }, Range { first: 0xfef0_0000, last: (1 << 39) - 1 }];
        IovaSpace::new(4096, valid)
    }

    #[test]
    fn what_is_reserved_taken_or_no_page_is_told_apart() {
        let mut space = space();
        space.insert(0x10_0000, 0x2000);
        assert_eq!(space.check(0, 0x10_0000), Ok(()));
        assert_eq!(space.check(0, 0x10_1000), Err(Conflict::Taken));
        assert_eq!(space.check(0x10_1000, 0x1000), Err(Conflict::Taken));
        assert_eq!(space.check(0x10_2000, 0x1000), Ok(()));
        assert_eq!(space.check(0xfee0_0000, 0x1000), Err(Conflict::Reserved));
        assert_eq!(space.check(0xfedf_f000, 0x10_3000), Err(Conflict::Reserved), "spans what is reserved");
        assert_eq!(space.check(1 << 39, 0x1000), Err(Conflict::Reserved));
        assert_eq!(space.check(u64::MAX - 0xfff, 0x2000), Err(Conflict::Reserved));
        assert_eq!(space.check(0x800, 0x1000), Err(Conflict::Misaligned));
        assert_eq!(space.check(0, 0), Err(Conflict::Misaligned));
    }

    #[test]
    fn a_mailbox_goes_to_the_top_and_the_next_below_it() {
        let mut space = space();
        let first = space.highest(0x4000).unwrap();
        assert_eq!(first, (1 << 39) - 0x5000);
        space.insert(first, 0x4000);
        let second = space.highest(0x1000).unwrap();
        assert!(second + 0x2000 <= first);
        space.insert(second, 0x1000);
        space.remove(first);
        assert_eq!(space.highest(0x4000), Some(first));
        assert_eq!(space.highest(u64::MAX), None);
        let whole = IovaSpace::new(4096, vec![Range { first: 0, last: u64::MAX }]);
        assert!(whole.highest(0x1000).is_some());
    }

    proptest! {
        #[test]
        fn places_are_free_and_guarded(lens in proptest::collection::vec(1u64..64, 1..20), gone in 0usize..20) {
            let mut space = space();
            let mut placed: Vec<(u64, u64)> = Vec::new();
            for (i, pages) in lens.iter().enumerate() {
                let len = pages * 4096;
                let at = space.highest(len).unwrap();
                for (other, size) in &placed {
                    prop_assert!(at + len < *other || other + size < at);
                }
                prop_assert_eq!(space.check(at, len), Ok(()));
                space.insert(at, len);
                placed.push((at, len));
                if i == gone {
                    let (at, _) = placed.swap_remove(0);
                    space.remove(at);
                }
            }
        }
    }
}
