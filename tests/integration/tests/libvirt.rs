//! Debian's unmodified libvirtd drives soc-vmm on this machine's KVM: what `virsh` does to a domain is seen in the guest, in its
//! images or among the processes.

use std::cell::OnceCell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use integration::libvirt::{Boot, Domain, Host, Message, Operated, cdrom, disk, messages, tap, user};
use integration::{kvm, test_name};
use nix::sys::signal::Signal;
use payloads::operated::{self, keys};
use payloads::{balloon, virtio_blk};
use testbed::debian;
use testbed::libvirt::{Config, Libvirt, Process};

/// The domain of most tests.
const NAME: &str = "operated";
/// Its interfaces.
const TAP: &str = "guest0";
const SECOND_TAP: &str = "guest1";
/// How long the guest may take to say something.
const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

#[test]
fn the_daemons_start_come_back_and_leave_nothing() {
    if let Some(why) = Libvirt::lacks().unwrap() {
        testbed::skip(&test_name(), &why);
        return;
    }
    let libvirt = Libvirt::start(&Config { stock: true, ..Config::default() }).unwrap();
    let says = |args: &[&str]| {
        let output = libvirt.virsh(args).unwrap();
        assert_eq!(output.status, 0, "virsh {args:?}: {}", output.stderr);
        output.stdout
    };
    let version = libvirt.output("libvirtd", &["--version"]).unwrap();
    assert_eq!(version.stdout, "libvirtd (libvirt) 9.0.0\n");
    assert_eq!(says(&["list", "--all", "--name"]).trim(), "");
    assert!(says(&["nodeinfo"]).contains("x86_64"));
    assert!(says(&["capabilities"]).contains("<arch>x86_64</arch>"));

    let before = libvirt.running("libvirtd");
    libvirt.restart_libvirtd().unwrap();
    let after = libvirt.running("libvirtd");
    assert!(before.len() == 1 && after.len() == 1 && before[0].pid != after[0].pid, "{before:?}, {after:?}");
    assert_eq!(libvirt.running("virtlogd").len(), 1);

    let everybody = libvirt.processes();
    drop(libvirt);
    let alive = |pid: i32| Path::new(&format!("/proc/{pid}")).exists();
    assert!(!everybody.iter().any(|process| alive(process.pid)), "{everybody:?}");
}

#[test]
fn a_domain_lives_as_virsh_says() {
    let Some(mut host) = start(true) else { return };
    host.virsh(&["start", NAME]);
    is_confined(&host);
    let mut console = at(&host);
    console.answers('x');

    console.stands_still_and_goes_on(
        || {
            host.virsh(&["suspend", NAME]);
            host.becomes(NAME, "paused (user)");
        },
        || {
            host.virsh(&["resume", NAME]);
            host.becomes(NAME, "running (unpaused)");
        },
    );
    host.virsh(&["reset", NAME]);
    console.is_up();
    host.virsh(&["reboot", NAME]);
    console.0.expect(operated::BUTTON, LIMIT).unwrap();
    console.is_up();
    host.becomes(NAME, "running (");
    console.does(keys::RESET);
    console.is_up();
    host.told(0, "event 'reboot' for domain 'operated'");

    survives_libvirtd(&mut host, &mut console);

    host.virsh(&["shutdown", NAME]);
    console.0.expect(operated::BUTTON, LIMIT).unwrap();
    host.becomes(NAME, "shut off (shutdown)");
    is_gone(&host);

    host.virsh(&["start", NAME]);
    at(&host).does(keys::OFF);
    host.becomes(NAME, "shut off (shutdown)");
    is_gone(&host);

    host.virsh(&["start", NAME]);
    host.virsh(&["destroy", NAME]);
    host.becomes(NAME, "shut off (destroyed)");
    is_gone(&host);
    host.check_messages();
}

