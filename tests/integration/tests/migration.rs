//! A guest goes on in another VM while it writes its memory: by `soc-vmm migrate`, between two of this machine's.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use integration::hostile::is_listened_on;
use integration::monitor::Monitor;
use integration::moving::unique;
use integration::{Vm, kvm, test_name};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use payloads::scribe::Scribe;
use payloads::virtio_blk::{Load, virtio_blk};
use payloads::wanderer::Wanderer;
use serde_json::json;
use tempfile::TempDir;

fn scribe() -> Scribe {
    Scribe { vcpus: 2, pages: 2048, pace: 0 }
}

#[test]
fn a_guest_that_writes_its_memory_moves_to_and_fro() {
    to_and_fro(10);
}

#[test]
#[ignore = "some minutes: cargo xtask soak test.migration runs it"]
fn a_guest_that_writes_its_memory_moves_to_and_fro_for_long() {
    to_and_fro(200);
}

/// 128 MiB, most of it written again and again by two vCPUs, each of which looks whether its last pass is there.
fn to_and_fro(moves: u16) {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    // Some ten megabytes a second each.
    let scribe = Scribe { vcpus: 2, pages: 12 << 10, pace: 1_000_000 };
    let payload = scribe.payload().unwrap();
    let options = ["--memory", "128M"];
    let mut name = unique("m");
    let mut vm = Vm::payload(&payload, &[&["--name", &name], &options[..]].concat());
    vm.debugcon_has("scribe");
    for number in 0..moves {
        let of_next = unique("m");
        let door = dir.path().join(&of_next);
        let uri = format!("unix:{}", door.display());
        let mut next = Vm::payload(&payload, &[&["--name", &of_next, "--incoming", &uri], &options[..]].concat());
        next.wait_until("it waits", |_| is_listened_on(&door));
        let connections = (1 + number % 4).to_string();
        let how: &[&str] = if number % 3 == 2 { &["--zstd"] } else { &[] };
        let said = vm.soc_vmm(&[&["migrate", &uri, &name, "--connections", &connections], how].concat()).unwrap();
        assert!(said.contains("completed in"), "{said}");
        let ended = vm.wait();
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "move {number}: {}", ended.debugcon);
        (vm, name) = (next, of_next);
    }
    vm.passes("");
}

/// A VM with a guest that writes, and its name, and another one that waits for it, and where.
fn pair(dir: &TempDir, more: &[&str]) -> (Vm, String, Vm, String) {
    pair_of(dir, [&[], more])
}

/// With options of each side's.
fn pair_of(dir: &TempDir, [ours, theirs]: [&[&str]; 2]) -> (Vm, String, Vm, String) {
    let scribe = scribe();
    let name = unique("here");
    let mut here = Vm::payload(&scribe.payload().unwrap(), &[&["--name", &name], ours].concat());
    here.debugcon_has("scribe");
    let uri = format!("unix:{}", dir.path().join("there").display());
    let of_other = unique("there");
    let args = [&["--name", &of_other, "--incoming", &uri], theirs].concat();
    let mut there = Vm::payload(&scribe.payload().unwrap(), &args);
    there.wait_until("it waits", |_| is_listened_on(&dir.path().join("there")));
    (here, name, there, uri)
}

#[test]
fn what_nobody_writes_is_sent_once() {
    if !kvm(&test_name()) {
        return;
    }
    const MIB: u32 = 16;
    let dir = TempDir::new().unwrap();
    let payload = Wanderer { pages: MIB << 8, pace: None }.payload().unwrap();
    let (name, of_other, door) = (unique("here"), unique("there"), dir.path().join("there"));
    let uri = format!("unix:{}", door.display());
    let mut here = Vm::payload(&payload, &["--name", &name]);
    here.debugcon_has("ready");
    let mut there = Vm::payload(&payload, &["--name", &of_other, "--incoming", &uri]);
    there.wait_until("it waits", |_| is_listened_on(&door));
    let said = here.soc_vmm(&["migrate", &uri, &name]).unwrap();
    let sent = said.split_once(" MiB sent").and_then(|(before, _)| before.rsplit(' ').next()?.parse::<f64>().ok());
    // What the guest's pages are, besides zeros, is its payload and tables.
    assert!(sent.is_some_and(|sent| (f64::from(MIB)..f64::from(MIB + 1)).contains(&sent)), "{said}");
    there.command(&["quit"]);
}

