//! A VM whose soc-vmm has given up what it has no need of: `--sandbox on`.

use std::path::Path;

use integration::{Vm, kvm, test_name};
use payloads::virtio_blk::{Load, WRITTEN, virtio_blk};
use payloads::{PASSED, smp};

/// A field of a thread's status, for each thread of a process.
fn of_threads(pid: u32, field: &str) -> Vec<String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    // One may end meanwhile.
    let status = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("status")).ok());
    let value = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.map(|value| value.trim().to_owned())
    };
    status.filter_map(value).collect()
}

fn is_confined(vm: &Vm) {
    for (field, value) in [("Seccomp", "2"), ("NoNewPrivs", "1")] {
        let values = of_threads(vm.pid(), field);
        assert!(!values.is_empty() && values.iter().all(|found| found == value), "{field}: {values:?}");
    }
}

fn image(directory: &Path, name: &str) -> String {
    let path = directory.join(name);
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    format!("file={}", path.display())
}

/// Disks by io_uring, disks that come and go, resets, monitors, the shim's end: nothing of it starts a program.
#[test]
fn a_confined_vm_runs_is_plugged_reset_and_ends() {
    if !kvm(&test_name()) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let firmware = directory.path().join("firmware");
    // Jumps to itself at the reset vector.
    let mut bytes = vec![0; 0x1_0000];
    bytes[0xfff0..0xfff2].copy_from_slice(&[0xeb, 0xfe]);
    std::fs::write(&firmware, bytes).unwrap();
    let (a, b) = (image(directory.path(), "a.img"), image(directory.path(), "b.img"));
    let name = format!("confined-{}", std::process::id());
    let firmware = firmware.display().to_string();
    let args = ["--firmware", &firmware, "--memory", "16M", "--name", &name, "--sandbox", "on", "--disk", &a];
    let mut vm = Vm::run(&args);
    vm.wait_until("it runs", |vm| vm.try_command(&["status"]).is_ok_and(|said| said.contains("running")));
    is_confined(&vm);
    for _ in 0..3 {
        let id = vm.soc_vmm(&["add-disk", &name, &b]).unwrap();
        is_confined(&vm);
        vm.soc_vmm(&["remove", &name, id.trim()]).unwrap();
        vm.command(&["reset"]);
    }
    vm.command(&["pause"]);
    vm.command(&["resume"]);
    vm.command(&["quit"]);
    let ended = vm.wait();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
}

/// A guest that drives a disk through io_uring, and one with vCPUs that talk to each other.
#[test]
fn a_confined_vms_guest_has_its_disk_and_its_vcpus() {
    if !kvm(&test_name()) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let disk = image(directory.path(), "disk.img");
    let load = Load { write: true, depth: 8, count: 64, rounds: 1, sleeps: true };
    for (payload, more) in [(virtio_blk(load).unwrap(), &["--disk", &disk][..]), (smp::ipi(4).unwrap(), &[])] {
        let ended = Vm::payload(&payload, &[&["--sandbox", "on"], more].concat()).wait();
        let passed = (ended.status.code(), ended.stderr.as_str()) == (Some(PASSED), "");
        assert!(passed, "{}: {:?} {} {}", payload.name, ended.status, ended.stderr, ended.debugcon);
    }
    let written = std::fs::read(directory.path().join("disk.img")).unwrap();
    assert!(written.contains(&WRITTEN), "nothing was written");
}
