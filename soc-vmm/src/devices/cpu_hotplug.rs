//! ACPI's registers for CPU hot-plug, which our own AML drives, and which OVMF reads to count the processors that there can be; made
//! like those of QEMU (docs/specs/acpi_cpu_hotplug.rst).
//!
//! | port | bytes | read | written |
//! | --- | --- | --- | --- |
//! | 0xcd8 | 4 | upper half of the APIC ID after command 3: zero | selects a processor |
//! | 0xcdc | 1 | bit 0: it is there · 1: it was put in · 2: it should be let go | ones clear bits 1 and 2; bit 3 ejects |
//! | 0xcdd | 1 | zero | the command |
//! | 0xce0 | 4 | after command 0 the selector, after command 3 the APIC ID | after command 1 the source of a report, after command 2 its status |
//!
//! Command 0 goes on to the next processor, the selected one included, to which something happened. Where the selector is no
//! processor's everything reads as zero, and nothing but the selector takes a write.
//!
//! What becomes of a processor:
//!
//! ```text
//! absent ── insert ──▶ present ── ask_out ──▶ present, asked out ── the guest ejects it, or is reset ──▶ ejected ── gone ──▶ absent
//!                         └──────────────────── the guest ejects it of its own accord ──────────────────────▲
//! ```
//!
//! One that is ejected is not there for the guest any more, but may still run until who hears of it ([`CpuSink`]) has parked it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::{AcpiHandle, Persist, Ranges, RestoreError, check, claim};
use crate::bus::{Access, Answer, Deferred, Device};

/// First port.
pub const CPU_HOTPLUG_PORT: u16 = 0xcd8;
/// Ports from there on.
pub const CPU_HOTPLUG_LEN: u8 = 12;
/// The general-purpose event that tells of a change.
pub const CPU_HOTPLUG_GPE: u8 = 2;

// Offsets.
const SELECT: u64 = 0;
const FLAGS: u64 = 4;
const COMMAND: u64 = 5;
const DATA: u64 = 8;

/// Bits of [`FLAGS`].
mod flag {
    pub(super) const PRESENT: u8 = 1 << 0;
    pub(super) const INSERTING: u8 = 1 << 1;
    pub(super) const REMOVING: u8 = 1 << 2;
    pub(super) const EJECT: u8 = 1 << 3;
}

/// Commands.
mod command {
    pub(super) const NEXT: u8 = 0;
    pub(super) const OST_SOURCE: u8 = 1;
    pub(super) const OST_STATUS: u8 = 2;
    pub(super) const ARCH_ID: u8 = 3;
}

/// `_OST` (ACPI 6.5 §6.3.5): sources and status codes that mean something here.
mod ost {
    pub(super) const EJECT_REQUEST: u32 = 3;
    pub(super) const OWN_EJECTION: u32 = 0x103;
    pub(super) const SUCCESS: u32 = 0;
    pub(super) const IN_PROGRESS: u32 = 0x84;
}

/// Reports that a guest may make of a processor before anything is done to it again: Linux makes two. More tell nobody anything.
const REPORTS: u8 = 16;

/// What the guest has to say of a processor (`_OST`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuReport {
    /// The processor.
    pub cpu: usize,
    /// To what: a notification's number, or 0x103 for an ejection of the guest's own.
    pub source: u32,
    /// How it went; 0: well.
    pub status: u32,
}

impl CpuReport {
    /// Whether it says that the processor is not let go.
    pub fn is_refusal(&self) -> bool {
        let Self { source, status, .. } = *self;
        matches!(source, ost::EJECT_REQUEST | ost::OWN_EJECTION) && !matches!(status, ost::SUCCESS | ost::IN_PROGRESS)
    }
}

/// Hears what the guest does. Called on the thread that serves IOREQs.
pub trait CpuSink: Send + Sync {
    /// Processors were ejected: [`CpuHotplugHandle::ejected`] has them.
    fn ejected(&self);

    /// The guest reports.
    fn reported(&self, report: CpuReport);
}

/// The registers.
pub struct CpuHotplug {
    cpus: Arc<Mutex<Vec<Cpu>>>,
    apic_ids: Vec<u32>,
    selector: u32,
    command: u8,
    sink: Arc<dyn CpuSink>,
}

/// Saved state of a [`CpuHotplug`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuHotplugState {
    /// The selector, whether or not there is such a processor.
    pub selector: u32,
    /// The last command.
    pub command: u8,
    /// Each processor.
    pub cpus: Vec<Cpu>,
}

/// A processor as the registers have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Whether it is there.
    pub standing: Standing,
    /// The guest is to be told that it was put in.
    pub inserting: bool,
    /// The guest is to be told that it should be let go.
    pub removing: bool,
    /// It was asked for, and the guest has not refused: a reset takes it.
    pub asked_out: bool,
    /// The source of the report that is being made.
    pub source: u32,
    /// Reports that are left to the guest.
    pub reports: u8,
}