#[test]
fn a_domain_that_is_killed_has_crashed_and_leaves_nothing() {
    let Some(host) = start(true) else { return };
    for victim in ["soc-vmm", "host-kvm-shim"] {
        host.virsh(&["start", NAME]);
        at(&host).answers('x');
        let from = host.events().len();
        host.libvirt.signal(&the(&host, victim), Signal::SIGKILL).unwrap();
        host.becomes(NAME, "shut off (crashed)");
        host.told(from, "Stopped Failed");
        is_gone(&host);
    }
    host.check_messages();
}

#[test]
fn a_domain_s_actions_are_taken() {
    let Some(host) = start(true) else { return };
    let panic = "<panic model=\"isa\"/>";
    for (action, key, state) in [
        ("<on_reboot>destroy</on_reboot>", keys::RESET, "shut off (shutdown)"),
        ("<on_poweroff>restart</on_poweroff>", keys::OFF, "running"),
        ("<on_crash>destroy</on_crash>", keys::PANIC, "shut off (crashed)"),
        ("<on_crash>preserve</on_crash>", keys::PANIC, "crashed (panicked)"),
    ] {
        let mut domain = domain(&host);
        domain.more = action.to_owned();
        domain.devices.push(panic.to_owned());
        host.define(&domain);
        host.virsh(&["start", NAME]);
        let mut guest = at(&host);
        guest.does(key);
        if state == "running" {
            guest.is_up();
        }
        host.becomes(NAME, state);
        let _ = host.libvirt.virsh(&["destroy", NAME]).unwrap();
    }

    host.define(&domain(&host));
    host.virsh(&["autostart", NAME]);
    assert_eq!(host.field(&["dominfo", NAME], "Autostart"), "enable");
    // What a boot of this machine does to /run.
    host.libvirt.end_libvirtd(Signal::SIGTERM).unwrap();
    fs::remove_file(host.libvirt.path("/run/libvirt/qemu/autostarted")).unwrap();
    host.libvirt.start_libvirtd().unwrap();
    host.becomes(NAME, "running (booted)");
    at(&host).answers('x');
    host.check_messages();
}

#[test]
fn a_domain_is_measured_and_changed_while_it_runs() {
    let Some(host) = start(true) else { return };
    host.virsh(&["start", NAME]);
    let mut guest = at(&host);
    guest.answers('x');
    is_measured(&host);
    disks_come_and_go(&host);
    media_are_changed(&host);
    interfaces_come_and_go(&host);

    host.virsh(&["setvcpus", NAME, "3", "--live"]);
    assert_eq!(host.virsh(&["vcpucount", NAME, "--live", "--active"]), "3");
    let cpus = host.qmp(NAME, "query-cpus-fast", serde_json::json!({}));
    assert_eq!(cpus.as_array().unwrap().len(), 3);

    host.virsh(&["blkdeviotune", NAME, "vda", "--total-iops-sec", "50", "--live"]);
    assert_eq!(host.field(&["blkdeviotune", NAME, "vda"], "total_iops_sec"), "50");
    let apart = ["--total-iops-sec", "0", "--read-iops-sec", "60", "--write-bytes-sec", "70000"];
    host.virsh(&[&["blkdeviotune", NAME, "vda"], &apart[..], &["--live"]].concat());
    for (name, value) in [("total_iops_sec", "0"), ("read_iops_sec", "60"), ("write_bytes_sec", "70000")] {
        assert_eq!(host.field(&["blkdeviotune", NAME, "vda"], name), value, "{name}");
    }
    guest.answers('y');
    host.check_messages();
}

