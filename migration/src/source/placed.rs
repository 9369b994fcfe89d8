//! A file in which each page has its place: one that is written again takes no more room, and one of zeros takes none.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::bitmap::Bitmap;
use crate::connection::Place;
use crate::ending::lock;
use crate::stream::{MOST_PLACED, PAGE, PlacedHead, Record, Run, SUM};
use crate::{MigrationError, Region};

/// The file. Its pages are in the order of their regions, the records behind them.
pub(super) struct Placed {
    place: Mutex<Place>,
    areas: Vec<Area>,
    /// Where the records begin.
    records: u64,
}

/// A region.
struct Area {
    id: u32,
    pages: u64,
    /// Where its first page is.
    at: u64,
    /// Pages that the file has.
    has: Bitmap,
    /// Their checksums.
    sums: Vec<AtomicU32>,
}

impl Placed {
    /// Begins it behind the preamble: nobody takes it for a guest before [`Self::finish`]. What the connection writes next is a record.
    pub(super) fn begin(mut place: Place, regions: &[Region]) -> Result<Self, MigrationError> {
        // In the file, not from the preamble on, pages begin where those of the host's cache do.
        let mut at = (place.start() + PlacedHead::END).next_multiple_of(PAGE) - place.start();
        let mut areas = Vec::new();
        for &Region { id, pages } in regions {
            let sums = (0..pages).map(|_| AtomicU32::new(0)).collect();
            areas.push(Area { id, pages, at, has: Bitmap::new(pages), sums });
            at += pages * PAGE;
        }
        let begun = place.ends(PlacedHead::END).and_then(|()| {
            place.write_at(PlacedHead::AT, &PlacedHead { records: None }.bytes())?;
            place.go_to(at)
        });
        begun.map_err(MigrationError::file("beginning"))?;
        Ok(Self { place: Mutex::new(place), areas, records: at })
    }

    /// Writes pages.
    pub(super) fn put(&self, run: Run, bytes: &[u8]) -> Result<(), MigrationError> {
        let area = self.area(run)?;
        let writing = MigrationError::file("writing pages into");
        lock(&self.place).write_at(area.at + run.first * PAGE, bytes).map_err(writing)?;
        for (page, bytes) in (run.first..).zip(bytes.chunks_exact(PAGE as usize)) {
            area.sums[page as usize].store(crc32fast::hash(bytes), Ordering::Relaxed);
        }
        area.has.set(run);
        Ok(())
    }

    /// These pages are zeros.
    pub(super) fn clear(&self, run: Run) -> Result<(), MigrationError> {
        let area = self.area(run)?;
        for part in area.has.set_parts(run) {
            let forgotten = lock(&self.place).forget(area.at + part.first * PAGE, part.pages * PAGE);
            forgotten.map_err(MigrationError::file("writing pages into"))?;
            area.has.clear(part);
        }
        Ok(())
    }

    /// Has what was written reach the disk.
    pub(super) fn sync(&self) -> Result<(), MigrationError> {
        lock(&self.place).sync().map_err(MigrationError::file("having the disk take"))
    }

    /// Says which pages there are, and where.
    pub(super) fn tell(
        &self,
        mut say: impl FnMut(&Record<'_>) -> Result<(), MigrationError>,
    ) -> Result<(), MigrationError> {
        let mut sums = Vec::new();
        for area in &self.areas {
            for whole in area.has.list(area.id, true) {
                for first in (whole.first..whole.first + whole.pages).step_by(MOST_PLACED) {
                    let pages = (whole.first + whole.pages - first).min(MOST_PLACED as u64);
                    sums.clear();
                    sums.reserve(pages as usize * SUM);
                    for sum in &area.sums[first as usize..(first + pages) as usize] {
                        sums.extend_from_slice(&sum.load(Ordering::Relaxed).to_le_bytes());
                    }
                    let run = Run { region: area.id, first, pages };
                    say(&Record::Placed { run, at: area.at + first * PAGE, sums: &sums })?;
                }
            }
        }
        Ok(())
    }

    /// All records are written: from here on it is a guest.
    pub(super) fn finish(&self) -> Result<(), MigrationError> {
        let place = lock(&self.place);
        let finished = place.position().and_then(|end| {
            place.sync()?;
            place.check()?;
            let head = PlacedHead { records: Some(self.records..end) };
            place.write_at(PlacedHead::AT, &head.bytes())?;
            place.sync()
        });
        finished.map_err(MigrationError::file("finishing"))
    }

    fn area(&self, run: Run) -> Result<&Area, MigrationError> {
        let has = |area: &&Area| area.id == run.region && run.end().is_some_and(|end| end <= area.pages);
        self.areas.iter().find(has).ok_or_else(|| MigrationError::no_such_pages(run))
    }
}
