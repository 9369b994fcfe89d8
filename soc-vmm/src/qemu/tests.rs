//! Command lines: libvirt's, people's, and wrong ones.

mod notation;

use super::chardev::LogFile;
use super::small::{RebootAction, ShutdownAction};
use super::*;
use crate::boot::BootSource;
use crate::cli::{Invocation, RunConfig};
use crate::sandbox::SandboxSpec;

/// The recorded command lines: name, arguments.
fn recorded() -> Vec<(&'static str, Vec<&'static str>)> {
    let mut all: Vec<(&str, Vec<&str>)> = Vec::new();
    for text in include_str!("../../tests/data/libvirt-argv.txt").lines().filter(|text| !text.starts_with('#')) {
        match (text.strip_prefix("== "), all.last_mut()) {
            (Some(name), _) => all.push((name, Vec::new())),
            (None, Some((_, args))) => args.push(text),
            (None, None) => panic!("an argument before its name"),
        }
    }
    all
}

fn parsed(args: &[&str]) -> Result<Invocation, Wrong> {
    parse(args.iter().map(|arg| (*arg).into()))
}

fn config(args: &[&str]) -> RunConfig {
    match parsed(args) {
        Ok(Invocation::Run(config)) => *config,
        other => panic!("{args:?}: {other:?}"),
    }
}

fn of_record(name: &str) -> (RunConfig, Hardware) {
    let (_, args) = recorded().into_iter().find(|(known, _)| *known == name).unwrap();
    let mut config = config(&args);
    let hardware = config.hardware.take().unwrap();
    (config, hardware)
}

/// What is wrong with a command line of a machine and these.
fn refused(args: &[&str]) -> String {
    let all = [&["-machine", "q35"], args].concat();
    match parsed(&all) {
        Err(wrong) => wrong.to_string(),
        Ok(config) => panic!("{args:?} is taken: {config:?}"),
    }
}

#[test]
fn what_libvirt_starts_is_understood_or_refused_by_name() {
    // What such a domain's XML must not ask for, and what is said of it.
    let refused = [
        ("q35_tcg", "-accel: 'tcg' is not there"),
        ("q35_virtio_console", "-device: virtconsole: there is no virtio console"),
        ("q35_blk_mmio", "-device: virtio-blk-device: there is no virtio over MMIO"),
        ("q35_net_udp", "-netdev: type: 'socket' is none of tap, user"),
        ("q35_nousbnone", "-device: qemu-xhci: there is no USB"),
    ];
    let mut understood = 0;
    for (name, args) in recorded() {
        let machine = args[args.iter().position(|arg| *arg == "-machine").unwrap() + 1].split(',').next().unwrap();
        let outcome = parsed(&args);
        match refused.iter().find(|(known, _)| *known == name) {
            Some((_, why)) => {
                let wrong = outcome.expect_err(name).to_string();
                assert!(wrong.starts_with(why), "{name}: {wrong}");
            }
            None if machine.starts_with("pc-q35") => {
                let Ok(Invocation::Run(config)) = outcome else { panic!("{name}: {outcome:?}") };
                // Every domain of the recordings.
                assert!(config.paused && config.process.emulator, "{name}");
                assert_eq!(config.process.guest.as_deref(), Some("t"), "{name}");
                assert_eq!(config.machine.actions.shutdown, Some(ShutdownAction::Pause), "{name}");
                assert_ne!(config.machine.uuid, [0; 16], "{name}");
                assert!(config.machine.boot.strict, "{name}");
                assert_eq!(config.sandbox, Some(SandboxSpec::STRICT), "{name}");
                let hardware = config.hardware.unwrap();
                assert_eq!(hardware.monitors, ["charmonitor"], "{name}");
                understood += 1;
            }
            None => {
                let wrong = outcome.expect_err(name).to_string();
                let said = format!("-machine: type: there is no machine '{machine}': write q35");
                // What comes before the machine may be as little there.
                assert!(wrong == said || wrong.starts_with("-device"), "{name}: {wrong}");
            }
        }
    }
    assert_eq!(understood, 24);
}

