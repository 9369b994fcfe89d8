//! Disks and network interfaces put in and taken out by a user's commands.

use std::os::unix::net::UnixListener;
use std::path::Path;

use integration::monitor::Monitor;
use integration::moving::unique;
use integration::{Vm, kvm, test_name};
use serde_json::{Value, json};

/// A VM whose guest jumps to itself at the reset vector: it never looks at its devices.
struct Idle {
    vm: Vm,
    name: String,
    directory: tempfile::TempDir,
}

impl Idle {
    fn run(more: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (name, len) in [("a.img", 1 << 20), ("b.img", 1 << 20), ("firmware", 0x1_0000)] {
            let mut bytes = vec![0; len];
            bytes.splice(len - 16..len - 14, [0xeb, 0xfe]);
            std::fs::write(directory.path().join(name), bytes).unwrap();
        }
        let name = unique("plug");
        let firmware = directory.path().join("firmware").display().to_string();
        let args = ["--firmware", &firmware, "--memory", "16M", "--name", &name];
        let mut vm = Vm::run(&[&args[..], more].concat());
        vm.wait_until("it runs", |vm| vm.try_command(&["status"]).is_ok_and(|said| said.contains("running")));
        Self { vm, name, directory }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn add_disk(&self, spec: &str) -> Result<String, String> {
        self.vm.soc_vmm(&["add-disk", &self.name, spec]).map(|id| id.trim().to_owned())
    }

    fn remove(&self, id: &str) -> Result<String, String> {
        self.vm.soc_vmm(&["remove", &self.name, id])
    }

    /// The devices that `status` shows, of which `--json` has the same ids.
    fn shown(&self) -> Vec<String> {
        let text = self.vm.soc_vmm(&["status", &self.name]).unwrap();
        let devices: Vec<String> = text.lines().skip(1).map(str::to_owned).collect();
        let json: Value = serde_json::from_str(&self.vm.soc_vmm(&["status", &self.name, "--json"]).unwrap()).unwrap();
        let ids: Vec<_> =
            json["devices"].as_array().unwrap().iter().filter_map(|device| device["id"].as_str()).collect();
        assert!(
            devices.iter().zip(&ids).all(|(line, id)| line.trim_start().starts_with(id)) && devices.len() == ids.len()
        );
        devices
    }

    /// Files that are open whose name ends so, sorted.
    fn open_files(&self, end: &str) -> Vec<String> {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", self.vm.pid())).unwrap();
        let links = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
        let names = links.filter_map(|link| Some(link.file_name()?.to_str()?.to_owned()));
        let mut names: Vec<_> = names.filter(|name| name.ends_with(end)).collect();
        names.sort();
        names
    }

    fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.vm.pid())).unwrap().count()
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.vm.pid())).unwrap().count()
    }
}

#[test]
fn a_disk_comes_and_goes_with_its_file_its_lock_and_its_thread() {
    if !kvm(&test_name()) {
        return;
    }
    let idle = Idle::run(&[]);
    let [a, b] = ["a.img", "b.img"].map(|name| format!("file={}", idle.path(name)));
    let count = |idle: &Idle| (idle.threads(), idle.descriptors());
    // The first time there are threads that stay.
    for _ in 0..2 {
        assert_eq!(idle.add_disk(&a).unwrap(), "disk0");
        idle.remove("disk0").unwrap();
    }
    let before = count(&idle);
    for _ in 0..20 {
        assert_eq!((idle.add_disk(&a).unwrap(), idle.add_disk(&b).unwrap()), ("disk0".into(), "disk1".into()));
        assert_eq!(idle.open_files(".img"), ["a.img", "b.img"]);
        assert_eq!(idle.shown(), ["  disk0 (virtio-blk-pci)", "  disk1 (virtio-blk-pci)"]);
        idle.remove("disk0").unwrap();
        assert_eq!(idle.open_files(".img"), ["b.img"]);
        idle.remove("disk1").unwrap();
    }
    assert!(idle.open_files(".img").is_empty());
    let (threads, descriptors) = count(&idle);
    assert!(threads <= before.0 + 2 && descriptors <= before.1 + 2, "{before:?}, then {threads}, {descriptors}");
    // In it when the VM ends.
    idle.add_disk(&a).unwrap();
    idle.vm.command(&["quit"]);
    let ended = idle.vm.wait();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
}

