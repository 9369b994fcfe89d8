//! What the shims cost a server.

use testbed::bed::GUEST_RAM;
use testbed::machine::Machine;

/// What a shim may take of the host's memory, without the guest's.
const MOST_KIB: u64 = 1024;

/// A shim whose VM has `vcpus` vCPUs takes a thread more than these, and little memory; both are printed.
///
/// # Panics
/// It takes more.
pub fn shim_is_small(server: &Machine, pid: i32, vcpus: usize) {
    let mut threads = server.threads(pid).expect("the shim's threads");
    threads.retain(|thread| !thread.is_of_kvm());
    let memory = server.memory(pid).expect("the shim's memory");
    let private = memory.private_kib_without(GUEST_RAM);
    let (tables, count) = (memory.page_tables, threads.len());
    println!("shim {pid}: {private} KiB private, {tables} KiB of page tables, {count} threads for {vcpus} vCPUs");
    assert!(count <= vcpus + 1, "{threads:?}");
    assert!(private < MOST_KIB, "{memory:?}");
}
