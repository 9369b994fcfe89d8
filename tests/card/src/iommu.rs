//! What one side has mapped for the card's DMA: IOVA ranges, and the files behind them.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::ops::Bound;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Weak};

use pcie_function::{Mapping, Window};

use crate::memory;

/// The mappings of one side of one function.
#[derive(Debug, Default)]
pub(crate) struct IovaMap {
    /// By first IOVA; ranges don't overlap.
    ranges: BTreeMap<u64, Range>,
    /// Files mapped now, by device and inode. With 4 KiB pages behind an IOMMU, one message and one descriptor come for each
    /// page of the same memory; a mapping and a descriptor for each would soon be too many.
    files: HashMap<(u64, u64), Weak<Mapping>>,
}

#[derive(Debug)]
struct Range {
    /// Last IOVA: a range may end at 2⁶⁴ − 1.
    last: u64,
    access: Access,
    /// `None` where the memory can't be reached from here (no descriptor, not sealed): it faults.
    backing: Option<(Window, usize)>,
}

/// What the device may do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    /// DMA reads.
    pub(crate) read: bool,
    /// DMA writes.
    pub(crate) write: bool,
}

/// Which of both a transfer needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

impl IovaMap {
    /// Maps `size` bytes of `file` from `offset` at `iova`.
    ///
    /// # Errors
    /// Empty, wraps around, or overlaps what is mapped.
    pub(crate) fn map(
        &mut self,
        iova: u64,
        size: u64,
        access: Access,
        file: Option<File>,
        offset: u64,
    ) -> io::Result<()> {
        let last = last(iova, size)?;
        if self.overlapping(iova, last).next().is_some() {
            return Err(io::Error::from(io::ErrorKind::AlreadyExists));
        }
        let backing = file.and_then(|file| self.backing(&file, offset, size));
        self.ranges.insert(iova, Range { last, access, backing });
        Ok(())
    }

    /// Unmaps all that lies in the range.
    ///
    /// # Errors
    /// The range cuts a mapping in two; nothing is unmapped.
    pub(crate) fn unmap(&mut self, iova: u64, size: u64) -> io::Result<()> {
        let last = last(iova, size)?;
        let within: Vec<u64> = self.overlapping(iova, last).map(|(&start, _)| start).collect();
        if within.iter().any(|start| *start < iova || self.ranges[start].last > last) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        for start in within {
            self.ranges.remove(&start);
        }
        self.files.retain(|_, mapping| mapping.strong_count() > 0);
        Ok(())
    }

    /// Unmaps everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Bytes mapped, and ranges.
    pub(crate) fn size(&self) -> (u64, usize) {
        let bytes = self.ranges.iter().map(|(start, range)| (range.last - start).saturating_add(1)).sum();
        (bytes, self.ranges.len())
    }

    /// How many of the `len` bytes from `iova` on can be reached before the first that faults.
    pub(crate) fn reach(&self, iova: u64, len: usize, direction: Direction) -> usize {
        let mut done = 0;
        while done < len {
            match self.span(iova.wrapping_add(done as u64), len - done, direction) {
                Some((_, _, span)) => done += span,
                None => break,
            }
        }
        done
    }

    /// Reads `data.len()` bytes, all within what [`IovaMap::reach`] said.
    pub(crate) fn read(&self, iova: u64, data: &mut [u8]) {
        let mut done = 0;
        while done < data.len() {
            let left = data.len() - done;
            let (memory, offset, span) =
                self.span(iova + done as u64, left, Direction::Read).expect("the caller asked for the reach");
            memory.read_bytes(offset, &mut data[done..done + span]);
            done += span;
        }
    }

