//! Which pages are still to be sent.

use crate::bitmap::Bitmap;
use crate::stream::Run;
use crate::{MigrationError, Region, SourceVm};

/// A round in which a page was dirty counts as long as the two after it: who was in all three never rests.
const LOOKS_BACK: usize = 2;

/// The guest's memory as the source sees it.
pub(super) struct Memory {
    areas: Vec<Area>,
}

/// A region.
pub(super) struct Area {
    pub(super) id: u32,
    /// Dirty, or never sent: a bit is cleared once its page was handed to a connection that took it.
    pub(super) pending: Bitmap,
    /// Dirty each time that anybody looked lately.
    pub(super) hot: Bitmap,
    /// What was dirty in the last rounds, the latest first.
    past: [Bitmap; LOOKS_BACK],
    pages: u64,
    /// Whether none of it may come after the guest has started.
    pub(super) whole: bool,
}

/// What a look at the log has found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// Pages that became dirty since the one before.
    pub(super) dirtied: u64,
    /// Pages to send.
    pub(super) pending: u64,
    /// Those of them that are hot.
    pub(super) hot: u64,
}

impl Memory {
    /// All of it is to be sent.
    pub(super) fn new(vm: &dyn SourceVm) -> Self {
        let area = |region: &Region| {
            let pending = Bitmap::new(region.pages);
            pending.fill();
            let map = |()| Bitmap::new(region.pages);
            let whole = vm.comes_whole(region.id);
            Area { id: region.id, pending, hot: map(()), past: [(), ()].map(map), pages: region.pages, whole }
        };
        Self { areas: vm.regions().iter().map(area).collect() }
    }

    pub(super) fn areas(&self) -> &[Area] {
        &self.areas
    }

    pub(super) fn pages(&self) -> u64 {
        self.areas.iter().map(|area| area.pages).sum()
    }

    /// What is to be sent.
    pub(super) fn pending(&self) -> Vec<Run> {
        self.areas.iter().flat_map(|area| area.pending.list(area.id, true)).collect()
    }

    /// How many pages those are.
    pub(super) fn count_pending(&self) -> u64 {
        self.areas.iter().map(|area| area.pending.count()).sum()
    }

    /// Nothing is to be sent, but for what [`Self::resend`] adds.
    pub(super) fn settle(&self) {
        for area in &self.areas {
            (0..area.pending.words()).for_each(|index| area.pending.set_word(index, 0));
        }
    }

    /// These runs, which it has, are to be sent.
    pub(super) fn resend(&self, runs: &[Run]) {
        for area in &self.areas {
            runs.iter().filter(|run| run.region == area.id).for_each(|run| area.pending.set(*run));
        }
    }

    /// Looks at the log.
    pub(super) fn look(&self, vm: &dyn SourceVm) -> Result<Look, MigrationError> {
        let mut look = Look { dirtied: 0, pending: 0, hot: 0 };
        for area in &self.areas {
            let runs = vm.take_dirty(area.id).map_err(MigrationError::vm("reading the dirty log"))?;
            area.look(&runs, &mut look)?;
        }
        Ok(look)
    }
}

impl Area {
    fn look(&self, dirty: &[Run], look: &mut Look) -> Result<(), MigrationError> {
        let now = Bitmap::new(self.pages);
        for run in dirty {
            if run.region != self.id || run.end().is_none_or(|end| end > self.pages) {
                let why = format!(
                    "its dirty log names pages from {} of region {}, which it doesn't have",
                    run.first, run.region
                );
                return Err(MigrationError::Vm { doing: "reading the dirty log", source: why.into() });
            }
            now.set(*run);
        }
        let [last, before] = &self.past;
        for index in 0..now.words() {
            let bits = now.word(index);
            let hot = bits & last.word(index) & before.word(index);
            before.set_word(index, last.word(index));
            last.set_word(index, bits);
            let pending = self.pending.word(index) | bits;
            self.pending.set_word(index, pending);
            self.hot.set_word(index, hot);
            look.dirtied += u64::from(bits.count_ones());
            look.pending += u64::from(pending.count_ones());
            look.hot += u64::from((hot & pending).count_ones());
        }
        Ok(())
    }
}