/// A write for which there is no room stops the domain; once there is room it is made again, and the guest never knows.
#[test]
fn a_full_file_system_stops_a_domain_until_there_is_room() {
    const FILLER: &str = "filler";
    const FULL: &str = "/var/lib/libvirt/images/full";
    const DEPTH: u32 = virtio_blk::MOST_DEPTH;
    let Some(host) = start(true) else { return };
    let mount = |args: &[&str]| {
        let output = host.libvirt.output("busybox", &[&["mount"], args].concat()).unwrap();
        assert_eq!(output.status, 0, "mount {args:?}: {}", output.stderr);
    };
    fs::create_dir(host.libvirt.path(FULL)).unwrap();
    mount(&["-t", "tmpfs", "-o", "size=64k", "tmpfs", FULL]);
    let file = format!("{FULL}/disk");
    assert_eq!(host.libvirt.output("busybox", &["truncate", "-s", "1M", &file]).unwrap().status, 0);
    let load = virtio_blk::Load { write: true, depth: DEPTH, count: DEPTH, rounds: 1, sleeps: true };
    host.libvirt.write(&image("writes"), virtio_blk::virtio_blk(load).unwrap().file().1).unwrap();
    let boot = Boot::Kernel { kernel: image("writes"), initrd: None, cmdline: None };
    host.define(&Domain { devices: vec![disk(&file, "raw", "vda")], ..Domain::new(FILLER, boot) });

    host.virsh(&["start", FILLER]);
    host.becomes(FILLER, "paused (I/O error)");
    assert_eq!(host.virsh(&["domblkerror", FILLER]), "vda: no space");
    host.told(0, &format!("event 'io-error-reason' for domain '{FILLER}': {file} (virtio-disk0) pause due to enospc"));
    let nodes = host.qmp(FILLER, "query-named-block-nodes", serde_json::json!({}));
    let node = nodes.as_array().unwrap().iter().find(|node| node["drv"] == "raw").unwrap();
    let told = messages(&host.libvirt.libvirtd_log()).into_iter().find_map(|message| match message {
        Message::Told(_, event) if event["event"] == "BLOCK_IO_ERROR" => Some(event["data"]["node-name"].clone()),
        _ => None,
    });
    assert_eq!(told.as_ref(), Some(&node["node-name"]));
    // Nothing has changed meanwhile: it stops again, at once and for the same reason.
    let from = host.events().len();
    host.virsh(&["resume", FILLER]);
    host.told(from, "Suspended I/O Error");
    host.becomes(FILLER, "paused (I/O error)");

    mount(&["-o", "remount,size=2M", FULL]);
    host.virsh(&["resume", FILLER]);
    let emulator = format!("/proc/{}/root{file}", the(&host, "soc-vmm").pid);
    let piece = |number: u32| [number as u8 | virtio_blk::WRITTEN; virtio_blk::PIECE as usize];
    let all: Vec<u8> = (0..DEPTH).flat_map(piece).collect();
    host.waits("all was written", || fs::read(&emulator).is_ok_and(|bytes| bytes.starts_with(&all)));
    host.becomes(FILLER, "running (unpaused)");
    assert_eq!(host.virsh(&["domblkerror", FILLER]), "No errors found");
    // A request counts a moment after its bytes are there.
    let written = || host.field(&["domblkstat", FILLER, "vda"], "vda wr_req");
    host.waits("every write has counted", || written() == DEPTH.to_string());
    host.virsh(&["destroy", FILLER]);
    host.check_messages();
}

/// What `setmem` takes the guest gives, and then the host has it; what it gives the guest has again. What the guest says of its memory is told.
#[test]
fn a_guest_s_memory_is_taken_given_back_and_told() {
    const GIVER: &str = "giver";
    let Some(host) = start(true) else { return };
    host.libvirt.write(&image("balloon"), balloon::balloon().unwrap().file().1).unwrap();
    let boot = Boot::Kernel { kernel: image("balloon"), initrd: None, cmdline: None };
    host.define(&Domain { memory: (balloon::MEMORY / MIB) as u32, ..Domain::new(GIVER, boot) });
    host.virsh(&["start", GIVER]);
    let mut console = host.libvirt.console(GIVER).unwrap();
    console.expect(balloon::UP, LIMIT).unwrap();

    let told = |name: &str| -> u64 { host.field(&["dommemstat", GIVER], name).parse().unwrap() };
    let all = held(&host);
    assert!(all >= balloon::MOST, "{all} bytes of memory that the guest has touched");
    host.virsh(&["dommemstat", GIVER, "--period", "1", "--live"]);
    for taken in [balloon::MOST, 0, 3 * balloon::PART] {
        let left = (balloon::MEMORY - taken) >> 10;
        let from = host.events().len();
        host.virsh(&["setmem", GIVER, &format!("{left}k"), "--live"]);
        console.expect(&format!("{}{:016x}", balloon::GIVEN, taken / 4096), LIMIT).unwrap();
        host.told(from, &format!("event 'balloon-change' for domain '{GIVER}': {left}KiB"));
        assert_eq!(told("actual"), left);
        assert_eq!(host.field(&["dominfo", GIVER], "Used memory"), format!("{left} KiB"));
        host.waits("the host has what was given", || held(&host) == all - taken);
        host.waits("the guest tells of it", || told("unused") == left);
        assert_eq!(told("available"), balloon::MEMORY >> 10);
        assert!(told("last_update") > 0);
    }
    // More than it has is libvirt's to refuse.
    assert!(host.virsh_fails(&["setmem", GIVER, "65M", "--live"]).contains("cannot set memory higher than max memory"));
    host.virsh(&["destroy", GIVER]);
    host.check_messages();
}

