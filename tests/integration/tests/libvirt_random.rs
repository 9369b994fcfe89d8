//! Ten domains of libvirtd's that have four functions between them, and whatever virsh and SIGKILL do to them, at random: nothing of
//! any of them is left. Every run is another one; `cargo xtask soak` repeats it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{SystemTime, UNIX_EPOCH};

use integration::hostile::Dice;
use integration::libvirt::{Boot, Domain, Host, disk};
use integration::{kvm, test_name};
use nix::sys::signal::Signal;
use payloads::operated;
use testbed::libvirt::{Libvirt, Process};
use testbed::process::Child;

const DOMAINS: usize = 10;
const FUNCTIONS: usize = 4;
const STEPS: usize = 80;
const NONE_FREE: &str = "none of 4 functions is free";

#[test]
#[ignore = "minutes: cargo xtask soak libvirt_random runs it"]
fn nothing_is_left_of_ten_domains() {
    if !kvm(&test_name()) {
        return;
    }
    let Some(host) = Host::start(true, &[]) else { return };
    let place = Place::new(host);
    // What is made once, and stays, is there then.
    place.start(0);
    place.host.virsh(&["destroy", &name(0)]);
    let before = place.left();

    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed:#x}");
    let mut dice = Dice::new(seed);
    let mut domains = [State::Off; DOMAINS];
    for _ in 0..STEPS {
        let number = dice.below(DOMAINS as u64) as usize;
        place.step(number, &mut domains, &mut dice);
    }
    for (number, state) in domains.iter().enumerate() {
        if *state != State::Off {
            place.host.virsh(&["destroy", &name(number)]);
        }
    }
    place.host.waits("all is as it was before", || place.left() == before);
    place.host.check_messages();
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
                self.start(number);
                domains[number] = State::On { paused: false, plugged: false };
            }
            return;
        };
        domains[number] = match dice.below(7) {
            0 => {
                virsh(&["destroy"]);
                State::Off
            }
            1 => {
                let all = self.host.libvirt.running("soc-vmm");
                let mark = format!("guest={domain},");
                let is_it = |vmm: &&Process| vmm.arguments.iter().any(|argument| argument.starts_with(&mark));
                self.host.libvirt.signal(all.iter().find(is_it).unwrap(), Signal::SIGKILL).unwrap();
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

    fn left(&self) -> Left {
        let libvirt = &self.host.libvirt;
        let of_all = libvirt.processes();
        // This test's own look.
        let processes: Vec<Process> = of_all
            .into_iter()
            .filter(|process| !["virsh", "soc-vmm"].contains(&process.name()) || is_pool(process))
            .collect();
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

fn is_pool(process: &Process) -> bool {
    process.arguments.get(1).is_some_and(|word| word == "pool")
        && process.arguments.get(2).is_some_and(|w| w == "serve")
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