/// Whether a processor is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// It isn't.
    #[default]
    Absent,
    /// It is.
    Present,
    /// It isn't for the guest, but its vCPU is still to be parked.
    Ejected,
}

impl Cpu {
    fn present() -> Self {
        Self { standing: Standing::Present, reports: REPORTS, ..Self::default() }
    }

    fn is_present(&self) -> bool {
        self.standing == Standing::Present
    }

    fn is_absent(&self) -> bool {
        self.standing == Standing::Absent
    }

    fn eject(&mut self) {
        *self = Self { standing: Standing::Ejected, source: self.source, reports: self.reports, ..Self::default() };
    }

    fn flags(&self) -> u8 {
        let bit = |on, bit| if on { bit } else { 0 };
        bit(self.is_present(), flag::PRESENT)
            | bit(self.inserting, flag::INSERTING)
            | bit(self.removing, flag::REMOVING)
    }
}

/// The outside of a [`CpuHotplug`], for any thread.
#[derive(Clone, Debug)]
pub struct CpuHotplugHandle {
    cpus: Arc<Mutex<Vec<Cpu>>>,
    acpi: AcpiHandle,
}

impl CpuHotplugHandle {
    /// Puts an absent processor in, and tells the guest; whether it was absent.
    pub fn insert(&self, cpu: usize) -> bool {
        let is_there = |cpu: &mut Cpu| {
            let is_absent = cpu.is_absent();
            if is_absent {
                *cpu = Cpu { inserting: true, ..Cpu::present() };
            }
            is_absent
        };
        self.tell(cpu, is_there)
    }

    /// Asks the guest to let go of a processor other than the first; whether it is there.
    pub fn ask_out(&self, cpu: usize) -> bool {
        let is_there = |cpu: &mut Cpu| {
            if cpu.is_present() {
                (cpu.removing, cpu.asked_out, cpu.reports) = (true, true, REPORTS);
            }
            cpu.is_present()
        };
        cpu != 0 && self.tell(cpu, is_there)
    }

    /// The processors that are there.
    pub fn present(&self) -> Vec<usize> {
        self.standing(Standing::Present)
    }

    /// The processors that were ejected, and are to be parked.
    pub fn ejected(&self) -> Vec<usize> {
        self.standing(Standing::Ejected)
    }

    /// An ejected processor is parked.
    pub fn gone(&self, cpu: usize) {
        if let Some(cpu) = lock(&self.cpus).get_mut(cpu).filter(|cpu| cpu.standing == Standing::Ejected) {
            // What the guest has still to say of it is heard.
            cpu.standing = Standing::Absent;
        }
    }

    /// The guest starts anew: it will see what is there, and what was asked for is ejected.
    pub fn start_anew(&self) {
        for cpu in lock(&self.cpus).iter_mut() {
            (cpu.inserting, cpu.removing) = (false, false);
            if cpu.asked_out {
                cpu.eject();
            }
        }
    }

    fn standing(&self, standing: Standing) -> Vec<usize> {
        let cpus = lock(&self.cpus);
        cpus.iter().enumerate().filter(|(_, cpu)| cpu.standing == standing).map(|(n, _)| n).collect()
    }

    /// Makes a change, and has the guest look if there was one.
    fn tell(&self, cpu: usize, change: impl FnOnce(&mut Cpu) -> bool) -> bool {
        let changed = lock(&self.cpus).get_mut(cpu).is_some_and(change);
        if changed {
            self.acpi.raise_gpe(CPU_HOTPLUG_GPE);
        }
        changed
    }
}

impl CpuHotplug {
    /// What it claims.
    pub const RANGES: Ranges = Ranges::ports(&[claim(CPU_HOTPLUG_PORT as u64, CPU_HOTPLUG_LEN as u64)]);

    /// The registers of processors with these APIC IDs, of which the first `present` are there. `acpi` raises their event.
    pub fn new(
        acpi: AcpiHandle,
        apic_ids: Vec<u32>,
        present: usize,
        sink: Arc<dyn CpuSink>,
    ) -> (Self, CpuHotplugHandle) {
        let cpu = |n| if n < present { Cpu::present() } else { Cpu::default() };
        let cpus = Arc::new(Mutex::new((0..apic_ids.len()).map(cpu).collect()));
        let handle = CpuHotplugHandle { cpus: Arc::clone(&cpus), acpi };
        (Self { cpus, apic_ids, selector: 0, command: command::NEXT, sink }, handle)
    }

    fn read_selected(&self, offset: u64, len: u8, cpu: Cpu) -> u32 {
        match (offset, len) {
            (FLAGS, 1) => cpu.flags().into(),
            (DATA, 4) => match self.command {
                command::NEXT => self.selector,
                command::ARCH_ID => self.apic_ids[self.selector as usize],
                _ => 0,
            },
            _ => 0,
        }
    }

    fn write_flags(&self, flags: u8) {
        let selected = self.selector as usize;
        let mut cpus = lock(&self.cpus);
        let cpu = &mut cpus[selected];
        cpu.inserting &= flags & flag::INSERTING == 0;
        cpu.removing &= flags & flag::REMOVING == 0;
        if flags & flag::EJECT != 0 && selected != 0 && cpu.is_present() {
            cpu.eject();
            drop(cpus);
            self.sink.ejected();
        }
    }

