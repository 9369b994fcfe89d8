//! How fast a guest writes its memory, measured while it runs (QMP `calc-dirty-rate`): what a migration would have to keep up with.

use std::hash::{DefaultHasher, Hasher};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::Builder;
use std::time::{Duration, Instant};

use migration::stream::{PAGE, Run};
use migration::{Region, SourceVm, VmError};
use nix::time::{ClockId, clock_gettime};

use super::{MigrateError, WritingVcpus, Written};
use crate::cli::with_causes;

/// Pages of a GiB.
const OF_GIB: u64 = 1 << 18;

/// How often rings are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Pages that are looked at in each region, if it has so many, whatever was asked for: fewer tell nothing.
const FEWEST: u64 = 512;

/// By what it is measured: QMP `DirtyRateMeasureMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyRateMode {
    /// By some pages, which are looked at twice. The guest doesn't notice, and it may be moving meanwhile.
    #[default]
    PageSampling,
    /// By the log of dirty pages: exact, but one measurement or migration at a time, and the guest is slower.
    DirtyBitmap,
    /// By the vCPUs' rings of dirty pages, of VMs that have them: for each vCPU. The guest may be moving meanwhile.
    DirtyRing,
}

/// What is to be measured.
#[derive(Clone, Copy, Debug)]
pub struct Measurement {
    /// By what.
    pub mode: DirtyRateMode,
    /// For how long.
    pub time: Duration,
    /// With [`DirtyRateMode::PageSampling`]: pages of each GiB that are looked at.
    pub samples: u64,
}

/// QMP `DirtyRateStatus`, and what came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum DirtyRateStatus {
    /// Nothing was measured, or it failed.
    #[default]
    Unstarted,
    /// It is being measured.
    Measuring,
    /// So many bytes a second.
    Measured(f64),
}

/// The last measurement.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DirtyRate {
    /// How far it is.
    pub status: DirtyRateStatus,
    /// By what.
    pub mode: DirtyRateMode,
    /// When it began, by CLOCK_MONOTONIC.
    pub start: Duration,
    /// How long it takes, or took.
    pub time: Duration,
    /// Pages of each GiB that were looked at; 0 with another mode.
    pub samples: u64,
    /// Bytes a second of each vCPU, with [`DirtyRateMode::DirtyRing`].
    pub vcpus: Vec<f64>,
}

/// A VM's measurements: one at a time.
#[derive(Debug, Default)]
pub(super) struct DirtyRates {
    state: Mutex<State>,
    /// One is over, or has to be.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    last: DirtyRate,
    /// The one that is under way has to end early.
    gives_way: bool,
}

impl DirtyRates {
    pub(super) fn last(&self) -> DirtyRate {
        self.state().last.clone()
    }

    /// One begins.
    ///
    /// # Errors
    /// Another one is under way.
    pub(super) fn begin(self: &Arc<Self>, measurement: Measurement) -> Result<Under, MigrateError> {
        let mut state = self.state();
        if state.last.status == DirtyRateStatus::Measuring {
            let why = "the dirty rate is just being measured: wait until query-dirty-rate says 'measured'";
            return Err(MigrateError::Refused(why.into()));
        }
        let Measurement { mode, time, samples } = measurement;
        let start = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
        let samples = if mode == DirtyRateMode::PageSampling { samples } else { 0 };
        *state = State {
            last: DirtyRate { status: DirtyRateStatus::Measuring, mode, start, time, samples, vcpus: Vec::new() },
            gives_way: false,
        };
        Ok(Under { of: self.clone(), measurement, came: None, vcpus: Vec::new() })
    }

    /// A migration needs the log: who has it ends now, with what it has seen by now. Returns when the log is free.
    pub(super) fn give_way(&self) {
        let mut state = self.state();
        let has_log = |state: &State| {
            state.last.status == DirtyRateStatus::Measuring && state.last.mode == DirtyRateMode::DirtyBitmap
        };
        state.gives_way = has_log(&state);
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |state| has_log(state)));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A measurement that is under way, until this is dropped.
#[derive(Debug)]
pub(super) struct Under {
    of: Arc<DirtyRates>,
    measurement: Measurement,
    /// Bytes a second, and how long it took.
    came: Option<(f64, Duration)>,
    /// Of each vCPU.
    vcpus: Vec<f64>,
}

