//! A guest runs at its destination before all of its pages are there.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use integration::hostile::is_listened_on;
use integration::monitor::Monitor;
use integration::moving::unique;
use integration::{Vm, kvm, test_name, vhost_backend};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use payloads::scribe::Scribe;
use payloads::virtio_blk::{Load, virtio_blk};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Some ten megabytes that two vCPUs write again and again, each of which looks whether its last pass is there.
fn scribe() -> Scribe {
    Scribe { vcpus: 2, pages: 2048, pace: 0 }
}

/// A VM that waits for a guest, and where.
fn waiting(dir: &TempDir, more: &[&str]) -> (Vm, String) {
    let name = unique("p");
    let door = dir.path().join(&name);
    let uri = format!("unix:{}", door.display());
    let args = [&["--name", &name, "--incoming", &uri], more].concat();
    let mut vm = Vm::payload(&scribe().payload().unwrap(), &args);
    vm.wait_until("it waits", |_| is_listened_on(&door));
    (vm, uri)
}

fn running(more: &[&str]) -> Vm {
    let mut vm = Vm::payload(&scribe().payload().unwrap(), &[&["--name", &unique("p")], more].concat());
    vm.debugcon_has("scribe");
    vm
}

fn monitor(vm: &Vm) -> Monitor {
    Monitor::connect(&vm.file("qmp"))
}

/// Begins a move that is to be one by post-copy; none: there is none on this machine, and the test says why.
fn begin(vm: &Vm, uri: &str, parameters: Value) -> Monitor {
    let mut qmp = monitor(vm);
    let on = |name: &str| json!({ "capability": name, "state": true });
    qmp.does("migrate-set-capabilities", json!({ "capabilities": [on("postcopy-ram"), on("return-path")] }));
    qmp.does("migrate-set-parameters", parameters);
    qmp.does("migrate", json!({ "uri": uri }));
    qmp
}

