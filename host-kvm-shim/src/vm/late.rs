//! Post-copy: pages of a running guest that are still on their way. Who touches one waits in the kernel; a thread of its own hears of it, and
//! the API thread tells the SoC, which puts the bytes there and says so.
//!
//! All of an allocation that lacks a page is watched, not its missing pages alone: as many mappings as there are runs would be more than a
//! process may have. Faults on pages that are there are finished here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use api_channel::call::{LateRun, PAGE};
use api_channel::codec::Malformed;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::notices::Notices;
use super::ram::Ram;
use crate::error::Refusal;
use crate::kvm::{Userfault, Watched};
use crate::sandbox::VcpuFilter;

/// The pages that come later, before it begins.
#[derive(Debug, Default)]
pub(super) struct Lacks(BTreeMap<u32, Pages>);

/// Post-copy under way. Ends when this is dropped: nobody who waits for a page may run on then.
#[derive(Debug)]
pub(super) struct Late {
    shared: Arc<Shared>,
    /// None any more once it was given up.
    watched: Mutex<Vec<Watched>>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// What the API thread and the one that hears of faults share.
#[derive(Debug)]
struct Shared {
    userfault: Arc<Userfault>,
    notices: Arc<Notices>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    areas: Vec<Area>,
    /// What somebody waits for, and the SoC was not told of.
    wanted: BTreeSet<(u32, u64)>,
}

/// An allocation.
#[derive(Debug)]
struct Area {
    ram: u32,
    /// Where it is mapped for KVM.
    start: u64,
    lacks: Pages,
}

/// Pages of an allocation, in units that come as one.
#[derive(Debug)]
struct Pages {
    bits: Vec<u64>,
    /// Pages of 4096 bytes in a unit.
    unit: u64,
    units: u64,
    set: u64,
}

/// Bytes of the thread's stack.
const STACK: usize = 64 << 10;

impl Lacks {
    /// Adds pages; all of them or, where one of them can't be, none.
    pub(super) fn add(&mut self, rams: &BTreeMap<u32, Ram>, runs: &[LateRun]) -> Result<(), Refusal> {
        for run in runs {
            let ram = find(rams, run)?;
            Pages::of(ram).units_of(run)?;
        }
        for run in runs {
            let Some(ram) = rams.get(&run.ram) else { continue };
            let pages = self.0.entry(run.ram).or_insert_with(|| Pages::of(ram));
            let (first, end) = pages.units_of(run)?;
            (first..end).for_each(|unit| pages.change(unit, true));
        }
        Ok(())
    }
}

impl Late {
    /// Begins, with every vCPU out of the guest.
    pub(super) fn begin(
        userfault: &Arc<Userfault>,
        rams: &BTreeMap<u32, Ram>,
        lacks: Lacks,
        notices: &Arc<Notices>,
        filter: Option<VcpuFilter>,
    ) -> Result<Self, Refusal> {
        if lacks.0.is_empty() {
            return Err(Refusal::state("no page was said to come later"));
        }
        let mut watched = Vec::new();
        let mut areas = Vec::new();
        for (ram, lacks) in lacks.0 {
            let Some(memory) = rams.get(&ram).map(|ram| &ram.memory) else { continue };
            let start = memory.address(0);
            watched.push(userfault.watch(start, memory.len()).map_err(Refusal::nix("watch guest memory for faults"))?);
            // Behind that: what is touched from here on is told of.
            memory.unmap_pages().map_err(Refusal::nix("take the guest's pages from KVM"))?;
            areas.push(Area { ram, start, lacks });
        }
        let state = Mutex::new(State { areas, wanted: BTreeSet::new() });
        let shared = Arc::new(Shared { userfault: userfault.clone(), notices: notices.clone(), state });
        let failed = Refusal::nix("wait for faults");
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(&failed)?);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(&failed)?;
        epoll.add(&**userfault, EpollEvent::new(EpollFlags::EPOLLIN, FAULT)).map_err(&failed)?;
        epoll.add(&*stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP)).map_err(&failed)?;
        let hears = shared.clone();
        let thread = std::thread::Builder::new().name("faults".into()).stack_size(STACK).spawn(move || {
            // It needs no more than a vCPU's thread does.
            if let Some(Err(error)) = filter.map(|filter| filter.apply()) {
                panic!("the thread that hears of faults can't be confined: {error}");
            }
            hears.hear(&epoll);
        });
        let thread = thread.map_err(|e| Refusal::unavailable(format!("can't start a thread: {e}")))?;
        Ok(Self { shared, watched: Mutex::new(watched), stop, thread: Some(thread) })
    }

    /// The bytes of these pages are there.
    pub(super) fn placed(&self, rams: &BTreeMap<u32, Ram>, runs: &[LateRun]) -> Result<(), Refusal> {
        for run in runs {
            find(rams, run)?;
            let (start, len, page) = self.shared.state().take(run)?;
            // Outside of the lock: who faults meanwhile finds that the page is there.
            self.shared.userfault.show(start, len, page).map_err(Refusal::nix("show the guest its pages"))?;
        }
        Ok(())
    }

    /// How many pages are still to come.
    pub(super) fn left(&self) -> u64 {
        self.shared.state().areas.iter().map(|area| area.lacks.set * area.lacks.unit).sum()
    }

    /// What somebody waits for, once each; `told`: whether the SoC was told of it, else it stays.
    pub(super) fn tell(&self, mut told: impl FnMut(LateRun) -> bool) {
        loop {
            let Some((ram, first, pages)) = self.shared.state().next() else { return };
            if !told(LateRun { ram, reserved: 0, first, pages }) {
                self.shared.state().wanted.insert((ram, first));
                return;
            }
        }
    }

    /// Has nobody wait any more, whatever they find: the guest can't run on.
    pub(super) fn give_up(&self) {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether that was done.
    pub(super) fn is_given_up(&self) -> bool {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        self.give_up();
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const FAULT: u64 = 0;
const STOP: u64 = 1;

impl Shared {
    /// The thread's whole life.
    fn hear(&self, epoll: &Epoll) {
        let mut events = [EpollEvent::empty(); 2];
        loop {
            let count = match epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(_) => return,
            };
            if events[..count].iter().any(|event| event.data() == STOP) {
                return;
            }
            let mut news = false;
            for address in self.userfault.faults() {
                // The lock is not held while the kernel works.
                let found = self.state().fault(address);
                match found {
                    Fault::Late => news = true,
                    // One that can't be shown stays a fault, which ends with the VM; nobody could do better.
                    Fault::Here(start, len) => drop(self.userfault.show(start, len, len)),
                    Fault::Elsewhere => {}
                }
            }
            if news {
                self.notices.moved();
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a fault is about.
enum Fault {
    /// A page that is still to come: it is wanted.
    Late,
    /// One that is there: where it is mapped, and its bytes.
    Here(u64, u64),
    Elsewhere,
}

impl State {
    fn fault(&mut self, address: u64) -> Fault {
        let Some(area) = self.areas.iter().find(|area| area.range().contains(&address)) else {
            return Fault::Elsewhere;
        };
        let bytes = area.lacks.unit * PAGE;
        let unit = (address - area.start) / bytes;
        if area.lacks.has(unit) {
            self.wanted.insert((area.ram, unit * area.lacks.unit));
            return Fault::Late;
        }
        Fault::Here(area.start + unit * bytes, bytes)
    }

    /// These pages are there: where they are mapped, their bytes, those of one page.
    fn take(&mut self, run: &LateRun) -> Result<(u64, u64, u64), Refusal> {
        let area = self.areas.iter_mut().find(|area| area.ram == run.ram);
        let area = area.ok_or_else(|| Refusal::argument(format!("RAM {} lacks no page", run.ram)))?;
        let (first, end) = area.lacks.units_of(run)?;
        if let Some(unit) = (first..end).find(|unit| !area.lacks.has(*unit)) {
            let page = unit * area.lacks.unit;
            return Err(Refusal::argument(format!("page {page} of RAM {} is there already", run.ram)));
        }
        (first..end).for_each(|unit| area.lacks.change(unit, false));
        let (start, unit) = (area.start + run.first * PAGE, area.lacks.unit * PAGE);
        self.wanted.retain(|(ram, page)| *ram != run.ram || !(run.first..run.first + run.pages).contains(page));
        Ok((start, run.pages * PAGE, unit))
    }

    fn next(&mut self) -> Option<(u32, u64, u64)> {
        let (ram, first) = self.wanted.pop_first()?;
        let unit = self.areas.iter().find(|area| area.ram == ram)?.lacks.unit;
        Some((ram, first, unit))
    }
}

impl Area {
    fn range(&self) -> std::ops::Range<u64> {
        self.start..self.start + self.lacks.units * self.lacks.unit * PAGE
    }
}

impl Pages {
    /// None, of an allocation.
    fn of(ram: &Ram) -> Self {
        let unit = ram.page() / PAGE;
        let units = ram.memory.len() / ram.page();
        Self { bits: vec![0; units.div_ceil(64) as usize], unit, units, set: 0 }
    }

    /// The units that a run is, and which there are.
    fn units_of(&self, run: &LateRun) -> Result<(u64, u64), Refusal> {
        let LateRun { ram, first, pages, .. } = *run;
        let whole = pages != 0 && first.is_multiple_of(self.unit) && pages.is_multiple_of(self.unit);
        let end = first.checked_add(pages).filter(|end| whole && *end <= self.units * self.unit);
        let end = end.ok_or_else(|| {
            let unit = self.unit;
            Refusal::argument(format!("{pages} pages from {first} of RAM {ram}: it has {} times {unit}", self.units))
        })?;
        Ok((first / self.unit, end / self.unit))
    }

    fn has(&self, unit: u64) -> bool {
        self.bits[(unit / 64) as usize] >> (unit % 64) & 1 != 0
    }

    fn change(&mut self, unit: u64, set: bool) {
        if self.has(unit) != set {
            self.bits[(unit / 64) as usize] ^= 1 << (unit % 64);
            self.set = if set { self.set + 1 } else { self.set - 1 };
        }
    }
}

fn find<'a>(rams: &'a BTreeMap<u32, Ram>, run: &LateRun) -> Result<&'a Ram, Refusal> {
    if run.reserved != 0 {
        return Err(Malformed.into());
    }
    rams.get(&run.ram).ok_or_else(|| Refusal::argument(format!("there is no RAM {}", run.ram)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(units: u64, unit: u64) -> Pages {
        Pages { bits: vec![0; units.div_ceil(64) as usize], unit, units, set: 0 }
    }

    fn run(first: u64, pages: u64) -> LateRun {
        LateRun { ram: 0, reserved: 0, first, pages }
    }

    #[test]
    fn a_run_is_whole_units_that_there_are() {
        let small = pages(100, 1);
        assert_eq!(small.units_of(&run(99, 1)), Ok((99, 100)));
        for bad in [run(99, 2), run(0, 0), run(u64::MAX, 1), run(1, u64::MAX)] {
            assert!(small.units_of(&bad).is_err(), "{bad:?}");
        }
        let huge = pages(4, 512);
        assert_eq!(huge.units_of(&run(512, 1024)), Ok((1, 3)));
        assert!(huge.units_of(&run(512, 1)).is_err() && huge.units_of(&run(1, 512)).is_err());
    }

    #[test]
    fn what_is_late_is_wanted_once_and_what_is_there_is_shown() {
        let mut lacks = pages(8, 512);
        [1, 1, 5].into_iter().for_each(|unit| lacks.change(unit, true));
        assert_eq!(lacks.set, 2);
        let start = 1 << 40;
        let mut state = State { areas: vec![Area { ram: 0, start, lacks }], wanted: BTreeSet::new() };
        let huge = 512 * PAGE;
        assert!(matches!(state.fault(start + huge + 5), Fault::Late));
        assert!(matches!(state.fault(start + 2 * huge - 1), Fault::Late));
        assert!(
            matches!(state.fault(start + 2 * huge + 1), Fault::Here(at, len) if (at, len) == (start + 2 * huge, huge))
        );
        assert!(matches!(state.fault(start - 1), Fault::Elsewhere));
        assert!(matches!(state.fault(start + 8 * huge), Fault::Elsewhere));
        assert_eq!(state.next(), Some((0, 512, 512)));
        assert_eq!(state.next(), None);
        assert!(matches!(state.fault(start + huge), Fault::Late));
        assert_eq!(state.take(&run(512, 512)), Ok((start + huge, huge, huge)));
        assert_eq!(state.next(), None, "it is there");
        assert!(state.take(&run(512, 512)).is_err(), "a page comes once");
    }
}
