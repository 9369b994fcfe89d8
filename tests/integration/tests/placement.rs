//! Where a VM's CPUs and memory are, through soc-vmm as a user runs it: what the host gives, and what it is said to lack.

use integration::{Ended, Vm, kvm, test_name};
use payloads::{PASSED, Privilege, pio, smp};

/// Exit status of a VM that the host can't give.
const UNAVAILABLE: i32 = 4;

fn passes(ended: &Ended) {
    assert_eq!(ended.status.code(), Some(PASSED), "{}{}", ended.debugcon, ended.stderr);
}

/// Runs a payload of one vCPU that the host must refuse; what was said, one line.
fn refused(options: &[&str]) -> String {
    let ended = Vm::payload(&pio::pio(Privilege::Cpl0).unwrap(), options).wait();
    assert_eq!(ended.status.code(), Some(UNAVAILABLE), "{options:?}: {}{}", ended.debugcon, ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    ended.stderr
}

#[test]
fn nodes_of_the_guest_are_memory_on_nodes_of_the_host() {
    if !kvm(&test_name()) {
        return;
    }
    // Every Linux host has a node 0.
    let nodes = ["--numa", "cpus=0,cpus=3,memory=16M,host=0,pin=on", "--numa", "cpus=1-2,memory=48M"];
    let four = smp::bring_up(4).unwrap();
    passes(&Vm::payload(&four, &nodes).wait());
    // The second node lies on both sides of the hole below 4 GiB.
    let wide = ["--memory", "3G", "--numa", "cpus=0-1,memory=1G", "--numa", "cpus=2-3,memory=2G,host=0"];
    passes(&Vm::payload(&four, &wide).wait());
}

#[test]
fn what_the_host_has_not_is_one_line() {
    if !kvm(&test_name()) {
        return;
    }
    let far = refused(&["--numa", "cpus=0,memory=32M", "--numa", "memory=32M,host=4000"]);
    assert!(far.contains("--numa node=1: ") && far.contains("no NUMA node 4000"), "{far}");
    let far = refused(&["--memory", "64M,node=4000"]);
    assert!(far.contains("--memory: ") && far.contains("no NUMA node 4000"), "{far}");
    let far = refused(&["--numa", "cpus=0,memory=64M,host=4000,pin=on"]);
    assert!(far.contains("no NUMA node 4000"), "{far}");
    // More huge pages than any host of these tests keeps.
    let huge = refused(&["--memory", "16384G,hugepages=1G"]);
    assert!(huge.contains("--memory: ") && huge.contains("huge pages of 1024 MiB"), "{huge}");
    let cpu = refused(&["--cpu", "host,+3dnow,+lwp"]);
    assert!(cpu.contains("--cpu host: this host lacks 3dnow, lwp"), "{cpu}");
}