#[test]
fn the_smallest_domain() {
    let (config, hardware) = of_record("q35_kvm_serial_pty");
    assert_eq!((config.memory.size, config.cpus, config.cpu.name()), (128 << 20, 1, "qemu64"));
    assert!(!config.machine.acpi);
    let uuid = 0x20ec_b7fe_7b1b_4717_a0d1_6b97_657b_2150_u128.to_be_bytes();
    assert_eq!((config.machine.uuid, config.machine.rtc), (uuid, small::RtcBase::Utc));
    let BootSource::Kernel { kernel, initrd, cmdline } = config.boot else { panic!("{:?}", config.boot) };
    assert_eq!(kernel.to_str(), Some("/srv/probe/vm/vmlinuz"));
    assert_eq!(initrd.unwrap().to_str(), Some("/srv/probe/vm/initrd.gz"));
    assert_eq!(cmdline, "console=ttyS0 panic=-1");
    let monitor =
        Chardev { id: "charmonitor".into(), kind: ChardevKind::Listen(Socket::Descriptor("28".into())), log: None };
    let serial = Chardev { id: "charserial0".into(), kind: ChardevKind::Pty, log: None };
    assert_eq!(hardware.chardevs, [monitor, serial]);
    assert_eq!(hardware.serial.as_deref(), Some("charserial0"));
    assert!(hardware.devices.is_empty() && hardware.ports.is_empty());
    assert!(of_record("q35_acpi").0.machine.acpi);
}

#[test]
fn serial_ports_in_files_and_sockets() {
    let (_, hardware) = of_record("q35_serial_file");
    let set = &hardware.add_fds[0];
    assert_eq!((set.set, set.fd, set.opaque.as_deref()), (0, 30, Some("serial0-source")));
    assert_eq!(hardware.chardevs[1].kind, ChardevKind::File { path: "/dev/fdset/0".into(), append: true });
    let (_, hardware) = of_record("q35_serial_unix");
    assert_eq!(hardware.chardevs[1].kind, ChardevKind::Listen(Socket::Descriptor("28".into())));
    let logged = Chardev::parse("pty,id=charserial0,logfile=/dev/fdset/1,logappend=on").unwrap();
    assert_eq!(logged.log, Some(LogFile { path: "/dev/fdset/1".into(), append: true }));
}

#[test]
fn disks_and_interfaces_are_where_libvirt_puts_them() {
    let (config, hardware) = of_record("q35_full");
    assert_eq!((config.cpus, config.topology.sockets(), config.memory.size), (2, 2, 256 << 20));
    let ports: Vec<_> = hardware.ports.iter().map(|port| (port.name.as_str(), port.devfn, port.slot)).collect();
    assert_eq!(ports, [("pci.1", 0x08, 1), ("pci.2", 0x09, 2), ("pci.3", 0x0a, 3)]);
    let places: Vec<_> =
        hardware.devices.iter().map(|it| (it.id.as_deref().unwrap(), it.bus.as_deref().unwrap())).collect();
    assert_eq!(places, [("virtio-disk0", "pci.2"), ("net0", "pci.1")]);
    let DeviceKind::Disk(disk) = &hardware.devices[0].kind else { panic!("no disk") };
    assert_eq!((disk.drive.as_str(), disk.write_cache), ("libvirt-1-format", Switch::Auto));
    let DeviceKind::Net(net) = &hardware.devices[1].kind else { panic!("no interface") };
    assert_eq!(net.address().unwrap().unwrap().0, [0x52, 0x54, 0, 0x11, 0x22, 0x33]);
    assert_eq!(hardware.netdevs[0].descriptors(), ["30"]);
    let [file, image] = &hardware.blockdevs[..] else { panic!("{:?}", hardware.blockdevs) };
    assert_eq!(file.filename.as_deref().unwrap().to_str(), Some("/srv/probe/vm/disk.raw"));
    assert_eq!((image.driver, image.read_only), (BlockDriver::Raw, false));
    assert_eq!(image.file, Some(FileRef::Node("libvirt-1-storage".into())));
    let order: Vec<_> = hardware.boot_order().into_iter().map(|place| place.path).collect();
    assert_eq!(order, ["/pci@i0cf8/pci-bridge@1,1/scsi@0/disk@0,0"]);

    let (_, hardware) = of_record("q35_full_rootbus");
    let places: Vec<_> =
        hardware.devices.iter().map(|it| (it.bus.as_deref().unwrap(), it.address.unwrap().devfn())).collect();
    assert_eq!(places, [("pcie.0", 0x10), ("pcie.0", 0x18)]);
    assert_eq!(hardware.boot_order()[0].path, "/pci@i0cf8/scsi@2/disk@0,0");
}

