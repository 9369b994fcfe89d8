//! How often a guest kicks its device: beside each rate, since it doesn't jitter as that does.

use payloads::virtio_blk::Round;

use crate::contender::Entrant;
use crate::figure::Figure;
use crate::host::Clock;
use crate::turns;

/// Ends the name of [`kicks`].
pub const KICKS: &str = ".kicks";

/// The figure beside a device's: kicks a request. Each is an exit, and a guest that polls has no other reason for one.
pub fn kicks(figure: &str) -> String {
    format!("{figure}{KICKS}")
}

/// Measures a device's rate and kicks, of which `run` gives a pair a round.
pub(crate) fn measure(
    name: &str,
    [rate, kick]: [&str; 2],
    entrants: &mut [Entrant],
    runs: u32,
    progress: &dyn Fn(&str),
    run: impl Fn(&mut Entrant) -> Result<Vec<[f64; 2]>, String>,
) -> [Figure; 2] {
    turns::measure([(name, rate), (&kicks(name), kick)], Entrant::with_devices(entrants), runs, progress, run)
}

/// A round's requests a second, and its kicks a request.
pub(crate) fn rate_and_kicks(round: Round, clock: Clock) -> [f64; 2] {
    let requests = round.requests as f64;
    [requests / clock.nanoseconds(round.ticks) * 1e9, round.kicks as f64 / requests]
}
