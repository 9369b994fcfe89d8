//! The device's thread: fetches commands, carries them out, moves their data, and tells the guest.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::Shared;
use super::ata::{self, Ending, Plan};
use super::cdrom::{Medium, Reply, SECTOR, Sense};
use super::command::{Fetched, Scatter};
use super::dma::{Pass, Refused};
use super::fis::{AT_PIO_SETUP, AT_REGISTER, FromHost, TaskFile};
use super::hba::Hba;
use super::registers::{interrupt, status};
use crate::block::BlockError;

const SECTOR_LEN: usize = SECTOR as usize;
/// Sectors that are read at once.
const SECTORS_AT_ONCE: u32 = 64;
/// A medium that can't be read is logged no more often.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Works until the device is gone.
pub(super) fn run(shared: &Shared) {
    let mut logged = None;
    while let Some(job) = next(shared) {
        // Nobody waits for a job that was overtaken by a reset; every other end is in the registers.
        let _ = perform(shared, &job, &mut logged);
        shared.hba().busy = false;
        shared.wake.wake();
    }
}

/// What the thread does next.
struct Job<'a> {
    port: usize,
    pass: Pass<'a>,
    /// Where received FISes go, if anywhere.
    received: Option<u64>,
    work: Work,
}

enum Work {
    /// The device's first FIS after its reset.
    Signature(TaskFile),
    Command {
        list: u64,
        slot: u32,
    },
}

/// Waits for something to do; none: the device is gone.
fn next(shared: &Shared) -> Option<Job<'_>> {
    let mut hba = shared.hba();
    loop {
        if hba.ended {
            return None;
        }
        if let Some(job) = pick(shared, &mut hba) {
            return Some(job);
        }
        hba = shared.work.wait(hba).unwrap_or_else(PoisonError::into_inner);
    }
}

fn pick<'a>(shared: &'a Shared, hba: &mut Hba) -> Option<Job<'a>> {
    if !hba.bus_master || hba.halted {
        return None;
    }
    hba.turns().find_map(|index| {
        let port = &mut hba.ports[index];
        let received = port.fis_area();
        let work = if port.state.owes_signature && received.is_some() {
            port.state.owes_signature = false;
            Work::Signature(TaskFile::signature())
        } else {
            let slot = port.next_slot()?;
            port.state.slot = slot;
            port.state.task_file |= u32::from(status::BUSY);
            Work::Command { list: port.state.list, slot }
        };
        hba.serve(index);
        hba.busy = true;
        Some(Job { port: index, pass: shared.dma.pass(index), received, work })
    })
}

fn perform(shared: &Shared, job: &Job<'_>, logged: &mut Option<Instant>) -> Result<(), Refused> {
    match job.work {
        Work::Signature(task_file) => job.receive(AT_REGISTER, &task_file.register(false)),
        Work::Command { list, slot } => {
            let done = command(shared, job, list, slot, logged);
            match done {
                // A list, a table, a region or a place for FISes that is no memory: fatal for the port (AHCI 1.3.1 §6.1.2).
                Err(Refused::Bus) => finish(shared, job, |port| port.fatal(interrupt::HOST_BUS)),
                other => other,
            }
        }
    }
}