#[test]
fn other_devices_of_libvirt_s() {
    let (config, hardware) = of_record("q35_iothread_disk");
    assert!(hardware.blockdevs.iter().all(|node| node.cache.direct));
    assert_eq!(hardware.blockdevs[0].aio, Some(BlockAio::Native));
    let DeviceKind::Disk(disk) = &hardware.devices[0].kind else { panic!("no disk") };
    assert_eq!((disk.iothread.as_deref(), disk.write_cache), (Some("iothread1"), Switch::On));
    assert!(config.balloon.is_none());
    assert!(of_record("q35_balloon_virtio").0.balloon.is_some());
    let (_, hardware) = of_record("q35_agent_channel");
    let DeviceKind::Port(port) = &hardware.devices[1].kind else { panic!("no port") };
    assert_eq!((port.name.as_str(), port.nr), ("org.qemu.guest_agent.0", Some(1)));
    let (_, hardware) = of_record("q35_net_vhostuser");
    assert_eq!(hardware.netdevs[0].chardev.as_deref(), Some("charnet0"));
    assert!(matches!(&hardware.chardevs[1].kind, ChardevKind::Connect(path) if path.ends_with("vu.sock")));
    let (_, hardware) = of_record("q35_net_user");
    assert_eq!(hardware.netdevs[0].kind, NetdevKind::User);
    let (config, _) = of_record("q35_2of4vcpu");
    assert_eq!((config.cpus, config.topology.cpus()), (1, 2));
    let (config, _) = of_record("q35_cpu_host");
    assert_eq!(config.cpu.name(), "host");
    let (config, _) = of_record("q35_nokernel");
    assert!(matches!(&config.boot, BootSource::Firmware { code, nvram: None } if code.ends_with("bios-256k.bin")));
}

#[test]
fn what_virt_install_adds() {
    let uefi = config(&[
        "-machine",
        "pc-q35-7.2,usb=off,smm=off,dump-guest-core=off,pflash0=libvirt-pflash0-format,pflash1=libvirt-pflash1-format",
        "-accel",
        "kvm",
        "-blockdev",
        r#"{"driver":"file","filename":"/usr/share/OVMF/OVMF_CODE_4M.fd","node-name":"libvirt-pflash0-storage","auto-read-only":true,"discard":"unmap"}"#,
        "-blockdev",
        r#"{"node-name":"libvirt-pflash0-format","read-only":true,"driver":"raw","file":"libvirt-pflash0-storage"}"#,
        "-blockdev",
        r#"{"driver":"file","filename":"/nvram/g_VARS.fd","node-name":"libvirt-pflash1-storage","auto-read-only":true,"discard":"unmap"}"#,
        "-blockdev",
        r#"{"node-name":"libvirt-pflash1-format","read-only":false,"driver":"raw","file":"libvirt-pflash1-storage"}"#,
        "-global",
        "kvm-pit.lost_tick_policy=delay",
        "-global",
        "ICH9-LPC.disable_s3=1",
        "-no-hpet",
        "-rtc",
        "base=localtime,driftfix=slew",
        "-boot",
        "menu=on,splash-time=3000,strict=on",
        "-device",
        r#"{"driver":"ide-cd","bus":"ide.0","drive":"cd","id":"sata0-0-0","bootindex":2}"#,
        "-blockdev",
        r#"{"node-name":"cd","read-only":true,"driver":"raw","file":{"driver":"file","filename":"/a.iso"}}"#,
        "-no-reboot",
        "-action",
        "panic=pause",
    ]);
    let code =
        BootSource::Firmware { code: "/usr/share/OVMF/OVMF_CODE_4M.fd".into(), nvram: Some("/nvram/g_VARS.fd".into()) };
    assert_eq!(uefi.boot, code);
    assert_eq!(uefi.machine.rtc, small::RtcBase::LocalTime);
    assert!(uefi.machine.boot.menu && uefi.machine.boot.splash_time == Some(3000));
    assert_eq!(uefi.machine.actions.reboot, Some(RebootAction::Shutdown));
    assert_eq!(uefi.machine.actions.panic, Some(small::PanicAction::Pause));
    let hardware = uefi.hardware.unwrap();
    assert_eq!(hardware.flash, ["libvirt-pflash0-format", "libvirt-pflash1-format"]);
    assert_eq!(hardware.boot_order()[0].path, "/pci@i0cf8/pci8086,2922@1f,2/drive@0/disk@0");
}

