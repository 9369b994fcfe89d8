//! Guests in memory, and ways between them.

#![allow(dead_code, reason = "each test file uses what it needs")]

pub(crate) mod peer;
pub(crate) mod roads;
pub(crate) mod tape;
pub(crate) mod watched;

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, RwLock};
use std::thread;
use std::time::Duration;

use migration::stream::{PAGE, Run};
use migration::{DestinationVm, DeviceState, Region, SourceVm, State, VmError};

const WORDS: usize = PAGE as usize / 8;
/// The word of a page that a guest writes to at the destination.
const TOUCHED: usize = 5;
/// What every machine here is.
pub(crate) const DESCRIPTION: &[u8] = br#"{"machine":"test"}"#;

/// A machine's memory, and the log of writes to it.
pub(crate) struct Ram {
    regions: Vec<(Region, Vec<AtomicU64>)>,
    dirty: Mutex<Vec<Run>>,
    logs: AtomicBool,
}

/// The region that comes before the guest starts.
const WHOLE: u32 = 3;

impl Ram {
    /// Regions 0, 3, 6 … of so many pages.
    pub(crate) fn new(pages: &[u64]) -> Self {
        let region = |(index, pages): (usize, &u64)| {
            let words = (0..*pages as usize * WORDS).map(|_| AtomicU64::new(0)).collect();
            (Region { id: index as u32 * 3, pages: *pages }, words)
        };
        Self {
            regions: pages.iter().enumerate().map(region).collect(),
            dirty: Mutex::default(),
            logs: AtomicBool::new(false),
        }
    }

    /// Of each six pages two zeros, two that are hard to compress, two that are easy to.
    pub(crate) fn filled(pages: &[u64]) -> Self {
        let ram = Self::new(pages);
        let mut random = Random(1);
        for (_, words) in &ram.regions {
            for (index, word) in words.iter().enumerate() {
                let value = match index / WORDS % 6 {
                    0 | 4 => random.next(),
                    1 | 5 => index as u64 / 100,
                    _ => 0,
                };
                word.store(value, Ordering::Relaxed);
            }
        }
        ram
    }

    pub(crate) fn regions(&self) -> Vec<Region> {
        self.regions.iter().map(|(region, _)| *region).collect()
    }

    fn words(&self, run: Run) -> &[AtomicU64] {
        let (region, words) =
            self.regions.iter().find(|(region, _)| region.id == run.region).expect("a region that is there");
        assert!(run.pages > 0 && run.first + run.pages <= region.pages, "{run:?}");
        &words[run.first as usize * WORDS..(run.first + run.pages) as usize * WORDS]
    }

    fn read(&self, run: Run, to: &mut [u8]) {
        let words = self.words(run);
        assert_eq!(to.len(), words.len() * 8);
        for (bytes, word) in to.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
    }

    fn write(&self, run: Run, bytes: &[u8]) {
        let words = self.words(run);
        assert_eq!(bytes.len(), words.len() * 8);
        for (bytes, word) in bytes.chunks_exact(8).zip(words) {
            word.store(u64::from_le_bytes(bytes.try_into().unwrap()), Ordering::Relaxed);
        }
    }

    /// Each page.
    fn pages(&self) -> impl Iterator<Item = Run> {
        let of = |region: Region| (0..region.pages).map(move |first| Run { region: region.id, first, pages: 1 });
        self.regions.iter().flat_map(move |(region, _)| of(*region))
    }

    /// The pages that differ.
    pub(crate) fn differs(&self, other: &Self) -> Vec<Run> {
        assert_eq!(self.regions(), other.regions());
        let value = |word: &AtomicU64| word.load(Ordering::Relaxed);
        self.pages()
            .filter(|page| !self.words(*page).iter().map(value).eq(other.words(*page).iter().map(value)))
            .collect()
    }
}

/// How a guest writes to its memory.
#[derive(Clone, Copy)]
pub(crate) struct Writer {
    /// Pages of the first region.
    pub(crate) pages: u64,
    /// Writes between two looks at the clock, and for how long it sleeps then.
    pub(crate) burst: u32,
    pub(crate) sleep: Duration,
}

