//! The log by KVM's rings, one a vCPU.
//!
//! A ring is read by its vCPU's thread when it is full, and by the API thread for a fetch: under one lock for all of a VM's, which nobody
//! needs on the exit path.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::KVM_CAP_DIRTY_LOG_RING;
use kvm_ioctls::{VcpuFd, VmFd};
use nix::errno::Errno;

use super::harvest::{Harvest, runs};
use super::limit::{Limit, Turn};
use super::reader::Reader;
use super::{Found, Window, pages};
use crate::error::Refusal;
use crate::kvm::{DirtyRing, enable_cap, reset_dirty_rings};
use crate::vm::slots::Slots;

/// A VM's rings.
#[derive(Debug)]
pub(crate) struct Rings {
    vm: Arc<VmFd>,
    entries: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    vcpus: Vec<Vcpu>,
    /// Dirty pages that were read and not told.
    harvest: Harvest,
    /// The allocation of each slot that is logged, and its pages there.
    slots: BTreeMap<u32, (u32, Range<u64>)>,
    /// A ring was overrun.
    lost: bool,
    /// How often the log began anew because of that.
    overruns: u64,
    /// How often all were read.
    gathered: u64,
}

#[derive(Debug)]
struct Vcpu {
    reader: Reader,
    limit: Limit,
    /// Pages that it wrote, of those that were read.
    dirtied: u64,
    /// The last of them.
    last: Option<(u32, u64)>,
    /// Its ring was full and nothing in it, when all had been read so often.
    empty: Option<u64>,
}

/// How often KVM is asked to take back what was read: a signal may cut it short.
const TRIES: u32 = 16;

impl Rings {
    /// Has a VM that has no vCPUs yet keep its log in rings of so many entries.
    pub(crate) fn new(vm: &Arc<VmFd>, entries: u32) -> Result<Self, Refusal> {
        let most = vm.check_extension_raw(KVM_CAP_DIRTY_LOG_RING.into()).max(0) as u64 / size_of_entry();
        if most == 0 {
            return Err(Refusal::unavailable("this KVM has no dirty rings (KVM_CAP_DIRTY_LOG_RING)"));
        }
        if !entries.is_power_of_two() || u64::from(entries) > most {
            return Err(Refusal::argument(format!(
                "dirty rings of {entries} entries: KVM has those of a power of two, {most} at most"
            )));
        }
        enable_cap(&**vm, KVM_CAP_DIRTY_LOG_RING, [u64::from(entries) * size_of_entry(), 0, 0, 0]).map_err(
            |errno| {
                let why = Refusal::os("make dirty rings", errno);
                if errno == Errno::EINVAL {
                    Refusal::argument(format!(
                        "dirty rings of {entries} entries: KVM wants larger ones, 1024 are enough"
                    ))
                } else {
                    why
                }
            },
        )?;
        Ok(Self { vm: vm.clone(), entries, state: Mutex::default() })
    }

    /// The next vCPU has come.
    pub(crate) fn add(&self, vcpu: &VcpuFd) -> Result<(), Refusal> {
        let ring = DirtyRing::map(vcpu, self.entries).map_err(Refusal::nix("map a vCPU's dirty ring"))?;
        let limit = Limit::none(self.entries, Instant::now());
        self.state().vcpus.push(Vcpu { reader: Reader::new(ring), limit, dirtied: 0, last: None, empty: None });
        Ok(())
    }

    /// A vCPU's ring is full: its thread makes room, or has to stand still first for as long as this says.
    pub(crate) fn full(&self, vcpu: u32) -> Result<Duration, Errno> {
        let mut state = self.state();
        let Some(this) = state.vcpus.get_mut(vcpu as usize) else { return Err(Errno::EINVAL) };
        let room = match this.limit.turn(Instant::now()) {
            Turn::Room(room) => room,
            Turn::Stand(time) => return Ok(time),
        };
        let count = state.read(vcpu as usize, room);
        state.goes_on(vcpu as usize, count);
        match reset_dirty_rings(&*self.vm) {
            // What was not taken back will be.
            Ok(()) | Err(Errno::EINTR) => Ok(Duration::ZERO),
            Err(errno) => Err(errno),
        }
    }

    /// Limits a vCPU to so many pages a second; 0: no longer.
    pub(crate) fn limit(&self, vcpu: u32, pages: u64) {
        if let Some(vcpu) = self.state().vcpus.get_mut(vcpu as usize) {
            vcpu.limit.set(pages, Instant::now());
        }
    }

