//! Pages that come.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use zstd::bulk::Decompressor;

use crate::bitmap::Bitmap;
use crate::progress::Meter;
use crate::stream::{MOST_PAGES, PAGE, Pages, Record, Run, connection_of};
use crate::{Control, DestinationVm, MigrationError, Region};

/// What all connections share.
pub(super) struct Job<'v> {
    pub(super) vm: &'v dyn DestinationVm,
    control: Control,
    /// How many connections there are.
    pub(super) connections: u16,
    /// The guest runs: pages are placed, once each.
    runs: AtomicBool,
    areas: Vec<Area>,
}

/// A region.
struct Area {
    id: u32,
    pages: u64,
    /// Pages that came at all.
    came: Bitmap,
    /// Pages that may be anything but zeros.
    written: Bitmap,
    /// Pages that come after the guest has started.
    late: Bitmap,
}

impl<'v> Job<'v> {
    pub(super) fn new(vm: &'v dyn DestinationVm, control: Control, connections: u16, regions: &[Region]) -> Self {
        let area = |region: &Region| {
            let Region { id, pages } = *region;
            let map = || Bitmap::new(pages);
            Area { id, pages, came: map(), written: map(), late: map() }
        };
        Self { vm, control, connections, runs: AtomicBool::new(false), areas: regions.iter().map(area).collect() }
    }

    pub(super) fn meter(&self) -> &Meter {
        self.control.meter()
    }

    pub(super) fn pages(&self) -> u64 {
        self.areas.iter().map(|area| area.pages).sum()
    }

    /// Nothing, if each page has come, or was said to come late.
    pub(super) fn may_start(&self) -> Result<(), MigrationError> {
        self.misses(|area| area.came.count_or(&area.late))
    }

    /// Nothing, if each page has come.
    pub(super) fn is_complete(&self) -> Result<(), MigrationError> {
        self.misses(|area| area.came.count())
    }

    fn misses(&self, has: impl Fn(&Area) -> u64) -> Result<(), MigrationError> {
        for area in &self.areas {
            let pages = area.pages - has(area);
            if pages > 0 {
                return Err(MigrationError::Missing { region: area.id, pages });
            }
        }
        Ok(())
    }

    /// These come late, whatever came of them; whether there are any.
    pub(super) fn put_off(&self, runs: &[Run]) -> Result<(), MigrationError> {
        for run in runs {
            let area = self.area(*run)?;
            area.came.clear(*run);
            area.late.set(*run);
        }
        self.vm.lacks(runs).map_err(MigrationError::vm("preparing for pages that come late"))
    }

    /// All pages are zeros but these, which are still to come.
    pub(super) fn are_zeros_but(&self, runs: impl Iterator<Item = Run>) -> Result<(), MigrationError> {
        self.areas.iter().for_each(|area| area.came.fill());
        for run in runs {
            self.area(run)?.came.clear(run);
        }
        Ok(())
    }

    /// Of the block of a page, or of several, what hasn't come.
    pub(super) fn missing_around(&self, run: Run) -> Vec<Run> {
        let Ok(area) = self.area(run) else { return Vec::new() };
        let first = run.first / MOST_PAGES * MOST_PAGES;
        let end = run.first.saturating_add(run.pages).next_multiple_of(MOST_PAGES).min(area.pages);
        area.came.clear_parts(Run { first, pages: end - first, ..run }).collect()
    }

    /// Where a run ends, and how many bytes it has.
    pub(super) fn bounds(&self, run: Run) -> Result<(u64, u64), MigrationError> {
        self.area(run).map(|_| (run.first + run.pages, run.pages * PAGE))
    }

    /// Whether pages come late.
    pub(super) fn has_late(&self) -> bool {
        self.areas.iter().any(|area| area.late.count() > 0)
    }

    /// From here on pages are placed.
    pub(super) fn starts(&self) {
        self.runs.store(true, Ordering::Release);
    }

    pub(super) fn runs(&self) -> bool {
        self.runs.load(Ordering::Acquire)
    }

    /// How many pages haven't come.
    pub(super) fn missing(&self) -> u64 {
        self.areas.iter().map(|area| area.pages - area.came.count()).sum()
    }

    pub(super) fn list_missing(&self) -> Vec<Run> {
        self.areas.iter().flat_map(|area| area.came.list(area.id, false)).collect()
    }

    /// Whether some of a run hasn't come.
    pub(super) fn lacks(&self, run: Run) -> bool {
        self.area(run).is_ok_and(|area| area.came.set_parts(run).map(|part| part.pages).sum::<u64>() < run.pages)
    }

