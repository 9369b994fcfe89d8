//! Real firmware and a virtio disk: SeaBIOS boots a sector from it, which reads and writes the disk through the firmware.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use integration::hostile::is_listened_on;
use integration::{Ended, Vm, kvm, seabios, test_name};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use payloads::virtio_blk::{Load, virtio_blk};
use tempfile::TempDir;

const SECTOR: usize = 512;
const SECTORS: usize = 4096;
/// What the sector counts its boots in.
const COUNTER: u16 = 40;

const ORIGIN: u64 = 0x7c00;
const READ: u16 = 0x7d00;
const WRITE: u16 = 0x7d10;
const BUFFER: u16 = 0x9000;
const DEBUG_CONSOLE: u32 = 0x402;
const DEBUG_EXIT: u32 = 0xf4;

/// Reads the counter's sector (INT 13h, function 42h), adds one, writes it (43h), and ends with the counter; with the firmware's error
/// where there is one.
fn boot_sector() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    let mut out = a.create_label();
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.mov(es, ax)?;
    a.mov(si, u32::from(READ))?;
    a.mov(ah, 0x42)?;
    a.int(0x13)?;
    a.mov(al, ah)?;
    a.jc(out)?;
    a.inc(byte_ptr(u64::from(BUFFER)))?;
    a.mov(si, u32::from(WRITE))?;
    a.mov(ax, 0x4300)?;
    a.int(0x13)?;
    a.mov(al, ah)?;
    a.jc(out)?;
    a.mov(al, byte_ptr(u64::from(BUFFER)))?;
    a.set_label(&mut out)?;
    a.mov(dx, DEBUG_EXIT)?;
    a.out(dx, al)?;
    a.hlt()?;
    let mut code = a.assemble(ORIGIN)?;
    code.resize(usize::from(READ) - ORIGIN as usize, 0);
    // Disk address packets: their length, sectors, where to or from, which.
    for _ in [READ, WRITE] {
        code.extend([16, 0]);
        code.extend([1, BUFFER, 0].map(u16::to_le_bytes).concat());
        code.extend(u64::from(COUNTER).to_le_bytes());
    }
    code.resize(SECTOR - 2, 0);
    code.extend([0x55, 0xaa]);
    Ok(code)
}

/// Says so, then writes the counter's sector for ever.
fn endless_writer() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    let mut again = a.create_label();
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.mov(dx, DEBUG_CONSOLE)?;
    a.mov(al, u32::from(b'W'))?;
    a.out(dx, al)?;
    a.set_label(&mut again)?;
    a.mov(si, u32::from(WRITE))?;
    a.mov(dx, 0x80)?;
    a.mov(ax, 0x4300)?;
    a.int(0x13)?;
    a.jmp(again)?;
    a.assemble(ORIGIN)
}

#[test]
fn a_vm_that_is_told_to_end_while_it_writes_its_disk_says_nothing() {
    let Some(firmware) = seabios() else { return };
    let dir = TempDir::new().unwrap();
    let spec = format!("file={}", endless_disk(&dir).display());
    for round in 0..8 {
        let mut vm = Vm::run(&["--firmware", &firmware, "--memory", "64M", "--disk", &spec]);
        // SeaBIOS talks here too.
        vm.debugcon_has("Booting from 0000:7c00\nW");
        kill(Pid::from_raw(vm.pid() as i32), Signal::SIGTERM).unwrap();
        let ended = vm.wait();
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "round {round}");
    }
}

#[test]
fn a_vm_is_reset_again_and_again_while_another_process_reads_its_memory() {
    let Some(firmware) = seabios() else { return };
    let dir = TempDir::new().unwrap();
    let (path, socket) = (endless_disk(&dir), dir.path().join("socket"));
    let words = [Path::new("recorded"), &path, &socket].map(|word| word.to_str().unwrap().to_owned());
    let backend = std::thread::spawn(move || vhost_backend::run(&words));
    while !is_listened_on(&socket) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let disk = format!("vhost-user={}", socket.display());
    let mut vm = Vm::run(&["--firmware", &firmware, "--memory", "64M", "--disk", &disk]);
    for boots in 1..=4 {
        vm.wait_until("another boot", |vm| {
            let said = std::fs::read_to_string(vm.file("debugcon")).unwrap_or_default();
            said.matches("Booting from 0000:7c00\nW").count() == boots
        });
        if boots < 4 {
            vm.command(&["reset"]);
        }
    }
    kill(Pid::from_raw(vm.pid() as i32), Signal::SIGTERM).unwrap();
    let ended = vm.wait();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
    backend.join().unwrap().unwrap();
}

/// A disk whose boot sector writes it for ever.
fn endless_disk(dir: &TempDir) -> std::path::PathBuf {
    let path = disk(dir);
    let mut bytes = std::fs::read(&path).unwrap();
    let code = endless_writer().expect("instructions that exist");
    bytes[..code.len()].copy_from_slice(&code);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn disk(dir: &TempDir) -> std::path::PathBuf {
    let mut disk = boot_sector().expect("instructions that exist");
    disk.resize(SECTORS * SECTOR, 0);
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, disk).unwrap();
    path
}