/// Bytes of the guest's memory that the machine holds.
fn held(host: &Host) -> u64 {
    let files = fs::read_dir(format!("/proc/{}/fd", the(host, "host-kvm-shim").pid)).unwrap();
    let ram = files.filter_map(|file| fs::metadata(file.ok()?.path()).ok()).filter(|it| it.len() == balloon::MEMORY);
    ram.map(|it| it.blocks() * 512).max().expect("the guest has memory")
}

/// passt is a process that soc-vmm starts, which it may not any more when it runs under libvirt's sandbox: those of the start are there.
#[test]
fn a_user_s_network_is_there_from_the_start_and_comes_later_without_a_sandbox() {
    let another = user("52:54:00:00:00:04");
    let Some(host) = start(true) else { return };
    host.virsh(&["start", NAME]);
    has_passts(&host, 1);
    host.libvirt.write("/tmp/another.xml", &another).unwrap();
    let why = host.virsh_fails(&["attach-device", NAME, "/tmp/another.xml", "--live"]);
    assert!(why.contains("passt"), "{why}");
    has_passts(&host, 1);
    host.check_messages();
    drop(host);

    let host = start(false).unwrap();
    host.virsh(&["start", NAME]);
    host.with_xml(&["attach-device", NAME], &another, &["--live"]);
    has_passts(&host, 2);
    host.virsh(&["detach-interface", NAME, "user", "--mac", "52:54:00:00:00:04", "--live"]);
    has_passts(&host, 1);
    host.virsh(&["destroy", NAME]);
    is_gone(&host);
    host.check_messages();
}