    /// Places the pages of a run that haven't come: those that have are the guest's, which may have written to them.
    fn place(&self, area: &Area, run: Run, bytes: Option<&[u8]>) -> Result<(), MigrationError> {
        for part in area.came.claim(run) {
            let at = ((part.first - run.first) * PAGE) as usize;
            let placed = match bytes {
                Some(bytes) => self.vm.place(part, Some(&bytes[at..at + (part.pages * PAGE) as usize])),
                // A page of zeros that was never anything else takes no memory.
                None => area
                    .written
                    .set_parts(part)
                    .try_for_each(|stale| self.vm.clear(stale))
                    .and_then(|()| self.vm.place(part, None)),
            };
            if let Err(error) = placed {
                area.came.clear(part);
                return Err(MigrationError::vm("placing a page of the running guest")(error));
            }
        }
        Ok(())
    }

    /// Where a run is.
    fn area(&self, run: Run) -> Result<&Area, MigrationError> {
        let has = |area: &&Area| area.id == run.region && run.end().is_some_and(|end| end <= area.pages);
        self.areas.iter().find(has).ok_or_else(|| MigrationError::no_such_pages(run))
    }
}

/// Puts the pages of one connection where they belong.
pub(super) struct Putter<'v> {
    job: Arc<Job<'v>>,
    number: u16,
    decompressor: Option<Decompressor<'static>>,
    buffer: Vec<u8>,
}

impl<'v> Putter<'v> {
    /// Of connection `number`; `zstd`: pages may be compressed.
    pub(super) fn new(job: Arc<Job<'v>>, number: u16, zstd: bool) -> Result<Self, MigrationError> {
        let no_memory = |e: std::io::Error| MigrationError::Vm { doing: "setting up zstd", source: e.into() };
        let decompressor = zstd.then(Decompressor::new).transpose().map_err(no_memory)?;
        let buffer = vec![0; if zstd { (MOST_PAGES * PAGE) as usize } else { 0 }];
        Ok(Self { job, number, decompressor, buffer })
    }

    pub(super) fn job(&self) -> &Job<'v> {
        &self.job
    }

    fn meter(&self) -> &Meter {
        self.job.meter()
    }

    /// Puts pages, if the record has some; whether it has.
    pub(super) fn put(&mut self, record: &Record<'_>) -> Result<bool, MigrationError> {
        match record {
            Record::Pages(pages) => {
                self.is_ours(record, pages.run)?;
                self.write(pages)?;
            }
            Record::Zeros(runs) => {
                for run in runs {
                    self.is_ours(record, *run)?;
                    self.clear(*run)?;
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&mut self, pages: &Pages<'_>) -> Result<(), MigrationError> {
        let run = pages.run;
        let area = self.job.area(run)?;
        let bytes = match (&mut self.decompressor, pages.compressed) {
            (_, false) => pages.bytes,
            (Some(decompressor), true) => {
                let whole = &mut self.buffer[..(run.pages * PAGE) as usize];
                match decompressor.decompress_to_buffer(pages.bytes, whole) {
                    Ok(len) if len == whole.len() => &*whole,
                    _ => return Err(MigrationError::Compressed { region: run.region, first: run.first }),
                }
            }
            (None, true) => return Err(MigrationError::Compressed { region: run.region, first: run.first }),
        };
        if self.job.runs() {
            self.job.place(area, run, Some(bytes))?;
        } else {
            // Before it is written: what fails half-way is no page of zeros.
            area.written.set(run);
            self.job.vm.write(run, bytes).map_err(MigrationError::vm("writing guest memory"))?;
            area.came.set(run);
        }
        let meter = self.meter();
        Meter::add(&meter.normal_pages, run.pages);
        if pages.compressed {
            Meter::add(&meter.compressed_pages, run.pages);
            Meter::add(&meter.compressed_bytes, pages.bytes.len() as u64);
        }
        Ok(())
    }

    fn clear(&self, run: Run) -> Result<(), MigrationError> {
        let area = self.job.area(run)?;
        if self.job.runs() {
            self.job.place(area, run, None)?;
        } else {
            for part in area.written.set_parts(run) {
                self.job.vm.clear(part).map_err(MigrationError::vm("clearing guest memory"))?;
                area.written.clear(part);
            }
            area.came.set(run);
        }
        Meter::add(&self.meter().zero_pages, run.pages);
        Ok(())
    }

    /// Two connections with the same page would have no order.
    fn is_ours(&self, record: &Record<'_>, run: Run) -> Result<(), MigrationError> {
        let (connection, connections) = (self.number, self.job.connections);
        if connections == 1 || run.parts(MOST_PAGES).all(|part| connection_of(part.first, connections) == connection) {
            return Ok(());
        }
        Err(MigrationError::Unexpected { connection, kind: record.kind(), when: "has pages of another connection" })
    }
}