#[test]
fn another_machine_is_refused_before_a_page_moves_and_the_guest_stays() {
    if !kvm(&test_name()) {
        return;
    }
    for (more, why) in [
        (&["--memory", "128M"][..], "the source's guest has 64 MiB of RAM, this one 128"),
        (&["--cpus", "3"], "1×2×1 vCPUs (sockets, cores, threads), this one 1×3×1"),
        (&["--cpus", "2,maxcpus=4"], "this one 1×4×1"),
        (&["--cpu", "host,-cx16"], "this host's processor is another one for the guest: it"),
        (&["--iommu", "intel"], "the source has no IOMMU, this VM has an"),
        (&["--entropy", "on"], "this VM has virtio-rng@"),
    ] {
        is_refused([&[], more], why);
    }
    let disks = TempDir::new().unwrap();
    let disk = |name: &str, mib: usize| {
        let path = disks.path().join(name);
        std::fs::write(&path, vec![0; mib << 20]).unwrap();
        format!("file={},format=raw", path.display())
    };
    let (ours, small, other) = (disk("ours", 2), disk("small", 1), disk("other", 2) + ",queues=2");
    for (theirs, why) in [
        (small, "has 4096 sectors at the source, 2048 here, which may be more"),
        (other, "has 1 queues at the source, 2 here"),
    ] {
        is_refused([&["--disk", &ours], &["--disk", &theirs]], why);
    }
}

fn is_refused(options: [&[&str]; 2], why: &str) {
    let dir = TempDir::new().unwrap();
    let (here, name, there, uri) = pair_of(&dir, options);
    let refused = here.soc_vmm(&["migrate", &uri, &name]).unwrap_err();
    assert!(refused.contains("the destination refused: preparing") && refused.contains(why), "{options:?}: {refused}");
    let ended = there.wait();
    assert_eq!(ended.status.code(), Some(6), "{}", ended.stderr);
    assert!(ended.stderr.contains(why), "{}", ended.stderr);
    here.passes("");
}

#[test]
fn who_knocks_and_is_no_source_ends_no_wait() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (here, name, there, uri) = pair(&dir, &[]);
    let door = dir.path().join("there");
    for said in ["", "GET / HTTP/1.1\r\nHost: there\r\n\r\n"] {
        UnixStream::connect(&door).unwrap().write_all(said.as_bytes()).unwrap();
    }
    let second = Vm::payload(&scribe().payload().unwrap(), &["--name", &unique("there"), "--incoming", &uri]);
    let ended = second.wait();
    assert!(!ended.status.success() && ended.stderr.contains("another process listens there"), "{}", ended.stderr);
    here.soc_vmm(&["migrate", &uri, &name]).unwrap();
    assert!(here.wait().status.success());
    there.passes("");
}

#[test]
fn a_file_that_is_there_stays_and_so_does_the_guest() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (here, name, there, _) = pair(&dir, &[]);
    let disk = dir.path().join("disk");
    std::fs::write(&disk, "a disk").unwrap();
    let refused = here.soc_vmm(&["migrate", &format!("file:{}", disk.display()), &name]).unwrap_err();
    assert!(refused.contains("something is there already"), "{refused}");
    assert_eq!(std::fs::read_to_string(&disk).unwrap(), "a disk");
    there.command(&["quit"]);
    here.passes("");
}