/// A guest that may move away.
pub(crate) struct Source {
    pub(crate) ram: Ram,
    runs: Mutex<bool>,
    stops: AtomicBool,
    percent: AtomicU64,
    /// How often each page of the first region was written: not in the guest's memory, so no migration moves it.
    written: Vec<AtomicU64>,
    pub(crate) throttled: Mutex<Vec<u8>>,
    pub(crate) gone: AtomicBool,
    /// Whether it was told that nobody knows where the guest is.
    pub(crate) doubts: AtomicBool,
    pub(crate) logged: AtomicU64,
    /// What fails, and what panics, by the trait's name for it.
    pub(crate) fails: RwLock<Option<&'static str>>,
    pub(crate) panics: RwLock<Option<&'static str>>,
}

impl Source {
    pub(crate) fn new(ram: Ram) -> Self {
        let pages = ram.regions[0].0.pages;
        Self {
            ram,
            runs: Mutex::new(true),
            stops: AtomicBool::new(false),
            percent: AtomicU64::new(0),
            written: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            throttled: Mutex::default(),
            gone: AtomicBool::new(false),
            doubts: AtomicBool::new(false),
            logged: AtomicU64::new(0),
            fails: RwLock::new(None),
            panics: RwLock::new(None),
        }
    }

    pub(crate) fn runs(&self) -> bool {
        *self.runs.lock().unwrap()
    }

    /// The guest, until [`Halts`]: it counts in the first word of the pages that it writes to.
    pub(crate) fn write_on(&self, writer: Writer) {
        let mut random = Random(7);
        while !self.stops.load(Ordering::Relaxed) {
            {
                // Whoever pauses waits for the burst, as for a vCPU.
                let runs = self.runs.lock().unwrap();
                for _ in 0..if *runs { writer.burst } else { 0 } {
                    let page = random.next() % writer.pages;
                    let run = Run { region: 0, first: page, pages: 1 };
                    let count = self.written[page as usize].fetch_add(1, Ordering::Relaxed) + 1;
                    self.ram.words(run)[0].store(count << 1 | 1, Ordering::Relaxed);
                    self.ram.words(run)[WORDS - 1].store(count, Ordering::Relaxed);
                    if self.ram.logs.load(Ordering::Relaxed) {
                        self.ram.dirty.lock().unwrap().push(run);
                    }
                }
            }
            let percent = self.percent.load(Ordering::Relaxed).min(99) as u32;
            thread::sleep(writer.sleep * 100 / (100 - percent));
        }
    }

    /// Nothing that the guest wrote is missing there.
    pub(crate) fn check_counts(&self, ram: &Ram) {
        for (page, count) in self.written.iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            let run = Run { region: 0, first: page as u64, pages: 1 };
            if count > 0 {
                assert_eq!(ram.words(run)[0].load(Ordering::Relaxed), count << 1 | 1, "page {page}");
            }
        }
    }

    pub(crate) fn writes(&self) -> u64 {
        self.written.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    fn fails(&self, what: &'static str) -> Result<(), VmError> {
        let panics = *self.panics.read().unwrap() == Some(what);
        assert!(!panics, "{what} panics here");
        let fails = *self.fails.read().unwrap() == Some(what);
        if fails { Err(format!("{what} does not work here").into()) } else { Ok(()) }
    }
}

/// Ends a guest's [`Source::write_on`], also where a test fails.
pub(crate) struct Halts<'a>(pub(crate) &'a Source);

impl Drop for Halts<'_> {
    fn drop(&mut self) {
        self.0.stops.store(true, Ordering::Relaxed);
    }
}

impl SourceVm for Source {
    fn description(&self) -> Result<Vec<u8>, migration::VmError> {
        Ok(DESCRIPTION.to_vec())
    }

    fn regions(&self) -> Vec<Region> {
        self.ram.regions()
    }

    fn comes_whole(&self, region: u32) -> bool {
        region == WHOLE
    }