/// An empty qcow2 image of version 3 over `backing`, clusters of 64 KiB (QEMU docs/interop/qcow2.txt).
fn overlay(dir: &TempDir, backing: &Path) -> std::path::PathBuf {
    const CLUSTER: usize = 0x1_0000;
    const NAME: usize = 0x200;
    let name = backing.to_str().unwrap().as_bytes();
    let mut image = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(8, &(NAME as u64).to_be_bytes());
    put(16, &(name.len() as u32).to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &((SECTORS * SECTOR) as u64).to_be_bytes());
    // One table of one entry each: active clusters in the fourth cluster, reference counts in the second and third.
    put(36, &1u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    // The backing file's format.
    put(104, &0xe279_2acau32.to_be_bytes());
    put(108, &3u32.to_be_bytes());
    put(112, b"raw");
    put(NAME, name);
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for used in 0..4 {
        put(2 * CLUSTER + 2 * used, &1u16.to_be_bytes());
    }
    let path = dir.path().join("disk.qcow2");
    std::fs::write(&path, image).unwrap();
    path
}

/// Boots from a disk; none where that can't be had here.
fn boot(disk: &str) -> Option<Ended> {
    let firmware = seabios()?;
    let args = ["--firmware", &firmware, "--memory", "64M", "--debug-exit", "--disk", disk];
    Some(Vm::run(&args).wait())
}

fn counted(disk: &str) -> Option<u8> {
    let ended = boot(disk)?;
    assert_eq!(ended.stderr, "", "{}", ended.debugcon);
    Some((ended.status.code().unwrap() >> 1) as u8)
}

#[test]
fn a_boot_sector_reads_and_writes_its_disk() {
    let dir = TempDir::new().unwrap();
    let path = disk(&dir);
    let spec = format!("file={}", path.display());
    let Some(first) = counted(&spec) else { return };
    assert_eq!((Some(first), counted(&spec)), (Some(1), Some(2)));
    let bytes = std::fs::read(path).unwrap();
    assert_eq!((bytes.len(), bytes[usize::from(COUNTER) * SECTOR]), (SECTORS * SECTOR, 2));
}

#[test]
fn a_qcow2_image_keeps_what_is_written_and_its_backing_file_stays() {
    let dir = TempDir::new().unwrap();
    let raw = disk(&dir);
    let spec = format!("file={}", overlay(&dir, &raw).display());
    let Some(first) = counted(&spec) else { return };
    assert_eq!((Some(first), counted(&spec)), (Some(1), Some(2)));
    assert_eq!(std::fs::read(raw).unwrap()[usize::from(COUNTER) * SECTOR], 0);
}

/// Of a file that may not grow every request of the guest's fails. Each error names the file, and the log doesn't grow with them.
#[test]
fn a_qcow2_image_without_room_is_told_of_with_its_name_and_not_for_ever() {
    if !kvm(&test_name()) {
        return;
    }
    const REQUESTS: u32 = 500;
    let dir = TempDir::new().unwrap();
    let image = overlay(&dir, &disk(&dir));
    let spec = format!("file={},werror=report", image.display());
    let load = Load { write: true, depth: 8, count: REQUESTS, rounds: 1, sleeps: true };
    let mut vm = Vm::payload(&virtio_blk(load).unwrap(), &["--disk", &spec, "--paused"]);
    // The shim's memory may grow: it has the limits that soc-vmm had when it was started.
    let shim = format!("/proc/{0}/task/{0}/children", vm.pid());
    vm.wait_until("its shim is there", |_| std::fs::read_to_string(&shim).is_ok_and(|shims| !shims.is_empty()));
    let size = std::fs::metadata(&image).unwrap().len();
    let limit = Command::new("prlimit").args(["--pid", &vm.pid().to_string(), &format!("--fsize={size}:")]).status();
    assert!(limit.unwrap().success());
    vm.command(&["resume"]);
    let ended = vm.wait();
    assert!(ended.debugcon.contains("a request's status"), "{}", ended.debugcon);
    let lines: Vec<&str> = ended.stderr.lines().collect();
    assert!((1..=20).contains(&lines.len()), "{} lines for {REQUESTS} requests: {:?}", lines.len(), lines.first());
    assert!(lines.iter().all(|line| line.contains("disk.qcow2")), "{}", ended.stderr);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let dir = TempDir::new().unwrap();
    let path = disk(&dir);
    // The firmware's "device failed" or "write protected", but no count.
    let Some(ended) = boot(&format!("file={},readonly=on", path.display())) else { return };
    assert!((ended.status.code().unwrap() >> 1) > 2, "{:?} {}", ended.status, ended.debugcon);
    assert_eq!(std::fs::read(path).unwrap()[usize::from(COUNTER) * SECTOR], 0);
}

#[test]
fn a_boot_sector_reads_and_writes_a_disk_of_another_process() {
    // With shadow queues, and with a back end that works on the guest's own.
    for kind in ["block", "recorded"] {
        let dir = TempDir::new().unwrap();
        let path = disk(&dir);
        let socket = dir.path().join("socket");
        for boot in [1, 2] {
            let words = [Path::new(kind), &path, &socket].map(|word| word.to_str().unwrap().to_owned());
            // Its connection is the VM's: both end together.
            let backend = std::thread::spawn(move || vhost_backend::run(&words));
            while !is_listened_on(&socket) {
                std::thread::sleep(Duration::from_millis(1));
            }
            let Some(count) = counted(&format!("vhost-user={}", socket.display())) else { return };
            assert_eq!(count, boot);
            backend.join().unwrap().unwrap();
            // Where the back end hasn't taken it away.
            _ = std::fs::remove_file(&socket);
        }
        assert_eq!(std::fs::read(path).unwrap()[usize::from(COUNTER) * SECTOR], 2);
    }
}