/// Slowly enough that it is still under way when somebody looks, pre-copy and post-copy.
fn slowly() -> Value {
    json!({ "max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 1 << 20, "downtime-limit": 1 })
}

/// A guest that runs at its destination and lacks most of its pages: both VMs, monitors of both.
fn under_way(dir: &TempDir, options: &[&str]) -> [(Vm, Monitor); 2] {
    let mut here = running(options);
    let (mut there, uri) = waiting(dir, options);
    let mut ours = begin(&here, &uri, slowly());
    ours.does("migrate-start-postcopy", json!({}));
    become_all([&mut here, &mut there], "postcopy-active");
    let theirs = monitor(&there);
    [(here, ours), (there, theirs)]
}

fn become_all(vms: [&mut Vm; 2], status: &str) {
    for vm in vms {
        becomes(vm, status);
    }
}

fn becomes(vm: &mut Vm, status: &str) {
    vm.wait_until(status, |vm| vm.migration()["status"] == status);
}

#[test]
fn a_guest_that_writes_its_memory_goes_to_and_fro_before_its_pages_do() {
    if kvm(&test_name()) {
        to_and_fro(4, &[]);
    }
}

#[test]
fn huge_pages_come_whole() {
    if !kvm(&test_name()) {
        return;
    }
    // Of both VMs.
    let Some(_reserved) = Reserved::new(64) else {
        testbed::skip(&test_name(), "this machine has no 64 huge pages of 2 MiB to reserve");
        return;
    };
    to_and_fro(2, &["--memory", "64M,hugepages=2M"]);
}

/// Huge pages of 2 MiB, until this is dropped.
struct Reserved(String);

impl Reserved {
    const COUNT: &str = "/proc/sys/vm/nr_hugepages";

    /// So many more; none: they can't be had.
    fn new(more: u64) -> Option<Self> {
        let before = fs::read_to_string(Self::COUNT).ok()?;
        let wanted = before.trim().parse::<u64>().ok()? + more;
        let reserved = Self(before);
        fs::write(Self::COUNT, wanted.to_string()).ok()?;
        let there = fs::read_to_string(Self::COUNT).ok()?.trim().parse::<u64>().ok()?;
        (there >= wanted).then_some(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = fs::write(Self::COUNT, &self.0);
    }
}

fn to_and_fro(moves: u32, more: &[&str]) {
    let dir = TempDir::new().unwrap();
    let mut here = running(more);
    for _ in 0..moves {
        let (mut there, uri) = waiting(&dir, more);
        // It writes faster than that: it would never end by itself.
        let parameters = json!({ "max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 0, "downtime-limit": 1 });
        let mut qmp = begin(&here, &uri, parameters);
        qmp.does("migrate-start-postcopy", json!({}));
        let mut steps = Vec::new();
        while steps.last().is_none_or(|last| last != "completed") {
            steps.push(qmp.event("MIGRATION")["status"].as_str().unwrap().to_owned());
        }
        assert_eq!(steps, ["setup", "active", "device", "postcopy-active", "completed"]);
        let ended = here.wait();
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "{}", ended.debugcon);
        becomes(&mut there, "completed");
        assert!(there.migration()["ram"]["postcopy-requests"].as_u64().unwrap() > 0, "{}", there.migration());
        here = there;
    }
    here.passes("");
}

#[test]
fn soc_vmm_begins_it_after_the_first_round() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let here = running(&[]);
    let (mut there, uri) = waiting(&dir, &["--memory", "64M"]);
    let socket = here.file("qmp").display().to_string();
    let said =
        here.soc_vmm(&["migrate", &uri, "--qmp", &socket, "--postcopy", "--bandwidth", "64M", "--downtime", "0"]);
    assert!(said.as_ref().is_ok_and(|said| said.contains("of that while it ran there")), "{said:?}");
    assert_eq!(here.wait().status.code(), Some(0));
    becomes(&mut there, "completed");
    there.passes("");
}

#[test]
fn a_disk_s_requests_wait_for_their_pages() {
    if !kvm(&test_name()) {
        return;
    }
    for sleeps in [false, true] {
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("disk");
        fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let disk = format!("file={}", image.display());
        let payload = virtio_blk(Load { write: true, depth: 16, count: 300, rounds: u32::MAX, sleeps }).unwrap();
        let mut here = Vm::payload(&payload, &["--name", &unique("p"), "--disk", &disk]);
        for _ in 0..3 {
            here.debugcon_has("requests");
            let name = unique("p");
            let door = dir.path().join(&name);
            let uri = format!("unix:{}", door.display());
            let mut there = Vm::payload(&payload, &["--name", &name, "--disk", &disk, "--incoming", &uri]);
            there.wait_until("it waits", |_| is_listened_on(&door));
            // Little of its memory is anything but zeros: nothing of it has come when the guest starts there.
            begin(&here, &uri, slowly()).does("migrate-start-postcopy", json!({}));
            let ended = here.wait();
            assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "{}", ended.debugcon);
            assert!(!ended.debugcon.contains("fail"), "{}", ended.debugcon);
            here = there;
        }
        // Of the rounds that end here one began here.
        here.wait_until("it goes on", |vm| fs::read_to_string(vm.file("debugcon")).unwrap().lines().count() > 2);
        here.command(&["quit"]);
        let ended = here.wait();
        assert!(ended.status.success() && !ended.debugcon.contains("fail"), "{} {}", ended.debugcon, ended.stderr);
    }
}

#[test]
fn a_connection_that_is_given_up_is_followed_by_another_one() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let [(mut here, mut ours), (mut there, mut theirs)] = under_way(&dir, &[]);
    let other = format!("unix:{}", dir.path().join("other").display());
    assert!(ours.refuses("migrate", json!({ "uri": other, "resume": true })).contains("no paused migration"));
    assert!(theirs.refuses("migrate-recover", json!({ "uri": other })).contains("postcopy is paused"));
    ours.does("migrate-pause", json!({}));
    become_all([&mut here, &mut there], "postcopy-paused");
    // Each side says why.
    for (vm, qmp, why) in [(&mut here, &mut ours, "was given up"), (&mut there, &mut theirs, "connection 0")] {
        let told = vm.command(&["status"]);
        let paused = told.lines().find(|line| line.starts_with("  migration postcopy-paused, "));
        assert!(paused.is_some_and(|line| line.contains(" MiB left of ") && line.contains(why)), "{told}");
        let told = qmp.does("query-migrate", json!({}))["error-desc"].to_string();
        assert!(told.contains(why), "{told}");
    }
    // The guest is there: nobody starts it here once more.
    let refused = ours.refuses("cont", json!({}));
    assert!(refused.contains("is just being moved"), "{refused}");
    assert!(ours.refuses("migrate-pause", json!({})).contains("postcopy-active"));
    assert_eq!(theirs.does("query-status", json!({}))["status"], "running");
    // By another door, then by the same once more, which the destination gives up this time.
    theirs.does("migrate-recover", json!({ "uri": other }));
    ours.does("migrate", json!({ "uri": other, "resume": true }));
    become_all([&mut here, &mut there], "postcopy-active");
    theirs.does("migrate-pause", json!({}));
    become_all([&mut here, &mut there], "postcopy-paused");
    // It stands there already.
    theirs.does("migrate-recover", json!({ "uri": other }));
    ours.does("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 }));
    let socket = here.file("qmp").display().to_string();
    let said = here.soc_vmm(&["migrate", &other, "--qmp", &socket, "--resume"]);
    assert!(said.as_ref().is_ok_and(|said| said.contains("completed in")), "{said:?}");
    assert_eq!(here.wait().status.code(), Some(0));
    becomes(&mut there, "completed");
    there.passes("");
}

/// KVM takes away what it signals for a device once no vCPU is in it any more, not even one that waits for a page.
#[test]
fn a_device_goes_while_pages_come() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![0; 4 << 20]).unwrap();
    let disk = format!("file={},format=raw,id=d0", disk.display());
    let [(here, mut ours), (mut there, mut theirs)] = under_way(&dir, &["--disk", &disk]);
    let source = Pid::from_raw(here.pid() as i32);
    // While no page comes, the guest, which writes all of its memory, soon waits for one.
    kill(source, Signal::SIGSTOP).unwrap();
    thread::sleep(Duration::from_millis(300));
    theirs.does("device_del", json!({ "id": "d0" }));
    thread::sleep(Duration::from_millis(300));
    kill(source, Signal::SIGCONT).unwrap();
    theirs.does("stop", json!({}));
    theirs.does("cont", json!({}));
    ours.does("migrate-set-parameters", json!({ "max-postcopy-bandwidth": 0 }));
    assert_eq!(here.wait().status.code(), Some(0));
    becomes(&mut there, "completed");
    there.passes("");
}