#[test]
fn what_can_t_be_put_in_is_refused_and_changes_nothing() {
    if !kvm(&test_name()) {
        return;
    }
    let idle = Idle::run(&[]);
    let [a, b, firmware] = ["a.img", "b.img", "firmware"].map(|name| format!("file={}", idle.path(name)));
    let refused = |spec: &str, words: &[&str]| {
        let why = idle.add_disk(spec).unwrap_err();
        assert!(why.lines().count() == 1 && words.iter().all(|word| why.contains(word)), "{spec}: {why}");
    };
    refused("file=/no/such/image", &["/no/such/image", "open it"]);
    refused("file=a,cache=no", &["cache=no"]);
    refused(&firmware, &["also the", "firmware", "readonly=on"]);
    for (console, role) in [("serial", "serial port's output"), ("debugcon", "debug console's output")] {
        refused(&format!("file={}", idle.vm.file(console).display()), &["also the", role]);
    }
    assert_eq!(idle.add_disk(&format!("{a},id=data")).unwrap(), "data");
    refused(&a, &["a.img", "use"]);
    refused(&format!("{b},id=data"), &["id=data", "already"]);
    assert_eq!(idle.add_disk(&format!("{firmware},readonly=on")).unwrap(), "disk0");
    assert_eq!(idle.add_disk(&format!("{firmware},readonly=on")).unwrap(), "disk1");
    assert_eq!(idle.add_disk(&format!("{firmware},readonly=on")).unwrap(), "disk2");
    refused(&b, &["all 4 slots", "remove"]);
    assert_eq!(idle.open_files(".img"), ["a.img"]);
    let why = idle.remove("disk7").unwrap_err();
    assert!(why.contains("'disk7'") && why.lines().count() == 1, "{why}");
    let why = idle.vm.soc_vmm(&["add-net", &idle.name, "stream=/no/such/socket"]).unwrap_err();
    assert!(why.contains("/no/such/socket") && why.lines().count() == 1, "{why}");
    idle.remove("data").unwrap();
    assert_eq!(idle.add_disk(&b).unwrap(), "disk3");
}

#[test]
fn a_device_has_no_processor_s_name_and_what_is_no_name_is_told_at_once() {
    if !kvm(&test_name()) {
        return;
    }
    let idle = Idle::run(&["--cpus", "1,maxcpus=3"]);
    let a = format!("file={}", idle.path("a.img"));
    for id in ["cpu0", "cpu2"] {
        let why = idle.add_disk(&format!("{a},id={id}")).unwrap_err();
        assert!(why.contains("already") && why.contains(id), "{why}");
    }
    // Not yet one's name, and one that a monitor has given.
    assert_eq!(idle.add_disk(&format!("{a},id=cpu3")).unwrap(), "cpu3");
    idle.remove("cpu3").unwrap();
    Monitor::connect(&idle.vm.file("qmp")).does("device_add", json!({"driver": "host-x86_64-cpu", "id": "third"}));
    let why = idle.add_disk(&format!("{a},id=third")).unwrap_err();
    assert!(why.contains("id=third") && why.contains("already"), "{why}");
    assert_eq!(idle.add_disk(&a).unwrap(), "disk0");
    let path = "/machine/peripheral/disk0";
    for words in [&["remove", &idle.name, path][..], &["resize", &idle.name, path, "1G"]] {
        let why = idle.vm.soc_vmm(words).unwrap_err();
        assert!(why.contains("an id is a letter") && why.lines().count() == 1, "{why}");
    }
    for (size, words) in [("512K", "only grows"), ("8388607T", "can't grow")] {
        let why = idle.vm.soc_vmm(&["resize", &idle.name, "disk0", size]).unwrap_err();
        assert!(why.contains("'disk0' keeps its size") && why.contains(words) && why.lines().count() == 1, "{why}");
    }
    idle.vm.soc_vmm(&["resize", &idle.name, "disk0", "2M"]).unwrap();
}

