//! A Debian on an emulated server, into which a disk, a network interface and a processor are plugged, and pulled out again, under load:
//! it finds them each time, lets them go when asked, and finds nothing to complain about.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use integration::machines::{but_for_the_emulator, complaints};
use integration::{program, test_name};
use testbed::bed::{Bed, BedConfig};
use testbed::debian::{self, COMMAND_LINE, Image, Passt, Shell, Tools};
use testbed::protocol::Status;
use testbed::vmm::{Boot, VmConfig, Vmm};

const BOOT_LIMIT: Duration = Duration::from_secs(300);
const LIMIT: Duration = Duration::from_secs(120);
/// How often each is plugged and pulled.
const ROUNDS: usize = 20;
/// Bytes of the disk that comes and goes.
const SIZE: u64 = 8 << 20;

#[test]
fn a_disk_an_interface_and_a_processor_come_and_go_under_load() {
    // A run that the emulator ends leaves the next one the rounds that it hadn't come to.
    let done = AtomicUsize::new(0);
    but_for_the_emulator(|| _ = Place::new().map(|place| place.plug_and_pull(&done)));
}

struct Place {
    name: String,
    bed: Bed,
    image: Image,
    tools: Tools,
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Option<Self> {
        if !testbed::machines_or_skip(&test_name()) {
            return None;
        }
        let (image, tools) = (debian::image().unwrap(), debian::tools().unwrap());
        let dir = testbed::scratch::dir().unwrap();
        let disk = dir.path().join("disk");
        image.copy_disk(&disk).unwrap();
        fs::File::create(dir.path().join("data")).unwrap().set_len(SIZE).unwrap();
        let bed = BedConfig::new("hotplug", 1).start().unwrap();
        let name = format!("hotplug-{}", std::process::id());
        Some(Self { name, bed, image: Image { disk, ..image }, tools, dir })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs one of soc-vmm's commands on the VM; what it printed.
    fn command(&self, verb: &str, what: &[&str]) -> String {
        let output = Command::new(program("soc-vmm")).args([verb, &self.name]).args(what).output().unwrap();
        let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(output.status.success(), "{verb} {what:?}: {stderr}");
        stdout.trim().to_owned()
    }

    fn plug_and_pull(&self, done: &AtomicUsize) {
        let (kernel, initrd) = (path(&self.image.kernel), path(&self.image.initrd));
        let disk = format!("file={}", self.image.disk.display());
        let args = ["--kernel", kernel, "--initrd", initrd, "--cmdline", COMMAND_LINE, "--disk", &disk];
        let args = [&args[..], &["--cpus", "2,maxcpus=3", "--log", "info"]].concat();
        let args = args.into_iter().map(str::to_owned).collect();
        let config = VmConfig { boot: Boot::AsTold, args, ..VmConfig::new(&self.name, 0) };
        let mut vmm = Vmm::run(&self.bed, &config).unwrap();
        let mut guest = Guest(Shell::log_in(&mut vmm, BOOT_LIMIT).unwrap());
        guest.begins("while dd if=/dev/vda of=/dev/null bs=64k iflag=direct; do :; done");
        let data = format!("file={},id=data", self.file("data").display());
        let first = done.load(Relaxed);
        for round in first..ROUNDS {
            let passt = Passt::start(&self.tools, self.file(&format!("passt-{round}"))).unwrap();
            let net = format!("stream={},id=lan", passt.socket().display());
            let added = [("add-disk", &[&*data][..]), ("add-net", &[&*net]), ("add-cpu", &[])];
            assert_eq!(added.map(|(verb, what)| self.command(verb, what)), ["data", "lan", "cpu2"]);
            guest.has_processor();
            guest.has("/dev/disk/by-id/virtio-data");
            // The only one with a device is the one that comes and goes.
            guest.has("/sys/class/net/*/device");
            // What the last round wrote is there, and what this one writes is read back.
            let marks = if round == first { 0..0 } else { round - 1..round };
            for mark in marks {
                let read = "dd if=/dev/disk/by-id/virtio-data bs=512 count=1 iflag=direct 2>/dev/null";
                assert_eq!(guest.succeeds(&format!("{read} | tr -d '\\000'")), format!("round {mark}\n"));
            }
            let write = "dd of=/dev/disk/by-id/virtio-data bs=512 count=1 conv=sync,fsync 2>/dev/null";
            guest.succeeds(&format!("echo round {round} | {write}"));
            guest.begins("dd if=/dev/disk/by-id/virtio-data of=/dev/null bs=4k iflag=direct");
            // Its name is its own once udev has given it.
            guest.succeeds("udevadm settle");
            let interface =
                guest.succeeds("for n in /sys/class/net/*; do test -e $n/device && basename $n; done; true");
            guest.succeeds(&format!("ip link set {0} up && udhcpc -n -q -t 10 -i {0}", interface.trim()));
            std::thread::scope(|scope| {
                for id in ["data", "lan", "cpu2"] {
                    scope.spawn(move || self.command("remove", &[id]));
                }
                if round != first {
                    guest.lets_go_at_once();
                }
            });
            assert_eq!(guest.succeeds("nproc; cat /sys/devices/system/cpu/present"), "2\n0-1\n");
            guest.has_no_more("/dev/disk/by-id/virtio-data");
            done.store(round + 1, Relaxed);
        }
        let said = guest.succeeds("dmesg --notime --level emerg,alert,crit,err,warn");
        assert_eq!(complaints::of_the_kernel(&said), [""; 0], "dmesg");
        let functions = guest.succeeds("lspci -vv");
        assert_eq!(complaints::of_lspci(&functions), [""; 0], "{functions}");
        guest.0.last("poweroff").unwrap();
        let status = vmm.wait_for_exit(LIMIT).unwrap();
        // Where a vCPU stood that reset the machine is a matter of course to soc-vmm.
        let complaints = vmm.complaints();
        let complaints: Vec<_> = complaints.lines().filter(|line| !line.contains(" INFO ")).collect();
        assert_eq!((status, complaints), (Status::Code(0), vec![]), "{}", vmm.text());
    }
}

/// A Debian that somebody is logged into.
struct Guest<'v, 'a>(Shell<'v, 'a>);

impl Guest<'_, '_> {
    /// Runs a command that succeeds; what it printed.
    fn succeeds(&mut self, command: &str) -> String {
        let answer = self.0.run(command, LIMIT).unwrap();
        assert_eq!(answer.status, 0, "{command}: {}", answer.output);
        answer.output
    }

