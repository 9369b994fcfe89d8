//! Ten domains of libvirtd's that have four functions between them, and whatever virsh and SIGKILL do to them, at random: nothing of
//! any of them is left. Every run is another one, unless `OUTBOARD_SEED` is set to the seed that one printed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use integration::hostile::Dice;
use integration::libvirt::{Boot, Domain, Host, disk};
use integration::{kvm, test_name};
use nix::sys::signal::Signal;
use payloads::operated;
use testbed::libvirt::{Libvirt, Process};
use testbed::process::Child;

const DOMAINS: usize = 10;
const FUNCTIONS: usize = 4;
const NONE_FREE: &str = "none of 4 functions is free";
/// How long the last of what a domain was may take to go.
const LIMIT: Duration = Duration::from_secs(120);
const SEED: &str = "OUTBOARD_SEED";

#[test]
fn nothing_is_left_of_ten_domains() {
    is_left_as_found(20);
}

#[test]
#[ignore = "a minute a round: cargo xtask soak libvirt_random runs it"]
fn nothing_is_left_of_ten_domains_after_long() {
    is_left_as_found(150);
}

fn is_left_as_found(steps: usize) {
    if !kvm(&test_name()) {
        return;
    }
    let Some(host) = Host::start(true, &[]) else { return };
    let place = Place::new(host);
    // What is made once, and stays, is there then.
    place.start(0);
    place.host.virsh(&["destroy", &name(0)]);
    place.all_are_free();
    let before = place.left_at_rest();

    let seed = seed();
    println!("{SEED}={seed:#x}");
    let mut dice = Dice::new(seed);
    let mut domains = [State::Off; DOMAINS];
    for _ in 0..steps {
        let number = one_of(&domains, &mut dice);
        let (began, was) = (Instant::now(), domains[number]);
        place.step(number, &mut domains, &mut dice);
        println!("{number}: {was:?} -> {:?} in {:.1?}", domains[number], began.elapsed());
    }
    for (number, state) in domains.iter().enumerate() {
        if *state != State::Off {
            place.host.virsh(&["destroy", &name(number)]);
        }
    }
    place.all_are_free();
    let end = Instant::now() + LIMIT;
    while place.left() != before && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(place.left(), before, "{}", place.host.story());
    place.host.check_messages();
}

/// Most are off: one that is on every second time.
fn one_of(domains: &[State; DOMAINS], dice: &mut Dice) -> usize {
    let on: Vec<usize> = (0..DOMAINS).filter(|&number| domains[number] != State::Off).collect();
    match dice.below(2) {
        0 if !on.is_empty() => *dice.one(&on),
        _ => dice.below(DOMAINS as u64) as usize,
    }
}