#[test]
fn an_interface_is_connected_while_it_is_there() {
    if !kvm(&test_name()) {
        return;
    }
    let idle = Idle::run(&[]);
    let path = idle.path("net");
    let listener = UnixListener::bind(Path::new(&path)).unwrap();
    let spec = format!("stream={path}");
    for _ in 0..3 {
        let added = std::thread::scope(|scope| {
            let adds = scope.spawn(|| idle.vm.soc_vmm(&["add-net", &idle.name, &spec]));
            let (mut peer, _) = listener.accept().unwrap();
            assert_eq!(adds.join().unwrap().as_deref(), Ok("net0\n"));
            idle.remove("net0").unwrap();
            std::io::Read::read(&mut peer, &mut [0; 8]).unwrap()
        });
        assert_eq!(added, 0, "the peer sees the end");
    }
}

#[test]
fn libvirt_s_calls_put_a_disk_and_an_interface_in_and_take_them_out() {
    if !kvm(&test_name()) {
        return;
    }
    let idle = Idle::run(&[]);
    let mut monitor = Monitor::connect(&idle.vm.file("qmp"));
    let mut ports = vec!["type string".to_owned()];
    ports.extend((1..=4).map(|n| format!("pci.{n} child<pcie-root-port>")));
    assert_eq!(monitor.peripherals(), ports);
    // Of a libvirt's log.
    let file = json!({"driver": "file", "filename": idle.path("a.img"), "node-name": "libvirt-2-storage",
                      "auto-read-only": true, "discard": "unmap"});
    let format =
        json!({"node-name": "libvirt-2-format", "read-only": false, "driver": "raw", "file": "libvirt-2-storage"});
    let disk = json!({"driver": "virtio-blk-pci", "bus": "pci.2", "addr": "0x0", "drive": "libvirt-2-format",
                      "id": "virtio-disk1"});
    monitor.does("blockdev-add", file);
    assert!(
        monitor
            .refuses("blockdev-add", format!("{format}").replace("2-format", "2-storage").parse().unwrap())
            .contains("there already")
    );
    monitor.does("blockdev-add", format.clone());
    monitor.does("device_add", disk.clone());
    assert!(monitor.peripherals().contains(&"virtio-disk1 child<virtio-blk-pci>".to_owned()));
    for (command, arguments, word) in [
        ("device_add", disk, "already"),
        (
            "device_add",
            json!({"driver": "virtio-blk-pci", "drive": "libvirt-2-format", "id": "x"}),
            "in use by 'virtio-disk1'",
        ),
        ("device_add", json!({"driver": "virtio-blk-pci", "drive": "nothing", "id": "x"}), "'nothing'"),
        ("device_add", json!({"driver": "e1000e", "id": "x"}), "e1000e"),
        ("device_add", json!({"driver": "virtio-blk-pci", "id": "x"}), "needs 'drive'"),
        ("blockdev-del", json!({"node-name": "libvirt-2-format"}), "in use by 'virtio-disk1'"),
        ("blockdev-del", json!({"node-name": "libvirt-2-storage"}), "in use by 'libvirt-2-format'"),
        ("device_del", json!({"id": "x"}), "'x'"),
        ("netdev_add", json!({"type": "socket", "id": "hostnet1"}), "'socket'"),
        ("blockdev-add", json!({"driver": "raw", "node-name": "x", "file": 5}), "'file' is a node's name, or"),
    ] {
        let why = monitor.refuses(command, arguments);
        assert!(why.contains(word), "{command}: {why}");
    }
    monitor.does("device_del", json!({"id": "virtio-disk1"}));
    let path = "/machine/peripheral/virtio-disk1";
    assert_eq!(monitor.event("DEVICE_DELETED"), json!({"path": format!("{path}/virtio-backend")}));
    assert_eq!(monitor.event("DEVICE_DELETED"), json!({"device": "virtio-disk1", "path": path}));
    assert_eq!(idle.open_files(".img"), ["a.img"], "the node has it");
    monitor.does("blockdev-del", json!({"node-name": "libvirt-2-format"}));
    monitor.does("blockdev-del", json!({"node-name": "libvirt-2-storage"}));
    assert!(idle.open_files(".img").is_empty());

    let path = idle.path("net");
    let listener = UnixListener::bind(Path::new(&path)).unwrap();
    let address = json!({"type": "unix", "path": path});
    monitor.does("netdev_add", json!({"type": "stream", "id": "hostnet1", "addr": address}));
    let _peer = listener.accept().unwrap();
    let net = json!({"driver": "virtio-net-pci", "netdev": "hostnet1", "id": "net1", "mac": "52:54:00:11:22:99",
                     "bus": "pci.2", "addr": "0x0"});
    // What is refused costs nothing: the network is still connected.
    let elsewhere = json!({"driver": "virtio-net-pci", "netdev": "hostnet1", "id": "net1", "bus": "pci.9"});
    assert!(monitor.refuses("device_add", elsewhere).contains("pci.9"));
    monitor.does("device_add", net);
    assert!(monitor.refuses("netdev_del", json!({"id": "hostnet1"})).contains("in use by 'net1'"));
    monitor.does("device_del", json!({"id": "net1"}));
    monitor.event("DEVICE_DELETED");
    monitor.event("DEVICE_DELETED");
    monitor.does("netdev_del", json!({"id": "hostnet1"}));
    assert_eq!(monitor.peripherals(), ports);
}