#[test]
fn capabilities_are_those_of_this_host() {
    let Some(host) = start(true) else { return };
    let text = host.virsh(&["domcapabilities", "--emulatorbin", Libvirt::EMULATOR, "--machine", "q35"]);
    for part in ["<domain>kvm</domain>", "<arch>x86_64</arch>", "<mode name='host-passthrough' supported='yes'>"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    assert!(text.contains("<value>virtio</value>") && text.contains("<value>sata</value>"), "{text}");
    for part in ["<value>spice</value>", "<value>usb</value>", "<value>qxl</value>"] {
        assert!(!text.contains(part), "{part} in {text}");
    }
    // Asking needs no function and leaves no process.
    is_gone(&host);
    host.check_messages();
}

#[test]
fn a_domain_boots_through_seabios_from_an_overlay() {
    let Some(host) = start(true) else { return };
    host.libvirt.write(&image("base"), boot_sector().unwrap()).unwrap();
    debian::instruments().unwrap().make_overlay("base", &host.libvirt.path(&image("overlay"))).unwrap();
    let devices = vec![disk(&image("disk"), "raw", "vdb"), disk(&image("overlay"), "qcow2", "vda")];
    host.define(&Domain { devices, ..Domain::new("bios", Boot::Disk) });
    host.virsh(&["start", "bios", "--paused"]);
    let mut console = host.libvirt.console("bios").unwrap();
    host.virsh(&["resume", "bios"]);
    console.expect(BOOTED, LIMIT).unwrap();
    host.virsh(&["reset", "bios"]);
    console.expect(BOOTED, LIMIT).unwrap();
    host.virsh(&["destroy", "bios"]);
    host.check_messages();
}

/// What [`boot_sector`] says.
const BOOTED: &str = "booted from a disk";

/// A disk whose first sector says so on the serial port.
fn boot_sector() -> Result<Vec<u8>, IcedError> {
    const ORIGIN: u64 = 0x7c00;
    const TEXT: u32 = 0x7d00;
    let mut a = CodeAssembler::new(16)?;
    let [mut next, mut full, mut over] = [0; 3].map(|_| a.create_label());
    a.cli()?;
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.mov(si, TEXT)?;
    a.set_label(&mut next)?;
    a.mov(dx, 0x3fd)?;
    a.set_label(&mut full)?;
    a.in_(al, dx)?;
    a.test(al, 0x20)?;
    a.je(full)?;
    a.lodsb()?;
    a.test(al, al)?;
    a.je(over)?;
    a.mov(dx, 0x3f8)?;
    a.out(dx, al)?;
    a.jmp(next)?;
    a.set_label(&mut over)?;
    a.hlt()?;
    a.jmp(over)?;
    let mut disk = a.assemble(ORIGIN)?;
    disk.resize(TEXT as usize - ORIGIN as usize, 0);
    disk.extend(format!("{BOOTED}\r\n\0").bytes());
    disk.resize(MIB as usize, 0);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    Ok(disk)
}

/// The daemons with the domain defined, where VMs can run.
fn start(stock: bool) -> Option<Host> {
    if !kvm(&test_name()) {
        return None;
    }
    let host = Host::start(stock, &[])?;
    if let Some(why) = host.libvirt.no_cgroups() {
        testbed::skip(&format!("{}: its domains' cgroups", test_name()), &why);
    }
    let payload = operated::operated().unwrap();
    host.libvirt.write(&image("kernel"), payload.file().1).unwrap();
    for (name, bytes) in [("disk", MIB), ("second", MIB), ("cd", 64 << 10), ("other-cd", 64 << 10)] {
        fs::File::create(host.libvirt.path(&image(name))).unwrap().set_len(bytes).unwrap();
    }
    host.libvirt.make_tap(TAP).unwrap();
    host.libvirt.make_tap(SECOND_TAP).unwrap();
    host.define(&domain(&host));
    assert_eq!(host.field(&["dominfo", NAME], "State"), "shut off");
    Some(host)
}

fn image(name: &str) -> String {
    format!("{}/{name}", Libvirt::IMAGES)
}

fn domain(_: &Host) -> Domain {
    let boot = Boot::Kernel { kernel: image("kernel"), initrd: None, cmdline: None };
    let devices = vec![
        disk(&image("disk"), "raw", "vda"),
        cdrom(Some(&image("cd")), "sda"),
        tap(TAP, "52:54:00:00:00:01"),
        user("52:54:00:00:00:02"),
    ];
    let features = r#"<kvm><dirty-ring state="on" size="1024"/></kvm>"#.to_owned();
    Domain { vcpus: (1, 3), features, devices, ..Domain::new(NAME, boot) }
}

/// The guest behind `virsh console`.
fn at(host: &Host) -> Operated {
    Operated(host.libvirt.console(NAME).unwrap())
}

/// The one process of that name. A program that is just being started has the name of who starts it.
fn the(host: &Host, name: &str) -> Process {
    let one = OnceCell::new();
    host.waits(&format!("there is one {name}"), || {
        let mut all = host.libvirt.running(name);
        all.len() == 1 && one.set(all.remove(0)).is_ok()
    });
    one.into_inner().expect("it was set")
}

/// Nothing of a domain is left.
fn is_gone(host: &Host) {
    let left = || {
        host.libvirt.processes().into_iter().filter(|process| {
            ["soc-vmm", "host-kvm-shim"].contains(&process.name()) || process.name().starts_with("passt")
        })
    };
    host.waits("the domain's processes end", || left().count() == 0);
}

/// libvirt's own security: who the emulator is, what it may, what it sees.
fn is_confined(host: &Host) {
    let vmm = the(host, "soc-vmm");
    assert_eq!(vmm.status("Uid"), "64055\t64055\t64055\t64055");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(vmm.status(set), "0000000000000000", "{set}");
    }
    let nodes = fs::read_dir(format!("/proc/{}/root/dev", vmm.pid)).unwrap();
    let mut nodes: Vec<String> = nodes.map(|node| node.unwrap().file_name().into_string().unwrap()).collect();
    nodes.sort();
    let allowed = ["full", "kvm", "mqueue", "null", "ptmx", "pts", "random", "shm", "urandom", "zero"];
    assert!(
        nodes.iter().all(|node| allowed.contains(&node.as_str())) && nodes.contains(&"kvm".to_owned()),
        "{nodes:?}"
    );
    if host.libvirt.no_cgroups().is_none() {
        let cgroups = fs::read_to_string(format!("/proc/{}/cgroup", vmm.pid)).unwrap();
        assert!(cgroups.contains("/machine/qemu-") && cgroups.contains("-operated.libvirt-qemu"), "{cgroups}");
    }
}