fn seed() -> u64 {
    match std::env::var(SEED) {
        Ok(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("a number in hexadecimal"),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Off,
    On { paused: bool, plugged: bool },
}

struct Place {
    host: Host,
    _pool: Child,
    _shims: Vec<Child>,
}

/// What could be left of a domain.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    processes: Vec<Process>,
    /// Of each of them, how many.
    descriptors: Vec<usize>,
    files: BTreeSet<String>,
    functions: Vec<String>,
}

impl Place {
    fn new(host: Host) -> Self {
        let libvirt = &host.libvirt;
        libvirt.write(&image("kernel"), operated::operated().unwrap().file().1).unwrap();
        for number in 0..DOMAINS {
            for kind in ["disk", "spare"] {
                let path = libvirt.path(&image(&format!("{kind}-{number}")));
                fs::File::create(path).unwrap().set_len(1 << 20).unwrap();
            }
        }
        let sockets: Vec<String> = (0..FUNCTIONS).map(|number| format!("unix:/run/shim-{number}")).collect();
        let shim = |function: &String| {
            libvirt.spawn(Libvirt::SHIM, &["--function", function, "--lease", "0"], Stdio::null()).unwrap()
        };
        let shims = sockets.iter().map(shim).collect();
        let pool = host.serve_pool(&sockets, None);
        for number in 0..DOMAINS {
            let boot = Boot::Kernel { kernel: image("kernel"), initrd: None, cmdline: None };
            let devices = vec![disk(&image(&format!("disk-{number}")), "raw", "vda")];
            host.define(&Domain { devices, ..Domain::new(&name(number), boot) });
        }
        Self { host, _pool: pool, _shims: shims }
    }

    /// Waits until every function is clean again.
    fn all_are_free(&self) {
        let free = || self.host.pool().iter().filter(|one| one["state"] == "free").count();
        self.host.waits("all functions are free", || free() == FUNCTIONS);
    }

    /// Starts a domain for which there is a function, or will be once what was just given back is clean.
    fn start(&self, number: usize) {
        self.host.waits(&format!("{} starts", name(number)), || {
            let output = self.host.libvirt.virsh(&["start", &name(number)]).unwrap();
            assert!(output.status == 0 || output.stderr.contains(NONE_FREE), "{}{}", output.stderr, self.host.story());
            output.status == 0
        });
    }

    /// Does something to a domain that can be done to it.
    fn step(&self, number: usize, domains: &mut [State], dice: &mut Dice) {
        let domain = &name(number);
        let on = domains.iter().filter(|state| **state != State::Off).count();
        let virsh = |args: &[&str]| _ = self.host.virsh(&[&[args[0], domain], &args[1..]].concat());
        let State::On { paused, plugged } = domains[number] else {
            if on == FUNCTIONS {
                let why = self.host.virsh_fails(&["start", domain]);
                assert!(why.contains(NONE_FREE), "{why}");
            } else {
                domains[number] = match dice.below(4) {
                    0 => self.start_and_kill(number, Duration::from_millis(dice.below(200))),
                    _ => {
                        self.start(number);
                        State::On { paused: false, plugged: false }
                    }
                };
            }
            return;
        };
        domains[number] = match dice.below(7) {
            0 => {
                virsh(&["destroy"]);
                State::Off
            }
            1 => {
                self.kill(&self.emulator(domain).expect("it runs"));
                self.host.becomes(domain, "shut off (crashed)");
                State::Off
            }
            2 | 3 => {
                virsh(&[if paused { "resume" } else { "suspend" }]);
                State::On { paused: !paused, plugged }
            }
            4 => {
                virsh(&["reset"]);
                State::On { paused, plugged }
            }
            _ if plugged => {
                virsh(&["detach-disk", "vdb", "--live"]);
                self.host.waits("the disk goes", || !self.host.virsh(&["domblklist", domain]).contains("vdb"));
                State::On { paused, plugged: false }
            }
            _ => {
                virsh(&["attach-disk", &image(&format!("spare-{number}")), "vdb", "--live"]);
                State::On { paused, plugged: true }
            }
        };
    }

    /// Kills a domain's emulator that long after it is there, wherever its start is then.
    fn start_and_kill(&self, number: usize, after: Duration) -> State {
        let domain = &name(number);
        std::thread::scope(|scope| {
            let start = scope.spawn(|| self.host.libvirt.virsh(&["start", domain]).unwrap());
            self.host.waits("the emulator is there", || self.emulator(domain).is_some() || start.is_finished());
            std::thread::sleep(after);
            // It may have found no function, and have ended.
            if let Some(emulator) = self.emulator(domain) {
                self.kill(&emulator);
            }
        });
        self.host.becomes(domain, "shut off");
        State::Off
    }

    fn emulator(&self, domain: &str) -> Option<Process> {
        let mark = format!("guest={domain},");
        let is_it = |vmm: &Process| vmm.arguments.iter().any(|argument| argument.starts_with(&mark));
        self.host.libvirt.running("soc-vmm").into_iter().find(is_it)
    }

    /// Whoever has ended by himself needs no more.
    fn kill(&self, emulator: &Process) {
        let _ = self.host.libvirt.signal(emulator, Signal::SIGKILL);
    }

    /// The same once that changes no more: libvirtd lets go of a client, and of what a domain was, a moment later.
    fn left_at_rest(&self) -> Left {
        let end = Instant::now() + LIMIT;
        let mut last = self.left();
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let now = self.left();
            if now == last {
                return now;
            }
            assert!(Instant::now() < end, "there is no rest: {last:?}, then {now:?}");
            last = now;
        }
    }

    fn left(&self) -> Left {
        let libvirt = &self.host.libvirt;
        let of_all = libvirt.processes();
        // This test's own look: busybox is what bounds the time of all that it runs.
        let own = |process: &Process| ["busybox", "virsh"].contains(&process.name()) || is_pool_list(process);
        let processes: Vec<Process> = of_all.into_iter().filter(|process| !own(process)).collect();
        let open = |process: &Process| fs::read_dir(format!("/proc/{}/fd", process.pid)).map_or(0, Iterator::count);
        let mut files = BTreeSet::new();
        for dir in ["/run", "/tmp", "/var/lib", "/var/cache"] {
            list(&libvirt.path(dir), &mut files);
        }
        let cgroups = libvirt.output("busybox", &["find", "/sys/fs/cgroup", "-name", "*.libvirt-qemu"]).unwrap();
        files.extend(cgroups.stdout.lines().map(str::to_owned));
        Left {
            descriptors: processes.iter().map(open).collect(),
            processes,
            files,
            functions: self.host.pool().iter().map(|one| one["state"].to_string()).collect(),
        }
    }
}

fn is_pool_list(process: &Process) -> bool {
    process.arguments.get(1..3).is_some_and(|words| words == ["pool", "list"])
}

fn list(dir: &Path, into: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        into.insert(entry.path().display().to_string());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list(&entry.path(), into);
        }
    }
}

fn name(number: usize) -> String {
    format!("domain-{number}")
}

fn image(name: &str) -> String {
    format!("{}/{name}", Libvirt::IMAGES)
}