impl Under {
    /// Has a thread do it, and returns when that has begun. `has_ended` says whether the VM is gone, which nobody asks any more.
    ///
    /// # Errors
    /// The log can't be had, and why; or no thread.
    pub(super) fn start(
        mut self,
        vm: Arc<impl SourceVm + WritingVcpus + ?Sized + 'static>,
        has_ended: impl Fn() -> bool + Send + 'static,
    ) -> Result<(), MigrateError> {
        let (sender, begun) = mpsc::sync_channel(1);
        let work = move || match self.measurement.mode {
            DirtyRateMode::PageSampling => {
                // Nobody waits for the samples.
                let _ = sender.send(Ok(()));
                self.sample(&*vm);
            }
            DirtyRateMode::DirtyBitmap => {
                let log = vm.start_log();
                let is_on = log.is_ok();
                let _ = sender.send(log);
                if is_on {
                    self.watch_log(&*vm, &has_ended);
                }
                if is_on && !has_ended() {
                    vm.stop_log();
                }
            }
            DirtyRateMode::DirtyRing => {
                let counts = vm.count_writes(true);
                let is_on = counts.is_ok();
                let _ = sender.send(counts);
                if is_on {
                    self.watch_rings(&*vm, &has_ended);
                }
                if !has_ended() {
                    _ = vm.count_writes(false);
                }
            }
        };
        Builder::new().name("dirty-rate".into()).spawn(work).map_err(MigrateError::Thread)?;
        // It says something before it ends.
        begun
            .recv()
            .unwrap_or(Ok(()))
            .map_err(|e| MigrateError::Refused(format!("the dirty rate can't be measured: {}", with_causes(&*e))))
    }

    fn sample(&mut self, vm: &(impl SourceVm + ?Sized)) {
        let start = Instant::now();
        let Some(samples) = self.told(Samples::take(vm, self.measurement.samples)) else { return };
        self.wait(start);
        let time = start.elapsed();
        let Some(dirty) = self.told(samples.dirty(vm)) else { return };
        self.came = Some((dirty / time.as_secs_f64(), time));
    }

    fn watch_log(&mut self, vm: &(impl SourceVm + ?Sized), has_ended: &impl Fn() -> bool) {
        let start = Instant::now();
        self.wait(start);
        if has_ended() {
            return;
        }
        let time = start.elapsed();
        let dirty = vm.regions().iter().map(|region| vm.take_dirty(region.id).map(pages)).sum::<Result<u64, _>>();
        let Some(dirty) = self.told(dirty) else { return };
        self.came = Some(((dirty * PAGE) as f64 / time.as_secs_f64(), time));
    }

    fn watch_rings(&mut self, vm: &(impl WritingVcpus + ?Sized), has_ended: &impl Fn() -> bool) {
        let start = Instant::now();
        let Some(before) = self.told(vm.written()) else { return };
        // Each look has the next write to a page logged again.
        let mut now = before.clone();
        while start.elapsed() < self.measurement.time {
            self.wait_until(start, LOOK.min(self.measurement.time.saturating_sub(start.elapsed())) + start.elapsed());
            if has_ended() {
                return;
            }
            let Some(written) = self.told(vm.written()) else { return };
            now = written;
        }
        let time = start.elapsed();
        let rate =
            |(before, now): (&Written, &Written)| now.bytes.saturating_sub(before.bytes) as f64 / time.as_secs_f64();
        self.vcpus = before.vcpus.iter().zip(&now.vcpus).map(rate).collect();
        self.came = Some((self.vcpus.iter().sum(), time));
    }

    /// Waits until its time is over, or it has to end.
    fn wait(&self, start: Instant) {
        self.wait_until(start, self.measurement.time);
    }

    fn wait_until(&self, start: Instant, time: Duration) {
        let state = self.of.state();
        let rest = time.saturating_sub(start.elapsed());
        drop(self.of.changed.wait_timeout_while(state, rest, |state| !state.gives_way));
    }

    /// A failure ends the measurement, and nothing else.
    fn told<T>(&self, result: Result<T, VmError>) -> Option<T> {
        result.inspect_err(|e| tracing::warn!("the dirty rate can't be measured: {}", with_causes(&**e))).ok()
    }
}

