//! Guests in files: kept there, started from there before their pages are read, several from one.

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use integration::hostile::is_listened_on;
use integration::monitor::Monitor;
use integration::moving::unique;
use integration::{Vm, kvm, test_name};
use payloads::scribe::Scribe;
use payloads::virtio_blk::{Load, virtio_blk};
use serde_json::json;
use tempfile::TempDir;

/// Some ten megabytes that two vCPUs write again and again, each of which looks whether its last pass is there.
fn scribe() -> Scribe {
    Scribe { vcpus: 2, pages: 2048, pace: 0 }
}

fn running() -> Vm {
    let mut vm = Vm::payload(&scribe().payload().unwrap(), &["--name", &unique("s")]);
    vm.debugcon_has("scribe");
    vm
}

fn save(vm: &Vm, file: &Path, more: &[&str]) -> Result<String, String> {
    vm.try_command(&[&["save", file.to_str().unwrap()], more].concat())
}

/// A VM whose guest is in that file.
fn restored(file: &Path, how: &str) -> Vm {
    let uri = format!("file:{}{how}", file.display());
    Vm::payload(&scribe().payload().unwrap(), &["--name", &unique("s"), "--incoming", &uri])
}

fn completes(vm: &mut Vm) {
    vm.wait_until("all of it is there", |vm| {
        vm.try_command(&["status"]).is_ok_and(|said| said.contains("running"))
            && vm.migration()["status"] == "completed"
    });
}

/// The guest runs there, and has lost nothing.
fn passes(mut vm: Vm) {
    completes(&mut vm);
    vm.passes("");
}

/// A guest that was kept in a file, and the VM ended.
fn kept(dir: &TempDir) -> PathBuf {
    let vm = running();
    let file = dir.path().join("saved");
    let said = save(&vm, &file, &[]).unwrap();
    assert!(said.lines().last().unwrap().starts_with("saved in "), "{said}");
    assert_eq!(vm.wait().status.code(), Some(0));
    file
}

#[test]
fn a_guest_goes_on_from_a_file_as_its_pages_come() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let file = kept(&dir);
    // It is as large as the guest's memory, and has what isn't zeros: the payload's pages and little else.
    let metadata = fs::metadata(&file).unwrap();
    assert!(metadata.len() > 64 << 20 && metadata.blocks() * 512 < 24 << 20, "{metadata:?}");
    assert_eq!(metadata.mode() & 0o777, 0o600);
    let mut vm = restored(&file, "");
    completes(&mut vm);
    assert!(vm.migration()["ram"]["postcopy-requests"].as_u64().unwrap() > 0, "{}", vm.migration());
    // It doesn't need the file any more.
    fs::remove_file(&file).unwrap();
    passes(vm);
}

#[test]
fn pages_come_first_where_they_are_told_to_or_nobody_can_wait() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let file = kept(&dir);
    let mut vm = restored(&file, ",pages=first");
    completes(&mut vm);
    assert_eq!(vm.migration()["ram"]["postcopy-requests"].as_u64().unwrap_or(0), 0, "{}", vm.migration());
    passes(vm);
    // A machine that can't wait for pages.
    let payload = scribe().payload().unwrap();
    let name = unique("s");
    let mut vm = Vm::payload(&payload, &["--name", &name, "--iommu", "intel"]);
    vm.debugcon_has("scribe");
    let file = dir.path().join("iommu");
    save(&vm, &file, &[]).unwrap();
    assert_eq!(vm.wait().status.code(), Some(0));
    let uri = format!("file:{}", file.display());
    let mut vm = Vm::payload(&payload, &["--name", &name, "--iommu", "intel", "--incoming", &uri]);
    completes(&mut vm);
    assert_eq!(vm.migration()["ram"]["postcopy-requests"].as_u64().unwrap_or(0), 0, "{}", vm.migration());
    passes(vm);
}

#[test]
fn a_snapshot_s_guest_goes_on_and_two_others_run_from_it() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (vm, live, still) = (running(), dir.path().join("live"), dir.path().join("still"));
    save(&vm, &live, &["--keep"]).unwrap();
    assert!(vm.command(&["status"]).contains("running"));
    assert!(save(&vm, &live, &["--keep"]).unwrap_err().contains("is there already"));
    let said = save(&vm, &still, &["--keep=paused"]).unwrap();
    assert!(said.contains("the guest stands still until soc-vmm resume"), "{said}");
    assert!(vm.command(&["status"]).contains("postmigrate"));
    let again = dir.path().join("again");
    save(&vm, &again, &["--keep=paused"]).unwrap();
    vm.command(&["resume"]);
    assert!(vm.command(&["status"]).contains("running"));
    let all = [restored(&live, ""), restored(&live, ""), restored(&still, "")];
    all.into_iter().for_each(passes);
    arrives(restored(&again, ""), "paused");
    passes(vm);
}

