//! Guest memory as a migration reaches it: by allocations, RAM and ROM, whatever the guest is shown of them.

use std::sync::{Arc, Weak};
use std::time::Duration;

use api_channel::call::{Call, DirtyFetch, DirtyRun, Extent, LateRun, PAGE};
use api_channel::codec::Reader;
use migration::Region;
use migration::stream::Run;
use pcie_function::{BusError, SocFunction};

use super::log::{HostLog, User};
use super::writes::Writes;
use crate::link::{CallError, Channel};
use crate::vm::late::Late;
use crate::vm::ram::GuestRam;

/// Most runs of a reply.
const RUNS: usize = 1 << 20;
/// Runs of a call: what a message has room for.
const RUNS_A_CALL: usize = 1024;

/// A VM's memory, and what is written in it.
#[derive(Clone, Debug)]
pub(in crate::vm) struct Memory<F: SocFunction> {
    channel: Channel<F>,
    log: HostLog<F>,
    ram: Arc<GuestRam<F>>,
    /// Each allocation as DMA reaches it.
    extents: Arc<[(u32, Vec<Extent>)]>,
    /// Those that are ROM: devices look at it while they are loaded.
    roms: Arc<[u32]>,
    /// Pages of 4096 bytes in one of the host's, of RAM.
    unit: u64,
    /// Those that come after the guest has started.
    late: Arc<Late>,
}

/// Why memory can't be moved.
#[derive(Debug, thiserror::Error)]
pub(in crate::vm) enum MoveError {
    #[error("the host did not do what it was asked for")]
    Call(#[from] CallError),
    #[error("guest memory can't be reached")]
    Bus(#[from] BusError),
    #[error("there is no memory for a log of what is written")]
    Log(#[from] pcie_function::FunctionError),
    #[error("{} can't say what {} in guest memory: take {} out first", .0.join(", "), if .0.len() == 1 { "it writes" } else { "they write" }, if .0.len() == 1 { "it" } else { "them" })]
    Silent(Vec<String>),
    #[error(
        "the source would send ROM after the guest has started, in which this side's devices look before: migrate without post-copy"
    )]
    LateRom,
    #[error("there is no page {first} of region {region} with {pages} pages behind it")]
    NoPages { region: u32, first: u64, pages: u64 },
}

impl<F: SocFunction> Memory<F> {
    /// Its allocations `extents`, of which `roms` are ROM; RAM is in pages of `page` bytes.
    pub(in crate::vm) fn new(
        channel: Channel<F>,
        ram: Arc<GuestRam<F>>,
        extents: &[(u32, Vec<Extent>)],
        roms: Vec<u32>,
        page: u64,
    ) -> Self {
        let late = Arc::new(Late::default());
        let hears: Weak<Late> = Arc::downgrade(&late);
        channel.on_wanted(hears);
        let log = HostLog::new(channel.clone());
        Self { channel, log, ram, extents: extents.into(), roms: roms.into(), unit: page / PAGE, late }
    }

    /// What each of so many vCPUs writes, of a host that keeps rings of so many entries, or none.
    pub(in crate::vm) fn writes(&self, vcpus: u32, ring: u32) -> Writes<F> {
        Writes::new(self.channel.clone(), self.log.clone(), vcpus, ring)
    }

    /// Whether it is ROM.
    pub(super) fn is_rom(&self, region: u32) -> bool {
        self.roms.contains(&region)
    }

    /// Its allocations.
    pub(super) fn regions(&self) -> Vec<Region> {
        let pages = |extents: &[Extent]| extents.iter().map(|extent| extent.len).sum::<u64>() / PAGE;
        self.extents.iter().map(|(ram, extents)| Region { id: *ram, pages: pages(extents) }).collect()
    }

    /// From now on notes what is written, by whomever. On return every earlier write has landed.
    ///
    /// # Errors
    /// There is no such log, or a device's back end writes without one.
    pub(super) async fn start_log(&self) -> Result<(), MoveError> {
        let started = self.try_start_log().await;
        if started.is_err() {
            // Whoever has no log doesn't end it.
            self.stop_log().await;
        }
        started
    }

    async fn try_start_log(&self) -> Result<(), MoveError> {
        self.ram.log_writes(&self.extents)?;
        self.log.begin(User::Reader).await?;
        // At first every page counts as written.
        for region in self.regions() {
            self.take_dirty(region.id).await?;
        }
        match self.ram.others_log().await {
            silent if silent.is_empty() => Ok(()),
            silent => Err(MoveError::Silent(silent)),
        }
    }

    /// Notes nothing any more.
    pub(super) async fn stop_log(&self) {
        self.ram.end_log();
        self.log.end(User::Reader).await;
    }

