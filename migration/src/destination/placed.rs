//! A guest out of a file in which each page has its place: it is started at once, and gets its pages from there as somebody touches them.
//! Where nobody can wait for a page, all are read first.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use super::Destination;
use super::pages::{Job, Putter};
use crate::connection::Place;
use crate::ending::caught;
use crate::progress::Meter;
use crate::stream::{MOST_PAGES, PAGE, Pages, PlacedHead, Record, Run, SUM, StreamError};
use crate::{Connection, MigrationError, Phase};

/// Where the pages of a file are. As large as the machine's memory allows, whatever the file says.
pub(super) struct Placed {
    place: Place,
    /// Where the records begin, behind which no page is.
    records: u64,
    /// By region and first page; none has a page of another.
    runs: BTreeMap<(u32, u64), Found>,
}

/// Pages beside each other, in the guest and in the file.
struct Found {
    pages: u64,
    at: u64,
    sums: Vec<u8>,
}

impl Placed {
    /// Behind the preamble: what the connection reads next is a record.
    pub(super) fn open(connection: &mut Connection) -> Result<Self, MigrationError> {
        let mut place = connection.place.take().ok_or(MigrationError::NoPlace)?;
        let mut bytes = [0; PlacedHead::BYTES];
        let read = connection.reader.read_exact(&mut bytes).map_err(StreamError::from);
        let head = read.and_then(|()| PlacedHead::read(bytes)).map_err(MigrationError::stream(0))?;
        let records = head.records.ok_or(StreamError::Unfinished).map_err(MigrationError::stream(0))?;
        let reading = || MigrationError::file("reading");
        if place.len().map_err(reading())? < records.end {
            return Err(MigrationError::stream(0)(StreamError::Truncated));
        }
        place.go_to(records.start).map_err(reading())?;
        let reader = std::mem::replace(&mut connection.reader, Box::new(std::io::empty()));
        connection.reader = Box::new(reader.take(records.end - records.start));
        connection.writer = Box::new(std::io::sink()) as Box<dyn Write + Send>;
        Ok(Self { place, records: records.start, runs: BTreeMap::new() })
    }

    /// Notes where pages are, each once.
    pub(super) fn add(&mut self, job: &Job<'_>, run: Run, at: u64, sums: &[u8]) -> Result<(), MigrationError> {
        let (end, len) = job.bounds(run)?;
        let misplaced =
            |why| Err(MigrationError::Misplaced { region: run.region, first: run.first, last: end - 1, why });
        if at < PlacedHead::END || at.checked_add(len).is_none_or(|end| end > self.records) {
            return misplaced("there are no pages in the file");
        }
        let before = self.runs.range(..=(run.region, run.first)).next_back();
        let overlaps =
            before.is_some_and(|((region, first), found)| *region == run.region && first + found.pages > run.first);
        let after = self.runs.range((run.region, run.first)..(run.region, end)).next();
        if overlaps || after.is_some() {
            return misplaced("some of them are there twice");
        }
        self.runs.insert((run.region, run.first), Found { pages: run.pages, at, sums: sums.to_vec() });
        Ok(())
    }

    fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.runs.iter().map(|(&(region, first), found)| Run { region, first, pages: found.pages })
    }

    /// Of the pages of a run, those from the first on that are beside each other in the file, and their bytes.
    fn read<'a>(&self, run: Run, to: &'a mut Vec<u8>) -> Result<Pages<'a>, MigrationError> {
        let damaged = |page| MigrationError::DamagedPage { region: run.region, page };
        let found = self.runs.range(..=(run.region, run.first)).next_back();
        let (first, found) = found.map(|((_, first), found)| (*first, found)).ok_or_else(|| damaged(run.first))?;
        let skipped = run.first - first;
        let pages = found.pages.saturating_sub(skipped).min(run.pages);
        if pages == 0 {
            return Err(damaged(run.first));
        }
        to.resize((pages * PAGE) as usize, 0);
        self.place.read_at(found.at + skipped * PAGE, to).map_err(MigrationError::file("reading pages out of"))?;
        let sums = found.sums.chunks_exact(SUM).skip(skipped as usize);
        for ((page, bytes), sum) in (run.first..).zip(to.chunks_exact(PAGE as usize)).zip(sums) {
            if crc32fast::hash(bytes).to_le_bytes() != *sum {
                return Err(damaged(page));
            }
        }
        Ok(Pages { run: Run { pages, ..run }, compressed: false, bytes: to })
    }

    /// Brings the pages of a run to the guest.
    fn bring(&self, mut run: Run, buffer: &mut Vec<u8>, to: &mut Putter<'_>) -> Result<(), MigrationError> {
        while run.pages > 0 {
            let pages = self.read(run, buffer)?;
            Meter::add(&to.job().meter().transferred, pages.run.pages * PAGE);
            run = Run { first: run.first + pages.run.pages, pages: run.pages - pages.run.pages, ..run };
            to.put(&Record::Pages(pages))?;
        }
        Ok(())
    }
}

impl<'s, 'e, 'v: 's> Destination<'s, 'e, 'v>
where
    'e: 's,
{
    /// Reads the pages that have to be there before the guest starts; which is all of them, unless it `can_wait`.
    pub(super) fn read_first(&self, job: &Arc<Job<'v>>, placed: &Placed, can_wait: bool) -> Result<(), MigrationError> {
        job.are_zeros_but(placed.runs())?;
        let (mut buffer, mut putter) = (Vec::new(), Putter::new(Arc::clone(job), 0, false)?);
        for whole in placed.runs() {
            if can_wait && !self.vm.needs_whole(whole.region) {
                job.put_off(&[whole])?;
                continue;
            }
            for run in whole.parts(MOST_PAGES) {
                self.session.ending.check()?;
                placed.bring(run, &mut buffer, &mut putter)?;
            }
        }
        Ok(())
    }

    /// Brings the rest to the running guest, first what somebody waits for.
    ///
    /// # Errors
    /// It can't be had: the guest that runs here is lost.
    pub(super) fn bring_rest(&self, job: &Arc<Job<'v>>, placed: &Placed) -> Result<(), MigrationError> {
        // There is no connection that anybody could give up.
        self.control.follow(None);
        self.control.enter(Phase::PostcopyActive);
        let (mut buffer, mut putter) = (Vec::new(), Putter::new(Arc::clone(job), 0, false)?);
        Meter::set(&job.meter().remaining, job.missing() * PAGE);
        // What somebody touches next is likely beside what is touched now.
        let mut bring = |run| {
            job.missing_around(run).into_iter().try_for_each(|run| {
                placed.bring(run, &mut buffer, &mut putter)?;
                job.meter().took(run.pages);
                Ok(())
            })
        };
        let brought = caught(|| {
            placed.runs().flat_map(|run| run.parts(MOST_PAGES)).try_for_each(|run| {
                loop {
                    let wanted = self.vm.wanted(Duration::ZERO);
                    if wanted.is_empty() {
                        return bring(run);
                    }
                    Meter::add(&job.meter().postcopy_requests, wanted.len() as u64);
                    wanted.into_iter().try_for_each(&mut bring)?;
                }
            })
        });
        let lost = |source| MigrationError::Unreadable { pages: job.missing(), source: Box::new(source) };
        brought.and_then(|()| job.is_complete()).map_err(lost)?;
        self.complete();
        Ok(())
    }
}
