//! A Debian on an emulated server with every device that it can be given, and what people do with them: fio verifies its disks while
//! one grows, iperf3 its networks, QEMU's guest agent answers by a port and by a socket. Memory goes back to the server by a balloon.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use integration::machines::{Talk, but_for_the_emulator, complaints};
use integration::monitor::Monitor;
use integration::{program, test_name, vhost_backend};
use serde_json::{Value, json};
use testbed::bed::{Bed, BedConfig, SOC_VMM};
use testbed::debian::{self, COMMAND_LINE, Image, Instruments, Passt, Shell, Virtiofsd};
use testbed::network::{Network, is_listened_on};
use testbed::process::Child;
use testbed::protocol::Status;
use testbed::vmm::{Boot, VmConfig, Vmm};
use testbed::{guest, paths, scratch};

const BOOT_LIMIT: Duration = Duration::from_secs(300);
const LIMIT: Duration = Duration::from_secs(120);

const MIB: u64 = 1 << 20;
/// Bytes of each disk that is tried; one of them grows.
const SIZE: u64 = 8 * MIB;
const GROWN: u64 = 16 * MIB;
/// By which the disk is known that another process serves.
const VHOST_SIZE: u64 = 12 * MIB;

/// The interfaces' addresses.
const LAN_MAC: &str = "52:54:00:00:03:02";
const PASST_MAC: &str = "52:54:00:00:02:02";
const VHOST_MAC: &str = "52:54:00:00:02:03";
/// What an interface over TAP has negotiated (virtio 1.2 §5.1.3): checksums and TCP segments either way, merged buffers, the control queue,
/// several pairs of queues.
const OFFLOADS: [usize; 7] = [0, 1, 7, 11, 15, 17, 22];
/// Bytes of a page that a guest fetches.
const PAGE: usize = 256 << 10;
/// Bytes that iperf3 sends.
const SENT: u64 = 16 * MIB;
/// The largest frame on a wire that has no segmentation offload.
const FRAME: u64 = 1514;

/// What a guest that has filled 128 MiB gives back at least.
const MUCH: u64 = 64 * MIB;

const AGENT: &str = "org.qemu.guest_agent.0";
/// Where the agent listens among the guest's sockets.
const AGENT_PORT: u32 = 1024;

#[test]
fn a_debian_works_with_every_device() {
    but_for_the_emulator(|| {
        let Some(place) = Place::new() else { return };
        place.debian();
        place.balloon();
    });
}

/// One kind of disk and of network, with soc-vmm on the other architecture: the same code, but bytes cross to another kernel.
#[test]
fn a_debian_works_with_a_disk_and_a_network_of_an_arm_soc() {
    but_for_the_emulator(from_an_arm_soc);
}