#[test]
fn a_clone_runs_beside_its_original() {
    if !kvm(&test_name()) {
        return;
    }
    let (payload, [name, first, second]) = (scribe().payload().unwrap(), [(); 3].map(|()| unique("s")));
    let mut vm = Vm::payload(&payload, &["--name", &name]);
    vm.debugcon_has("scribe");
    let cloned = |vm: &Vm, twin: &str| {
        let mut twin = vm.cloned(&name, &payload, &["--name", twin]);
        completes(&mut twin);
        // Its guest is in no file that could be found.
        let entries = fs::read_dir(twin.file("")).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> = entries.filter(|name| name.to_string_lossy().contains("clone")).collect();
        assert!(left.is_empty(), "{left:?}");
        twin
    };
    let twins = [cloned(&vm, &first), cloned(&vm, &second)];
    assert!(vm.command(&["status"]).contains("running"));
    passes(vm);
    twins.into_iter().for_each(passes);
}

#[test]
fn what_can_t_be_cloned_goes_on() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk");
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let disk = format!("file={}", image.display());
    let (payload, [name, writes]) = (scribe().payload().unwrap(), [(); 2].map(|()| unique("s")));
    let mut vm = Vm::payload(&payload, &["--name", &name]);
    let mut writer = Vm::payload(&payload, &["--name", &writes, "--disk", &disk]);
    [&mut vm, &mut writer].into_iter().for_each(|vm| vm.debugcon_has("scribe"));
    for (original, of, options, status, why) in [
        (&writer, &writes, &["--disk", &disk][..], 6, "save --keep=paused"),
        (&vm, &name, &["--memory", "128M"], 6, "memory"),
        (&vm, &unique("s"), &[], 4, "no such VM runs here"),
    ] {
        let ended = original.cloned(of, &payload, &[&["--name", &unique("s")], options].concat()).wait();
        assert_eq!(ended.status.code(), Some(status), "{}", ended.stderr);
        assert!(ended.stderr.contains(why) && ended.stderr.lines().count() == 1, "{}", ended.stderr);
    }
    [vm, writer].into_iter().for_each(|vm| vm.passes("it never left"));
}

/// A guest that stands still where it was restored is there, and is nothing else.
fn is_there(vm: &mut Vm, state: &str) {
    let is_so = format!(": {state} ");
    vm.wait_until("all of it is there", |vm| {
        vm.try_command(&["status"]).is_ok_and(|said| said.contains(&is_so)) && vm.migration()["status"] == "completed"
    });
}

/// And goes on when it is told to.
fn arrives(mut vm: Vm, state: &str) {
    is_there(&mut vm, state);
    vm.command(&["resume"]);
    passes(vm);
}

#[test]
fn a_guest_that_was_never_started_is_kept_and_moved_as_such() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (file, door) = (dir.path().join("saved"), dir.path().join("door"));
    let paused = || Vm::payload(&scribe().payload().unwrap(), &["--name", &unique("s"), "--paused"]);
    let mut vm = paused();
    vm.wait_until("it is built", |vm| vm.try_command(&["status"]).is_ok_and(|said| said.contains(": prelaunch ")));
    save(&vm, &file, &[]).unwrap();
    assert_eq!(vm.wait().status.code(), Some(0));
    for how in ["", ",pages=first"] {
        arrives(restored(&file, how), "prelaunch");
    }
    let uri = format!("unix:{}", door.display());
    let mut there = Vm::payload(&scribe().payload().unwrap(), &["--name", &unique("s"), "--incoming", &uri]);
    there.wait_until("it waits", |_| is_listened_on(&door));
    let mut vm = restored(&file, "");
    is_there(&mut vm, "prelaunch");
    vm.command(&["migrate", &uri]);
    assert_eq!(vm.wait().status.code(), Some(0));
    arrives(there, "prelaunch");
}

#[test]
fn a_vm_that_ends_leaves_a_whole_file_or_none() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    for round in 0..12 {
        let (vm, file) = (running(), dir.path().join(format!("saved-{round}")));
        save(&vm, &file, &["--detach"]).unwrap();
        // At any time of its writing.
        thread::sleep(Duration::from_millis(round * 40));
        _ = vm.try_command(&["quit"]);
        assert_eq!(vm.wait().status.code(), Some(0), "round {round}");
        if file.exists() {
            passes(restored(&file, ""));
        }
    }
}

#[test]
fn a_guest_that_writes_to_a_disk_stands_still_while_that_is_copied() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let [image, copy, file] = ["disk", "copy", "saved"].map(|name| dir.path().join(name));
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let payload = virtio_blk(Load { write: true, depth: 16, count: 300, rounds: u32::MAX, sleeps: false }).unwrap();
    let disk = |image: &Path| format!("file={}", image.display());
    let mut vm = Vm::payload(&payload, &["--name", &unique("s"), "--disk", &disk(&image)]);
    vm.debugcon_has("requests");
    let refused = save(&vm, &file, &["--keep"]).unwrap_err();
    assert!(
        refused.contains("disk0") && refused.contains("--keep=paused") && refused.lines().count() == 1,
        "{refused}"
    );
    save(&vm, &file, &["--keep=paused"]).unwrap();
    fs::copy(&image, &copy).unwrap();
    vm.command(&["resume"]);
    let uri = format!("file:{}", file.display());
    let twin = Vm::payload(&payload, &["--name", &unique("s"), "--disk", &disk(&copy), "--incoming", &uri]);
    for mut vm in [vm, twin] {
        completes_rounds(&mut vm);
        vm.command(&["quit"]);
        let ended = vm.wait();
        assert!(ended.status.success() && !ended.debugcon.contains("fail"), "{} {}", ended.debugcon, ended.stderr);
    }
}