    fn start_log(&self) -> Result<(), VmError> {
        self.fails("start_log")?;
        let _between_bursts = self.runs.lock().unwrap();
        self.ram.dirty.lock().unwrap().clear();
        self.ram.logs.store(true, Ordering::Relaxed);
        self.logged.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn take_dirty(&self, region: u32) -> Result<Vec<Run>, VmError> {
        self.fails("take_dirty")?;
        assert!(self.ram.logs.load(Ordering::Relaxed));
        let mut dirty = self.ram.dirty.lock().unwrap();
        Ok(dirty.extract_if(.., |run| run.region == region).collect())
    }

    fn stop_log(&self) {
        assert!(self.ram.logs.swap(false, Ordering::Relaxed));
    }

    fn read(&self, run: Run, to: &mut [u8]) -> Result<(), VmError> {
        self.fails("read")?;
        self.ram.read(run, to);
        Ok(())
    }

    fn pause(&self) -> Result<(), VmError> {
        *self.runs.lock().unwrap() = false;
        self.fails("pause")
    }

    fn resume(&self) -> Result<(), VmError> {
        self.fails("resume")?;
        assert!(!self.gone.load(Ordering::Relaxed));
        *self.runs.lock().unwrap() = true;
        Ok(())
    }

    fn state(&self) -> Result<State, VmError> {
        assert!(!self.runs());
        self.fails("state")?;
        Ok(state())
    }

    fn throttle(&self, percent: u8) -> Result<(), VmError> {
        self.fails("throttle")?;
        self.throttled.lock().unwrap().push(percent);
        self.percent.store(percent.into(), Ordering::Relaxed);
        Ok(())
    }

    fn gone(&self) {
        assert!(!self.runs());
        assert!(!self.gone.swap(true, Ordering::Relaxed));
    }

    fn in_doubt(&self) {
        assert!(!self.runs() && !self.gone.load(Ordering::Relaxed));
        assert!(!self.doubts.swap(true, Ordering::Relaxed));
    }
}

/// The state of every guest here.
pub(crate) fn state() -> State {
    let device =
        |name: &str, version| DeviceState { name: name.to_owned(), version, state: br#"{"index":3}"#.to_vec() };
    State {
        devices: vec![device("rtc", 1), device("disk/0", 7)],
        guest: vec![(None, b"vm".to_vec()), (Some(0), b"vcpu 0".to_vec()), (Some(1), vec![5; 9000])],
    }
}

/// Where guests come to.
pub(crate) struct Destination {
    pub(crate) ram: Ram,
    pub(crate) loaded: Mutex<Option<State>>,
    pub(crate) runs: AtomicBool,
    fails: Option<&'static str>,
    panics: Option<&'static str>,
    written: Mutex<HashSet<(u32, u64)>>,
    /// Whether it can run without its memory.
    post_copy: bool,
    late: Mutex<Late>,
    arrives: Condvar,
}

/// Pages that a guest lacks.
#[derive(Default)]
struct Late {
    absent: HashSet<(u32, u64)>,
    wanted: Vec<Run>,
    /// The migration is over, whatever is absent.
    over: bool,
}

impl Destination {
    pub(crate) fn like(source: &Source) -> Self {
        let pages: Vec<u64> = source.ram.regions().iter().map(|region| region.pages).collect();
        Self::new(&pages)
    }

    /// One whose `what` fails, by the trait's name for it.
    pub(crate) fn failing(self, what: &'static str) -> Self {
        Self { fails: Some(what), ..self }
    }

    /// One whose `what` panics.
    pub(crate) fn panicking(self, what: &'static str) -> Self {
        Self { panics: Some(what), ..self }
    }

    pub(crate) fn new(pages: &[u64]) -> Self {
        Self {
            ram: Ram::new(pages),
            loaded: Mutex::default(),
            runs: AtomicBool::new(false),
            fails: None,
            panics: None,
            written: Mutex::default(),
            post_copy: false,
            late: Mutex::default(),
            arrives: Condvar::new(),
        }
    }

    /// One that can run without its memory.
    pub(crate) fn waiting(self) -> Self {
        Self { post_copy: true, ..self }
    }

    pub(crate) fn runs(&self) -> bool {
        self.runs.load(Ordering::Relaxed)
    }

    /// The guest, once it runs: it looks at every page in some order, waits for those that are absent, finds what was there at the
    /// source, and writes to it. Until it has seen all, or [`Self::end`].
    pub(crate) fn touch_all(&self, source: &Ram) {
        let mut pages: Vec<_> = self.ram.pages().collect();
        let mut random = Random(11);
        pages.sort_by_cached_key(|_| random.next());
        for page in pages {
            let mut late = self.late.lock().unwrap();
            while !self.runs() || late.absent.contains(&(page.region, page.first)) {
                if late.over {
                    return;
                }
                if self.runs() {
                    late.wanted.push(page);
                }
                self.arrives.notify_all();
                let absent =
                    |late: &mut Late| !late.over && (!self.runs() || late.absent.contains(&(page.region, page.first)));
                late = self.arrives.wait_while(late, absent).unwrap();
            }
            let words = self.ram.words(page);
            let same = |at: usize| words[at].load(Ordering::Relaxed) == source.words(page)[at].load(Ordering::Relaxed);
            assert!((0..WORDS).all(same), "{page:?}");
            words[TOUCHED].store(!words[TOUCHED].load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Nothing more comes.
    pub(crate) fn end(&self) {
        self.late.lock().unwrap().over = true;
        self.arrives.notify_all();
    }

    /// Every page is as at the source, but for what [`Self::touch_all`] wrote.
    pub(crate) fn check_touched(&self, source: &Ram) {
        for page in self.ram.pages() {
            for (at, (here, there)) in self.ram.words(page).iter().zip(source.words(page)).enumerate() {
                let (here, there) = (here.load(Ordering::Relaxed), there.load(Ordering::Relaxed));
                assert_eq!(here, if at == TOUCHED { !there } else { there }, "{page:?} {at}");
            }
        }
    }

    fn fails(&self, what: &'static str) -> Result<(), VmError> {
        assert!(self.panics != Some(what), "{what} panics here");
        if self.fails == Some(what) { Err(format!("{what} does not work here").into()) } else { Ok(()) }
    }
}

fn pages(run: Run) -> Range<u64> {
    run.first..run.first + run.pages
}

impl DestinationVm for Destination {
    fn prepare(&self, description: &[u8]) -> Result<Vec<Region>, VmError> {
        self.fails("prepare")?;
        if description == DESCRIPTION { Ok(self.ram.regions()) } else { Err("no such machine".into()) }
    }

    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), VmError> {
        self.fails("write")?;
        assert!(self.loaded.lock().unwrap().is_none());
        self.ram.write(run, bytes);
        self.written.lock().unwrap().extend(pages(run).map(|page| (run.region, page)));
        Ok(())
    }

    fn clear(&self, run: Run) -> Result<(), VmError> {
        self.fails("clear")?;
        let mut written = self.written.lock().unwrap();
        assert!(pages(run).all(|page| written.remove(&(run.region, page))), "{run:?} was zero");
        self.ram.write(run, &vec![0; (run.pages * PAGE) as usize]);
        Ok(())
    }

    fn load(&self, state: State) -> Result<(), VmError> {
        self.fails("load")?;
        assert!(self.loaded.lock().unwrap().replace(state).is_none());
        Ok(())
    }

    fn start(&self) -> Result<(), VmError> {
        self.fails("start")?;
        assert!(self.loaded.lock().unwrap().is_some());
        let _late = self.late.lock().unwrap();
        assert!(!self.runs.swap(true, Ordering::Relaxed));
        self.arrives.notify_all();
        Ok(())
    }

    fn can_post_copy(&self) -> bool {
        self.post_copy
    }

    fn needs_whole(&self, region: u32) -> bool {
        region == WHOLE
    }

    fn lacks(&self, runs: &[Run]) -> Result<(), VmError> {
        assert!(self.post_copy && self.loaded.lock().unwrap().is_none());
        assert!(runs.iter().all(|run| run.region != WHOLE), "{runs:?}");
        let absent = runs.iter().flat_map(|run| pages(*run).map(|page| (run.region, page)));
        self.late.lock().unwrap().absent.extend(absent);
        Ok(())
    }

    fn wanted(&self, at_most: Duration) -> Vec<Run> {
        let late = self.late.lock().unwrap();
        let (mut late, _) = self.arrives.wait_timeout_while(late, at_most, |late| late.wanted.is_empty()).unwrap();
        std::mem::take(&mut late.wanted)
    }

    fn place(&self, run: Run, bytes: Option<&[u8]>) -> Result<(), VmError> {
        assert!(self.runs());
        let mut late = self.late.lock().unwrap();
        let zeros = vec![0; (run.pages * PAGE) as usize];
        self.ram.write(run, bytes.unwrap_or(&zeros));
        assert!(pages(run).all(|page| late.absent.remove(&(run.region, page))), "{run:?} was there");
        self.arrives.notify_all();
        Ok(())
    }
}

/// Numbers that look random (xorshift64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