    /// The pages of an allocation that were written since the last call, and forgets them; of others than the first, since that was asked.
    ///
    /// # Errors
    /// There is no log.
    pub(super) async fn take_dirty(&self, region: u32) -> Result<Vec<Run>, MoveError> {
        let pages = self.pages(region)?;
        let mut runs = self.ram.take_written(region);
        let mut first = 0;
        // Rings are read once in a look at all allocations, which begins with the first.
        let is_first = self.extents.first().is_some_and(|(ram, _)| *ram == region);
        while first < pages {
            let as_read = if is_first && first == 0 { 0 } else { DirtyFetch::AS_READ };
            let fetch = DirtyFetch { ram: region, flags: DirtyFetch::CLEAR | as_read, first, pages: pages - first };
            let reply = self.channel.call(&Call::DirtyFetch(fetch)).await?;
            runs.extend(Reader::new(&reply.bulk).list::<DirtyRun>(RUNS).map_err(CallError::from)?);
            let next: u64 = Reader::new(&reply.payload).take().map_err(CallError::from)?;
            if next <= first {
                return Err(CallError::Malformed.into());
            }
            first = next;
        }
        // A host may say anything.
        let sound = |run: &DirtyRun| run.first.checked_add(run.pages).is_some_and(|end| end <= pages);
        if !runs.iter().all(sound) {
            return Err(CallError::Malformed.into());
        }
        Ok(runs.into_iter().map(|DirtyRun { first, pages }| Run { region, first, pages }).collect())
    }

    /// Fills `to` with the bytes of a run.
    ///
    /// # Errors
    /// There is no such run, or the function is lost.
    pub(super) fn read(&self, run: Run, to: &mut [u8]) -> Result<(), MoveError> {
        let extents = self.check(run)?;
        Ok(self.ram.fetch(extents, run.first * PAGE, &mut to[..(run.pages * PAGE) as usize])?)
    }

    /// Gives a run these bytes.
    ///
    /// # Errors
    /// There is no such run, or the function is lost.
    pub(super) fn write(&self, run: Run, bytes: &[u8]) -> Result<(), MoveError> {
        let extents = self.check(run)?;
        Ok(self.ram.fill(run.region, extents, run.first * PAGE, &bytes[..(run.pages * PAGE) as usize])?)
    }

    /// These pages come after the guest has started: whoever touches one waits from here on, but vCPUs, which are paused.
    ///
    /// # Errors
    /// There are no such pages, or they can't be waited for.
    pub(super) fn lacks(&self, runs: &[Run]) -> Result<(), MoveError> {
        for run in runs {
            self.check(*run)?;
            if self.is_rom(run.region) {
                return Err(MoveError::LateRom);
            }
            self.late.lacks(of_channel(*run), self.pages(run.region)?, self.unit);
        }
        self.ram.set_late(Some(self.late.clone()));
        Ok(())
    }

    /// From here on vCPUs wait too, if there is anything to wait for.
    ///
    /// # Errors
    /// The host can't have them wait.
    pub(super) async fn watch(&self) -> Result<(), MoveError> {
        let runs = self.late.of_host();
        if runs.is_empty() {
            return Ok(());
        }
        for part in runs.chunks(RUNS_A_CALL) {
            self.channel.call(&Call::Lacks(part.to_vec())).await?;
        }
        Ok(self.channel.call(&Call::PostCopy(true)).await.map(drop)?)
    }

    /// Pages that somebody waits for since this was last called; none for `at_most`: none.
    pub(super) fn wanted(&self, at_most: Duration) -> Vec<Run> {
        let run = |LateRun { ram, first, pages, .. }| Run { region: ram, first, pages };
        self.late.wanted(at_most).into_iter().map(run).collect()
    }

    /// These pages are there.
    ///
    /// # Errors
    /// The host can't show them to the guest.
    pub(super) async fn came(&self, run: Run) -> Result<(), MoveError> {
        self.check(run)?;
        let shown = self.late.came(of_channel(run));
        if !shown.is_empty() {
            self.channel.call(&Call::Placed(shown)).await?;
        }
        if self.late.told(run.pages) == 0 {
            self.channel.call(&Call::PostCopy(false)).await?;
            self.ram.set_late(None);
        }
        Ok(())
    }

    /// No page comes any more.
    pub(super) fn give_up(&self) {
        self.late.give_up();
    }

    fn check(&self, run: Run) -> Result<&[Extent], MoveError> {
        let Run { region, first, pages } = run;
        let is_there = first.checked_add(pages).is_some_and(|end| self.pages(region).is_ok_and(|pages| end <= pages));
        let (_, extents) = self
            .extents
            .iter()
            .find(|(ram, _)| *ram == region && is_there)
            .ok_or(MoveError::NoPages { region, first, pages })?;
        Ok(extents)
    }

    fn pages(&self, region: u32) -> Result<u64, MoveError> {
        let known = self.regions().into_iter().find(|known| known.id == region);
        known.map(|region| region.pages).ok_or(MoveError::NoPages { region, first: 0, pages: 0 })
    }
}

fn of_channel(Run { region, first, pages }: Run) -> LateRun {
    LateRun { ram: region, reserved: 0, first, pages }
}