/// Of the rounds that end here one began here.
fn completes_rounds(vm: &mut Vm) {
    vm.debugcon_has("requests");
    let lines = |vm: &Vm| fs::read_to_string(vm.file("debugcon")).unwrap().lines().count();
    let before = lines(vm);
    vm.wait_until("it goes on", |vm| lines(vm) > before + 1);
}

#[test]
fn what_is_no_whole_guest_is_refused() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let file = kept(&dir);
    let whole = fs::metadata(&file).unwrap().len();
    let refused = |file: &Path, how: &str, why: &str| {
        let ended = restored(file, how).wait();
        assert_eq!(ended.status.code(), Some(6), "{}", ended.stderr);
        assert!(ended.stderr.contains(why) && ended.stderr.lines().count() == 1, "{}", ended.stderr);
    };
    let copied = |len: u64| {
        let copy = dir.path().join("copy");
        fs::copy(&file, &copy).unwrap();
        let opened = fs::File::options().read(true).write(true).open(&copy).unwrap();
        opened.set_len(len).unwrap();
        (copy, opened)
    };
    for len in [10, 3000, whole / 2, whole - 1] {
        refused(&copied(len).0, "", "no guest came");
    }
    // Somebody was killed while it was written.
    let (copy, opened) = copied(whole);
    opened.write_all_at(&[0; 24], 48).unwrap();
    refused(&copy, "", "record 0 was damaged");
    // One page, of those that the file has: which the guest had come to is another matter each time.
    let (copy, opened) = copied(whole);
    let mut page = [0; 4096];
    let is_there = |at: &u64| {
        opened.read_exact_at(&mut page, *at).unwrap();
        page != [0; 4096]
    };
    let at = (4096 + (1 << 20)..whole).step_by(4096).find(is_there).expect("the guest's own pages");
    opened.write_all_at(&[page[100] ^ 1], at + 100).unwrap();
    refused(&copy, ",pages=first", "is damaged in the file");
    refused(&copy, "", "the guest is lost, its file is as it was");
}

/// As where the disk is full.
#[test]
fn a_guest_whose_file_can_t_grow_goes_on() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (mut vm, file) = (running(), dir.path().join("saved"));
    let pid = vm.pid().to_string();
    let limit = |bytes: &str| {
        let set = Command::new("prlimit").args(["--pid", &pid, &format!("--fsize={bytes}:")]).status();
        assert!(set.unwrap().success());
    };
    limit("4194304");
    for how in [&[][..], &["--keep"], &["--keep=paused"]] {
        let why = save(&vm, &file, how).unwrap_err();
        let words = ["File too large", "the guest runs on here", file.to_str().unwrap()];
        assert!(words.iter().all(|word| why.contains(word)) && why.lines().count() == 1, "{why}");
        assert!(vm.command(&["status"]).contains("running"));
        // It goes a moment after it is told.
        vm.wait_until("no half of a guest is left", |_| !file.exists());
    }
    let why = save(&vm, &dir.path().join("no/where"), &[]).unwrap_err();
    assert!(why.contains("No such file") && why.lines().count() == 1, "{why}");
    limit("unlimited");
    save(&vm, &file, &[]).unwrap();
    assert_eq!(vm.wait().status.code(), Some(0));
    passes(restored(&file, ""));
}

/// As a monitor has it done, with what is before it in the file.
#[test]
fn monitors_have_it_by_a_capability() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (vm, file) = (running(), dir.path().join("saved"));
    fs::write(&file, [b'x'; 5000]).unwrap();
    let mut qmp = Monitor::connect(&vm.file("qmp"));
    let on = json!({ "capabilities": [{ "capability": "mapped-ram", "state": true }] });
    qmp.does("migrate-set-capabilities", on.clone());
    let zstd = qmp.refuses("migrate-set-parameters", json!({ "multifd-compression": "zstd" }));
    assert!(zstd.contains("not compressed"), "{zstd}");
    let uri = format!("file:{},offset=5000", file.display());
    assert!(qmp.refuses("migrate", json!({ "uri": format!("{uri},pages=first") })).contains("--incoming"));
    qmp.does("migrate-set-parameters", json!({ "max-bandwidth": 0, "downtime-limit": 2000 }));
    qmp.does("migrate", json!({ "uri": uri }));
    assert_eq!(vm.wait().status.code(), Some(0));
    assert_eq!(fs::read(&file).unwrap()[..5000], [b'x'; 5000]);
    let file = PathBuf::from(format!("{},offset=5000", file.display()));
    passes(restored(&file, ""));
}