#[test]
fn a_destination_whose_source_dies_waits_and_can_be_ended() {
    if !kvm(&test_name()) {
        return;
    }
    for way in ["quit", "signal"] {
        let dir = TempDir::new().unwrap();
        let [(here, _), (mut there, mut theirs)] = under_way(&dir, &[]);
        kill(Pid::from_raw(here.pid() as i32), Signal::SIGKILL).unwrap();
        here.wait();
        becomes(&mut there, "postcopy-paused");
        let refused = theirs.refuses("migrate-recover", json!({ "uri": "file:/dev/null" }));
        assert!(refused.contains("takes a way with two directions"), "{refused}");
        // Its vCPUs wait for pages, which is nobody else's trouble.
        assert_eq!(theirs.does("query-status", json!({}))["status"], "running");
        match way {
            "quit" => drop(theirs.does("quit", json!({}))),
            _ => kill(Pid::from_raw(there.pid() as i32), Signal::SIGTERM).unwrap(),
        }
        let ended = there.wait();
        assert_eq!(ended.status.code(), Some(0), "{way}: {}", ended.stderr);
    }
}

#[test]
fn a_destination_that_dies_takes_the_guest_with_it_and_the_source_says_so() {
    if !kvm(&test_name()) {
        return;
    }
    for who in ["vmm", "shim"] {
        let dir = TempDir::new().unwrap();
        let [(mut here, mut ours), (there, _)] = under_way(&dir, &[]);
        match who {
            "vmm" => kill(Pid::from_raw(there.pid() as i32), Signal::SIGKILL).unwrap(),
            _ => kill(Pid::from_raw(there.shim() as i32), Signal::SIGKILL).unwrap(),
        }
        assert_ne!(there.wait().status.code(), Some(0));
        becomes(&mut here, "postcopy-paused");
        assert!(ours.refuses("cont", json!({})).contains("is just being moved"));
        ours.does("quit", json!({}));
        assert_eq!(here.wait().status.code(), Some(0));
    }
}

#[test]
fn what_can_t_wait_for_pages_is_refused_by_name() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let on = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
    let socket = dir.path().join("backend");
    let image = dir.path().join("image");
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let mut backend = Command::new(vhost_backend()).arg("block").arg(image).arg(&socket).spawn().unwrap();
    let disk = format!("vhost-user={}", socket.display());
    for (more, why) in [(["--iommu", "intel"], "the guest's IOMMU"), (["--disk", &disk], "vhost-user-blk@")] {
        let name = unique("p");
        let args = [&["--name", &name, "--incoming", "defer"][..], &more].concat();
        let mut there = Vm::payload(&scribe().payload().unwrap(), &args);
        let refuses = |vm: &Vm| monitor(vm).refuses("migrate-set-capabilities", on.clone());
        there.wait_until("it answers", |vm| vm.try_command(&["status"]).is_ok());
        there.wait_until("it is built", |vm| !refuses(vm).contains("still being built"));
        let refused = refuses(&there);
        assert!(refused.contains("post-copy is not possible here") && refused.contains(why), "{refused}");
    }
    backend.kill().unwrap();
    backend.wait().unwrap();
    // At the source it is asked for before it begins.
    let here = running(&[]);
    let mut qmp = monitor(&here);
    assert!(qmp.refuses("migrate-start-postcopy", json!({})).contains("after migration has been started"));
    let (there, uri) = waiting(&dir, &[]);
    qmp.does("migrate-set-capabilities", json!({ "capabilities": [{ "capability": "return-path", "state": true }] }));
    qmp.does("migrate-set-parameters", slowly());
    qmp.does("migrate", json!({ "uri": uri }));
    assert!(qmp.refuses("migrate-start-postcopy", json!({})).contains("Enable postcopy"));
    drop(there);
}