/// A domain doesn't notice that libvirtd ends and comes back, running or paused.
fn survives_libvirtd(host: &mut Host, guest: &mut Operated) {
    let vmm = the(host, "soc-vmm");
    host.restart_libvirtd();
    host.becomes(NAME, "running");
    *guest = at(host);
    guest.answers('a');
    host.virsh(&["suspend", NAME]);
    host.libvirt.end_libvirtd(Signal::SIGKILL).unwrap();
    host.restart_libvirtd();
    host.becomes(NAME, "paused");
    *guest = at(host);
    host.virsh(&["resume", NAME]);
    guest.answers('b');
    assert_eq!(the(host, "soc-vmm"), vmm);
}

fn is_measured(host: &Host) {
    let info = |name: &str| host.field(&["dominfo", NAME], name);
    assert_eq!((info("State").as_str(), info("CPU(s)").as_str()), ("running", "1"));
    assert_eq!((info("Max memory").as_str(), info("Used memory").as_str()), ("65536 KiB", "65536 KiB"));
    let time = || host.field(&["domstats", NAME, "--cpu-total"], "cpu.time");
    let first = time();
    host.waits("its CPU time grows", || time() != first);

    for mode in ["page-sampling", "dirty-bitmap", "dirty-ring"] {
        host.virsh(&["domdirtyrate-calc", NAME, "--seconds", "1", "--mode", mode]);
        let of = |name: &str| host.field(&["domstats", NAME, "--dirtyrate"], &format!("dirtyrate.{name}"));
        host.waits("its dirty rate is measured", || of("calc_status") == "2");
        assert_eq!((of("calc_mode"), of("calc_period")), (mode.to_owned(), "1".to_owned()));
        of("megabytes_per_second").parse::<u64>().unwrap();
        if mode == "dirty-ring" {
            of("vcpu.0.megabytes_per_second").parse::<u64>().unwrap();
        }
    }

    let stats = host.virsh(&["domstats", NAME]);
    for line in
        ["state.state=1", "vcpu.current=1", "vcpu.maximum=3", "block.count=2", "net.count=2", "block.0.name=vda"]
    {
        assert!(stats.lines().any(|found| found.trim() == line), "no {line} in {stats}");
    }
    assert_eq!(host.field(&["domstats", NAME], "block.0.capacity"), MIB.to_string());
    let memory = |name: &str| -> u64 { host.field(&["dommemstat", NAME], name).parse().unwrap() };
    assert_eq!(memory("actual"), 65536);
    assert!(memory("rss") > 0);
    assert_eq!(host.field(&["domblkinfo", NAME, "vda"], "Capacity"), MIB.to_string());
    for name in ["rd_req", "rd_bytes", "wr_req", "wr_bytes", "flush_operations"] {
        let value = host.field(&["domblkstat", NAME, "vda"], &format!("vda {name}"));
        assert_eq!(value, "0", "{name}: the guest hasn't touched its disk");
    }
    assert_eq!(host.virsh(&["domblkerror", NAME]), "No errors found");
    let interfaces = host.virsh(&["domiflist", NAME]);
    assert!(interfaces.contains(TAP) && interfaces.contains("52:54:00:00:00:02"), "{interfaces}");
    host.field(&["domifstat", NAME, TAP], &format!("{TAP} rx_packets"));
    assert_eq!(host.field(&["vcpuinfo", NAME], "State"), "running");
    // It runs on the host: what stands for it here takes no time, of which virsh then tells none.
    let affinity = host.field(&["vcpuinfo", NAME], "CPU Affinity");
    assert!(affinity.contains('y'), "{affinity}");
}

