//! Debian's unmodified libvirtd with the functions of an emulated server: a Debian is started, used and changed by `virsh`, and what
//! was done to it is seen in the guest and in its images.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use integration::libvirt::{Boot, Domain, Host, cdrom, disk, tap, user};
use integration::machines::{but_for_the_emulator, complaints};
use integration::test_name;
use testbed::bed::{Bed, BedConfig};
use testbed::debian::{self, COMMAND_LINE, Instruments, Shell};
use testbed::libvirt::{Console, Libvirt};
use testbed::paths;
use testbed::process::Child;

const BOOT_LIMIT: Duration = Duration::from_secs(300);
const LIMIT: Duration = Duration::from_secs(120);

const NAME: &str = "debian";
/// What the second disk and the second CD hold.
const TEXT: &str = "an unlikely text, 9c1d50e7";
const SIZE: u64 = 8 << 20;
const GROWN: u64 = 16 << 20;

/// An interface at a TAP.
struct Wire {
    tap: &'static str,
    mac: &'static str,
    /// The addresses of both ends.
    guest: &'static str,
    host: &'static str,
}

const WIRE: Wire = Wire { tap: "guest0", mac: "52:54:00:00:01:01", guest: "10.0.7.2", host: "10.0.7.1" };
/// That of an interface that comes and goes.
const SECOND: Wire = Wire { tap: "guest1", mac: "52:54:00:00:01:02", guest: "10.0.8.2", host: "10.0.8.1" };
/// The interface behind passt.
const USER_MAC: &str = "52:54:00:00:01:03";

#[test]
#[ignore = "by hand for now: it was not seen to pass yet"]
fn virsh_works_on_a_debian_of_an_emulated_server() {
    but_for_the_emulator(|| _ = Place::new().as_ref().map(Place::is_used));
}

struct Place {
    // Dropped in this order: soc-vmm and the pool before the card that they are clients of.
    host: Host,
    _pool: Child,
    _pages: Child,
    _bed: Bed,
    _images: tempfile::TempDir,
}

impl Place {
    fn new() -> Option<Self> {
        if !testbed::machines_or_skip(&test_name()) {
            return None;
        }
        let (image, tools, instruments) =
            (debian::image().unwrap(), debian::tools().unwrap(), debian::instruments().unwrap());
        let config = BedConfig::new("libvirt", 1);
        let bed = BedConfig { shim_args: ["--lease", "0"].map(str::to_owned).to_vec(), ..config }.start().unwrap();
        let socket = bed.card.soc_socket(0);
        let (card, name) = (socket.parent().unwrap(), socket.file_name().unwrap().to_str().unwrap());
        // The images are where there is room.
        let images = tempfile::tempdir_in(paths::cache()).unwrap();
        let host = Host::start(true, &[(card, "card"), (images.path(), "images")])?;
        let at = |name: &str| images.path().join(name);
        image.copy_disk(&at("disk")).unwrap();
        for (from, to) in [(&image.kernel, "kernel"), (&image.initrd, "initrd"), (&instruments.disk(), "instruments")] {
            fs::copy(from, at(to)).unwrap();
        }
        fs::File::create(at("second")).unwrap().set_len(SIZE).unwrap();
        let content = at("content");
        fs::create_dir(&content).unwrap();
        fs::write(content.join("text"), TEXT).unwrap();
        tools.iso("OUTBOARD", &content, &at("cd")).unwrap();

        let at = |socket: &str| format!("card:{}/card/{socket}", Libvirt::SHARED);
        let of_the_host = bed.card.soc_socket(bed.card.functions());
        let of_the_host = at(of_the_host.file_name().unwrap().to_str().unwrap());
        let pool = host.serve_pool(&[at(name)], Some(&of_the_host));

        for wire in [WIRE, SECOND] {
            host.libvirt.make_tap(wire.tap).unwrap();
            let address = ["addr", "add", &format!("{}/24", wire.host), "dev", wire.tap];
            assert_eq!(host.libvirt.output("/bin/ip", &address).unwrap().status, 0);
        }
        host.libvirt.write("/tmp/page", TEXT).unwrap();
        let serve = ["httpd", "-f", "-p", "80", "-h", "/tmp"];
        let pages = host.libvirt.spawn("busybox", &serve, Stdio::null()).unwrap();
        Some(Self { host, _pool: pool, _pages: pages, _bed: bed, _images: images })
    }

