//! VMs that are started by a command line of QEMU's, as libvirt does it: with a monitor that listens already, and descriptors by their numbers.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use integration::monitor::Monitor;
use integration::{kvm, program, seabios, test_name};
use serde_json::json;
use tempfile::TempDir;

/// No VM of a test lives longer.
const LIMIT: Duration = Duration::from_secs(120);

/// A soc-vmm in QEMU's place, ended when dropped.
struct Emulator {
    child: Child,
    monitor: Monitor,
    directory: TempDir,
}

/// A descriptor that a child inherits, under its own number.
fn inheritable(fd: impl AsFd) -> OwnedFd {
    let fd = nix::unistd::dup(fd).expect("a descriptor");
    assert!(fd.as_raw_fd() > 2);
    fd
}

impl Emulator {
    /// Starts it with a monitor, 128 MiB and no more than `more`; `{}` in that is the VM's own directory.
    fn start(more: &[&str]) -> Self {
        Self::start_with(more, &std::env::var("PATH").unwrap_or_default())
    }

    /// The same, which finds programs on that path.
    fn start_with(more: &[&str], path: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let own = directory.path().display().to_string();
        let socket = directory.path().join("monitor.sock");
        let listener = inheritable(UnixListener::bind(&socket).unwrap());
        let chardev = format!("socket,id=charmonitor,fd={},server=on,wait=off", listener.as_raw_fd());
        let child = Command::new(program("soc-vmm"))
            .args(["-name", "guest=a b,debug-threads=on", "-S"])
            .args(["-object", "{\"qom-type\":\"memory-backend-ram\",\"id\":\"pc.ram\",\"size\":134217728}"])
            .args(["-machine", "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram", "-accel", "kvm"])
            .args(["-m", "128", "-overcommit", "mem-lock=off", "-uuid", "20ecb7fe-7b1b-4717-a0d1-6b97657b2150"])
            .args(["-display", "none", "-no-user-config", "-nodefaults", "-rtc", "base=utc", "-msg", "timestamp=on"])
            .args(["-chardev", &chardev, "-mon", "chardev=charmonitor,id=monitor,mode=control"])
            .args(["-chardev", &format!("file,id=dbg,path={own}/debugcon")])
            .args(["-device", "isa-debugcon,chardev=dbg,iobase=0x402"])
            .args(more.iter().map(|arg| arg.replace("{}", &own)))
            .env("XDG_RUNTIME_DIR", directory.path())
            .env("PATH", path)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        drop(listener);
        let monitor = Monitor::connect(&socket);
        Self { child, monitor, directory }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        std::fs::read(self.file(name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Waits until the machine is built.
    fn built(&mut self) -> Vec<String> {
        let start = Instant::now();
        loop {
            let reply = self.monitor.replies("qom-list", json!({"path": "/machine/peripheral"}));
            if let Some(list) = reply["return"].as_array() {
                return list.iter().map(|it| it["name"].as_str().unwrap().to_owned()).collect();
            }
            assert!(start.elapsed() < LIMIT, "{reply}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn wait_for(&self, file: &str, text: &str) {
        let start = Instant::now();
        while !self.text(file).contains(text) {
            assert!(start.elapsed() < LIMIT, "{file} has no {text:?}: {}", self.text(file));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn status(&mut self) -> String {
        self.monitor.replies("query-status", json!({}))["return"]["status"].as_str().unwrap().to_owned()
    }

    fn ended(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < LIMIT, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Firmware of 64 KiB that does `code` in real mode and then nothing.
fn firmware(code: &[u8]) -> Vec<u8> {
    const LEN: usize = 0x1_0000;
    let mut image = vec![0; LEN];
    image[..code.len()].copy_from_slice(code);
    image[code.len()..code.len() + 2].copy_from_slice(&[0xeb, 0xfe]);
    // jmp near 0xf000:0.
    image[LEN - 16..LEN - 13].copy_from_slice(&[0xe9, 0x0d, 0x00]);
    image
}

/// Power management at 0x600 (ICH9 datasheet §13.1.13, §13.1.14), and off: `out 0x604, 0x2000`.
const POWER_OFF: &[u8] = &[
    0x66, 0xb8, 0x40, 0xf8, 0x00, 0x80, 0xba, 0xf8, 0x0c, 0x66, 0xef, 0x66, 0xb8, 0x01, 0x06, 0x00, 0x00, 0xb2, 0xfc,
    0x66, 0xef, 0x66, 0xb8, 0x44, 0xf8, 0x00, 0x80, 0xb2, 0xf8, 0x66, 0xef, 0xb0, 0x80, 0xb2, 0xfc, 0xee, 0xba, 0x04,
    0x06, 0xb8, 0x00, 0x20, 0xef,
];
/// `out 0xcf9, 6`.
const RESET: &[u8] = &[0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee];
/// `out 0x505, 1`.
const PANIC: &[u8] = &[0xba, 0x05, 0x05, 0xb0, 0x01, 0xee];

/// A VM whose firmware does that; none: VMs can't run here.
fn doing(code: &[u8], more: &[&str]) -> Option<Emulator> {
    if !kvm(&test_name()) {
        return None;
    }
    let directory = TempDir::new().unwrap();
    let image = directory.path().join("firmware");
    std::fs::write(&image, firmware(code)).unwrap();
    let mut emulator = Emulator::start(&[&["-bios", image.to_str().unwrap()], more].concat());
    emulator.built();
    Some(emulator)
}

#[test]
fn a_domain_of_libvirt_s_has_its_devices_where_they_were_put() {
    let Some(firmware) = seabios() else { return };
    let directory = TempDir::new().unwrap();
    let [a, b] = ["a.raw", "b.raw"].map(|name| {
        let path = directory.path().join(name);
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        path.display().to_string()
    });
    let storage = |name: &str, path: &str| {
        json!({"driver": "file", "filename": path, "node-name": name, "auto-read-only": true, "discard": "unmap"})
            .to_string()
    };
    let format = |name: &str, file: &str| {
        json!({"node-name": name, "read-only": false, "driver": "raw", "file": file}).to_string()
    };
    let port = |number: u8, more: &str| {
        let (chassis, place) = (number, u16::from(number) - 1);
        let addr = if place == 0 { "0x1".to_owned() } else { format!("0x1.{place:#x}") };
        format!(
            r#"{{"driver":"pcie-root-port","port":{},"chassis":{chassis},"id":"pci.{number}","bus":"pcie.0","addr":"{addr}"{more}}}"#,
            place + 8
        )
    };
    let log = directory.path().join("console");
    let log_file = inheritable(std::fs::File::create(&log).unwrap());
    let mut emulator = Emulator::start(&[
        "-bios",
        &firmware,
        "-smp",
        "2,sockets=2,cores=1,threads=1",
        "-no-shutdown",
        "-boot",
        "strict=on",
        "-device",
        &port(1, r#","multifunction":true"#),
        "-device",
        &port(2, ""),
        "-blockdev",
        &storage("libvirt-2-storage", &a),
        "-blockdev",
        &format("libvirt-2-format", "libvirt-2-storage"),
        "-device",
        r#"{"driver":"virtio-blk-pci","bus":"pci.2","addr":"0x0","drive":"libvirt-2-format","id":"virtio-disk0","bootindex":1}"#,
        "-blockdev",
        &storage("libvirt-1-storage", &b),
        "-blockdev",
        &format("libvirt-1-format", "libvirt-1-storage"),
        "-device",
        r#"{"driver":"virtio-blk-pci","bus":"pcie.0","addr":"0x5","drive":"libvirt-1-format","id":"virtio-disk1","serial":"S1"}"#,
        "-device",
        r#"{"driver":"virtio-serial-pci","id":"virtio-serial0","bus":"pci.1","addr":"0x0"}"#,
        "-chardev",
        "socket,id=charchannel0,path={}/agent,server=on,wait=off",
        "-device",
        r#"{"driver":"virtserialport","bus":"virtio-serial0.0","nr":1,"chardev":"charchannel0","id":"channel0","name":"org.qemu.guest_agent.0"}"#,
        "-add-fd",
        &format!("set=0,fd={},opaque=serial0-log", log_file.as_raw_fd()),
        "-chardev",
        "pty,id=charserial0,logfile=/dev/fdset/0,logappend=on",
        "-device",
        r#"{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}"#,
    ]);
    assert_eq!(
        emulator.built(),
        ["type", "pci.1", "pci.2", "virtio-serial0", "virtio-disk0", "virtio-disk1", "channel0", "serial0"]
    );
    assert_eq!(emulator.status(), "prelaunch");
    assert_eq!(emulator.monitor.replies("query-name", json!({}))["return"]["name"], "a b");
    assert!(emulator.text("debugcon").is_empty(), "the vCPUs ran");
    assert!(UnixStream::connect(emulator.file("agent")).is_ok());
    assert_eq!(emulator.monitor.does("cont", json!({})), json!({}));
    // What firmware found, and where.
    emulator.wait_for("debugcon", "All threads complete.");
    let said = emulator.text("debugcon");
    for words in [
        "Machine UUID 20ecb7fe-7b1b-4717-a0d1-6b97657b2150",
        "PCI: init bdf=00:01.0 id=1b36:000c",
        "PCI: init bdf=00:01.1 id=1b36:000c",
        "PCI: init bdf=01:00.0 id=1af4:1043",
        "PCI: init bdf=02:00.0 id=1af4:1042",
        "PCI: init bdf=00:05.0 id=1af4:1042",
        // Behind the last device with a bootindex firmware gives up.
        "skipping init of a non-bootable virtio-blk at 00:05.0",
        "found virtio-blk at 02:00.0",
        "Found 2 cpu(s)",
    ] {
        assert!(said.contains(words), "no {words:?} in {said}");
    }
    // The same socket serves the next libvirtd.
    emulator.monitor = Monitor::connect(&emulator.file("monitor.sock"));
    for (id, said) in [("virtio-disk1", "on the root bus"), ("none", "there is no device")] {
        let reply = emulator.monitor.replies("device_del", json!({"id": id}));
        assert!(reply["error"]["desc"].as_str().is_some_and(|desc| desc.contains(said)), "{reply}");
    }
    let deleted = emulator.monitor.replies("blockdev-del", json!({"node-name": "libvirt-1-format"}));
    assert!(deleted["error"]["desc"].as_str().is_some_and(|desc| desc.contains("'virtio-disk1'")), "{deleted}");
    // A channel comes and goes.
    let path = emulator.file("second").display().to_string();
    let socket = json!({"addr": {"type": "unix", "data": {"path": path}}, "server": true, "wait": false});
    let backend = json!({"type": "socket", "data": socket});
    let port = json!({"driver": "virtserialport", "bus": "virtio-serial0.0", "nr": 2, "chardev": "charchannel1",
                      "id": "channel1", "name": "com.example.1"});
    let removed = json!({"id": "charchannel1"});
    for (command, arguments, said) in [
        ("chardev-add", json!({"id": "charchannel1", "backend": backend}), None),
        ("device_add", port.clone(), None),
        ("device_add", port, Some("is used by 'channel1'")),
        ("chardev-remove", removed.clone(), Some("is used by 'channel1'")),
        ("device_del", json!({"id": "channel1"}), None),
        ("chardev-remove", removed, None),
    ] {
        let reply = emulator.monitor.replies(command, arguments);
        match said {
            None => assert_eq!(reply["return"], json!({}), "{command}: {reply}"),
            Some(said) => assert!(reply["error"]["desc"].as_str().is_some_and(|why| why.contains(said)), "{reply}"),
        }
    }
    assert_eq!(emulator.monitor.event("DEVICE_DELETED")["device"], "channel1");
    emulator.monitor.replies("quit", json!({}));
    assert_eq!(emulator.ended(), Some(0));
    assert!(emulator.file("monitor.sock").exists(), "a socket that was passed is its owner's");
    assert!(std::fs::read_to_string(&log).unwrap().contains("SeaBIOS"), "the console's log");
}

#[test]
fn a_machine_that_is_off_waits_to_be_reset() {
    let Some(mut emulator) = doing(POWER_OFF, &["-no-shutdown"]) else { return };
    for _ in 0..2 {
        assert_eq!(emulator.status(), "prelaunch");
        emulator.monitor.replies("cont", json!({}));
        let shutdown = emulator.monitor.event("SHUTDOWN");
        assert_eq!(shutdown, json!({"guest": true, "reason": "guest-shutdown"}));
        emulator.monitor.event("STOP");
        assert_eq!(emulator.status(), "shutdown");
        let refused = emulator.monitor.replies("cont", json!({}));
        assert!(refused["error"]["desc"].as_str().is_some_and(|desc| desc.contains("Reset")), "{refused}");
        assert_eq!(emulator.monitor.does("system_reset", json!({})), json!({}));
        assert_eq!(emulator.monitor.event("RESET"), json!({"guest": false, "reason": "host-qmp-system-reset"}));
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(emulator.child.id() as i32), nix::sys::signal::SIGTERM).unwrap();
    assert_eq!(emulator.monitor.event("SHUTDOWN"), json!({"guest": false, "reason": "host-signal"}));
    assert_eq!(emulator.ended(), Some(0));
}

#[test]
fn a_reset_is_the_end_where_it_is_asked_for() {
    let Some(mut emulator) = doing(RESET, &["-no-reboot"]) else { return };
    emulator.monitor.replies("cont", json!({}));
    assert_eq!(emulator.monitor.event("SHUTDOWN"), json!({"guest": true, "reason": "guest-reset"}));
    assert_eq!(emulator.ended(), Some(0));
    let Some(mut emulator) = doing(&[], &["-action", "reboot=shutdown,shutdown=pause"]) else { return };
    emulator.monitor.replies("cont", json!({}));
    emulator.monitor.replies("system_reset", json!({}));
    let shutdown = emulator.monitor.event("SHUTDOWN");
    assert_eq!(shutdown, json!({"guest": false, "reason": "host-qmp-system-reset"}));
    assert_eq!(emulator.status(), "shutdown");
}

#[test]
fn a_panic_stops_a_machine_that_shall_stay() {
    let Some(mut emulator) = doing(PANIC, &["-no-shutdown", "-device", "pvpanic"]) else { return };
    emulator.monitor.replies("cont", json!({}));
    assert_eq!(emulator.monitor.event("GUEST_PANICKED")["action"], "pause");
    emulator.monitor.event("STOP");
    assert_eq!(emulator.status(), "guest-panicked");
    let Some(mut emulator) = doing(PANIC, &["-action", "panic=none"]) else { return };
    emulator.monitor.replies("cont", json!({}));
    assert_eq!(emulator.monitor.event("GUEST_PANICKED")["action"], "run");
    assert_eq!(emulator.status(), "running");
}

#[test]
fn a_descriptor_is_taken_once_and_of_its_kind_alone() {
    let directory = TempDir::new().unwrap();
    let file = inheritable(std::fs::File::create(directory.path().join("f")).unwrap());
    let number = file.as_raw_fd();
    let image = directory.path().join("firmware");
    std::fs::write(&image, firmware(&[])).unwrap();
    let run = |args: &[&str]| {
        let output = Command::new(program("soc-vmm"))
            .args(["-machine", "q35", "-bios", image.to_str().unwrap()])
            .args(args.iter().map(|arg| arg.replace("{}", &number.to_string())))
            .env("XDG_RUNTIME_DIR", directory.path())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for (args, said) in [
        (&["-chardev", "socket,id=m,fd={},server=on,wait=off"][..], "no UNIX stream socket that listens"),
        (&["-chardev", "socket,id=m,fd=200,server=on,wait=off"], "descriptor 200 was not passed"),
        (&["-add-fd", "set=0,fd={}", "-netdev", "tap,id=n,fd={}"], "is used twice"),
        (&["-netdev", "tap,id=n,fd={}"], "no TAP interface"),
        (&["-chardev", "file,id=f,path=/dev/fdset/9"], "there is no set 9"),
        (&["-netdev", "tap,id=n,fd=name"], "there is no descriptor named 'name'"),
    ] {
        let (status, line) = run(args);
        assert_eq!(status, Some(2), "{args:?}: {line}");
        assert!(line.contains(said) && line.lines().count() == 1, "{args:?}: {line}");
    }
}

#[test]
fn a_block_node_is_one_disk_s_or_one_drive_s() {
    let port = ["-device", "pcie-root-port,id=pci.1,bus=pcie.0,addr=1", "-device", "ide-cd,id=cd,bus=ide.0"];
    let Some(mut emulator) = doing(&[], &port) else { return };
    emulator.built();
    let image = emulator.file("image");
    std::fs::write(&image, [0; 4096]).unwrap();
    let node = json!({"driver": "raw", "node-name": "n", "read-only": true,
                      "file": {"driver": "file", "filename": image.display().to_string()}});
    let disk = json!({"driver": "virtio-blk-pci", "id": "disk", "bus": "pci.1", "drive": "n"});
    let (drive, delete) = (json!({"id": "cd"}), json!({"node-name": "n"}));
    let insert = json!({"id": "cd", "node-name": "n"});
    for (command, arguments, refusal) in [
        ("blockdev-add", node, None),
        ("blockdev-open-tray", drive.clone(), None),
        ("blockdev-insert-medium", insert.clone(), None),
        ("blockdev-del", delete.clone(), Some("'n' is in use by 'cd'")),
        ("device_add", disk.clone(), Some("'n' is in use by 'cd'")),
        ("blockdev-remove-medium", drive, None),
        ("device_add", disk, None),
        ("blockdev-insert-medium", insert, Some("'n' is in use by 'disk'")),
        ("blockdev-del", delete, Some("'n' is in use by 'disk'")),
    ] {
        let reply = emulator.monitor.replies(command, arguments);
        match refusal {
            None => assert_eq!(reply["return"], json!({}), "{command}: {reply}"),
            Some(why) => {
                assert!(reply["error"]["desc"].as_str().is_some_and(|desc| desc.contains(why)), "{command}: {reply}");
            }
        }
    }
}

#[test]
fn a_user_s_network_is_a_passt_that_ends_with_its_vm() {
    if !kvm(&test_name()) {
        return;
    }
    let tools = match testbed::debian::tools() {
        Ok(tools) => tools,
        Err(error @ testbed::fetch::Error::Unreachable(_)) => return testbed::skip(&test_name(), &error.to_string()),
        Err(error) => panic!("{error:?}"),
    };
    let directory = TempDir::new().unwrap();
    let image = directory.path().join("firmware");
    std::fs::write(&image, firmware(&[])).unwrap();
    tools.write_passt(&directory.path().join("passt")).unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut emulator = Emulator::start_with(
        &[
            "-bios",
            image.to_str().unwrap(),
            "-netdev",
            r#"{"type":"user","id":"hostnet0"}"#,
            "-device",
            r#"{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:11:22:33","bus":"pcie.0","addr":"0x2"}"#,
        ],
        &format!("{}:{path}", directory.path().display()),
    );
    assert!(emulator.built().contains(&"net0".to_owned()));
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", emulator.child.id())).unwrap();
    let is_passt = |pid: &&str| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&words).contains("passt")
    };
    let passt: Vec<&str> = children.split_whitespace().filter(is_passt).collect();
    assert_eq!(passt.len(), 1, "{children}");
    emulator.monitor.replies("quit", json!({}));
    assert_eq!(emulator.ended(), Some(0));
    let start = Instant::now();
    while is_passt(&passt[0]) {
        assert!(start.elapsed() < LIMIT, "passt outlives its VM");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_vm_goes_on_in_the_background() {
    if !kvm(&test_name()) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(at("firmware"), firmware(POWER_OFF)).unwrap();
    let start = |firmware: &str, function: &str, more: &[&str]| {
        // Whoever collects what it says waits until nobody can say more: the daemon lets go of it.
        Command::new(program("soc-vmm"))
            .args(["-machine", "q35,accel=kvm", "-m", "32", "-nodefaults", "-nographic", "-S", "-daemonize"])
            .args(["-bios", firmware, "-qmp", &format!("unix:{},server=on,wait=off", at("monitor"))])
            .args(["-pidfile", &at("pid"), "-outboard", &format!("function={function}")])
            .args(more)
            .env("XDG_RUNTIME_DIR", directory.path())
            .output()
            .unwrap()
    };
    let ended = start(&at("firmware"), "local", &[]);
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!((ended.status.code(), said.as_str()), (Some(0), ""));
    let pid: u32 = std::fs::read_to_string(at("pid")).unwrap().trim().parse().unwrap();
    let process = PathBuf::from(format!("/proc/{pid}"));
    assert_eq!(std::fs::read_link(process.join("cwd")).unwrap().to_str(), Some("/"));
    for stream in 0..3 {
        let open = std::fs::read_link(process.join(format!("fd/{stream}"))).unwrap();
        assert_eq!(open.to_str(), Some("/dev/null"), "descriptor {stream}");
    }
    let mut monitor = Monitor::connect(&directory.path().join("monitor"));
    assert_eq!(monitor.does("query-status", json!({}))["status"], "prelaunch");
    // Its guest switches itself off, and nobody told it to stay.
    monitor.does("cont", json!({}));
    let began = Instant::now();
    while process.exists() || directory.path().join("pid").exists() {
        assert!(began.elapsed() < LIMIT, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    }

    let (whole, nobody) = (at("firmware"), format!("unix:{}", at("nobody")));
    for (firmware, function, more, status, why) in [
        (&whole, "local", &["-serial", "stdio"][..], 2, "-daemonize: a process in the background has no terminal"),
        (&at("none"), "local", &[], 2, "none"),
        (&whole, &nobody, &[], 4, "nobody"),
    ] {
        let ended = start(firmware, function, more);
        let said = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(status), "{said}");
        assert!(said.lines().count() == 1 && said.contains(why), "{said}");
        assert!(!directory.path().join("pid").exists() && !directory.path().join("monitor").exists());
    }
}
