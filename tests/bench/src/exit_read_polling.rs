//! What one exit costs: the guest reads a port of a device in the VMM, again and again, and looks at its clock.
//!
//! The port is the debug console's, whose read is a constant: in QEMU a device in the process that runs the vCPU, here
//! a device in soc-vmm, behind the lane, while both sides poll.

use std::time::Duration;

use payloads::{Privilege, hot, ports};

use crate::contender::{Entrant, Error, Side};
use crate::figure::{Figure, Summary};
use crate::host::Clock;

/// Reads a round, timed as a whole: some tens of milliseconds, so that not every round of a run is disturbed.
const READS: u32 = 2_000;
/// Rounds a run; the first warms up and does not count, 20 000 reads do.
const ROUNDS: u32 = 11;
/// What a run may take, with a firmware's start.
const LIMIT: Duration = Duration::from_secs(60);

/// The figure's name: `exit.read.polling` is read at CPL0.
pub fn name(privilege: Privilege) -> &'static str {
    match privilege {
        Privilege::Cpl0 => "exit.read.polling",
        Privilege::Cpl3 => "exit.read.polling.cpl3",
    }
}

/// Measures. The entrants' runs take turns, so that what else the machine does meets all of them.
pub fn measure(
    privilege: Privilege,
    entrants: &mut [Entrant],
    clock: Clock,
    runs: u32,
    progress: &dyn Fn(&str),
) -> Result<Figure, Error> {
    let name = name(privilege);
    let payload = hot::read_port(privilege, ports::DEBUG_CONSOLE, READS, ROUNDS)?;
    let mut results: Vec<Result<Vec<f64>, String>> = entrants.iter().map(|_| Ok(Vec::new())).collect();
    for run in 1..=runs {
        for (entrant, result) in entrants.iter_mut().zip(&mut results) {
            let Ok(values) = result else { continue };
            match entrant.run(&payload, LIMIT) {
                Ok(console) => {
                    let rounds = nanoseconds_a_read(&console, clock);
                    let of_run = Summary::of(&rounds).map_or(f64::NAN, |summary| summary.median);
                    progress(&format!("{name}, run {run} of {runs}: {} {of_run:.0} ns", entrant.name));
                    values.extend(rounds);
                }
                Err(why) => {
                    progress(&format!("{name}: {} left out: {why}", entrant.name));
                    *result = Err(why);
                }
            }
        }
    }

    let mut figure = Figure::empty(name, "ns", runs);
    let mut skipped = Vec::new();
    for (entrant, result) in entrants.iter().zip(results) {
        match result.map(|values| Summary::of(&values)) {
            Ok(Some(summary)) => match entrant.side {
                Side::Ours => figure.ours = Some(summary),
                Side::Peer => drop(figure.peers.insert(entrant.name.to_owned(), summary)),
                Side::Floor => figure.floor = Some(summary),
            },
            Ok(None) => skipped.push(format!("{}: no round", entrant.name)),
            Err(why) => skipped.push(format!("{}: {why}", entrant.name)),
        }
    }
    figure.skipped = (!skipped.is_empty()).then(|| skipped.join("; "));
    Ok(figure)
}

fn nanoseconds_a_read(console: &str, clock: Clock) -> Vec<f64> {
    let rounds = console.lines().filter_map(hot::parse_round).skip(1);
    rounds.map(|(reads, ticks)| clock.nanoseconds(ticks) / reads as f64).collect()
}