    fn is_used(&self) {
        let host = &self.host;
        host.define(&domain(NAME));
        host.virsh(&["start", NAME]);
        assert_eq!(host.libvirt.running("host-kvm-shim"), [], "a pool's function has its shim on the server");
        let why = host.virsh_fails(&["setmem", NAME, "128M", "--live"]);
        assert!(why.contains("the guest keeps its 268435456 bytes of memory: the function's DMA pins"), "{why}");
        self.another_has_no_function();

        let mut console = host.libvirt.console(NAME).unwrap();
        let mut guest = Guest::log_in(&mut console);
        guest.succeeds("mount -o ro /dev/disk/by-label/INSTRUMENTS /mnt");
        self.agent(&mut guest);
        self.disks(&mut guest);
        self.media(&mut guest);
        self.networks(&mut guest);
        self.processors(&mut guest);
        guest.has_no_complaint();

        self.stands_still();
        host.libvirt.restart_libvirtd().unwrap();
        host.becomes(NAME, "running");
        host.virsh(&["shutdown", NAME, "--mode", "agent"]);
        host.becomes(NAME, "shut off (shutdown)");
        drop(console);

        // The function is free again, and what was written is in the image.
        let mut console = self.again();
        let mut guest = Guest::log_in(&mut console);
        assert_eq!(guest.succeeds("cat /root/mark"), TEXT);
        drop(console);
        host.virsh(&["destroy", NAME]);
        host.becomes(NAME, "shut off (destroyed)");
        host.check_messages();
    }

    fn again(&self) -> Console {
        self.host.virsh(&["start", NAME]);
        self.host.libvirt.console(NAME).unwrap()
    }

    fn another_has_no_function(&self) {
        let other = Domain { devices: Vec::new(), ..domain("other") };
        self.host.define(&other);
        let why = self.host.virsh_fails(&["start", "other"]);
        assert!(why.contains("none of 1 functions is free") && why.contains(NAME), "{why}");
        assert_eq!(self.host.virsh(&["domstate", "other"]), "shut off");
    }

    fn agent(&self, guest: &mut Guest<'_>) {
        let port = "-m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0";
        let agent = Instruments::run_at("/mnt", "usr/sbin/qemu-ga");
        guest.succeeds(&format!("{agent} -d -t /run -f /run/agent.pid {port}"));
        self.host.waits("the agent is connected", || self.host.virsh(&["dumpxml", NAME]).contains("state='connected'"));
        let info = self.host.virsh(&["guestinfo", NAME]);
        let release = guest.succeeds("uname -r");
        assert!(info.contains(release.trim()) && info.contains("os.id") && info.contains("debian"), "{info}");
    }