    /// How many pages a vCPU wrote, each time that it was logged.
    pub(crate) fn dirtied(&self, vcpu: u32) -> u64 {
        self.state().vcpus.get(vcpu as usize).map_or(0, |vcpu| vcpu.dirtied + u64::from(vcpu.reader.waiting()))
    }

    /// How often the log began anew, every page written, because KVM had lost some.
    pub(crate) fn overruns(&self) -> u64 {
        self.state().overruns
    }

    /// Reads all that is there: once this returns the next write to each of these pages is logged again.
    pub(super) fn gather(&self) -> Result<(), Refusal> {
        self.state().gather(&self.vm)
    }

    pub(super) fn has_lost(&self) -> bool {
        self.state().lost
    }

    pub(super) fn shows(&self, slots: &Slots) {
        self.state().shows(slots);
    }

    pub(super) fn switched(&self, slots: &Slots) -> Result<(), Refusal> {
        let mut state = self.state();
        // What they hold is of the time before.
        state.gather(&self.vm)?;
        state.overruns += u64::from(std::mem::take(&mut state.lost));
        state.harvest.clear();
        state.shows(slots);
        let State { slots, harvest, .. } = &mut *state;
        for (ram, pages) in slots.values() {
            harvest.mark_all(*ram, pages);
        }
        Ok(())
    }

    pub(super) fn fetch(&self, window: &Window) -> Found {
        let mut state = self.state();
        let mut bits = window.bits();
        state.harvest.pages(window).for_each(|page| window.mark(&mut bits, page));
        let found = runs(&bits, window.first, window.end);
        if window.clear {
            state.harvest.forget(window, &found);
        }
        found
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// KVM called a vCPU's ring full, in which `count` entries were. Where nothing was, the API thread may just have read it; but not if
    /// that comes again, and nobody has read it in between.
    fn goes_on(&mut self, vcpu: usize, count: u32) {
        let Self { vcpus, gathered, .. } = self;
        let Vcpu { reader, empty, .. } = &mut vcpus[vcpu];
        let is_again = *empty == Some(*gathered);
        *empty = (count == 0).then_some(*gathered);
        if count == 0 && is_again {
            reader.leave_out();
        }
    }

    fn gather(&mut self, vm: &VmFd) -> Result<(), Refusal> {
        self.gathered += 1;
        self.read_all();
        self.take_back(vm)?;
        if self.vcpus.iter().any(|vcpu| vcpu.reader.is_behind()) {
            // KVM waits for entries that it filled twice.
            self.lost = true;
            self.read_all();
            self.take_back(vm)?;
        }
        Ok(())
    }

    /// KVM logs the next write to pages that were read.
    fn take_back(&self, vm: &VmFd) -> Result<(), Refusal> {
        for _ in 0..TRIES {
            match reset_dirty_rings(vm) {
                Ok(()) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(Refusal::os("reset the dirty rings", errno)),
            }
            if !self.vcpus.iter().any(|vcpu| vcpu.reader.is_behind()) {
                break;
            }
        }
        Ok(())
    }

    fn read_all(&mut self) {
        for vcpu in 0..self.vcpus.len() {
            self.read(vcpu, u32::MAX);
        }
    }

    fn read(&mut self, vcpu: usize, most: u32) -> u32 {
        let Self { vcpus, harvest, slots, lost, .. } = self;
        let Vcpu { reader, dirtied, last, .. } = &mut vcpus[vcpu];
        let reading = reader.read(most, |slot, page| {
            // A KVM that writes for the guest says so at each write.
            *dirtied += u64::from(last.replace((slot, page)) != Some((slot, page)));
            // Of a slot that isn't logged any more nobody wants to know.
            let place =
                slots.get(&slot).and_then(|(ram, pages)| Some((*ram, pages.start.checked_add(page)?, pages.end)));
            if let Some((ram, page, _)) = place.filter(|(_, page, end)| page < end) {
                harvest.mark(ram, page);
            }
        });
        *lost |= reading.overrun;
        reading.count
    }

    fn shows(&mut self, slots: &Slots) {
        self.slots.clear();
        for (number, slot) in slots.logged() {
            let pages = pages(slot);
            // A vCPU's thread takes no memory.
            self.harvest.reserve(slot.ram, pages.end);
            self.slots.insert(number, (slot.ram, pages));
        }
    }
}

fn size_of_entry() -> u64 {
    size_of::<kvm_bindings::kvm_dirty_gfn>() as u64
}
