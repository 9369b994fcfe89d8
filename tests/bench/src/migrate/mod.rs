//! Moving a guest of 1 GiB, 900 MiB of it random, between two processes of this machine over TCP.
//!
//! | figure | guest |
//! | --- | --- |
//! | `migrate.total`, `.cpu` | halts; the destination's memory is taken before |
//! | `migrate.total.cold` | halts; memory is taken as pages come |
//! | `migrate.downtime` | a vCPU that beats each millisecond, as a reader of its debug console sees it: the longest time without a beat |
//! | `migrate.dirty.N` | it writes N MB/s too, and may be slowed down; `.downtime`, `.throttle` (the most, %) and `.lost` (of its work, %) |

mod floor;
mod monitor;
mod mover;
mod processes;
mod pulse;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use payloads::wanderer::{Pace, Wanderer};

use crate::contender::{Error, Qemu, Side};
use crate::figure::Figure;
use crate::host::Clock;
use crate::turns;

use floor::Sides;
use mover::{Mover, Outcome, Program, Trip};

/// Every figure of this module, and what it counts.
pub const FIGURES: [(&str, &str); 16] = [
    ("migrate.total", "ms"),
    ("migrate.cpu", "ms"),
    ("migrate.total.cold", "ms"),
    ("migrate.downtime", "ms"),
    ("migrate.dirty.10", "ms"),
    ("migrate.dirty.10.downtime", "ms"),
    ("migrate.dirty.10.throttle", "%"),
    ("migrate.dirty.10.lost", "%"),
    ("migrate.dirty.100", "ms"),
    ("migrate.dirty.100.downtime", "ms"),
    ("migrate.dirty.100.throttle", "%"),
    ("migrate.dirty.100.lost", "%"),
    ("migrate.dirty.1000", "ms"),
    ("migrate.dirty.1000.downtime", "ms"),
    ("migrate.dirty.1000.throttle", "%"),
    ("migrate.dirty.1000.lost", "%"),
];

/// Guest memory.
const MEMORY_MIB: u64 = 1024;
/// Random pages of it.
const PAGES: u32 = 900 * 256;
/// Connections, where there are several.
const CHANNELS: u32 = 2;
/// What each is told to keep to.
const DOWNTIME_LIMIT_MS: u32 = 50;
/// From beat to beat.
const BEAT: Duration = Duration::from_millis(1);
/// How long one may try to move a guest.
const LIMIT: Duration = Duration::from_secs(30);

/// Time of a clock and of processors.
#[derive(Clone, Copy, Debug)]
struct Cost {
    ms: f64,
    cpu_ms: f64,
}

/// Measures those of [`FIGURES`] that are wanted.
///
/// # Errors
/// A payload does not assemble.
pub fn measure(
    soc_vmm: &Path,
    qemu: Option<&Path>,
    clock: Clock,
    runs: u32,
    wanted: &dyn Fn(&str) -> bool,
    progress: &dyn Fn(&str),
) -> Result<Vec<Figure>, Error> {
    let mut movers = movers(soc_vmm, qemu);
    let any = |names: &[(&str, &str)]| names.iter().any(|(name, _)| wanted(name));
    let quiet = Wanderer { pages: PAGES, pace: None }.payload()?;
    let trip = Trip { payload: &quiet, prepared: true, beats: false, throttle: false, limit: LIMIT };
    let mut figures = Vec::new();
    if any(&FIGURES[..2]) {
        let of = |outcome: Outcome| [outcome.total_ms, outcome.cpu_ms];
        let measured = turns::measure([FIGURES[0], FIGURES[1]], &mut movers, runs, progress, |mover| {
            Ok(vec![of(mover.travel(trip)?)])
        });
        figures.extend(with_floors(measured, runs));
    }
    if any(&FIGURES[2..3]) {
        let trip = Trip { prepared: false, ..trip };
        figures.extend(turns::measure([FIGURES[2]], &mut movers, runs, progress, |mover| {
            Ok(vec![[mover.travel(trip)?.total_ms]])
        }));
    }
    if any(&FIGURES[3..4]) {
        let beating = Wanderer { pages: PAGES, pace: Some(pace(clock, 0)) }.payload()?;
        let trip = Trip { payload: &beating, beats: true, ..trip };
        figures.extend(turns::measure([FIGURES[3]], &mut movers, runs, progress, |mover| {
            Ok(vec![[mover.travel(trip)?.gap_ms]])
        }));
    }
    for (names, rate) in FIGURES[4..].as_chunks::<4>().0.iter().zip([10, 100, 1000]) {
        if any(names) {
            let dirtying = Wanderer { pages: PAGES, pace: Some(pace(clock, rate)) }.payload()?;
            let trip = Trip { payload: &dirtying, beats: true, throttle: true, ..trip };
            figures.extend(turns::measure(*names, &mut movers, runs, progress, |mover| {
                let Outcome { total_ms, gap_ms, throttle, lost, .. } = mover.travel(trip)?;
                Ok(vec![[total_ms, gap_ms, throttle, lost]])
            }));
        }
    }
    Ok(figures)
}

fn movers(soc_vmm: &Path, qemu: Option<&Path>) -> Vec<Mover> {
    let ours = if soc_vmm.is_file() {
        Ok(Program::Outboard(soc_vmm.to_owned()))
    } else {
        Err(format!("{} is not built", soc_vmm.display()))
    };
    let peer = qemu.map_or_else(Qemu::new, |root| Ok(Qemu::at(root)));
    let peer = peer.map(|qemu| Program::Qemu(Arc::new(qemu))).map_err(|error| error.to_string());
    vec![
        Mover { name: "outboard", side: Side::Ours, program: ours, multifd: true },
        Mover { name: "qemu-multifd", side: Side::Peer, program: peer.clone(), multifd: true },
        Mover { name: "qemu", side: Side::Peer, program: peer, multifd: false },
    ]
}

/// Adds what nobody can be below: the same bytes over TCP as the floor, and copied by two threads as a peer that doesn't move anything.
fn with_floors(figures: [Figure; 2], runs: u32) -> [Figure; 2] {
    let mut sides = Sides::new(PAGES as usize * 4096);
    // The first is not counted: it warms up.
    let sent: Vec<Cost> = (0..=runs).filter_map(|_| sides.sent().ok()).skip(1).collect();
    let copied: Vec<Cost> = (0..=runs).map(|_| sides.copied()).skip(1).collect();
    let [mut total, mut cpu] = figures;
    for (figure, of) in [(&mut total, (|cost| cost.ms) as fn(&Cost) -> f64), (&mut cpu, |cost| cost.cpu_ms)] {
        let summary = |costs: &[Cost]| crate::figure::Summary::of(&costs.iter().map(of).collect::<Vec<_>>());
        figure.floor = summary(&sent);
        figure.peers.extend(summary(&copied).map(|summary| ("memcpy".to_owned(), summary)));
    }
    [total, cpu]
}

/// `rate` MB of pages a second; 0: none.
fn pace(clock: Clock, rate: u32) -> Pace {
    let ticks = |seconds: f64| (seconds / clock.nanoseconds(1) * 1e9) as u32;
    let page = if rate == 0 { 0 } else { ticks(4096.0 / (f64::from(rate) * 1e6)) };
    Pace { beat: ticks(BEAT.as_secs_f64()), page }
}