impl Drop for Under {
    fn drop(&mut self) {
        let last = &mut self.of.state().last;
        match self.came {
            Some((rate, time)) => {
                (last.status, last.time) = (DirtyRateStatus::Measured(rate), time);
                last.vcpus = std::mem::take(&mut self.vcpus);
            }
            None => last.status = DirtyRateStatus::Unstarted,
        }
        self.of.changed.notify_all();
    }
}

/// Pages that stand for all others.
struct Samples(Vec<Area>);

/// Those of a region: each with a digest of what it held.
struct Area {
    region: Region,
    pages: Vec<(u64, u64)>,
}

impl Samples {
    /// Looks at `of_gib` pages of each GiB.
    fn take(vm: &(impl SourceVm + ?Sized), of_gib: u64) -> Result<Self, VmError> {
        let area = |region: Region| {
            let chosen = chosen(region.pages, of_gib)?;
            let pages = chosen.into_iter().map(|page| Ok((page, digest(vm, region.id, page)?)));
            Ok(Area { region, pages: pages.collect::<Result<_, VmError>>()? })
        };
        Ok(Self(vm.regions().into_iter().map(area).collect::<Result<_, VmError>>()?))
    }

    /// Bytes of all pages that hold something else now, if these stand for them.
    fn dirty(&self, vm: &(impl SourceVm + ?Sized)) -> Result<f64, VmError> {
        let mut bytes = 0.0;
        for Area { region, pages } in self.0.iter().filter(|area| !area.pages.is_empty()) {
            let mut others = 0u64;
            for &(page, before) in pages {
                others += u64::from(digest(vm, region.id, page)? != before);
            }
            bytes += (region.pages * PAGE) as f64 * others as f64 / pages.len() as f64;
        }
        Ok(bytes)
    }
}

/// Pages of a region of `pages`: one somewhere in each of as many equal parts, so that none of the guest's habits of placing things meets all of them.
fn chosen(pages: u64, of_gib: u64) -> Result<Vec<u64>, VmError> {
    let count = (u128::from(pages) * u128::from(of_gib)).div_ceil(OF_GIB.into());
    let count = (count as u64).max(FEWEST).min(pages);
    let part = |number: u64| (u128::from(pages) * u128::from(number) / u128::from(count)) as u64;
    let within = |Range { start, end }: Range<u64>| {
        let mut random = [0; 8];
        getrandom::fill(&mut random)?;
        Ok(start + u64::from_ne_bytes(random) % (end - start))
    };
    (0..count).map(|number| within(part(number)..part(number + 1))).collect()
}

/// What tells a page from another one, and from itself with other bytes.
fn digest(vm: &(impl SourceVm + ?Sized), region: u32, page: u64) -> Result<u64, VmError> {
    let mut bytes = [0; PAGE as usize];
    vm.read(Run { region, first: page, pages: 1 }, &mut bytes)?;
    let mut hasher = DefaultHasher::new();
    hasher.write(&bytes);
    Ok(hasher.finish())
}

/// Pages of runs, each once: those of the host and those of this side may be the same.
fn pages(mut runs: Vec<Run>) -> u64 {
    runs.sort_unstable_by_key(|run| run.first);
    let mut behind = 0;
    runs.iter().fold(0, |count, run| {
        let end = run.first.saturating_add(run.pages);
        let new = end.saturating_sub(run.first.max(behind));
        behind = behind.max(end);
        count + new
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn samples_are_all_over_a_region(count in 0..1u64 << 14, of_gib in 128..=4096u64) {
            let chosen = chosen(count, of_gib).unwrap();
            prop_assert!(chosen.is_sorted_by(|a, b| a < b) && chosen.last().is_none_or(|&last| last < count));
            let wanted = (count * of_gib).div_ceil(OF_GIB).max(FEWEST.min(count));
            prop_assert_eq!(chosen.len() as u64, wanted);
            let widest = 2 * count.div_ceil(wanted.max(1));
            prop_assert!(chosen.windows(2).all(|pair| pair[1] - pair[0] <= widest));
        }

        #[test]
        fn each_page_counts_once(runs in prop::collection::vec((0..200u64, 1..60u64), 0..9)) {
            let all: BTreeSet<u64> = runs.iter().flat_map(|&(first, pages)| first..first + pages).collect();
            let runs = runs.into_iter().map(|(first, pages)| Run { region: 0, first, pages }).collect();
            prop_assert_eq!(pages(runs), all.len() as u64);
        }
    }
}
