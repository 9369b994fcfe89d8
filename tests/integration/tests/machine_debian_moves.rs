//! A Debian at work moves between two emulated servers again and again: its disk, its network and its memory stay as they are, its clock goes on,
//! and nothing is left behind.

use std::time::{Duration, Instant};

use integration::machines::{but_for_the_emulator, complaints};
use integration::test_name;
use testbed::bed::{Bed, BedConfig};
use testbed::clock;
use testbed::debian::{Shell, Site, worker};
use testbed::protocol::Status;
use testbed::vmm::Vmm;

/// How long Debian may take to come up. Seconds on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

const NAME: &str = "debian-moves";
const MOVES: usize = 5;
/// A server under emulation finds out its TSC's rate by timers that are late: what a second of its clocks may be wrong by, at most.
const DRIFT: f64 = 0.01;

#[test]
#[ignore = "minutes: cargo xtask soak test.machine_debian_moves runs it"]
fn debian_moves_to_and_fro_between_servers() {
    but_for_the_emulator(moves);
}

fn moves() {
    if !testbed::machines_or_skip(&test_name()) {
        return;
    }
    let beds = ["debian-moves-a", "debian-moves-b"].map(|name| BedConfig::new(name, 1).start().unwrap());
    let mut rest = beds.each_ref().map(|bed| Rest { idle: open(bed), events: None });
    let mut busy = [None, None];
    let site = Site::new().unwrap();
    let mut vmm = Vmm::run(&beds[0], &site.vm(NAME)).unwrap();
    let mut shell = Shell::log_in(&mut vmm, BOOT_LIMIT).unwrap();
    worker::begin(&mut shell, &site.echo).unwrap();
    // What its kernel says from now on.
    assert_eq!(shell.run("dmesg --clear", ANSWER_LIMIT).unwrap().status, 0);
    for number in 0..MOVES {
        let (from, to) = (number % 2, (number + 1) % 2);
        let doubt: Duration = beds.iter().map(|bed| clock::set(&bed.server).unwrap()).sum();
        let done = worker::done(&mut shell).unwrap();
        let began = Instant::now();
        let before = worker::clock(&mut shell).unwrap();
        worker::gap(&mut shell).unwrap();
        let seat = shell.leave();

        let next = site.vm(&format!("{NAME}-{number}"));
        let (there, told) = vmm.move_to(&beds[to], &next, site.dir(), &[]).unwrap();
        print!("{told}");
        assert_eq!(vmm.wait_for_exit(ANSWER_LIMIT).unwrap(), Status::Code(0), "{}", vmm.errors());
        vmm = there;

        shell = Shell::back(&mut vmm, seat);
        let gap = worker::gap(&mut shell).unwrap();
        let after = worker::clock(&mut shell).unwrap();
        println!("longest gap {gap:?}; {before:?}, then {after:?}");
        let most = doubt + began.elapsed().mul_f64(DRIFT);
        assert!(before.jump_to(&after) <= most, "the clock was set on: {before:?}, then {after:?}, {most:?} at most");
        println!("{:?}", worker::goes_on(&mut shell, done).unwrap());
        let seat = shell.leave();

        rest[from].comes_to(&beds[from]);
        let first = busy[to].get_or_insert_with(|| (vmm.descriptors().unwrap(), open(&beds[to])));
        until("what is open where the guest is", || {
            let now = (vmm.descriptors().unwrap(), open(&beds[to]));
            if (now.0.len(), &now.1) == (first.0.len(), &first.1) {
                Ok(())
            } else {
                Err(format!("{now:#?}; at first {first:#?}"))
            }
        });
        shell = Shell::back(&mut vmm, seat);
    }
    let said = shell.run("dmesg --notime --level emerg,alert,crit,err,warn", ANSWER_LIMIT).unwrap();
    assert_eq!(complaints::of_the_kernel(&said.output), [""; 0], "dmesg");
    worker::end(&mut shell).unwrap();
    shell.last("poweroff").unwrap();
    assert_eq!(vmm.wait_for_exit(ANSWER_LIMIT).unwrap(), Status::Code(0), "{}", vmm.errors());
    rest.iter_mut().zip(&beds).for_each(|(rest, bed)| rest.comes_to(bed));
}

/// A program's command line, and what it has open.
type Descriptors = (Vec<String>, Vec<String>);

/// The whole user space of a server.
fn open(bed: &Bed) -> Vec<Descriptors> {
    let programs = bed.server.programs().unwrap();
    programs.into_iter().map(|program| (program.command, bed.server.descriptors(program.pid).unwrap())).collect()
}

/// A server that no guest is on.
struct Rest {
    /// What was open there before the first one.
    idle: Vec<Descriptors>,
    /// How many events were left by it. A function's vectors each have one from their first use on, for as long as the shim has the function.
    events: Option<usize>,
}

impl Rest {
    /// Waits until it is as it was: a shim hears of its VM's end a moment after soc-vmm.
    fn comes_to(&mut self, bed: &Bed) {
        let is_event = |open: &str| open == "anon_inode:[eventfd]";
        let others = |all: &[Descriptors]| -> Vec<Descriptors> {
            let of = |open: &[String]| open.iter().filter(|open| !is_event(open)).cloned().collect();
            all.iter().map(|(program, open)| (program.clone(), of(open))).collect()
        };
        until("what a guest left behind", || {
            let now = open(bed);
            let events = now.iter().flat_map(|(_, open)| open).filter(|open| is_event(open)).count();
            let most = self.events.unwrap_or(usize::MAX);
            if others(&now) == others(&self.idle) && events <= most {
                self.events = Some(events);
                return Ok(());
            }
            Err(format!("{now:#?}; before there was {:#?}, with {most} events after the first guest", self.idle))
        });
    }
}

/// Waits until nothing is wrong.
fn until(what: &str, mut look: impl FnMut() -> Result<(), String>) {
    let end = Instant::now() + ANSWER_LIMIT;
    while let Err(wrong) = look() {
        assert!(Instant::now() < end, "{what}: {wrong}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