fn from_an_arm_soc() {
    if !testbed::machines_or_skip(&test_name()) {
        return;
    }
    let (image, tools) = (debian::image().unwrap(), debian::tools().unwrap());
    let instruments = debian::instruments().unwrap();
    let dir = scratch::dir().unwrap();
    let [backing, thin] = ["base", "thin"].map(|name| dir.path().join(name));
    fs::write(&backing, base()).unwrap();
    instruments.make_overlay("base", &thin).unwrap();
    let mut config = BedConfig::new("devices-arm", 1).with_arm_soc();
    let soc = config.soc.as_mut().unwrap();
    let (image, _) = debian::equip(soc, &image, &instruments.disk(), &tools.firmware()).unwrap();
    soc.basics.files.extend([("/images/base".to_owned(), backing), ("/images/thin".to_owned(), thin)]);
    let bed = config.start().unwrap();
    let soc = bed.soc.as_ref().unwrap();
    let page = String::from_utf8(base()).unwrap();
    let port = debian::serve_page(soc, &page[..PAGE]).unwrap();
    let passt = Passt::start_on(soc).unwrap();
    let options = [
        ("--kernel", path(&image.kernel).to_owned()),
        ("--initrd", path(&image.initrd).to_owned()),
        ("--cmdline", COMMAND_LINE.to_owned()),
        ("--disk", format!("file={}", image.disk.display())),
        ("--disk", format!("file={},readonly=on,id=instruments", debian::SOC_CD)),
        ("--disk", "file=/images/thin,format=qcow2,queues=2,id=thin".to_owned()),
        ("--net", format!("stream={},mac={PASST_MAC}", passt.socket().display())),
    ];
    let args = options.into_iter().flat_map(|(option, value)| [option.to_owned(), value]).collect();
    let config = VmConfig { boot: Boot::AsTold, args, ..VmConfig::new("devices-arm", 0) };
    let mut vmm = Vmm::run(&bed, &config).unwrap();
    let mut guest = Guest(Shell::log_in(&mut vmm, BOOT_LIMIT).unwrap());
    guest.mount_instruments();
    let disk = "/dev/disk/by-id/virtio-thin";
    guest.fio(&[(disk, 0, 0)], "");
    guest.reads_the_rest_of(disk);
    let name = guest.interface(PASST_MAC);
    guest.succeeds(&format!("ip link set {name} up && udhcpc -n -q -t 10 -i {name}"));
    guest.succeeds(&format!("wget -q -T 60 -O /tmp/page http://{}:{port}/", Passt::HOST));
    guest.succeeds(&format!("{} | busybox cmp - /tmp/page", lines(0, PAGE as u64 / 8)));
    guest.has_no_complaint();
    guest.0.last("poweroff").unwrap();
    let status = vmm.wait_for_exit(LIMIT).unwrap();
    assert_eq!((status, vmm.complaints().as_str()), (Status::Code(0), ""), "{}", vmm.text());
}

struct Place {
    name: String,
    bed: Bed,
    image: Image,
    instruments: Instruments,
    network: Network,
    /// A stream of frames, and a back end.
    passt: [Passt; 2],
    /// The back end of a disk.
    _block: Child,
    /// That of a file system.
    shared: Virtiofsd,
    /// Of images: on a disk, which has direct I/O.
    images: tempfile::TempDir,
    /// Of sockets.
    sockets: tempfile::TempDir,
}

impl Place {
    fn new() -> Option<Self> {
        let test = test_name();
        if !testbed::machines_or_skip(&test) {
            return None;
        }
        if !nix::unistd::geteuid().is_root() {
            testbed::skip(&test, "a network namespace with a TAP interface takes root");
            return None;
        }
        let (image, tools) = (debian::image().unwrap(), debian::tools().unwrap());
        let instruments = debian::instruments().unwrap();
        let (images, sockets) = (tempfile::tempdir_in(paths::cache()).unwrap(), scratch::dir().unwrap());
        let disk = images.path().join("disk");
        image.copy_disk(&disk).unwrap();
        fs::File::create(images.path().join("raw")).unwrap().set_len(SIZE).unwrap();
        fs::write(images.path().join("base"), base()).unwrap();
        instruments.make_overlay("base", &images.path().join("thin")).unwrap();

        let mut server = instruments.command("usr/bin/iperf3");
        server.args(["--server", "--forceflush"]);
        let network = Network::start(&server, sockets.path().join("iperf3"), "Server listening").unwrap();
        let passt = [("passt", &[][..]), ("vhost-net", &["--vhost-user"])]
            .map(|(name, more)| Passt::start_in(&network, &tools, sockets.path().join(name), more).unwrap());
        fs::File::create(images.path().join("vhost")).unwrap().set_len(VHOST_SIZE).unwrap();
        fs::create_dir(images.path().join("shared")).unwrap();
        let shared = Virtiofsd::start(&images.path().join("shared"), sockets.path().join("virtiofsd")).unwrap();
        let socket = sockets.path().join("vhost-disk");
        let mut block = Command::new(vhost_backend());
        block.arg("block").arg(images.path().join("vhost")).arg(&socket);
        let block = serves(block, &socket);
        let bed = BedConfig::new("devices", 1).with_soc_vmm_on_the_server(2).unwrap().start().unwrap();
        let name = format!("devices-{}", std::process::id());
        Some(Self {
            name,
            bed,
            image: Image { disk, ..image },
            instruments,
            network,
            passt,
            _block: block,
            shared,
            images,
            sockets,
        })
    }

    fn image(&self, name: &str) -> PathBuf {
        self.images.path().join(name)
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.sockets.path().join(name)
    }

