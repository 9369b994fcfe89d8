//! Ranges of posted writes: replaced as a whole by the API thread, looked up in a private copy by each vCPU's thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use api_channel::call::PostedRange;
use api_channel::codec::Malformed;
use ioreq_ring::{Kind, Request};

use crate::error::Refusal;

/// The current set.
#[derive(Debug)]
pub(crate) struct Posted {
    ranges: Mutex<Arc<[PostedRange]>>,
    generation: AtomicU64,
}

impl Default for Posted {
    fn default() -> Self {
        Self { ranges: Mutex::new(Arc::from([])), generation: AtomicU64::new(0) }
    }
}

impl Posted {
    /// Replaces the set. Every exit that begins after this returns uses the new one.
    pub(crate) fn replace(&self, mut ranges: Vec<PostedRange>) -> Result<(), Refusal> {
        if ranges.iter().any(|r| r.ports > 1) {
            return Err(Malformed.into());
        }
        let end = |r: &PostedRange| r.base.checked_add(r.len).filter(|_| r.len != 0);
        ranges.sort_by_key(|r| (r.ports, r.base));
        let apart = |pair: &[PostedRange]| pair[0].ports != pair[1].ports || end(&pair[0]) <= Some(pair[1].base);
        if !ranges.iter().all(|r| end(r).is_some()) || !ranges.windows(2).all(apart) {
            return Err(Refusal::argument("ranges of posted writes are empty or overlap".into()));
        }
        let mut current = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        *current = ranges.into();
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// The set and its generation, where it is newer than `generation`: one load where it isn't.
    #[inline]
    pub(crate) fn newer_than(&self, generation: u64) -> Option<(Arc<[PostedRange]>, u64)> {
        if self.generation.load(Ordering::Acquire) == generation {
            return None;
        }
        let ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        Some((ranges.clone(), self.generation.load(Ordering::Acquire)))
    }
}

/// Whether the whole access lies in one of the ranges.
pub(crate) fn contains(ranges: &[PostedRange], request: &Request) -> bool {
    let ports = match request.kind {
        Kind::PIO => 1,
        Kind::MMIO => 0,
        _ => return false,
    };
    let after = ranges.partition_point(|r| (r.ports, r.base) <= (ports, request.address));
    after.checked_sub(1).is_some_and(|i| {
        let r = &ranges[i];
        let offset = request.address.wrapping_sub(r.base);
        r.ports == ports && offset < r.len && u64::from(request.length) <= r.len - offset
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ioreq_ring::Direction;

    #[test]
    fn an_access_is_posted_only_where_all_of_it_is() {
        let posted = Posted::default();
        let range = |base, len, ports| PostedRange { base, len, ports };
        posted.replace(vec![range(0x1000, 8, 0), range(0x20, 2, 1), range(0x1008, 4, 0)]).unwrap();
        let (ranges, generation) = posted.newer_than(0).unwrap();
        assert!(posted.newer_than(generation).is_none());
        let access =
            |kind, address, len| contains(&ranges, &Request::access(kind, Direction::Write, address, 0, len, 0));
        assert!(access(Kind::MMIO, 0x1000, 8) && access(Kind::MMIO, 0x1007, 1) && access(Kind::MMIO, 0x1008, 4));
        assert!(!access(Kind::MMIO, 0x1004, 8) && !access(Kind::MMIO, 0x100c, 1) && !access(Kind::MMIO, 0xfff, 2));
        assert!(access(Kind::PIO, 0x20, 2) && !access(Kind::PIO, 0x21, 2) && !access(Kind::PIO, 0x1000, 1));
        assert!(!access(Kind::MSR, 0x1000, 8));
        for bad in [
            vec![range(0, 0, 0)],
            vec![range(u64::MAX, 2, 0)],
            vec![range(0, 9, 0), range(8, 1, 0)],
            vec![range(0, 1, 2)],
        ] {
            assert!(posted.replace(bad).is_err());
        }
    }
}