#[test]
fn numa_nodes_and_huge_pages() {
    let numa = config(&[
        "-machine",
        "q35",
        "-m",
        "size=1G",
        "-smp",
        "4,sockets=2,dies=1,cores=2,threads=1",
        "-object",
        r#"{"qom-type":"memory-backend-memfd","id":"ram-node0","hugetlb":true,"hugetlbsize":2097152,"share":true,"prealloc":true,"size":536870912,"host-nodes":[1],"policy":"bind"}"#,
        "-object",
        "memory-backend-memfd,id=ram-node1,hugetlb=on,hugetlbsize=2M,size=512M",
        "-numa",
        "node,nodeid=0,cpus=0,cpus=2,memdev=ram-node0",
        "-numa",
        "node,nodeid=1,cpus=1,cpus=3,memdev=ram-node1",
    ]);
    assert_eq!(numa.memory.hugepages, Some(crate::cli::HugePages::Size2M));
    let nodes: Vec<_> = numa.numa.iter().map(|node| (node.vcpus.clone(), node.memory, node.host)).collect();
    assert_eq!(nodes, [(vec![0, 2], 512 << 20, Some(1)), (vec![1, 3], 512 << 20, None)]);
}

#[test]
fn what_people_write() {
    let people = config(&[
        "-M",
        "q35,accel=kvm",
        "-m",
        "2G",
        "-cpu",
        "host,migratable=on,-avx2",
        "-kernel",
        "bzImage",
        "-nographic",
        "-qmp",
        "unix:/tmp/q,server=on,wait=off",
        "-device",
        "virtio-rng-pci",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "-debugcon",
        "file:/tmp/d",
        "-global",
        "isa-debugcon.iobase=0x402",
        "-outboard",
        "function=unix:/tmp/shim,log=debug",
    ]);
    let hardware = people.hardware.unwrap();
    assert_eq!(people.function, crate::cli::FunctionSpec::Unix("/tmp/shim".into()));
    assert_eq!((people.memory.size, people.debug_exit), (2 << 30, true));
    assert_eq!(hardware.monitors, ["compat_monitor0"]);
    assert_eq!((hardware.serial.as_deref(), hardware.debugcon.as_deref()), (Some("serial0"), Some("debugcon")));
    assert_eq!(hardware.devices[0].address.unwrap().devfn(), 1 << 3);
    let rom = config(&["-machine", "q35", "-bios", "/a/b.bin", "-nodefaults", "-nographic"]);
    assert!(matches!(&rom.boot, BootSource::Firmware { code, .. } if code.to_str() == Some("/a/b.bin")));
    assert_eq!(rom.hardware.unwrap().serial, None);
    let dated = config(&["-machine", "q35", "-rtc", "base=2024-02-29T12:00:00"]);
    assert_eq!(dated.machine.rtc, small::RtcBase::Date(std::time::Duration::from_secs(1_709_208_000)));
}