    /// A VM on the card's function.
    fn run(&self, more: &[String]) -> Vmm<'_> {
        let (kernel, initrd) = (path(&self.image.kernel), path(&self.image.initrd));
        let direct = ["--kernel", kernel, "--initrd", initrd, "--cmdline", COMMAND_LINE];
        let args = direct.into_iter().map(str::to_owned).chain(more.iter().cloned()).collect();
        let network_of = Some(self.network.id());
        let config = VmConfig { boot: Boot::AsTold, args, network_of, ..VmConfig::new(&self.name, 0) };
        Vmm::run(&self.bed, &config).unwrap()
    }

    fn debian(&self) {
        self.refuses_reports();
        let [agent, sockets, monitor] = ["agent", "vsock", "qmp"].map(|name| self.socket(name));
        let options = [
            ("--disk", format!("file={}", self.image.disk.display())),
            ("--disk", format!("file={},readonly=on,id=instruments", self.instruments.disk().display())),
            ("--disk", format!("file={},id=raw,queues=2,cache=none,aio=io_uring", self.image("raw").display())),
            ("--disk", format!("file={},format=qcow2,id=thin", self.image("thin").display())),
            ("--net", format!("tap={},queues=2,mac={LAN_MAC},id=lan", Network::TAP)),
            ("--disk", format!("vhost-user={},queues=2", self.socket("vhost-disk").display())),
            ("--fs", format!("vhost-user={},tag=shared", self.shared.socket().display())),
            ("--net", format!("stream={},mac={PASST_MAC}", self.passt[0].socket().display())),
            ("--net", format!("vhost-user={},mac={VHOST_MAC}", self.passt[1].socket().display())),
            ("--channel", format!("unix:{},name={AGENT}", agent.display())),
            ("--entropy", "on".to_owned()),
            ("--vsock", format!("cid=3,socket={}", sockets.display())),
            ("--qmp", format!("unix:{}", monitor.display())),
        ];
        let options: Vec<_> = options.into_iter().flat_map(|(option, value)| [option.to_owned(), value]).collect();
        let mut vmm = self.run(&options);
        let mut guest = Guest(Shell::log_in(&mut vmm, BOOT_LIMIT).unwrap());
        guest.mount_instruments();
        self.disks(&mut guest);
        self.networks(&mut guest, &mut Monitor::connect(&monitor));
        agent_by_a_port(&mut guest, &agent);
        agent_by_a_socket(&mut guest, &sockets);
        guest.has_entropy();
        guest.has_no_complaint();
        guest.0.last("poweroff").unwrap();
        let status = vmm.wait_for_exit(LIMIT).unwrap();
        assert_eq!((status, vmm.complaints().as_str()), (Status::Code(0), ""), "{}", vmm.text());

        self.instruments.check(&self.image("thin")).unwrap();
        assert!(fs::read(self.image("base")).unwrap() == base(), "the backing file was written");
    }

    /// A function's DMA pins the guest's memory.
    fn refuses_reports(&self) {
        let mut vmm = self.run(&["--balloon".to_owned(), "on,free-page-reporting=on".to_owned()]);
        let status = vmm.wait_for_exit(LIMIT).unwrap();
        let said = vmm.errors();
        assert_eq!(status, Status::Code(4), "{said}");
        assert!(said.contains("--balloon") && said.contains("pins all guest memory"), "{said}");
    }

    /// fio writes both disks at once, one of them by both of its queues and where it grew, and reads back what it wrote.
    fn disks(&self, guest: &mut Guest<'_, '_>) {
        let [raw, thin] = ["raw", "thin"].map(|id| format!("/dev/disk/by-id/virtio-{id}"));
        let resize = Command::new(program("soc-vmm")).args(["resize", &self.name, "raw", "16M"]).output().unwrap();
        assert!(resize.status.success(), "{resize:?}");
        guest.waits_until(&format!("[ $(blockdev --getsize64 {raw}) = {GROWN} ]"));
        assert_eq!(guest.succeeds(&format!("ls /sys/block/$(basename $(readlink {raw}))/mq")), "0  1\n");
        let sectors = VHOST_SIZE / 512;
        let vhost = guest.succeeds(&format!("basename $(dirname $(grep -lx {sectors} /sys/block/vd*/size))"));
        let vhost = format!("/dev/{}", vhost.trim());
        let jobs: [(&str, _, _); 5] = [(&raw, 0, 0), (&raw, 12, 1), (&thin, 0, 0), (&vhost, 0, 0), (&vhost, 8, 1)];
        guest.succeeds("mkdir -p /srv && mount -t virtiofs shared /srv");
        let shared = "--name=shared --directory=/srv --ioengine=psync --direct=0";
        guest.fio(&jobs, shared);
        assert_eq!(fs::metadata(self.image("shared").join("shared.0.0")).unwrap().len(), 4 * MIB);
        guest.reads_the_rest_of(&thin);
    }

    fn networks(&self, guest: &mut Guest<'_, '_>, monitor: &mut Monitor) {
        let lan = guest.interface(LAN_MAC);
        guest.succeeds(&format!("ip addr add {} dev {lan} && ip link set {lan} up", Network::GUEST));
        let features = guest.succeeds(&format!("cat /sys/class/net/{lan}/device/features"));
        let missing: Vec<_> = OFFLOADS.into_iter().filter(|&bit| features.as_bytes()[bit] != b'1').collect();
        assert!(missing.is_empty(), "{missing:?} of {features}");

        let before = self.network.counts().unwrap();
        guest.iperf(Network::ADDRESS, "--parallel 2");
        guest.iperf(Network::ADDRESS, "--parallel 2 --reverse");
        for (now, then) in self.network.counts().unwrap().into_iter().zip(before) {
            let (bytes, frames) = (now.0 - then.0, now.1 - then.1);
            assert!(bytes > FRAME * frames, "no frame of {frames} is larger than one of a wire, {bytes} bytes");
        }
        for mac in [PASST_MAC, VHOST_MAC] {
            let name = guest.interface(mac);
            guest.succeeds(&format!("ip link set {name} up && udhcpc -n -q -t 10 -i {name}"));
            guest.iperf(Passt::HOST, "");
            guest.iperf(Passt::HOST, "--reverse");
            // The other one gives the same address.
            guest.succeeds(&format!("ip addr flush dev {name} && ip link set {name} down"));
        }

        for up in [false, true] {
            monitor.does("set_link", json!({ "name": "lan", "up": up }));
            guest.waits_until(&format!("[ $(cat /sys/class/net/{lan}/carrier) = {} ]", u8::from(up)));
        }
    }

    /// Guests on the server itself, where nothing pins their memory: what one gives by its balloon, and another reports to be free, the server
    /// has again.
    fn balloon(&self) {
        let run = |(number, options): (u32, &str)| {
            let args = ["--balloon", options].map(str::to_owned).to_vec();
            let config = VmConfig {
                cpus: 1,
                memory: "256M".to_owned(),
                args,
                ..VmConfig::new(&format!("balloon-{number}"), number)
            };
            Vmm::run_on_the_server(&self.bed.server, &config).unwrap()
        };
        let mut vms = [(0, "on"), (1, "on,free-page-reporting=on")].map(run);
        for vm in &mut vms {
            vm.expect(guest::UP_MARK, BOOT_LIMIT).unwrap();
            vm.expect("# ", LIMIT).unwrap();
            types(vm, "mount -t tmpfs -o size=90% tmpfs /tmp");
        }
        // The one that reports comes first: when what it filled is back, so is what it had touched before, and nothing but the balloon gives.
        for (number, vm) in vms.iter_mut().enumerate().rev() {
            types(vm, "dd if=/dev/zero of=/tmp/much bs=1M count=128");
            let filled = self.available();
            types(vm, "rm /tmp/much");
            if number == 0 {
                self.server_runs(&["balloon", "balloon-0", "96M"]);
            }
            self.waits_for_available(filled + MUCH);
        }
        // It has its memory back when it needs it.
        self.server_runs(&["balloon", "balloon-0", "256M"]);
        types(&mut vms[0], "until dd if=/dev/zero of=/tmp/much bs=1M count=128; do sleep 0.2; done");
        for vm in &mut vms {
            vm.type_text("poweroff -f\n").unwrap();
            assert_eq!(vm.wait_for_exit(LIMIT).unwrap(), Status::Code(0), "{}", vm.text());
        }
    }

    /// Runs one of soc-vmm's commands on the server.
    fn server_runs(&self, command: &[&str]) {
        let ended = self.bed.server.exec(SOC_VMM, command, LIMIT).unwrap();
        assert_eq!(ended.status, Status::Code(0), "{command:?}: {}", ended.stderr);
    }

    /// Bytes that programs of the server could have.
    fn available(&self) -> u64 {
        let text = self.bed.server.read("/proc/meminfo").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).expect("MemAvailable");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    }

    fn waits_for_available(&self, bytes: u64) {
        let end = Instant::now() + LIMIT;
        loop {
            let available = self.available();
            if available >= bytes {
                return;
            }
            assert!(Instant::now() < end, "{available} bytes are available, not {bytes}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// A process that serves at a socket of its own.
fn serves(mut command: Command, socket: &Path) -> Child {
    command.stdin(Stdio::null());
    let mut server = Child::spawn(command).unwrap();
    while !is_listened_on(socket, None) {
        let ended = server.wait(Duration::from_millis(20)).unwrap();
        assert!(ended.is_none(), "{}: {ended:?}", socket.display());
    }
    server
}

/// Runs a command at the console of the guest that has only a shell.
fn types(vmm: &mut Vmm<'_>, command: &str) {
    vmm.type_text(&format!("{command} && echo don''e\n")).unwrap();
    vmm.expect("done", LIMIT).unwrap();
}

/// The agent in the guest, over a port with its name.
fn agent_by_a_port(guest: &mut Guest<'_, '_>, socket: &Path) {
    guest.instrument(
        "usr/sbin/qemu-ga",
        &format!("-d -t /run -f /run/port.pid -m virtio-serial -p /dev/virtio-ports/{AGENT}"),
    );
    ask_agent(Talk::connect(socket).unwrap());
}

/// Another agent, which listens on a port of its machine's.
fn agent_by_a_socket(guest: &mut Guest<'_, '_>, socket: &Path) {
    guest.instrument("usr/sbin/qemu-ga", &format!("-d -t /run -f /run/vsock.pid -m vsock-listen -p 3:{AGENT_PORT}"));
    // It says that it runs before it listens; until then the guest refuses, and the connection ends.
    let end = Instant::now() + LIMIT;
    let (talk, answer) = loop {
        let mut talk = Talk::connect(socket).unwrap();
        talk.say(&format!("CONNECT {AGENT_PORT}")).unwrap();
        match talk.line() {
            Ok(answer) => break (talk, answer),
            Err(e) => assert!(Instant::now() < end, "{e}"),
        }
    };
    assert!(answer.starts_with("OK "), "{answer}");
    ask_agent(talk);
}

fn ask_agent(mut agent: Talk) {
    assert_eq!(agent.execute("guest-sync", &json!({ "id": 7 })), 7);
    assert_eq!(agent.execute("guest-ping", &Value::Null), json!({}));
    let info = agent.execute("guest-info", &Value::Null);
    assert!(info["supported_commands"].as_array().is_some_and(|commands| commands.len() > 20), "{info}");
    let release = agent.execute("guest-get-osinfo", &Value::Null);
    assert_eq!(release["id"], "debian", "{release}");
}

/// A Debian that somebody is logged into.
struct Guest<'v, 'a>(Shell<'v, 'a>);

impl Guest<'_, '_> {
    /// Where the instruments are.
    const MOUNTED: &'static str = "/mnt";

    /// Runs a command that succeeds; what it printed.
    fn succeeds(&mut self, command: &str) -> String {
        let answer = self.0.run(command, LIMIT).unwrap();
        assert_eq!(answer.status, 0, "{command}: {}", answer.output);
        answer.output
    }

    /// Waits until a command succeeds.
    fn waits_until(&mut self, command: &str) {
        self.succeeds(&format!("n=0; until {command} || [ $n -ge 300 ]; do n=$((n+1)); sleep 0.1; done; {command}"));
    }

    fn mount_instruments(&mut self) {
        self.succeeds(&format!("mount -o ro /dev/disk/by-id/virtio-instruments {}", Self::MOUNTED));
    }

    /// Runs one of the instruments.
    fn instrument(&mut self, program: &str, arguments: &str) -> String {
        self.succeeds(&format!("{} {arguments}", Instruments::run_at(Self::MOUNTED, program)))
    }

    /// fio writes 4 MiB at each of these offsets (MiB) of disks, on that CPU, all at once, and reads back what it wrote.
    fn fio(&mut self, jobs: &[(&str, u32, u32)], more: &str) {
        let how = "--direct=1 --ioengine=libaio --iodepth=8 --rw=randwrite --bsrange=4k-64k --size=4m --thread";
        let verify = "--verify=crc32c --verify_fatal=1 --fdatasync=16";
        let jobs = jobs.iter().map(|(disk, offset, cpu)| {
            format!("--name=at-{offset} --filename={disk} --offset={offset}m --cpus_allowed={cpu}")
        });
        let jobs = jobs.collect::<Vec<_>>().join(" ");
        self.instrument("usr/bin/fio", &format!("--output=/tmp/fio {how} {verify} {jobs} {more}"));
    }

    /// What nobody has written in the second half of a disk is its backing file's.
    fn reads_the_rest_of(&mut self, disk: &str) {
        self.succeeds(&format!("{} >/tmp/rest", lines(BASE_LINES / 2, BASE_LINES)));
        self.succeeds(&format!("dd if={disk} bs=1M skip=4 iflag=direct 2>/dev/null | busybox cmp - /tmp/rest"));
    }

    /// The name of the interface with that address.
    fn interface(&mut self, mac: &str) -> String {
        self.succeeds(&format!("basename $(dirname $(grep -l {mac} /sys/class/net/*/address))")).trim().to_owned()
    }

    /// iperf3 sends to a server, or with `--reverse` receives; what is under way when the sender is done doesn't count.
    fn iperf(&mut self, server: &str, more: &str) {
        self.succeeds("rm -f /tmp/iperf");
        self.instrument(
            "usr/bin/iperf3",
            &format!("--client {server} --bytes {SENT} {more} --json --logfile /tmp/iperf"),
        );
        let bytes =
            self.succeeds("sed -n '/\"sum_received\"/,/}/s/.*\"bytes\":[^0-9]*\\([0-9]*\\).*/\\1/p' /tmp/iperf");
        let bytes: u64 = bytes.trim().parse().unwrap_or_else(|e| panic!("{e}: {bytes}"));
        assert!(bytes >= SENT / 2, "{server} {more}: {bytes} bytes");
    }

    fn has_entropy(&mut self) {
        assert_eq!(self.succeeds("cat /sys/class/misc/hw_random/rng_current"), "virtio_rng.0\n");
        let mut read = || self.succeeds("head -c 1024 /dev/hwrng | sha256sum");
        let (one, other) = (read(), read());
        assert_ne!(one, other);
        assert!(!one.starts_with(SHA256_OF_NOTHING), "{one}");
    }

    fn has_no_complaint(&mut self) {
        let said = self.succeeds("dmesg --notime --level emerg,alert,crit,err,warn");
        assert_eq!(complaints::of_the_kernel(&said), [""; 0], "dmesg");
        // What many functions say is said once: the line is slow.
        let functions = self.succeeds("lspci -vv | sort -u");
        assert_eq!(complaints::of_lspci(&functions), [""; 0], "{functions}");
    }
}

/// How the SHA-256 of no bytes begins.
const SHA256_OF_NOTHING: &str = "e3b0c44298fc1c14";

/// Lines of the backing file, of 8 bytes each.
const BASE_LINES: u64 = SIZE / 8;

/// The backing file: its lines' numbers.
fn base() -> Vec<u8> {
    (0..BASE_LINES).flat_map(|number| format!("{number:07}\n").into_bytes()).collect()
}

/// A command that prints the backing file from a line on, up to another one.
fn lines(from: u64, to: u64) -> String {
    format!("seq -f %07.0f {from} {}", to - 1)
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path of the testbed is text")
}
