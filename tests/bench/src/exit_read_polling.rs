//! What one exit costs: the guest reads a port of a device in the VMM, again and again, and looks at its clock.
//!
//! The port is the debug console's, whose read is a constant: in QEMU a device in the process that runs the vCPU, here
//! a device in soc-vmm, behind the lane, while both sides poll.

use std::time::Duration;

use payloads::{Privilege, hot, ports};

use crate::contender::{Entrant, Error, Job};
use crate::figure::Figure;
use crate::host::Clock;
use crate::turns;

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

/// Measures.
///
/// # Errors
/// The payload does not assemble.
pub fn measure(
    privilege: Privilege,
    entrants: &mut [Entrant],
    clock: Clock,
    runs: u32,
    progress: &dyn Fn(&str),
) -> Result<Figure, Error> {
    let payload = hot::read_port(privilege, ports::DEBUG_CONSOLE, READS, ROUNDS)?;
    let job = Job { payload: &payload, disk: None, net: None, limit: LIMIT };
    let run = |entrant: &mut Entrant| entrant.run(&job).map(|console| nanoseconds_a_read(&console, clock));
    let [figure] = turns::measure([(name(privilege), "ns")], entrants, runs, progress, run);
    Ok(figure)
}

fn nanoseconds_a_read(console: &str, clock: Clock) -> Vec<[f64; 1]> {
    let rounds = console.lines().filter_map(hot::parse_round).skip(1);
    rounds.map(|(reads, ticks)| [clock.nanoseconds(ticks) / reads as f64]).collect()
}
