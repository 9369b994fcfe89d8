//! Pages of guest memory.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a page, whatever the host's or the guest's are.
pub const PAGE: u64 = 4096;

/// Pages beside each other that go by the same connection: large enough that reads of memory are long, small enough that a guest's
/// favourite megabytes are spread.
const BLOCK: u64 = 64;

/// Neighbouring pages of a region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Run {
    /// The region, as the description names it.
    pub region: u32,
    /// The first page, from the region's start.
    pub first: u64,
    /// How many, not 0.
    pub pages: u64,
}

impl Run {
    /// The page behind it; none: there are not that many.
    #[must_use]
    pub fn end(&self) -> Option<u64> {
        self.first.checked_add(self.pages)
    }

    /// Its parts that each go by one connection and have `most` pages at most, in order.
    pub fn parts(self, most: u64) -> impl Iterator<Item = Self> {
        let end = self.first.saturating_add(self.pages);
        let mut first = self.first;
        std::iter::from_fn(move || {
            let block_end = (first / BLOCK + 1).saturating_mul(BLOCK);
            let part = Self { first, pages: end.min(block_end).min(first.saturating_add(most)) - first, ..self };
            first += part.pages;
            (part.pages > 0).then_some(part)
        })
    }
}

/// By which of `connections` connections (not 0) a page goes: each time the same, so that a later copy never comes before an earlier one.
#[must_use]
pub fn connection_of(page: u64, connections: u16) -> u16 {
    (page / BLOCK % u64::from(connections)) as u16
}

/// A run's content as a record has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages<'a> {
    /// Which pages, [`super::MOST_PAGES`] at most.
    pub run: Run,
    /// Whether `bytes` is a frame of zstd instead of the pages themselves.
    pub compressed: bool,
    /// The content.
    pub bytes: &'a [u8],
}

/// A run on the wire.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct WireRun {
    pub(super) region: [u8; 4],
    pub(super) flags: [u8; 4],
    pub(super) first: [u8; 8],
    pub(super) pages: [u8; 8],
}

impl WireRun {
    pub(super) fn new(run: Run, flags: u32) -> Self {
        Self {
            region: run.region.to_le_bytes(),
            flags: flags.to_le_bytes(),
            first: run.first.to_le_bytes(),
            pages: run.pages.to_le_bytes(),
        }
    }

    /// The run and its flags, if it is one.
    pub(super) fn read(self) -> Option<(Run, u32)> {
        let run = Run {
            region: u32::from_le_bytes(self.region),
            first: u64::from_le_bytes(self.first),
            pages: u64::from_le_bytes(self.pages),
        };
        // Its bytes have addresses.
        let in_bounds = run.end().is_some_and(|end| end <= u64::MAX / PAGE);
        (in_bounds && run.pages > 0).then_some((run, u32::from_le_bytes(self.flags)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_are_the_run_and_each_has_one_connection(
            first in 0..1000u64, pages in 1..1000u64, most in 1..300u64, connections in 1..=16u16,
        ) {
            let run = Run { region: 3, first, pages };
            let parts: Vec<_> = run.parts(most).collect();
            let listed: Vec<u64> = parts.iter().flat_map(|part| part.first..part.first + part.pages).collect();
            prop_assert_eq!(listed, (first..first + pages).collect::<Vec<_>>());
            for part in parts {
                prop_assert!(part.pages <= most && part.region == 3);
                let connection = connection_of(part.first, connections);
                prop_assert!(connection < connections);
                prop_assert_eq!(connection_of(part.first + part.pages - 1, connections), connection);
            }
        }

        #[test]
        fn runs_at_the_end_of_addresses_have_parts(first: u64, pages in 1..5000u64) {
            let run = Run { region: 0, first, pages };
            prop_assert!(run.parts(256).map(|part| part.pages).sum::<u64>() <= pages);
            prop_assert_eq!(WireRun::new(run, 7).read().is_some(), first <= u64::MAX / PAGE - pages);
        }
    }
}
