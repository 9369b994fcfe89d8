//! Debian's unmodified libvirtd has a Debian move live between two emulated servers, in each way that it knows, and come back by a file.

use std::fs;
use std::path::Path;
use std::time::Duration;

use integration::libvirt::{Boot, Domain, Host, Pair, disk};
use integration::machines::{but_for_the_emulator, complaints};
use integration::test_name;
use tempfile::TempDir;
use testbed::bed::{Bed, BedConfig};
use testbed::debian::{self, COMMAND_LINE, Seat, Shell};
use testbed::libvirt::{Console, Libvirt};
use testbed::paths;
use testbed::process::Child;

const BOOT_LIMIT: Duration = Duration::from_secs(300);
const LIMIT: Duration = Duration::from_secs(120);

const NAME: &str = "debian";
/// MiB.
const MEMORY: u32 = 256;
/// Where both hosts have the same files: the guest's disk, and the file that it comes back by.
const COMMON: &str = "common";
/// Where each has its own.
const OWN: &str = "own";
/// The disk of which each host has its own, and what is in the first's.
const COPIED: &str = "copied";
const TEXT: &str = "an unlikely text, 51e0c9d7";
const SIZE: u64 = 8 << 20;

/// The disk is where both hosts see it, which libvirt believes of network file systems alone.
const SHARED_DISK: &str = "--unsafe";

#[test]
fn virsh_moves_a_debian_between_emulated_servers() {
    but_for_the_emulator(|| _ = Site::new().as_ref().map(Site::is_used));
}

struct Site {
    // Dropped in this order: soc-vmm and the pools before the cards that they are clients of.
    pair: Pair,
    _pools: [Child; 2],
    _beds: [Bed; 2],
    _files: TempDir,
}

impl Site {
    fn new() -> Option<Self> {
        if !testbed::machines_or_skip(&test_name()) {
            return None;
        }
        let image = debian::image().unwrap();
        let beds = ["here", "there"].map(|name| {
            let config = BedConfig::new(&format!("libvirt-{name}"), 1);
            BedConfig { shim_args: ["--lease", "0"].map(str::to_owned).to_vec(), ..config }.start().unwrap()
        });
        // Images are where there is room.
        let files = tempfile::tempdir_in(paths::cache()).unwrap();
        let common = files.path().join(COMMON);
        let own = ["here", "there"].map(|name| files.path().join(name));
        for directory in [&common, &own[0], &own[1]] {
            fs::create_dir(directory).unwrap();
        }
        image.copy_disk(&common.join("disk")).unwrap();
        for (from, to) in [(&image.kernel, "kernel"), (&image.initrd, "initrd")] {
            fs::copy(from, common.join(to)).unwrap();
        }
        for own in &own {
            fs::File::create(own.join(COPIED)).unwrap().set_len(SIZE).unwrap();
        }
        fs::write(own[0].join(COPIED), padded(TEXT)).unwrap();

        let cards = [&beds[0], &beds[1]].map(|bed| bed.card.soc_socket(0).parent().unwrap().to_owned());
        let shared = |number: usize| -> [(&Path, &str); 3] {
            [(&common, COMMON), (&own[number], OWN), (&cards[number], "card")]
        };
        let pair = Pair::of([&shared(0), &shared(1)])?;
        pair.trusts();
        let pools = [(&pair.here, &beds[0]), (&pair.there, &beds[1])].map(|(host, bed)| serve_pool(host, bed));
        Some(Self { pair, _pools: pools, _beds: beds, _files: files })
    }

    fn is_used(&self) {
        let Pair { here, there } = &self.pair;
        here.define(&domain());
        here.virsh(&["start", NAME]);
        let mut console = here.libvirt.console(NAME).unwrap();
        // The prompt may have been shown before the console was there.
        console.type_text("\n").unwrap();
        let mut shell = Shell::log_in(&mut console, BOOT_LIMIT).unwrap();
        succeeds(&mut shell, "(i=0; while :; do i=$((i+1)); echo $i >/run/count; sleep 0.02; done) & true");
        succeeds(&mut shell, "dmesg --clear");
        let mut seat = shell.leave();

        for way in [
            &["--auto-converge"][..],
            &["--tunnelled"],
            &["--parallel", "--parallel-connections", "3"],
            &["--postcopy", "--postcopy-after-precopy"],
            &["--tls"],
        ] {
            let way = if way.contains(&"--tunnelled") { way.to_vec() } else { [&Pair::TCP, way].concat() };
            seat = self.goes_on(here, seat);
            self.pair.move_by(NAME, &[&way[..], &[SHARED_DISK]].concat());
            seat = self.goes_on(there, seat);
            self.comes_back();
        }
        seat = self.is_aborted(seat);
        seat = self.takes_a_disk_along(seat);
        there.virsh(&["managedsave", NAME]);
        there.becomes(NAME, "shut off (saved)");
        there.virsh(&["start", NAME]);
        there.becomes(NAME, "running (restored)");

        let mut console = there.libvirt.console(NAME).unwrap();
        let mut shell = back(&mut console, seat);
        assert_eq!(succeeds(&mut shell, "cat /root/count-*").lines().count(), 11, "what was written on the way");
        let said = succeeds(&mut shell, "dmesg --notime --level emerg,alert,crit,err,warn");
        assert_eq!(complaints::of_the_kernel(&said), [""; 0], "dmesg");
        shell.last("poweroff").unwrap();
        there.waits("it is off", || there.virsh(&["list", "--name"]).trim().is_empty());
        self.pair.check_messages();
    }

