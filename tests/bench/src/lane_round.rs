//! What a lane costs by itself: a request to another core and its completion back, both ends polling, no guest and no VMM.
//!
//! An exit through soc-vmm can't be closer to the bare loop than this; what it is above it is the two programs' own work. The
//! floor is what the machine takes to hand one word to the other core and one back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ioreq_ring::wire::{LINE, POSTED_RING, STRING_PAGE};
use ioreq_ring::{
    BusMemory, Completion, Direction, HostLane, HostWindows, Kind, LaneError, Request, SocLane, SocWindows,
};
use pcie_function::local::sealed_memfd;
use pcie_function::{Mapping, Reach, Window, Windowed};

use crate::contender::Error;
use crate::figure::{Figure, Summary};

/// The figure's name.
pub const NAME: &str = "lane.round";
/// Rounds that are timed as one.
const BATCH: u32 = 20_000;
/// Batches a run; the first doesn't count.
const BATCHES: u32 = 11;

/// Measures both, in turns.
pub fn measure(runs: u32) -> Result<Figure, Error> {
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        ours.extend(lane()?);
        floor.extend(word()?);
    }
    let (ours, floor) = (Summary::of(&ours), Summary::of(&floor));
    Ok(Figure { ours, floor, ..Figure::empty(NAME, "ns", runs) })
}

/// Nanoseconds a round of each batch but the first.
fn batches(mut round: impl FnMut() -> Result<(), LaneError>) -> Result<Vec<f64>, LaneError> {
    let mut values = Vec::new();
    for _ in 0..BATCHES {
        let began = Instant::now();
        for _ in 0..BATCH {
            round()?;
        }
        values.push(began.elapsed().as_nanos() as f64 / f64::from(BATCH));
    }
    values.remove(0);
    Ok(values)
}

/// A lane between two threads, as a vCPU's and soc-vmm's use it.
fn lane() -> Result<Vec<f64>, Error> {
    // Every word of one writer in memory of its own: request, control, posted; completion, credit, idle, strings; private.
    let [card, inbox, private] = [POSTED_RING + 2 * LINE, 3 * LINE + 2 * STRING_PAGE, 4096].map(memory);
    let (card, inbox, private) = (card?, inbox?, private?);
    let cut = |memory: &Window, at, len| memory.cut(at, len).expect("the memory was made for it");
    let request = cut(&card, 0, LINE);
    let control = cut(&card, LINE, LINE);
    let posted = cut(&card, 2 * LINE, POSTED_RING);
    let completion = cut(&inbox, 0, LINE);
    let credit = cut(&inbox, LINE, LINE);
    let soc_idle = cut(&inbox, 2 * LINE, LINE);
    let outs = cut(&inbox, 3 * LINE, STRING_PAGE);
    let ins = cut(&inbox, 3 * LINE + STRING_PAGE, STRING_PAGE);
    // It polls: nothing need be rung.
    soc_idle.store(0, 1);
    let mut soc = SocLane::new(SocWindows {
        request: request.clone(),
        control: control.clone(),
        posted: posted.clone(),
        completion: completion.clone(),
        credit: credit.clone(),
        outs: outs.clone(),
        ins: ins.clone(),
        private,
    });
    let mut host = HostLane::new(HostWindows { request, control, posted, completion, credit, soc_idle, outs, ins });
    let over = AtomicBool::new(false);
    let measured = std::thread::scope(|scope| {
        let server = scope.spawn(|| -> Result<(), LaneError> {
            while !over.load(Ordering::Relaxed) {
                if let Some(request) = soc.poll()? {
                    soc.complete(&Completion::ok(request.address))?;
                    // The host never does, and memory of this process can always be looked at; but a worker looks.
                    let _ = soc.host_sleeps();
                }
            }
            Ok(())
        });
        let read = Request::access(Kind::PIO, Direction::Read, 0x402, 0, 1, 0);
        let measured = batches(|| {
            host.submit(&read)?;
            while host.poll()?.is_none() {}
            Ok(())
        });
        over.store(true, Ordering::Relaxed);
        server.join().expect("the server doesn't panic").and(measured)
    });
    measured.map_err(|error| Error::Guest(format!("the lane: {error}")))
}

/// One word there, one back.
fn word() -> Result<Vec<f64>, Error> {
    let memory = memory(2 * LINE)?;
    let over = AtomicBool::new(false);
    let measured = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seen = 0;
            while !over.load(Ordering::Relaxed) {
                let word = memory.load(0);
                if word != seen {
                    seen = word;
                    memory.store(LINE, seen);
                }
            }
        });
        let mut sent = 0;
        let measured = batches(|| {
            sent += 1;
            memory.store(0, sent);
            while memory.load(LINE) != sent {}
            Ok(())
        });
        over.store(true, Ordering::Relaxed);
        measured
    });
    measured.map_err(|error| Error::Guest(format!("a word: {error}")))
}

fn memory(len: usize) -> Result<Window, Error> {
    use std::os::fd::AsFd;
    let len = len.next_multiple_of(4096);
    let file =
        sealed_memfd("outboard-lane", len as u64).map_err(|e| Error::Absent(format!("memory for a lane: {e}")))?;
    let mapping = Mapping::new(file.as_fd(), 0, len, Reach::Local);
    Ok(mapping.map_err(|e| Error::Absent(format!("memory for a lane: {e}")))?.window())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_takes_longer_than_nothing() {
        let figure = measure(1).unwrap();
        assert!(figure.ours.is_some_and(|ours| ours.min > 0.0) && figure.floor.is_some());
    }
}
