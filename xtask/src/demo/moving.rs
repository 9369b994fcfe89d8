//! The demo's end: a Debian at work moves from one emulated server to another one.

use std::thread::sleep;
use std::time::Duration;

use testbed::bed::{Bed, BedConfig};
use testbed::clock;
use testbed::debian::worker::{self, Done};
use testbed::debian::{Seat, Shell, Site};
use testbed::machine::Error;
use testbed::protocol::Status;
use testbed::vmm::Vmm;

use super::{ANSWER_LIMIT, BOOT_LIMIT, refused, say};
use crate::table::Figures;

/// How long the guest's clock is looked at before it moves.
const LOOK: Duration = Duration::from_secs(5);

/// Starts a second server, and has a Debian move there from `bed`.
pub(super) fn play(bed: &Bed, figures: &mut Figures) -> Result<(), Error> {
    let site = Site::new()?;
    say("starting the second emulated server and its card");
    let other = BedConfig::new("demo-server-2", 1).start()?;
    say("starting Debian 12 from its disk on the first server: 2 vCPUs, on a network that both servers are at");
    let mut here = Vmm::run(bed, &site.vm("demo-debian"))?;
    let (seat, done) = at_work(&mut here, &site, figures)?;

    say("moving it to the second server: soc-vmm migrate unix:… demo-debian");
    // Its clock goes on by the servers'.
    clock::set(&bed.server)?;
    clock::set(&other.server)?;
    let (mut there, told) = here.move_to(&other, &site.vm("demo-debian-2"), site.dir(), &[])?;
    told.lines().for_each(|line| println!("      | {line}"));
    let ended = here.wait_for_exit(ANSWER_LIMIT)?;
    if ended != Status::Code(0) {
        return Err(refused(&here, &format!("ended with {ended:?} when its guest had gone")));
    }
    arrived(&mut there, (seat, done), figures)?;
    note(&told, figures).ok_or_else(|| refused(&there, &format!("told of the move: {told}")))?;
    let ended = there.wait_for_exit(ANSWER_LIMIT)?;
    if ended != Status::Code(0) {
        return Err(refused(&there, &format!("ended with {ended:?}")));
    }
    say("it powered off there; both soc-vmm ended with status 0");
    drop((here, there));
    other.server.power_off(ANSWER_LIMIT)
}

/// Has the guest work for a while.
fn at_work(vmm: &mut Vmm<'_>, site: &Site, figures: &mut Figures) -> Result<(Seat, Done), Error> {
    let mut shell = Shell::log_in(vmm, BOOT_LIMIT)?;
    say("it writes its disk, talks over a TCP connection, and looks at its clock");
    worker::begin(&mut shell, &site.echo)?;
    let before = worker::done(&mut shell)?;
    worker::gap(&mut shell)?;
    sleep(LOOK);
    figures.add("guest.gap.before", milliseconds(worker::gap(&mut shell)?), "ms");
    let done = worker::goes_on(&mut shell, before)?;
    worker::gap(&mut shell)?;
    Ok((shell.leave(), done))
}

/// The guest works on where it is now, and is switched off.
fn arrived(vmm: &mut Vmm<'_>, (seat, before): (Seat, Done), figures: &mut Figures) -> Result<(), Error> {
    let mut shell = Shell::back(vmm, seat);
    // The first look at the clock was before the move.
    let gap = worker::gap(&mut shell)?;
    figures.add("guest.gap", milliseconds(gap), "ms");
    let done = worker::goes_on(&mut shell, before)?;
    worker::end(&mut shell)?;
    say(&format!(
        "the guest goes on: its disk written {} times, {} words over the same connection, its 64 MiB of memory unchanged",
        done.disk, done.network
    ));
    shell.last("poweroff")
}

/// Notes what `soc-vmm migrate` said in the end.
fn note(told: &str, figures: &mut Figures) -> Option<()> {
    let line = told.lines().find(|line| line.starts_with("completed in "))?;
    let number_before = |unit: &str| line.split_once(unit)?.0.rsplit(' ').next()?.parse::<f64>().ok();
    let downtime = line.strip_suffix(" ms")?.rsplit(' ').next()?.parse().ok()?;
    figures.add("move.total", number_before(" ms:")?, "ms");
    figures.add("move.sent", number_before(" MiB sent")?, "MiB");
    figures.add("move.rounds", number_before(" rounds")?, "");
    figures.add("move.downtime", downtime, "ms");
    Some(())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_move_came_to_is_noted() {
        let told = "active: 3.0 MiB left of 512.0\ncompleted in 2262 ms: 900.3 MiB sent of 1024.0 in 2 rounds, 409.5 MiB/s, downtime 31 ms\n";
        let mut figures = Figures::default();
        note(told, &mut figures).unwrap();
        let names = ["move.total", "move.sent", "move.rounds", "move.downtime"];
        assert_eq!(names.map(|name| figures.value(name)), [2262.0, 900.3, 2.0, 31.0].map(Some));
        assert!(note("it failed", &mut figures).is_none());
    }
}