    /// What is written is in the image and is counted; a disk comes, grows, and goes.
    fn disks(&self, guest: &mut Guest<'_>) {
        let host = &self.host;
        let written = || -> u64 { host.field(&["domblkstat", NAME, "vda"], "vda wr_bytes").parse().unwrap() };
        let before = written();
        guest.succeeds(&format!("printf '{TEXT}' >/root/mark && sync"));
        assert!(written() > before);
        guest.succeeds("dd if=/dev/vda of=/dev/null bs=1M count=4 iflag=direct");
        assert!(host.field(&["domblkstat", NAME, "vda"], "vda rd_bytes").parse::<u64>().unwrap() >= 4 << 20);

        host.virsh(&["attach-disk", NAME, &image("second"), "vdb", "--live"]);
        guest.waits_until("test -b /dev/vdb");
        guest.succeeds(&format!("printf '{TEXT}' | dd of=/dev/vdb conv=fsync"));
        let second = self._images.path().join("second");
        assert!(fs::read(&second).unwrap().starts_with(TEXT.as_bytes()));
        host.virsh(&["blockresize", NAME, "vdb", "16M"]);
        guest.waits_until(&format!("[ $(blockdev --getsize64 /dev/vdb) = {GROWN} ]"));
        assert_eq!(host.field(&["domblkinfo", NAME, "vdb"], "Capacity"), GROWN.to_string());

        // With 20 requests a second these 60 take two seconds at least, whatever was saved up in the one before.
        host.virsh(&["blkdeviotune", NAME, "vdb", "--total-iops-sec", "20", "--live"]);
        let start = std::time::Instant::now();
        guest.succeeds("dd if=/dev/vdb of=/dev/null bs=4k count=60 iflag=direct");
        assert!(start.elapsed() > Duration::from_secs(2), "{:?}", start.elapsed());
        host.virsh(&["blkdeviotune", NAME, "vdb", "--total-iops-sec", "0", "--live"]);

        host.virsh(&["detach-disk", NAME, "vdb", "--live"]);
        guest.waits_until("! test -b /dev/vdb");
        host.waits("the disk is gone", || !host.virsh(&["domblklist", NAME]).contains("vdb"));
    }

    fn media(&self, guest: &mut Guest<'_>) {
        let host = &self.host;
        let reads = "mkdir -p /media && mount -o ro /dev/sr1 /media && cat /media/text; umount /media";
        assert_ne!(guest.status(reads), 0, "the drive is empty");
        host.virsh(&["change-media", NAME, "sdb", &image("cd"), "--insert", "--live"]);
        guest.waits_until("dd if=/dev/sr1 of=/dev/null bs=2048 count=1");
        assert_eq!(guest.succeeds(reads), TEXT);
        host.virsh(&["change-media", NAME, "sdb", "--eject", "--live"]);
        guest.waits_until("! dd if=/dev/sr1 of=/dev/null bs=2048 count=1");
    }

    /// By passt, by a TAP interface whose link goes and comes back, and by another that comes and goes itself.
    fn networks(&self, guest: &mut Guest<'_>) {
        let host = &self.host;
        let name = guest.interface(USER_MAC);
        guest.succeeds(&format!("ip link set {name} up && udhcpc -n -q -t 10 -i {name}"));
        let router = guest.succeeds(&format!("ip route show default dev {name} | cut -d' ' -f3"));
        guest.fetches_from(router.trim());

        guest.connects(&WIRE);
        let counted = |name: &str| -> u64 {
            host.field(&["domifstat", NAME, WIRE.tap], &format!("{} {name}", WIRE.tap)).parse().unwrap()
        };
        assert!(counted("rx_packets") > 0 && counted("tx_packets") > 0);
        let name = guest.interface(WIRE.mac);
        for (state, carrier) in [("down", 0), ("up", 1)] {
            host.virsh(&["domif-setlink", NAME, WIRE.mac, state]);
            assert!(host.virsh(&["domif-getlink", NAME, WIRE.mac]).ends_with(state));
            guest.waits_until(&format!("[ $(cat /sys/class/net/{name}/carrier) = {carrier} ]"));
        }

        host.with_xml(&["attach-device", NAME], &tap(SECOND.tap, SECOND.mac), &["--live"]);
        guest.waits_until(&format!("grep -qx {} /sys/class/net/*/address", SECOND.mac));
        guest.connects(&SECOND);
        host.virsh(&["detach-interface", NAME, "ethernet", "--mac", SECOND.mac, "--live"]);
        guest.waits_until(&format!("! grep -qx {} /sys/class/net/*/address", SECOND.mac));
    }