#[test]
fn devices_come_and_go_while_the_vm_is_reset_paused_and_ended() {
    if !kvm(&test_name()) {
        return;
    }
    let idle = Idle::run(&[]);
    let plug = |name: &str, rounds: usize| {
        let mut monitor = Monitor::connect(&idle.vm.file("qmp"));
        for _ in 0..rounds {
            // The slots may be full, and a reset may have been quicker: each is answered.
            let file =
                json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": idle.path(name)}});
            monitor.does("blockdev-add", file);
            monitor.does("device_add", json!({"driver": "virtio-blk-pci", "drive": name, "id": name}));
            monitor.does("device_del", json!({"id": name}));
            while monitor.event("DEVICE_DELETED")["device"] != name {}
            monitor.does("blockdev-del", json!({"node-name": name}));
        }
    };
    std::thread::scope(|scope| {
        let plugs = ["a.img", "b.img"].map(|name| scope.spawn(move || plug(name, 40)));
        let mut monitor = Monitor::connect(&idle.vm.file("qmp"));
        while !plugs.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            for command in ["system_reset", "stop", "cont"] {
                monitor.does(command, json!({}));
            }
        }
    });
    assert!(idle.open_files(".img").is_empty());
    // The end comes in the middle.
    std::thread::scope(|scope| {
        let mut monitor = Monitor::connect(&idle.vm.file("qmp"));
        let path = idle.path("a.img");
        scope.spawn(move || {
            let spec = json!({"spec": format!("file={path},id=last"), "directory": "/"});
            let line = format!(
                "{}\n{}\n",
                json!({"execute": "x-outboard-add-disk", "arguments": spec}),
                json!({"execute": "device_del", "arguments": {"id": "last"}})
            );
            // Until it is gone.
            while monitor.say(&line).is_ok() {}
        });
        idle.vm.command(&["quit"]);
    });
    let ended = idle.vm.wait();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
}