#[test]
fn a_move_that_is_cancelled_or_cut_leaves_the_guest_where_it_was() {
    if !kvm(&test_name()) {
        return;
    }
    let slow = |name: &str, uri: &str| ["migrate", uri, name, "--bandwidth", "4M", "--detach"].map(str::to_owned);
    // By command, by the end of the destination's process, of its shim, by one to the destination; while memory moves.
    for how in ["cancel", "vmm", "shim", "quit"] {
        let dir = TempDir::new().unwrap();
        let (mut here, name, there, uri) = pair(&dir, &[]);
        let words = slow(&name, &uri);
        here.soc_vmm(&words.each_ref().map(String::as_str)).unwrap();
        let status = |vm: &Vm| monitor(vm).does("query-migrate", json!({}))["status"].clone();
        here.wait_until("memory moves", |vm| status(vm) == "active");
        let told = here.command(&["status"]);
        assert!(told.contains("\n  migration active, ") && told.contains(" MiB left of 64.0"), "{told}");
        // The destination has the devices that it was asked for.
        let why = here.soc_vmm(&["add-cpu", &name]).unwrap_err();
        assert!(why.contains("just being moved"), "{why}");
        let why = here.soc_vmm(&["resize", &name, "disk0", "8M"]).unwrap_err();
        assert!(why.contains("just being moved"), "{why}");
        match how {
            "cancel" => drop(here.soc_vmm(&["cancel-migration", &name]).unwrap()),
            "quit" => drop(there.command(&["quit"])),
            "vmm" => kill(Pid::from_raw(there.pid() as i32), Signal::SIGKILL).unwrap(),
            _ => kill(Pid::from_raw(there.shim() as i32), Signal::SIGKILL).unwrap(),
        }
        here.wait_until("it is over", |vm| ["cancelled", "failed"].iter().any(|last| status(vm) == *last));
        assert_eq!(status(&here) == "cancelled", how == "cancel");
        let ended = there.wait();
        assert_eq!(ended.status.code() == Some(0), how == "quit", "{}", ended.stderr);
        let told = here.command(&["status"]);
        let expected = match how {
            "cancel" => "migration cancelled\n",
            "quit" => {
                "migration failed: the destination refused: the VM that waited there was told to end, or to take no guest\n"
            }
            _ => "migration failed: ",
        };
        assert!(told.contains(&format!("\n  {expected}")), "{told}");
        assert!(!told.contains("MiB left"), "{told}");
        here.passes("");
    }
}

#[test]
fn a_source_that_dies_leaves_no_half_guest() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (mut here, name, there, uri) = pair(&dir, &[]);
    here.soc_vmm(&["migrate", &uri, &name, "--bandwidth", "4M", "--detach"]).unwrap();
    here.wait_until("memory moves", |vm| monitor(vm).does("query-migrate", json!({}))["status"] == "active");
    kill(Pid::from_raw(here.pid() as i32), Signal::SIGKILL).unwrap();
    let ended = there.wait();
    assert_eq!(ended.status.code(), Some(6), "{}", ended.stderr);
    assert!(ended.stderr.contains("no guest came") && ended.stderr.lines().count() == 1, "{}", ended.stderr);
}

#[test]
fn a_move_waits_before_the_guest_changes_sides_where_it_is_told_to() {
    if !kvm(&test_name()) {
        return;
    }
    for ends in ["continues", "cancelled", "cut"] {
        let dir = TempDir::new().unwrap();
        let (mut here, _, there, uri) = pair(&dir, &[]);
        let mut qmp = monitor(&here);
        let on = |name: &str| json!({ "capability": name, "state": true });
        let capabilities =
            json!({ "capabilities": [on("pause-before-switchover"), on("auto-converge"), on("return-path")] });
        qmp.does("migrate-set-capabilities", capabilities);
        // How fast memory moves is the machine's, and here it needn't be faster than the guest.
        qmp.does("migrate-set-parameters", json!({ "downtime-limit": 60_000 }));
        qmp.does("migrate", json!({ "uri": uri }));
        let is = |vm: &Vm, status: &str| monitor(vm).does("query-migrate", json!({}))["status"] == status;
        here.wait_until("it waits", |vm| is(vm, "pre-switchover"));
        assert_eq!(qmp.does("query-status", json!({}))["status"], "finish-migrate");
        match ends {
            "continues" => {
                qmp.does("migrate-continue", json!({ "state": "pre-switchover" }));
                let ended = here.wait();
                assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
                there.passes("");
                continue;
            }
            "cancelled" => drop(qmp.does("migrate_cancel", json!({}))),
            _ => kill(Pid::from_raw(there.pid() as i32), Signal::SIGKILL).unwrap(),
        }
        here.wait_until("it is over", |vm| is(vm, "cancelled") || is(vm, "failed"));
        here.passes("");
    }
}

#[test]
fn a_guest_is_kept_in_a_file_and_goes_on_from_it_again_and_again() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let scribe = scribe();
    let name = unique("here");
    let mut vm = Vm::payload(&scribe.payload().unwrap(), &["--name", &name]);
    vm.debugcon_has("scribe");
    let uri = format!("file:{}", dir.path().join("saved").display());
    // The guest writes as fast as it can, and is to stand still for no time: the file has each page three times at most, all the same.
    vm.soc_vmm(&["migrate", &uri, &name, "--downtime", "0"]).unwrap();
    let bytes = std::fs::metadata(dir.path().join("saved")).unwrap().len();
    assert!(bytes < 3 * (64 << 20) + (1 << 20), "{bytes}");
    assert_eq!(vm.wait().status.code(), Some(0));
    for _ in 0..2 {
        let mut vm = Vm::payload(&scribe.payload().unwrap(), &["--incoming", &uri]);
        vm.wait_until("it runs", |vm| vm.try_command(&["status"]).is_ok_and(|said| said.contains("running")));
        vm.passes("");
    }
    // Part of a file is no guest.
    let whole = std::fs::read(dir.path().join("saved")).unwrap();
    std::fs::write(dir.path().join("saved"), &whole[..whole.len() / 2]).unwrap();
    let ended = Vm::payload(&scribe.payload().unwrap(), &["--incoming", &uri]).wait();
    assert_eq!(ended.status.code(), Some(6));
    assert!(ended.stderr.contains("no guest came") && ended.stderr.lines().count() == 1, "{}", ended.stderr);
}

