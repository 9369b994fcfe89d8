//! Who reads a vCPU's dirty ring, in step with KVM: also where KVM overran it.
//!
//! KVM keeps some entries for what a vCPU may write before it can be taken out of the guest. On hardware that is enough. A KVM that runs a
//! guest's kernel otherwise may write more at once, and fills entries again that nobody has read, or that it has not taken back: pages are
//! lost, their later writes too, and KVM goes on some entries further than anybody who counts from what he read. So a ring that is found
//! full to its last entry counts as overrun: every page may have been written, and the log has to begin anew.

use crate::kvm::DirtyRing;

/// The reader of a ring.
#[derive(Debug)]
pub(super) struct Reader {
    ring: DirtyRing,
    /// The entry that KVM takes back next, and fills next if the ring was never overrun.
    at: u32,
    /// The ring was overrun once: KVM may fill entries further on, from then on.
    astray: bool,
}

/// What a reading found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reading {
    /// How many entries were read.
    pub(super) count: u32,
    /// Pages may be missing.
    pub(super) overrun: bool,
}

/// Entries that KVM keeps at least: it doesn't call a ring full before it holds more than these.
const KEPT: u32 = 64;

impl Reader {
    pub(super) fn new(ring: DirtyRing) -> Self {
        Self { ring, at: 0, astray: false }
    }

    /// Reads entries, `most` at most: slot and page of each. KVM takes them back when it is told to reset its rings. One that was
    /// overrun is emptied whatever `most` is: by nothing else would the next time show.
    pub(super) fn read(&mut self, most: u32, mut found: impl FnMut(u32, u64)) -> Reading {
        let mut reading = Reading { count: 0, overrun: self.is_full() };
        self.astray |= reading.overrun;
        let most = if self.astray { self.ring.entries() } else { most.min(self.ring.entries()) };
        while reading.count < most {
            match self.ring.dirty(self.at) {
                Some((slot, page)) => {
                    found(slot, page);
                    self.pass(1);
                    reading.count += 1;
                }
                None if self.astray && self.catches_up() => {}
                None => break,
            }
        }
        reading
    }

    /// How many entries wait to be read.
    pub(super) fn waiting(&self) -> u32 {
        (0..self.ring.entries()).take_while(|&ahead| self.is_dirty(ahead)).count() as u32
    }

    /// Whether what was read is not all KVM's again, though it was told to reset its rings.
    pub(super) fn is_behind(&self) -> bool {
        !self.ring.is_free(self.at.wrapping_sub(1))
    }

    /// KVM calls the ring full, and nothing is in it: entries are left out that it believes to have filled. Of a ring that was never
    /// overrun none.
    pub(super) fn leave_out(&mut self) {
        if self.astray {
            self.pass(KEPT);
        }
    }

    /// The last entry before those that were read is full: KVM has filled all others since.
    fn is_full(&self) -> bool {
        self.is_dirty(self.ring.entries() - 1)
    }

    /// Looks for the next entry that KVM has filled, and passes those before it; whether there is one.
    fn catches_up(&mut self) -> bool {
        let Some(mut ahead) = (1..self.ring.entries()).find(|&n| self.is_dirty(n)) else { return false };
        // KVM may have filled some meanwhile: it does so in order.
        while ahead > 0 && self.is_dirty(ahead - 1) {
            ahead -= 1;
        }
        self.pass(ahead);
        true
    }

    fn is_dirty(&self, ahead: u32) -> bool {
        self.ring.dirty(self.at.wrapping_add(ahead)).is_some()
    }

    fn pass(&mut self, count: u32) {
        (0..count).for_each(|n| self.ring.give_back(self.at.wrapping_add(n)));
        self.at = self.at.wrapping_add(count);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::kvm::model::{Kernel, RESERVED, ring};

    const ENTRIES: u32 = 128;

    /// A guest, its KVM, and who reads. Pages are logged at their first write since they were reset.
    struct World {
        kernel: Kernel,
        reader: Reader,
        /// Pages whose next write is not logged.
        writable: BTreeSet<u64>,
        /// Written, and not told.
        owed: BTreeSet<u64>,
        overrun: bool,
    }

    impl World {
        fn new() -> Self {
            let reader = Reader::new(ring(ENTRIES));
            let (writable, owed) = (BTreeSet::new(), BTreeSet::new());
            Self { kernel: Kernel::default(), reader, writable, owed, overrun: false }
        }

        /// The guest writes these pages, at most `batch` of them before KVM looks whether the ring is full; then as many as `most` are
        /// read at a time.
        fn run(&mut self, pages: &[u64], batch: usize, most: u32) {
            for some in pages.chunks(batch) {
                let mut turns = 0;
                while self.kernel.is_full(&self.reader.ring) {
                    if self.read(most) == 0 {
                        self.reader.leave_out();
                        self.reset();
                    }
                    turns += 1;
                    assert!(turns < ENTRIES, "the vCPU never goes on: {:?} {:?}", self.kernel, self.reader);
                }
                for &page in some {
                    self.owed.insert(page);
                    if self.writable.insert(page) {
                        self.kernel.push(&self.reader.ring, 0, page);
                    }
                }
            }
        }

        fn read(&mut self, most: u32) -> u32 {
            let owed = &mut self.owed;
            let reading = self.reader.read(most, |_, page| _ = owed.remove(&page));
            self.overrun |= reading.overrun;
            self.reset();
            reading.count
        }

        /// All that was written is told; whether that may be more than was written.
        fn gather(&mut self) -> bool {
            self.read(u32::MAX);
            for _ in 0..2 {
                if self.reader.is_behind() {
                    self.overrun = true;
                    self.read(u32::MAX);
                }
            }
            if self.overrun {
                self.writable.clear();
                self.owed.clear();
            }
            std::mem::take(&mut self.overrun)
        }

        fn reset(&mut self) {
            for page in self.kernel.reset(&self.reader.ring) {
                self.writable.remove(&page);
            }
        }
    }

    proptest! {
        #[test]
        fn of_a_sound_kvm_exactly_what_was_written_is_told(
            rounds in prop::collection::vec((prop::collection::vec(0..400u64, 0..300), 1..=RESERVED as usize), 1..20),
            most in 1..200u32,
        ) {
            let mut world = World::new();
            for (pages, batch) in rounds {
                // What one entry into the guest may write is what was kept, and no more.
                let batch = batch.min((most as usize).min(RESERVED as usize));
                world.run(&pages, batch, most);
                prop_assert!(!world.gather());
                prop_assert_eq!(&world.owed, &BTreeSet::new());
                prop_assert_eq!(&world.writable, &BTreeSet::new(), "each page's next write is logged");
            }
        }

        #[test]
        fn of_an_overrun_ring_nothing_is_lost_unsaid_and_the_vcpu_goes_on(
            rounds in prop::collection::vec((prop::collection::vec(0..4000u64, 0..900), 1..700usize), 1..20),
            most in 1..200u32,
        ) {
            let mut world = World::new();
            for (pages, batch) in rounds {
                world.run(&pages, batch, most);
                world.gather();
                prop_assert_eq!(&world.owed, &BTreeSet::new());
            }
            // And the ring is in step again, once it isn't overrun any more.
            world.run(&[5000, 5001], 1, u32::MAX);
            world.gather();
            world.run(&(6000..6040).collect::<Vec<_>>(), 8, u32::MAX);
            prop_assert!(!world.gather());
            prop_assert_eq!(&world.owed, &BTreeSet::new());
        }
    }
}