    fn processors(&self, guest: &mut Guest<'_>) {
        let host = &self.host;
        assert_eq!(guest.succeeds("nproc"), "1\n");
        host.virsh(&["setvcpus", NAME, "2", "--live"]);
        let online = "/sys/devices/system/cpu/cpu1/online";
        guest.waits_until(&format!("echo 1 >{online} && [ $(nproc) = 2 ]"));
        assert_eq!(host.virsh(&["vcpucount", NAME, "--live", "--active"]), "2");
        host.virsh(&["setvcpus", NAME, "1", "--live"]);
        guest.waits_until("[ $(nproc) = 1 ]");
        host.waits("the processor is gone", || host.virsh(&["vcpucount", NAME, "--live", "--active"]) == "1");
    }

    /// Paused, it uses no processor.
    fn stands_still(&self) {
        let host = &self.host;
        host.virsh(&["suspend", NAME]);
        host.becomes(NAME, "paused (user)");
        let status = host.qmp(NAME, "query-status", serde_json::json!({}));
        assert_eq!((&status["running"], &status["status"]), (&false.into(), &"paused".into()));
        host.virsh(&["resume", NAME]);
        host.becomes(NAME, "running (unpaused)");
    }
}

fn domain(name: &str) -> Domain {
    let [kernel, initrd] = ["kernel", "initrd"].map(image);
    let boot = Boot::Kernel { kernel, initrd: Some(initrd), cmdline: Some(COMMAND_LINE.to_owned()) };
    let devices = vec![
        disk(&image("disk"), "raw", "vda"),
        cdrom(Some(&image("instruments")), "sda"),
        cdrom(None, "sdb"),
        tap(WIRE.tap, WIRE.mac),
        user(USER_MAC),
    ];
    Domain { memory: 256, vcpus: (1, 2), devices, ..Domain::new(name, boot) }
}

fn image(name: &str) -> String {
    let path = PathBuf::from(Libvirt::SHARED).join("images").join(name);
    path.to_str().expect("a path of letters").to_owned()
}

/// A Debian that somebody is logged into, by `virsh console`.
struct Guest<'a>(Shell<'a, 'a>);

impl<'a> Guest<'a> {
    fn log_in(console: &'a mut Console) -> Self {
        // The prompt may have been shown before the console was there.
        console.type_text("\n").unwrap();
        Self(Shell::log_in(console, BOOT_LIMIT).unwrap())
    }

    fn status(&mut self, command: &str) -> u32 {
        self.0.run(command, LIMIT).unwrap().status
    }

    fn succeeds(&mut self, command: &str) -> String {
        let answer = self.0.run(command, LIMIT).unwrap();
        assert_eq!(answer.status, 0, "{command}: {}", answer.output);
        answer.output
    }

    fn waits_until(&mut self, condition: &str) {
        self.succeeds(&format!(
            "(n=0; until {{ {condition}; }} 2>/dev/null; do n=$((n+1)); test $n -lt 300 || exit 1; sleep 0.1; done)"
        ));
    }

    /// Uses a wire, whose host's end has a page.
    fn connects(&mut self, wire: &Wire) {
        let name = self.interface(wire.mac);
        self.succeeds(&format!("ip addr add {}/24 dev {name} && ip link set {name} up", wire.guest));
        self.fetches_from(wire.host);
    }

    fn fetches_from(&mut self, host: &str) {
        assert_eq!(self.succeeds(&format!("wget -q -T 60 -O - http://{host}/page")), TEXT);
    }

    /// The name of the interface with an address.
    fn interface(&mut self, mac: &str) -> String {
        self.succeeds("udevadm settle");
        let name = self.succeeds(&format!("basename $(dirname $(grep -lx {mac} /sys/class/net/*/address))"));
        name.trim().to_owned()
    }

    fn has_no_complaint(&mut self) {
        let said = self.succeeds("dmesg --notime --level emerg,alert,crit,err,warn");
        assert_eq!(complaints::of_the_kernel(&said), [""; 0], "dmesg");
    }
}