#[test]
fn the_probe_is_no_machine() {
    let Invocation::Probe(probe) = parsed(&[
        "-S",
        "-no-user-config",
        "-nodefaults",
        "-nographic",
        "-machine",
        "none,accel=kvm:tcg",
        "-qmp",
        "unix:/q/qmp.monitor,server=on,wait=off",
        "-pidfile",
        "/q/qmp.pid",
        "-daemonize",
    ])
    .unwrap() else {
        panic!("a machine")
    };
    assert_eq!(probe.monitors[0].kind, ChardevKind::Listen(Socket::Path("/q/qmp.monitor".into())));
    assert!(probe.daemonize && probe.pid_file.is_some_and(|path| path.ends_with("qmp.pid")));
}

#[test]
fn what_is_not_there_is_named() {
    let cases: &[(&[&str], &str)] = &[
        (&["-frobnicate"], "-frobnicate: there is no such option"),
        (&["frob"], "'frob' is no option"),
        (&["-name"], "-name: it needs a value"),
        (&["-name", "guest=a,frob=1"], "-name: there is no 'frob' here; there is guest"),
        (&["-machine", "q35"], "-machine: it is there twice"),
        (&["-m", "512,maxmem=1G,slots=2"], "-m: maxmem: memory can't be added later"),
        (&["-m", "frob"], "-m: size: 'frob' is no size"),
        (&["-m", "17179869184G"], "-m: size:"),
        (&["-smp", "4,dies=2"], "-smp: dies: '2' is not there"),
        (&["-smp", "4,sockets=3"], "-smp: 4 vCPUs can't be arranged"),
        (&["-cpu", "frob"], "-cpu: there is no CPU model 'frob'"),
        (&["-accel", "tcg"], "-accel: 'tcg' is not there"),
        (&["-display", "gtk"], "-display: 'gtk' is not there: write none"),
        (&["-dtb", "x"], "-dtb: x86 guests have no device tree"),
        (&["-incoming", "frob"], "-incoming: 'frob': it names no place"),
        (&["-drive", "file=a,if=virtio"], "-drive: -drive is for flash"),
        (&["-drive", "if=pflash,unit=1,file=v"], "-drive: variables need their code"),
        (&["-device", "frob"], "-device: frob: there is no such device"),
        (&["-device", "virtio-blk-pci,drive=a"], "drive: there is no block node 'a'"),
        (&["-device", "virtio-blk-pci,drive=a,scsi=on"], "-device: virtio-blk-pci: scsi: 'on' is not there"),
        (
            &["-device", "virtio-blk-pci,drive=a,frob=on"],
            "-device: virtio-blk-pci: there is no 'frob' here; there is drive,",
        ),
        (&["-device", "virtio-blk-pci-transitional,drive=a"], "there is no legacy virtio"),
        (&["-device", "virtio-rng-pci,bus=pci.7"], "bus: 'pci.7': there is no such bus"),
        (&["-device", "virtio-rng-pci,addr=32"], "addr: '32' is no place on a PCI bus"),
        (&["-device", "virtio-rng-pci,rng=r"], "rng: there is no rng 'r'"),
        (&["-device", "virtio-rng-pci,bootindex=1"], "bootindex: nothing boots from it"),
        (&["-device", "ide-hd,drive=a"], "-device: ide-hd: the AHCI controller has CD-ROM drives"),
        (&["-device", "isa-serial,chardev=a,index=1"], "index: there is COM1 alone"),
        (&["-device", "isa-serial,chardev=a"], "chardev: there is no chardev 'a'"),
        (&["-device", "isa-debugcon,chardev=a"], "iobase: it is at 0x402, not at 0xe9"),
        (&["-serial", "null", "-serial", "null"], "-device: isa-serial: there is one of it"),
        (
            &["-chardev", "pty,id=a", "-mon", "chardev=a,mode=control"],
            "-mon: chardev: 'a': a monitor is on a UNIX socket",
        ),
        (&["-mon", "chardev=a"], "-mon: mode: the human monitor is not there"),
        (&["-chardev", "socket,id=a,path=p,server=on"], "-chardev: socket: wait: nobody is waited for"),
        (&["-chardev", "vc,id=a"], "-chardev: there is no 'vc'"),
        (
            &["-netdev", "tap,id=n,fds=3:4", "-device", "virtio-net-pci,netdev=n,mq=off"],
            "mq: its network has several pairs of queues",
        ),
        (&["-netdev", "tap,id=n"], "-netdev: a tap needs one of"),
        (&["-netdev", "user,id=n,fd=3"], "-netdev: fd: a network of type 'user' has id alone"),
        (&["-netdev", "tap,id=n,fd=3,script=/x"], "-netdev: script: '/x' is not there"),
        (&["-object", "frob,id=a"], "-object: there is no 'frob'"),
        (&["-object", "tls-creds-x509,id=a,endpoint=server"], "it needs 'dir'"),
        (
            &["-object", "tls-creds-x509,id=a,dir=/x,endpoint=client,verify-peer=off"],
            "verify-peer: whoever doesn't look",
        ),
        (
            &["-object", "tls-creds-x509,id=a,dir=/x,endpoint=server,passwordid=s"],
            "passwordid: encrypted keys can't be read",
        ),
        (&["-object", "tls-creds-x509,id=a,dir=/x,endpoint=server,priority=SECURE256"], "priority: there is TLS 1.3"),
        (&["-incoming", "tls::1"], "-incoming: which certificates are meant is said by a monitor"),
        (&["-object", "iothread,id=a", "-object", "iothread,id=a"], "-object: id: 'a' is there twice"),
        (&["-object", "memory-backend-file,id=a,size=1G,mem-path=/tmp/x"], "mem-path: guest memory is the host's"),
        (&["-blockdev", "driver=ssh,node-name=a"], "-blockdev: driver: 'ssh' is none of file,"),
        (&["-blockdev", r#"{"driver":"raw","node-name":"a","node-name":"b"}"#], "duplicate key"),
        (&["-blockdev", "driver=file,node-name=a,filename=f,discard=ignore"], "-blockdev: discard:"),
        (&["-smbios", "type=0,vendor=x"], "-smbios: type: type 0 is soc-vmm's own"),
        (&["-fw_cfg", "name=etc/x,string=y"], "-fw_cfg: name: a name begins with opt/"),
        (&["-global", "frob.x=1"], "-global: 'frob.x=1' can't be said"),
        (&["-rtc", "base=2023-02-29"], "-rtc: base: '2023-02-29'"),
        (&["-boot", "order=cc"], "-boot: order: write up to three"),
        (&["-boot", "order=cœ"], "-boot: order: write up to three"),
        (&["-uuid", "1-2"], "-uuid: '1-2' is no UUID"),
        (&["-sandbox", "on,spawn=children"], "-sandbox: spawn is allow or deny"),
        (&["-kernel", "k", "-bios", "b"], "-kernel: a kernel is started without firmware"),
        (&["-initrd", "i"], "-initrd: it needs -kernel"),
        (&["-add-fd", "set=0"], "-add-fd: it needs 'fd'"),
        (&["-action", "reboot=pause"], "-action: reboot: 'pause' is none of reset, shutdown"),
        (&["-audiodev", "pa,id=a"], "-audiodev: driver: there is no sound"),
        (&["-outboard", "function=x"], "-outboard: function: write local,"),
    ];
    for (args, said) in cases {
        let wrong = refused(args);
        assert!(wrong.contains(said), "{args:?}: {wrong}\n  is not: {said}");
        assert!(!wrong.contains('\n'));
    }
    assert_eq!(parsed(&["-S"]).unwrap_err().to_string(), "-machine: it is needed: write -machine q35,accel=kvm");
}

#[test]
fn every_reason_is_written_down() {
    let page = include_str!("../../../docs/qemu-command-line.md");
    for inert in inert::INERT {
        assert!(page.contains(&format!("`{}`", inert.key)) && page.contains(inert.why), "{inert:?}");
    }
    for (option, _, why) in inert::INERT_OPTIONS {
        assert!(page.contains(&format!("`{option}")) && page.contains(why), "{option}");
    }
    for (global, why) in inert::INERT_GLOBALS {
        assert!(page.contains(global) && page.contains(why), "{global}");
    }
}