#[test]
fn a_disk_goes_along_with_requests_under_way() {
    if !kvm(&test_name()) {
        return;
    }
    const MOVES: u32 = 3;
    let load = Load { write: true, depth: 16, count: 300, rounds: u32::MAX, sleeps: false };
    for (sleeps, format) in [(false, "raw"), (true, "raw"), (true, "qcow2")] {
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("disk");
        disk_image(&image, format, 1 << 20);
        let disk = format!("file={},format={format}", image.display());
        let payload = virtio_blk(Load { sleeps, ..load }).unwrap();
        let mut name = unique("d");
        let mut vm = Vm::payload(&payload, &["--name", &name, "--disk", &disk]);
        for _ in 0..MOVES {
            vm.debugcon_has("requests");
            let of_next = unique("d");
            let door = dir.path().join(&of_next);
            let uri = format!("unix:{}", door.display());
            let mut next = Vm::payload(&payload, &["--name", &of_next, "--disk", &disk, "--incoming", &uri]);
            next.wait_until("it waits", |_| is_listened_on(&door));
            vm.soc_vmm(&["migrate", &uri, &name]).unwrap();
            let ended = vm.wait();
            assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "{format}: {}", ended.debugcon);
            assert!(!ended.debugcon.contains("fail"), "{}", ended.debugcon);
            (vm, name) = (next, of_next);
        }
        // Of the rounds that end here one began here.
        vm.wait_until("it goes on", |vm| std::fs::read_to_string(vm.file("debugcon")).unwrap().lines().count() > 2);
        vm.command(&["quit"]);
        let ended = vm.wait();
        assert!(
            ended.status.success() && !ended.debugcon.contains("fail"),
            "{format}: {} {}",
            ended.debugcon,
            ended.stderr
        );
    }
}

/// Makes an image of that many bytes.
fn disk_image(path: &Path, format: &str, bytes: u64) {
    match format {
        "raw" => std::fs::File::create(path).unwrap().set_len(bytes).unwrap(),
        _ => {
            let mut made = Command::new("qemu-img");
            made.args(["create", "-q", "-f", format]).arg(path).arg(bytes.to_string());
            assert!(made.status().unwrap().success());
        }
    }
}

fn monitor(vm: &Vm) -> Monitor {
    Monitor::connect(&vm.file("qmp"))
}

/// Its connection isn't closed meanwhile, which the source would take for a lost one.
#[test]
fn a_source_waits_for_a_thread_that_the_destination_lacks() {
    if !kvm(&test_name()) {
        return;
    }
    let (dir, payload) = (TempDir::new().unwrap(), scribe().payload().unwrap());
    let door = dir.path().join("door");
    let uri = format!("unix:{}", door.display());
    let mut vm = Vm::payload(&payload, &["--name", &unique("m")]);
    vm.debugcon_has("scribe");
    let mut next = Vm::payload(&payload, &["--name", &unique("m"), "--incoming", &uri]);
    next.wait_until("it waits", |_| is_listened_on(&door));
    let pid = next.pid().to_string();
    let limit = |bytes: &str| {
        let set = Command::new("prlimit").args(["--pid", &pid, &format!("--as={bytes}:")]).status();
        assert!(set.unwrap().success());
    };
    let has_open = || std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    // No room for a thread's stack.
    let pages = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    let pages: u64 = pages.split(' ').next().unwrap().parse().unwrap();
    limit(&(pages * 4096 + (1 << 20)).to_string());
    let before = has_open();
    vm.command(&["migrate", &uri, "--detach"]);
    next.wait_until("somebody is there", |_| has_open() > before);
    limit("unlimited");
    assert_eq!(vm.wait().status.code(), Some(0));
    next.passes("it came");
}