fn command(shared: &Shared, job: &Job<'_>, list: u64, slot: u32, logged: &mut Option<Instant>) -> Result<(), Refused> {
    let fetched = Fetched::fetch(&job.pass, list, slot)?;
    let Some(frame) = FromHost::parse(&fetched.fis) else {
        return finish(shared, job, |port| port.fatal(interrupt::INTERFACE));
    };
    let Some(mut plan) = plan(shared, job, frame, &fetched.packet)? else { return Ok(()) };
    let mut scatter = fetched.scatter(job.pass);
    let mut happened = 0;
    match transfer(&plan.reply, &mut scatter)? {
        Moved::All => {}
        Moved::NoRoom => happened |= interrupt::OVERFLOW,
        Moved::Unreadable(error) => {
            log(&error, job.port, logged);
            plan.pio = false;
            plan.after = Plan::check_condition(Sense::UNREADABLE.key());
            finish(shared, job, |port| {
                if let Some(drive) = &mut port.drive {
                    drive.fail(Sense::UNREADABLE);
                }
            })?;
        }
    }
    if scatter.marked {
        happened |= interrupt::PRD;
    }
    fetched.report(&job.pass, scatter.moved)?;
    // Firmware that sees a FIS in its memory looks at the error bit, at once.
    finish(shared, job, |port| port.state.task_file = plan.after.tfd() | u32::from(status::BUSY))?;
    if plan.pio {
        let bytes = u16::try_from(scatter.moved).unwrap_or(u16::MAX - 1);
        let before = plan.after.status | status::DATA;
        job.receive(AT_PIO_SETUP, &plan.after.pio_setup(before, bytes))?;
        happened |= interrupt::PIO_SETUP;
    }
    if plan.ending != Ending::Silent {
        job.receive(AT_REGISTER, &plan.after.register(plan.ending == Ending::Interrupt))?;
    }
    if plan.ending == Ending::Interrupt {
        happened |= interrupt::REGISTER;
    }
    finish(shared, job, |port| port.done(slot, &plan.after, happened))
}

/// Has the drive carry out the frame; none if there is no drive.
fn plan(shared: &Shared, job: &Job<'_>, frame: FromHost, packet: &[u8; 12]) -> Result<Option<Plan>, Refused> {
    let mut hba = shared.hba();
    // A command from before a reset must not move the tray after it.
    if !job.pass.is_valid() {
        return Err(Refused::Stale);
    }
    let Some(drive) = &mut hba.ports[job.port].drive else { return Ok(None) };
    let plan = ata::execute(drive, frame, packet);
    let news = drive.take_news();
    drop(hba);
    if let Some((listener, open)) = news {
        listener.tray_moved(open);
    }
    Ok(Some(plan))
}

/// How far a transfer went.
enum Moved {
    All,
    /// The guest gave too little room: the rest is lost.
    NoRoom,
    Unreadable(BlockError),
}

fn transfer(reply: &Reply, scatter: &mut Scatter<'_>) -> Result<Moved, Refused> {
    let room = match reply {
        Reply::Done => true,
        Reply::Bytes(bytes) => scatter.put(bytes)?,
        Reply::Sectors { medium, first, count } => {
            let end = first.saturating_add(*count);
            let mut buffer = vec![0; SECTORS_AT_ONCE.min(*count) as usize * SECTOR_LEN];
            let mut next = *first;
            loop {
                let now = SECTORS_AT_ONCE.min(end - next);
                let part = &mut buffer[..now as usize * SECTOR_LEN];
                if let Err(error) = read(medium, next, part) {
                    return Ok(Moved::Unreadable(error));
                }
                let room = scatter.put(part)?;
                next += now;
                if !room || next == end {
                    break room;
                }
            }
        }
    };
    Ok(if room { Moved::All } else { Moved::NoRoom })
}

/// Reads sectors, of which the last may not be whole.
fn read(medium: &Medium, sector: u32, buffer: &mut [u8]) -> Result<(), BlockError> {
    let offset = u64::from(sector) * SECTOR;
    let there = medium.size().saturating_sub(offset).min(buffer.len() as u64) as usize;
    let (there, missing) = buffer.split_at_mut(there);
    missing.fill(0);
    medium.read_at(there, offset)
}

fn log(error: &BlockError, port: usize, logged: &mut Option<Instant>) {
    if logged.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
        *logged = Some(Instant::now());
        let causes = crate::cli::with_causes(error);
        tracing::warn!("the guest gets a medium error from its CD-ROM drive (SATA port {port}): {causes}");
    }
}

/// Changes the port's registers, unless the port was stopped or reset since the job began.
fn finish(shared: &Shared, job: &Job<'_>, change: impl FnOnce(&mut super::port::Port)) -> Result<(), Refused> {
    let mut hba = shared.hba();
    if !job.pass.is_valid() {
        return Err(Refused::Stale);
    }
    change(&mut hba.ports[job.port]);
    Ok(())
}

impl Job<'_> {
    /// Puts a FIS where the guest wants it.
    fn receive(&self, at: u64, fis: &[u8]) -> Result<(), Refused> {
        match self.received {
            Some(area) => self.pass.write(area + at, fis),
            None => Ok(()),
        }
    }
}
