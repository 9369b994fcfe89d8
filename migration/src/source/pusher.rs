//! One connection's thread: it sends the pages that go by it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use zstd::bulk::Compressor;

use super::memory::Memory;
use super::placed::Placed;
use super::rate::Rate;
use super::turns::{Turn, Turns};
use super::wants::Wants;
use crate::bitmap::runs;
use crate::bucket::Bucket;
use crate::ending::Ending;
use crate::progress::Meter;
use crate::stream::{MOST_PAGES, PAGE, Pages, Record, Run};
use crate::watch::Line;
use crate::{Control, MigrationError, SourceVm};

/// Bytes of the buffer.
const ROOM: usize = (MOST_PAGES * PAGE) as usize;
/// Zero runs that are sent together, which is what one record takes.
const ZEROS: usize = 1 << 12;
/// Bytes around a run of pages.
const AROUND: u64 = 40;

/// What all of them share.
pub(super) struct Job<'v> {
    pub(super) vm: &'v dyn SourceVm,
    pub(super) memory: Arc<Memory>,
    /// The main connection.
    pub(super) main: Arc<Line>,
    /// What the guest waits for.
    pub(super) wants: Arc<Wants>,
    /// Where pages go, if each has its place there.
    pub(super) file: Option<Arc<Placed>>,
    pub(super) turns: Turns,
    pub(super) bucket: Bucket,
    /// That of each connection.
    pub(super) rates: Vec<Rate>,
    pub(super) control: Control,
    pub(super) ending: Arc<Ending>,
    /// Level of compression.
    pub(super) zstd: Option<u8>,
}

impl Job<'_> {
    /// Bytes of pages a second, of all connections together; 0: nobody knows.
    pub(super) fn bandwidth(&self) -> u64 {
        self.rates.iter().map(Rate::per_second).sum()
    }
}

/// Sends pages by one connection.
pub(super) struct Pusher<'v> {
    job: Arc<Job<'v>>,
    line: Arc<Line>,
    /// Pages that were read, and where they belong, in order.
    buffer: Vec<u8>,
    batch: Vec<Run>,
    pages: u64,
    began: Instant,
    /// Pages of zeros that nobody has been told of.
    zeros: Vec<Run>,
    squeezer: Option<Squeezer>,
    /// The guest waits for what is sent now.
    is_urgent: bool,
}

/// Compresses.
struct Squeezer {
    compressor: Compressor<'static>,
    buffer: Vec<u8>,
    used: usize,
}

/// Where the bytes of a record are.
enum Place {
    Plain(Range<usize>),
    Squeezed(Range<usize>),
}

impl<'v> Pusher<'v> {
    /// For a thread that calls [`Self::run`].
    pub(super) fn new(job: Arc<Job<'v>>, line: Arc<Line>) -> Result<Self, MigrationError> {
        let squeezer = job.zstd.map(|level| {
            let compressor = Compressor::new(level.into())?;
            Ok(Squeezer { compressor, buffer: vec![0; ROOM], used: 0 })
        });
        let no_memory = |e: std::io::Error| MigrationError::Vm { doing: "setting up zstd", source: e.into() };
        let squeezer = squeezer.transpose().map_err(no_memory)?;
        job.turns.enter();
        Ok(Self {
            job,
            line,
            buffer: vec![0; ROOM],
            batch: Vec::new(),
            pages: 0,
            began: Instant::now(),
            zeros: Vec::new(),
            squeezer,
            is_urgent: false,
        })
    }

    /// Takes its turns until the migration is over.
    pub(super) fn run(mut self) {
        let job = Arc::clone(&self.job);
        job.turns.take_each(&job.ending, |turn| self.push(turn));
    }