    /// Runs a command beside others; no job of the shell's, which would tell of its end.
    fn begins(&mut self, command: &str) {
        self.succeeds(&format!("( ({command}) >/dev/null 2>&1 & )"));
    }

    /// Doesn't wait out the five seconds in which a user may think again, once each of the two slots behind the first blinks.
    fn lets_go_at_once(&mut self) {
        let blinks = "test $((0x$(setpci -s 0:1.$n CAP_EXP+18.w) & 0x300)) -eq 512";
        let power = "/sys/bus/pci/slots/$((n+1))/power";
        self.succeeds(&format!(
            "(for n in 1 2; do (until {blinks}; do sleep 0.1; done; echo 0 >{power}) & done; wait)"
        ));
    }

    /// Takes the third processor on, as its user would: Debian leaves that to them. Linux refuses for as long as it probes a PCI device.
    fn has_processor(&mut self) {
        const CPU: &str = "/sys/devices/system/cpu/cpu2/online";
        self.has(CPU);
        let online = format!("echo 1 2>/dev/null >{CPU}");
        self.succeeds(&format!("n=0; until {online} || test $n -ge 300; do n=$((n+1)); sleep 0.1; done; {online}"));
        let on_it = "nproc; taskset -c 2 grep Cpus_allowed_list /proc/self/status";
        assert_eq!(self.succeeds(on_it), "3\nCpus_allowed_list:\t2\n");
    }

    /// Waits until a file is gone: udev removes its links a moment after the device.
    fn has_no_more(&mut self, file: &str) {
        let waits = format!("n=0; while test -e {file} && test $n -lt 300; do n=$((n+1)); sleep 0.1; done");
        self.succeeds(&format!("{waits}; ! test -e {file}"));
    }

    /// Waits until a file is there.
    fn has(&mut self, file: &str) {
        let waits =
            format!("n=0; until test -e {file} || test $n -ge 300; do n=$((n+1)); sleep 0.1; done; test -e {file}");
        let answer = self.0.run(&waits, LIMIT).unwrap();
        if answer.status != 0 {
            let seen = self
                .0
                .run("dmesg | tail -n 60; ls /dev/vd* /sys/class/net /dev/disk/by-id; lspci -vv -s 0:1", LIMIT)
                .unwrap();
            panic!("no {file}: {}", seen.output);
        }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path of the testbed is text")
}