    /// The guest is there, with all its work and its disk.
    fn goes_on(&self, host: &Host, seat: Seat) -> Seat {
        let mut console = host.libvirt.console(NAME).unwrap();
        let mut shell = back(&mut console, seat);
        let before = count(&mut shell);
        succeeds(&mut shell, &format!("until [ $(cat /run/count || echo 0) -gt {before} ]; do sleep 0.02; done"));
        // While the next one is written the file is empty.
        succeeds(&mut shell, &format!("until grep . /run/count >/root/count-{before}; do :; done; sync"));
        shell.leave()
    }

    /// By a file that both hosts see.
    fn comes_back(&self) {
        let Pair { here, there } = &self.pair;
        let file = common("saved");
        there.virsh(&["save", NAME, &file]);
        there.waits("it is gone", || there.virsh(&["list", "--all", "--name"]).trim().is_empty());
        here.virsh(&["restore", &file]);
        here.becomes(NAME, "running (restored)");
    }

    /// Somebody looks at a move, and ends it: the guest stays.
    fn is_aborted(&self, seat: Seat) -> Seat {
        let here = &self.pair.here;
        let _moves = self.pair.begin_to_move(NAME, &[&Pair::TCP[..], &[SHARED_DISK, "--bandwidth", "1"]].concat());
        self.pair.moves_memory(NAME);
        here.virsh(&["domjobabort", NAME]);
        here.waits("nothing moves", || here.virsh(&["domjobinfo", NAME]).contains("None"));
        here.becomes(NAME, "running");
        self.pair.leaves_nothing_there();
        self.goes_on(here, seat)
    }

    /// A disk of which each host has its own.
    fn takes_a_disk_along(&self, seat: Seat) -> Seat {
        let Pair { here, there } = &self.pair;
        let path = format!("{}/{OWN}/{COPIED}", Libvirt::SHARED);
        here.virsh(&["attach-disk", NAME, &path, "vdb", "--live", "--targetbus", "virtio"]);
        let mut console = here.libvirt.console(NAME).unwrap();
        let mut shell = back(&mut console, seat);
        succeeds(&mut shell, "until test -b /dev/vdb; do sleep 0.1; done");
        assert_eq!(read(&mut shell), TEXT);
        let more = "and more";
        succeeds(&mut shell, &format!("printf '{more}' | dd of=/dev/vdb conv=fsync"));
        let seat = shell.leave();
        drop(console);
        let along = ["--copy-storage-all", "--migrate-disks", "vdb", "--persistent", SHARED_DISK];
        let way = [&Pair::TCP[..], &along].concat();
        self.pair.move_by(NAME, &way);
        let mut console = there.libvirt.console(NAME).unwrap();
        let mut shell = back(&mut console, seat);
        assert_eq!(read(&mut shell), format!("{more}{}", &TEXT[more.len()..]));
        shell.leave()
    }
}

/// At a console that was just opened.
fn back(console: &mut Console, seat: Seat) -> Shell<'_, '_> {
    let mut shell = Shell::back(console, seat);
    // What virsh says of itself ends with this.
    succeeds(&mut shell, "true");
    shell
}

fn serve_pool(host: &Host, bed: &Bed) -> Child {
    let at = |function| {
        let socket = bed.card.soc_socket(function);
        format!("card:{}/card/{}", Libvirt::SHARED, socket.file_name().unwrap().to_str().unwrap())
    };
    host.serve_pool(&[at(0)], Some(&at(bed.card.functions())))
}

fn domain() -> Domain {
    let [kernel, initrd] = ["kernel", "initrd"].map(common);
    let boot = Boot::Kernel { kernel, initrd: Some(initrd), cmdline: Some(COMMAND_LINE.to_owned()) };
    Domain { memory: MEMORY, devices: vec![disk(&common("disk"), "raw", "vda")], ..Domain::new(NAME, boot) }
}

fn common(name: &str) -> String {
    format!("{}/{COMMON}/{name}", Libvirt::SHARED)
}

/// What a disk begins with, from a place where nothing keeps what it was.
fn read(shell: &mut Shell<'_, '_>) -> String {
    succeeds(shell, &format!("dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null | head -c {}", TEXT.len()))
}

fn padded(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(SIZE as usize, 0);
    bytes
}

fn count(shell: &mut Shell<'_, '_>) -> u64 {
    let said = succeeds(shell, "until cat /run/count | grep .; do :; done");
    said.trim().parse().unwrap_or_else(|_| panic!("{said:?}"))
}

fn succeeds(shell: &mut Shell<'_, '_>, command: &str) -> String {
    let answer = shell.run(command, LIMIT).unwrap();
    assert_eq!(answer.status, 0, "{command}: {}", answer.output);
    answer.output
}