    /// Writes `data`, all within what [`IovaMap::reach`] said; a piece at a time in ascending order, each as [`memory::store`] does.
    pub(crate) fn write(&self, iova: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let left = data.len() - done;
            let (memory, offset, span) =
                self.span(iova + done as u64, left, Direction::Write).expect("the caller asked for the reach");
            memory::store(memory, offset, &data[done..done + span]);
            done += span;
        }
    }

    /// The file, offset and length of the contiguous piece that starts at `iova`, `len` bytes at most.
    fn span(&self, iova: u64, len: usize, direction: Direction) -> Option<(&Window, usize, usize)> {
        let (start, range) = self.ranges.range(..=iova).next_back()?;
        let allowed = match direction {
            Direction::Read => range.access.read,
            Direction::Write => range.access.write,
        };
        if iova > range.last || !allowed {
            return None;
        }
        let (memory, offset) = range.backing.as_ref()?;
        let left = usize::try_from(range.last - iova).map_or(usize::MAX, |left| left.saturating_add(1));
        // Fits: `backing` checked that the whole range lies within the file.
        Some((memory, offset + (iova - start) as usize, len.min(left)))
    }

    fn overlapping(&self, first: u64, last: u64) -> impl Iterator<Item = (&u64, &Range)> {
        let before = self.ranges.range(..first).next_back().filter(move |(_, range)| range.last >= first);
        before.into_iter().chain(self.ranges.range((Bound::Included(first), Bound::Included(last))))
    }

    fn backing(&mut self, file: &File, offset: u64, size: u64) -> Option<(Window, usize)> {
        let metadata = file.metadata().ok()?;
        let key = (metadata.dev(), metadata.ino());
        let end = usize::try_from(offset.checked_add(size)?).ok()?;
        let known = self.files.get(&key).and_then(Weak::upgrade).filter(|mapping| end <= mapping.size());
        let mapping = match known {
            Some(mapping) => mapping,
            // Also where a file has grown since it was mapped.
            None => {
                let mapping = memory::map(file).ok()?;
                self.files.insert(key, Arc::downgrade(&mapping));
                mapping
            }
        };
        (end <= mapping.size()).then(|| (mapping.window(), end - size as usize))
    }
}

fn last(iova: u64, size: u64) -> io::Result<u64> {
    size.checked_sub(1).and_then(|more| iova.checked_add(more)).ok_or(io::Error::from(io::ErrorKind::InvalidInput))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: Access = Access { read: true, write: true };

    fn file(len: u64) -> File {
        pcie_function::local::sealed_memfd("test", len).unwrap().into()
    }

    #[test]
    fn reach_ends_at_holes_and_at_rights() {
        let mut map = IovaMap::default();
        let memory = file(0x4000);
        map.map(0x1000, 0x1000, BOTH, Some(memory.try_clone().unwrap()), 0x2000).unwrap();
        map.map(0x2000, 0x1000, Access { read: true, write: false }, Some(memory), 0).unwrap();
        assert_eq!(map.reach(0x1800, 0x10000, Direction::Read), 0x1800);
        assert_eq!(map.reach(0x1800, 0x10000, Direction::Write), 0x800);
        assert_eq!(map.reach(0xfff, 1, Direction::Read), 0);
        map.write(0x1ffc, &[1, 2, 3, 4]);
        let mut back = [0; 8];
        map.read(0x1ffc, &mut back);
        assert_eq!(back, [1, 2, 3, 4, 0, 0, 0, 0]);
    }

    #[test]
    fn overlaps_and_cuts_are_refused() {
        let mut map = IovaMap::default();
        map.map(0x1000, 0x2000, BOTH, None, 0).unwrap();
        for (iova, size) in [(0x0, 0x1001), (0x1800, 0x10), (0x2fff, 1), (0x0, 0x10000), (0, 0), (u64::MAX, 2)] {
            assert!(map.map(iova, size, BOTH, None, 0).is_err(), "{iova:#x}+{size:#x}");
        }
        assert!(map.unmap(0x1000, 0x1000).is_err());
        assert!(map.unmap(0x2000, 0x2000).is_err());
        map.map(u64::MAX, 1, BOTH, None, 0).unwrap();
        assert_eq!(map.size(), (0x2001, 2));
        map.unmap(0, 0x8000).unwrap();
        assert_eq!(map.size(), (1, 1));
    }

    #[test]
    fn what_has_no_usable_file_faults() {
        let mut map = IovaMap::default();
        map.map(0, 0x1000, BOTH, None, 0).unwrap();
        map.map(0x1000, 0x1000, BOTH, Some(file(0x1000)), 0x1000).unwrap();
        map.map(0x2000, 0x1000, BOTH, Some(tempfile::tempfile().unwrap()), 0).unwrap();
        for iova in [0, 0x1000, 0x2000] {
            assert_eq!(map.reach(iova, 1, Direction::Read), 0);
        }
    }

    #[test]
    fn pages_of_one_file_share_a_mapping() {
        let mut map = IovaMap::default();
        let memory = file(0x8000);
        for page in 0..8 {
            map.map(page * 0x1000, 0x1000, BOTH, Some(memory.try_clone().unwrap()), page * 0x1000).unwrap();
        }
        assert_eq!(map.files.values().filter(|file| file.strong_count() > 0).count(), 1);
        map.unmap(0, 0x8000).unwrap();
        assert!(map.files.is_empty());
    }
}
