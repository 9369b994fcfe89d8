//! A guest's disk is copied while the guest writes it: by QMP, to a file and over NBD to another VM.

use std::path::{Path, PathBuf};
use std::time::Duration;

use integration::monitor::Monitor;
use integration::{Vm, kvm, test_name};
use payloads::virtio_blk::{Load, MOST_DEPTH, PIECE, WRITTEN, virtio_blk};
use serde_json::{Value, json};
use tempfile::TempDir;

const SIZE: usize = 32 << 20;

/// Data, a hole, data.
fn content() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..SIZE).map(|place| (place % 253) as u8 ^ (place >> 15) as u8).collect();
    bytes[10 << 20..20 << 20].fill(0);
    bytes
}

/// A VM whose guest writes its disk without end, and a directory for images.
struct Writer {
    vm: Vm,
    qmp: Monitor,
    dir: TempDir,
}

impl Writer {
    fn run() -> Self {
        let dir = TempDir::new().unwrap();
        std::fs::write(dir.path().join("disk"), content()).unwrap();
        let load = Load { write: true, depth: MOST_DEPTH, count: 4000, rounds: u32::MAX, sleeps: true };
        let mut vm = Vm::payload(&virtio_blk(load).unwrap(), &["--paused"]);
        vm.wait_until("it listens", |vm| vm.file("qmp").exists());
        let mut qmp = Monitor::connect(&vm.file("qmp"));
        while qmp.replies("qom-list", json!({"path": "/machine/peripheral"})).get("return").is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        add_node(&mut qmp, "disk", &dir.path().join("disk"));
        qmp.does("device_add", json!({"driver": "virtio-blk-pci", "drive": "disk", "id": "vda"}));
        qmp.does("cont", json!({}));
        vm.debugcon_has("requests");
        Self { vm, qmp, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes an image of other content for a copy, and names it.
    fn add_target(&mut self, name: &str) {
        let path = self.path(name);
        std::fs::write(&path, vec![0xee; SIZE]).unwrap();
        add_node(&mut self.qmp, name, &path);
    }

    #[expect(clippy::needless_pass_by_value, reason = "arguments are written where they are passed")]
    fn mirror(&mut self, target: &str, more: Value) {
        let mut arguments =
            json!({"job-id": "copy", "device": "disk", "target": target, "sync": "full", "auto-dismiss": false});
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.qmp.does("blockdev-mirror", arguments);
    }

    fn ends(&mut self) -> Value {
        let ended = self.status_is("concluded");
        assert_eq!(ended, "concluded");
        let jobs = self.qmp.does("query-jobs", json!({}));
        self.qmp.does("job-dismiss", json!({"id": "copy"}));
        assert_eq!(self.qmp.does("query-jobs", json!({})), json!([]));
        jobs[0].clone()
    }

    /// Waits until the job is there.
    fn status_is(&mut self, status: &str) -> String {
        loop {
            let event = self.qmp.event("JOB_STATUS_CHANGE");
            assert_eq!(event["id"], "copy");
            if event["status"] == status {
                return status.to_owned();
            }
        }
    }

    /// It writes on.
    fn goes_on(&mut self) {
        let lines = |vm: &Vm| std::fs::read_to_string(vm.file("debugcon")).unwrap_or_default().lines().count();
        let before = lines(&self.vm);
        self.vm.wait_until("it writes on", |vm| lines(vm) > before + 1);
    }
}

fn add_node(qmp: &mut Monitor, name: &str, path: &Path) {
    let under = format!("{name}-file");
    qmp.does("blockdev-add", json!({"driver": "file", "filename": path, "node-name": under}));
    qmp.does("blockdev-add", json!({"driver": "raw", "file": under, "node-name": name}));
}

/// What is there is what was in the disk, and what the guest writes, each piece whole.
fn is_whole(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    let (written, rest) = bytes.split_at((MOST_DEPTH * PIECE) as usize);
    for (number, piece) in written.chunks(PIECE as usize).enumerate() {
        assert!(piece.iter().all(|byte| *byte == number as u8 | WRITTEN), "piece {number}");
    }
    assert!(rest == &content()[written.len()..]);
}

#[test]
fn a_disk_is_copied_to_a_file_while_its_guest_writes_it() {
    if !kvm(&test_name()) {
        return;
    }
    let mut writer = Writer::run();
    for (number, mode) in ["background", "write-blocking"].into_iter().enumerate() {
        let target = format!("copy{number}");
        writer.add_target(&target);
        writer.mirror(&target, json!({"copy-mode": mode}));
        writer.status_is("ready");
        let ready = writer.qmp.event("BLOCK_JOB_READY");
        assert_eq!((&ready["device"], &ready["type"]), (&json!("copy"), &json!("mirror")));
        writer.goes_on();
        let job = writer.qmp.does("query-block-jobs", json!({}))[0].clone();
        assert_eq!((&job["ready"], &job["status"]), (&json!(true), &json!("ready")));
        assert!(job["offset"].as_u64() >= Some(SIZE as u64), "{job}");
        let why = writer.qmp.refuses("block-job-complete", json!({"device": "copy"}));
        assert!(why.contains("stays on its image"), "{why}");
        let why = writer.qmp.refuses("blockdev-del", json!({"node-name": target}));
        assert!(why.contains("in use by job 'copy'"), "{why}");
        let why = writer.qmp.refuses("block_resize", json!({"node-name": "disk", "size": 64 << 20}));
        assert!(why.contains("being copied"), "{why}");
        writer.qmp.does("block-job-cancel", json!({"device": "copy"}));
        let completed = writer.qmp.event("BLOCK_JOB_COMPLETED");
        assert_eq!(completed.get("error"), None);
        let job = writer.ends();
        assert_eq!(job.get("error"), None, "{job}");
        is_whole(&writer.path(&target));
        writer.goes_on();
        writer.qmp.does("blockdev-del", json!({"node-name": target}));
    }
    // A guest that stands still has a copy that is the same.
    writer.add_target("last");
    writer.mirror("last", json!({"granularity": 4096}));
    writer.status_is("ready");
    writer.qmp.does("stop", json!({}));
    writer.qmp.does("block-job-cancel", json!({"device": "copy"}));
    writer.ends();
    assert!(std::fs::read(writer.path("last")).unwrap() == std::fs::read(writer.path("disk")).unwrap());
}

#[test]
fn a_copy_that_is_ended_early_or_loses_its_disk_is_told_so() {
    if !kvm(&test_name()) {
        return;
    }
    let mut writer = Writer::run();
    writer.add_target("copy");
    writer.mirror("copy", json!({"speed": 1 << 20}));
    let why = writer.qmp.refuses("blockdev-mirror", json!({"device": "disk", "target": "copy", "sync": "full"}));
    assert!(why.contains("in use by job 'copy'"), "{why}");
    writer.qmp.does("block-job-set-speed", json!({"device": "copy", "speed": 2 << 20}));
    writer.qmp.does("block-job-cancel", json!({"device": "copy", "force": true}));
    writer.qmp.event("BLOCK_JOB_CANCELLED");
    assert_eq!(writer.ends()["error"], "Operation canceled");
    writer.goes_on();

    writer.mirror("copy", json!({"speed": 1 << 20}));
    writer.vm.command(&["reset"]);
    writer.qmp.does("device_del", json!({"id": "vda"}));
    writer.vm.command(&["reset"]);
    let job = writer.ends();
    assert!(job["error"].as_str().unwrap().contains("taken out of the VM"), "{job}");
}

/// libvirt's migrations wait without end for what they hear of one job while they dismiss another one.
#[test]
fn who_cancels_a_copy_has_heard_of_its_end_before_the_answer() {
    if !kvm(&test_name()) {
        return;
    }
    let mut writer = Writer::run();
    writer.add_target("copy");
    for (force, is_ready) in [(true, false), (true, true), (false, true)].repeat(4) {
        writer.mirror("copy", json!({"speed": if is_ready { 0 } else { 1 << 20 }}));
        if is_ready {
            writer.status_is("ready");
        }
        writer.qmp.does("block-job-cancel", json!({"device": "copy", "force": force}));
        assert!(writer.qmp.has_heard("JOB_STATUS_CHANGE", |data| data["status"] == "concluded"));
        writer.ends();
    }
}

#[test]
fn a_disk_is_copied_to_another_vm_which_shows_one() {
    if !kvm(&test_name()) {
        return;
    }
    let mut writer = Writer::run();
    let mut there = Writer::run();
    there.add_target("shown");
    let socket = there.path("socket");
    let server = json!({"type": "unix", "data": {"path": socket}});
    let why = there.qmp.refuses("nbd-server-start", json!({"addr": server, "tls-creds": "tls0"}));
    assert!(why.contains("not spoken over TLS"), "{why}");
    there.qmp.does("nbd-server-start", json!({"addr": server}));
    let export =
        |node: &str| json!({"type": "nbd", "id": "export", "node-name": node, "writable": true, "name": "disk"});
    let why = there.qmp.refuses("block-export-add", export("disk"));
    assert!(why.contains("the guest's disk 'vda'"), "{why}");
    there.qmp.does("block-export-add", export("shown"));
    let why = there.qmp.refuses("device_add", json!({"driver": "virtio-blk-pci", "drive": "shown", "id": "vdb"}));
    assert!(why.contains("written by export 'export'"), "{why}");

    let remote = json!({"driver": "nbd", "server": {"type": "unix", "path": socket}, "export": "disk", "node-name": "remote-storage"});
    let mut secret = remote.clone();
    secret["tls-creds"] = json!("tls0");
    let why = writer.qmp.refuses("blockdev-add", secret);
    assert!(why.contains("not spoken over TLS"), "{why}");
    writer.qmp.does("blockdev-add", remote);
    writer.qmp.does("blockdev-add", json!({"driver": "raw", "file": "remote-storage", "node-name": "remote"}));
    writer.mirror("remote", json!({}));
    writer.status_is("ready");
    writer.goes_on();
    writer.qmp.does("block-job-cancel", json!({"device": "copy"}));
    writer.ends();
    is_whole(&there.path("shown"));

    // A server that goes ends the job, and not the guest.
    writer.mirror("remote", json!({"speed": 1 << 20}));
    std::thread::sleep(Duration::from_millis(100));
    there.qmp.does("nbd-server-stop", json!({}));
    there.qmp.event("BLOCK_EXPORT_DELETED");
    let error = writer.qmp.event("BLOCK_JOB_ERROR");
    assert_eq!((&error["operation"], &error["action"]), (&json!("write"), &json!("report")));
    let job = writer.ends();
    assert!(job["error"].as_str().unwrap().contains("can't use disk nbd+unix://"), "{job}");
    writer.goes_on();
    for node in ["remote", "remote-storage"] {
        writer.qmp.does("blockdev-del", json!({"node-name": node}));
    }
    there.goes_on();
}