/// Whether soc-vmm has a file of [`Libvirt::IMAGES`] open.
fn has_open(host: &Host, name: &str) -> bool {
    let files = fs::read_dir(format!("/proc/{}/fd", the(host, "soc-vmm").pid)).unwrap();
    let mut files = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    files.any(|file| file.ends_with(image(name).trim_start_matches('/')))
}

fn disks_come_and_go(host: &Host) {
    for _ in 0..2 {
        assert!(!has_open(host, "second"));
        host.virsh(&["attach-disk", NAME, &image("second"), "vdb", "--live"]);
        assert!(has_open(host, "second"));
        assert!(host.virsh(&["domblklist", NAME]).contains("vdb"));
        host.virsh(&["detach-disk", NAME, "vdb", "--live"]);
        host.waits("the disk goes", || !has_open(host, "second"));
        assert!(!host.virsh(&["domblklist", NAME]).contains("vdb"));
    }
    host.virsh(&["blockresize", NAME, "vda", "3M"]);
    assert_eq!(fs::metadata(host.libvirt.path(&image("disk"))).unwrap().len(), 3 * MIB);
    let disk = host.libvirt.path(&image("disk"));
    for (name, bytes) in [("Capacity", 3 * MIB), ("Allocation", fs::metadata(disk).unwrap().blocks() * 512)] {
        assert_eq!(host.field(&["domblkinfo", NAME, "vda"], name), bytes.to_string(), "{name}");
    }
}

fn media_are_changed(host: &Host) {
    assert!(has_open(host, "cd"));
    host.virsh(&["change-media", NAME, "sda", "--eject", "--live"]);
    assert!(!has_open(host, "cd"));
    host.virsh(&["change-media", NAME, "sda", &image("other-cd"), "--insert", "--live"]);
    assert!(has_open(host, "other-cd"));
    host.virsh(&["change-media", NAME, "sda", &image("cd"), "--update", "--live"]);
    assert!(has_open(host, "cd") && !has_open(host, "other-cd"));
}

fn interfaces_come_and_go(host: &Host) {
    let carrier = || {
        let path = format!("/sys/class/net/{SECOND_TAP}/carrier");
        host.libvirt.output("busybox", &["cat", &path]).unwrap().stdout.trim().to_owned()
    };
    assert_eq!(carrier(), "0");
    for _ in 0..2 {
        host.with_xml(&["attach-device", NAME], &tap(SECOND_TAP, "52:54:00:00:00:03"), &["--live"]);
        assert_eq!(carrier(), "1");
        host.virsh(&["detach-interface", NAME, "ethernet", "--mac", "52:54:00:00:00:03", "--live"]);
        host.waits("the interface goes", || carrier() == "0");
    }
}

/// So many passts are there, an operator's or soc-vmm's: one that starts or ends has another process for a moment.
fn has_passts(host: &Host, count: usize) {
    let passts = || host.libvirt.processes().iter().filter(|process| process.name().starts_with("passt")).count();
    host.waits(&format!("{count} passts"), || passts() == count);
}