    /// Sends what is to be sent by this connection.
    fn push(&mut self, turn: Turn) -> Result<(), MigrationError> {
        self.push_pages(turn)?;
        self.send_all(turn)?;
        let last: &[Record<'_>] = if matches!(turn, Turn::Round { .. }) { &[] } else { &[Record::LastPage] };
        self.send(last)
    }

    fn push_pages(&mut self, turn: Turn) -> Result<(), MigrationError> {
        let job = Arc::clone(&self.job);
        for area in job.memory.areas().iter().filter(|area| turn != Turn::Mark || area.whole) {
            // A word is 64 pages: `stream::connection_of`.
            for index in (usize::from(self.line.number)..area.pending.words()).step_by(job.rates.len()) {
                let put_off = if turn == (Turn::Round { puts_off: true }) { area.hot.word(index) } else { 0 };
                let bits = area.pending.word(index) & !put_off;
                for run in runs(area.id, index, bits) {
                    self.add(run, turn)?;
                }
                match turn {
                    // The guest is to run at the destination now, not after what may be hours.
                    Turn::Round { .. } if job.control.wants_post_copy() => return Ok(()),
                    Turn::Rest => self.push_wanted(turn)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// What the guest waits for overtakes the rest.
    fn push_wanted(&mut self, turn: Turn) -> Result<(), MigrationError> {
        let job = Arc::clone(&self.job);
        while let Some(run) = job.wants.next(self.line.number) {
            // What was read already is sent first, or it would be sent twice.
            self.is_urgent = true;
            self.send_all(turn)?;
            let area = job.memory.areas().iter().find(|area| area.id == run.region);
            let parts: Vec<_> = area.map(|area| area.pending.set_parts(run).collect()).unwrap_or_default();
            for part in parts {
                self.add(part, turn)?;
            }
            self.send_all(turn)?;
            Meter::add(&job.control.meter().postcopy_requests, 1);
        }
        self.is_urgent = false;
        Ok(())
    }

    /// All that was read.
    fn send_all(&mut self, turn: Turn) -> Result<(), MigrationError> {
        self.send_pages(turn)?;
        self.send_zeros()
    }

    /// Reads a run, whose bits were set before: what is written to it from here on sets them again.
    fn add(&mut self, run: Run, turn: Turn) -> Result<(), MigrationError> {
        if self.pages + run.pages > MOST_PAGES {
            self.send_pages(turn)?;
        }
        if self.batch.is_empty() {
            self.job.ending.check()?;
            self.began = Instant::now();
        }
        let at = (self.pages * PAGE) as usize;
        let to = &mut self.buffer[at..at + (run.pages * PAGE) as usize];
        self.job.vm.read(run, to).map_err(MigrationError::vm("reading guest memory"))?;
        self.batch.push(run);
        self.pages += run.pages;
        Ok(())
    }

    /// Sends what was read.
    fn send_pages(&mut self, turn: Turn) -> Result<(), MigrationError> {
        let mut found = Vec::with_capacity(self.batch.len());
        let mut at = 0;
        for run in &self.batch {
            let bytes = &self.buffer[at..at + (run.pages * PAGE) as usize];
            split(*run, bytes, |part, range| match range {
                Some(range) => found.push((part, Place::Plain(at + range.start..at + range.end))),
                None => self.zeros.push(part),
            });
            at += bytes.len();
        }
        self.batch.clear();
        self.pages = 0;
        if !found.is_empty() {
            self.send_found(&mut found, turn)?;
        }
        if self.zeros.len() > ZEROS - MOST_PAGES as usize { self.send_zeros() } else { Ok(()) }
    }

    fn send_found(&mut self, found: &mut [(Run, Place)], turn: Turn) -> Result<(), MigrationError> {
        let meter = self.job.control.meter();
        if let Some(squeezer) = &mut self.squeezer {
            squeezer.used = 0;
            for (run, place) in &mut *found {
                squeezer.squeeze(&self.buffer, place);
                if let Place::Squeezed(range) = place {
                    Meter::add(&meter.compressed_pages, run.pages);
                    Meter::add(&meter.compressed_bytes, range.len() as u64);
                }
            }
        }
        let squeezed = self.squeezer.as_ref().map_or(&[][..], |squeezer| &squeezer.buffer);
        let record = |(run, place): &(Run, Place)| {
            let (compressed, bytes) = match place {
                Place::Plain(range) => (false, &self.buffer[range.clone()]),
                Place::Squeezed(range) => (true, &squeezed[range.clone()]),
            };
            (Pages { run: *run, compressed, bytes }, bytes.len() as u64 + AROUND)
        };
        let (records, sizes): (Vec<_>, Vec<_>) = found.iter().map(record).unzip();
        let records: Vec<_> = records.into_iter().map(Record::Pages).collect();
        self.wait_for_bandwidth(turn, sizes.iter().sum());
        match &self.job.file {
            Some(file) => {
                for record in &records {
                    if let Record::Pages(Pages { run, bytes, .. }) = record {
                        file.put(*run, bytes)?;
                    }
                }
                Meter::add(&meter.transferred, sizes.iter().sum());
            }
            None => self.send(&records)?,
        }
        let pages = found.iter().map(|(run, _)| run.pages).sum();
        Meter::add(&meter.normal_pages, pages);
        self.job.rates[usize::from(self.line.number)].add(pages * PAGE, self.began.elapsed());
        found.iter().for_each(|(run, _)| self.is_sent(*run));
        Ok(())
    }

    /// Only the guest that stands still, or waits for a page, has no limit.
    fn wait_for_bandwidth(&self, turn: Turn, bytes: u64) {
        let (job, number) = (&self.job, self.line.number);
        match turn {
            Turn::Round { .. } => {
                job.bucket.take(bytes, || job.control.max_bandwidth(), || job.ending.is_over());
            }
            Turn::Rest if !self.is_urgent => {
                let hurries = || job.ending.is_over() || job.wants.has(number);
                job.bucket.take(bytes, || job.control.max_post_copy_bandwidth(), hurries);
            }
            _ => {}
        }
    }

    fn send_zeros(&mut self) -> Result<(), MigrationError> {
        if self.zeros.is_empty() {
            return Ok(());
        }
        let mut runs: Vec<Run> = Vec::with_capacity(self.zeros.len());
        for run in &self.zeros {
            match runs.last_mut() {
                // Where all go by one connection, they are long.
                Some(last) if last.region == run.region && last.first + last.pages == run.first => {
                    last.pages += run.pages;
                }
                _ => runs.push(*run),
            }
        }
        match &self.job.file {
            Some(file) => runs.iter().try_for_each(|run| file.clear(*run))?,
            None => self.send(&[Record::Zeros(runs)])?,
        }
        Meter::add(&self.job.control.meter().zero_pages, self.zeros.iter().map(|run| run.pages).sum());
        std::mem::take(&mut self.zeros).into_iter().for_each(|run| self.is_sent(run));
        Ok(())
    }

    fn send(&self, records: &[Record<'_>]) -> Result<(), MigrationError> {
        let bytes = self.line.send(records)?;
        Meter::add(&self.job.control.meter().transferred, bytes);
        Ok(())
    }

    /// The connection took it.
    fn is_sent(&self, run: Run) {
        if let Some(area) = self.job.memory.areas().iter().find(|area| area.id == run.region) {
            area.pending.clear(run);
            self.job.control.meter().took(run.pages);
        }
    }
}

impl Squeezer {
    /// Compresses what is there, if it gets smaller.
    fn squeeze(&mut self, buffer: &[u8], place: &mut Place) {
        let Place::Plain(range) = place else { return };
        let from = self.used;
        let room = &mut self.buffer[from..from + range.len() - 1];
        // An error is that there was too little room.
        if let Ok(len) = self.compressor.compress_to_buffer(&buffer[range.clone()], room) {
            self.used += len;
            *place = Place::Squeezed(from..from + len);
        }
    }
}

/// The parts of a run that are zeros (none), and those that are not: where in `bytes` they are.
fn split(run: Run, bytes: &[u8], mut part: impl FnMut(Run, Option<Range<usize>>)) {
    let page = |index: u64| (index * PAGE) as usize;
    let is_zero_at = |index: u64| is_zero(&bytes[page(index)..page(index + 1)]);
    let (mut start, mut zero) = (0, is_zero_at(0));
    for index in 1..=run.pages {
        let next = index < run.pages && is_zero_at(index);
        if index == run.pages || next != zero {
            let range = (!zero).then(|| page(start)..page(index));
            part(Run { first: run.first + start, pages: index - start, ..run }, range);
            (start, zero) = (index, next);
        }
    }
}

/// Whether there are but zeros, looked at in pieces that compilers make vectors of.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(256).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}
