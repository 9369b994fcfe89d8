//! What one VM costs its host: private memory, page tables, threads.

use std::fs;
use std::time::{Duration, Instant};

use integration::soc::{Board, PATIENCE, Shape, Soc};
use integration::{kvm, test_name};
use payloads::{Payload, smp};

/// A shim whose guest of 1 GiB has come up and halts.
fn halted(payload: &Payload) -> Soc {
    let mut soc = Soc::start_optimized();
    soc.create(&Shape { memory: 1 << 30, ..Shape::of(payload) });
    soc.load(payload);
    soc.run();
    let mut board = Board::default();
    while board.console != "halted\n" {
        let seen = soc.take();
        let answer = board.serve(&seen);
        soc.answer(&seen, answer);
    }
    // This side sleeps too: nothing happens any more but heartbeats.
    soc.sleeps();
    soc
}

/// KiB that would belong to a process alone if it were the only one of its program, each mapping with its own; guest RAM, card memory
/// and mailbox apart.
fn private(pid: u32) -> (u64, String) {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut total, mut each, mut mapping) = (0, String::new(), "");
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            mapping = line;
        } else if first.starts_with("Private_") && !mapping.contains("/memfd:outboard-")
            || first.starts_with("Shared_") && mapping.ends_with("/host-kvm-shim")
        {
            let kib: u64 = words.next().unwrap().parse().unwrap();
            total += kib;
            if kib != 0 {
                each += &format!("{kib:6} {first} {mapping}\n");
            }
        }
    }
    (total, each)
}

fn page_tables(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

/// A process's threads by name, without those that KVM starts in it (`kvm-nx-lpage-recovery`).
fn threads(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let names = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap().trim().to_owned());
    names.filter(|name| !name.starts_with("kvm-")).collect()
}

#[test]
fn a_shim_of_a_1_gib_guest_has_less_than_a_megabyte_of_its_own() {
    if !kvm(&test_name()) {
        return;
    }
    let soc = halted(&smp::halted(1).unwrap());
    // What only the start needed goes at the next heartbeats.
    let beats = soc.host_beats();
    let start = Instant::now();
    while soc.host_beats() < beats + 3 {
        assert!(start.elapsed() < PATIENCE, "no heartbeat");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (kib, each) = private(soc.pid());
    println!("private memory {kib} KiB, page tables {} KiB\n{each}", page_tables(soc.pid()));
    assert!(kib * 1024 < 1_000_000, "{kib} KiB\n{each}");
    assert!(kib > 0, "smaps are read");
    assert!(soc.shut_down().unwrap().success());
}

#[test]
fn a_shim_has_a_thread_a_vcpu_and_one_more() {
    if !kvm(&test_name()) {
        return;
    }
    let vcpus = 4;
    let soc = halted(&smp::halted(vcpus).unwrap());
    let threads = threads(soc.pid());
    assert!(threads.len() <= usize::from(vcpus) + 1, "{threads:?}");
    assert!(soc.shut_down().unwrap().success());
}