    fn write_command(&mut self, command: u8) {
        if command > command::ARCH_ID {
            return;
        }
        self.command = command;
        if command == command::NEXT {
            let cpus = lock(&self.cpus);
            let selected = self.selector as usize;
            let mut from_here_on = (selected..cpus.len()).chain(0..selected);
            let next = from_here_on.find(|n| cpus[*n].inserting || cpus[*n].removing);
            self.selector = next.unwrap_or(selected) as u32;
        }
    }

    fn write_data(&self, data: u32) {
        let selected = self.selector as usize;
        let mut cpus = lock(&self.cpus);
        let cpu = &mut cpus[selected];
        match self.command {
            command::OST_SOURCE => cpu.source = data,
            command::OST_STATUS if cpu.reports != 0 => {
                cpu.reports -= 1;
                let report = CpuReport { cpu: selected, source: cpu.source, status: data };
                cpu.asked_out &= !report.is_refusal();
                drop(cpus);
                self.sink.reported(report);
            }
            _ => {}
        }
    }
}

impl Device for CpuHotplug {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        let selected = lock(&self.cpus).get(self.selector as usize).copied();
        Answer::Done(selected.map_or(0, |cpu| self.read_selected(offset, access.len, cpu)).into())
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, _: Deferred<'_>) -> Answer {
        let is_selected = (self.selector as usize) < self.apic_ids.len();
        match (offset, access.len) {
            (SELECT, 4) => self.selector = data as u32,
            (FLAGS, 1) if is_selected => self.write_flags(data as u8),
            (COMMAND, 1) if is_selected => self.write_command(data as u8),
            (DATA, 4) if is_selected => self.write_data(data as u32),
            _ => {}
        }
        Answer::Done(0)
    }

    /// What becomes of processors is [`CpuHotplugHandle::start_anew`]'s: a guest that wakes up from S3 finds them as they were.
    fn reset(&mut self) {
        (self.selector, self.command) = (0, command::NEXT);
    }
}

impl Persist for CpuHotplug {
    const NAME: &'static str = "cpu-hotplug";
    type State = CpuHotplugState;

    fn save(&self) -> CpuHotplugState {
        CpuHotplugState { selector: self.selector, command: self.command, cpus: lock(&self.cpus).clone() }
    }

    fn restore(&mut self, state: &CpuHotplugState) -> Result<(), RestoreError> {
        let ok = |condition, what| check(condition, "cpu hot-plug", what);
        ok(state.cpus.len() == self.apic_ids.len(), "it has another number of processors")?;
        ok(state.command <= command::ARCH_ID, "there is no such command")?;
        ok(state.cpus.first().is_some_and(|cpu| cpu.is_present() && !cpu.asked_out), "the first processor leaves")?;
        let is_told = |cpu: &Cpu| cpu.inserting || cpu.removing || cpu.asked_out;
        ok(state.cpus.iter().all(|cpu| cpu.is_present() || !is_told(cpu)), "something happens to an absent processor")?;
        ok(state.cpus.iter().all(|cpu| cpu.reports <= REPORTS), "a guest may report too often")?;
        let mut cpus = lock(&self.cpus);
        let pairs = || state.cpus.iter().zip(cpus.iter()).enumerate();
        let lacks = |(_, (there, here)): &(usize, (&Cpu, &Cpu))| there.is_present() && !here.is_present();
        if let Some((cpu, _)) = pairs().find(lacks) {
            return Err(differs(cpu, "is there at the source, and not here: put it into this VM too"));
        }
        let exceeds = |(_, (there, here)): &(usize, (&Cpu, &Cpu))| here.is_present() && there.is_absent();
        if let Some((cpu, _)) = pairs().find(exceeds) {
            return Err(differs(cpu, "is here, and not at the source: start this VM without it"));
        }
        for (here, there) in cpus.iter_mut().zip(&state.cpus) {
            // One that the guest has just ejected, and that this VM was not given any more, is parked already.
            let gone = there.standing == Standing::Ejected && here.is_absent();
            *here = if gone { Cpu { standing: Standing::Absent, ..*there } } else { *there };
        }
        drop(cpus);
        (self.selector, self.command) = (state.selector, state.command);
        self.sink.ejected();
        Ok(())
    }
}

impl std::fmt::Debug for CpuHotplug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { cpus, selector, command, .. } = self;
        f.debug_struct("CpuHotplug")
            .field("cpus", cpus)
            .field("selector", selector)
            .field("command", command)
            .finish_non_exhaustive()
    }
}

/// A processor is not as at the source.
fn differs(cpu: usize, how: &str) -> RestoreError {
    RestoreError::new("cpu hot-plug", format!("processor {cpu} {how}"))
}

fn lock(cpus: &Mutex<Vec<Cpu>>) -> MutexGuard<'_, Vec<Cpu>> {
    cpus.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
