//! A guest that runs before all of its pages are there.

mod soc;

use std::collections::BTreeMap;
use std::fs;

use api_channel::Status;
use api_channel::call::{Call, Irqchip, LateRun, RamRequest, VCPU_ALL};
use api_channel::event::Event;
use ioreq_ring::Completion;
use pcie_function::SocFunction;
use soc::{Soc, wait};

/// Reads a byte of each of these pages (below 64 KiB), tells it by port 0x80, then halts.
fn reads(pages: &[u16]) -> Vec<u8> {
    let read = |page: &u16| [[0xa0].as_slice(), &(page << 12).to_le_bytes(), &[0xe6, 0x80]].concat();
    let mut code: Vec<u8> = pages.iter().flat_map(read).collect();
    code.extend([0xf4, 0xeb, 0xfd]);
    code
}

fn run(first: u64, pages: u64) -> LateRun {
    LateRun { ram: 0, reserved: 0, first, pages }
}

/// A VM that lacks `late`, with bytes in some pages, about to run `code`. None: not on this machine, and why.
fn start(code: &[u8], late: &[LateRun]) -> Option<Soc> {
    if !soc::has_kvm() {
        return None;
    }
    let mut soc = Soc::start(&[]);
    if let Err((status, why)) = soc.call(&Call::CanPostCopy) {
        assert_eq!(status, Status::UNAVAILABLE);
        eprintln!("skipped: {why}");
        return None;
    }
    soc.handler = Box::new(|_, _| Some(Completion::ok(0)));
    soc.real_mode(1, Irqchip::Full, code);
    (4..8).for_each(|page| soc.function.write(page << 12, &[0x10 + page as u8]).unwrap());
    soc.ok(&Call::Lacks(late.to_vec()));
    soc.ok(&Call::PostCopy(true));
    Some(soc)
}

fn told(soc: &Soc) -> Vec<u32> {
    soc.seen
        .iter()
        .filter(|seen| seen.request.address == 0x80)
        .map(|seen| seen.request.data)
        .map(|d| d as u32)
        .collect()
}

fn wants(soc: &Soc, page: u64) -> bool {
    soc.events.contains(&Event::Wanted(run(page, 1)))
}

/// How many seccomp filters each thread of a process has.
fn filters(pid: u32) -> BTreeMap<String, u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        (field("Name:"), field("Seccomp_filters:").parse().unwrap())
    });
    tasks.collect()
}

#[test]
fn a_vcpu_waits_for_the_pages_that_it_lacks_and_for_no_other() {
    // One that was written, one that has its first byte, one that nobody ever wrote; two that are to come, of which one was never there.
    let Some(mut soc) = start(&reads(&[4, 5, 9, 6, 10]), &[run(6, 1), run(10, 2)]) else { return };
    soc.run();
    soc.until("it waits", |soc| wants(soc, 6));
    assert_eq!(told(&soc), [0x14, 0x15, 0]);
    let filters = filters(soc.child.as_ref().unwrap().id());
    assert_eq!(
        filters["faults"], filters["vcpu0"],
        "whoever hears of faults is confined as a vCPU's thread is: {filters:?}"
    );
    // A pause takes it out of its wait where KVM itself waits; not where the kernel does that for KVM, as here for what is emulated.
    if let Err((status, why)) = soc.call_within(&Call::Pause(VCPU_ALL), 100) {
        assert_eq!(status, Status::LATE, "{why}");
    }
    soc.run();
    soc.function.write(6 << 12, &[0x66]).unwrap();
    soc.ok(&Call::Placed(vec![run(6, 1)]));
    soc.until("it waits again", |soc| wants(soc, 10));
    assert_eq!(told(&soc), [0x14, 0x15, 0, 0x66]);
    let (status, why) = soc.refused(&Call::PostCopy(false));
    assert!(status == Status::STATE && why.contains("2 pages"), "{why}");
    soc.function.write(10 << 12, &[0xaa]).unwrap();
    soc.ok(&Call::Placed(vec![run(10, 2)]));
    soc.until("it is told", |soc| told(soc).len() == 5);
    assert_eq!(told(&soc)[4], 0xaa);
    soc.ok(&Call::PostCopy(false));
    assert!(soc.shut_down().success());
}

#[test]
fn what_makes_no_sense_is_refused() {
    let Some(mut soc) = start(&reads(&[4]), &[run(6, 2)]) else { return };
    for (call, status) in [
        (Call::Lacks(vec![run(7, 1)]), Status::STATE),
        (Call::PostCopy(true), Status::STATE),
        (Call::Placed(vec![run(5, 1)]), Status::ARGUMENT),
        (Call::Placed(vec![run(6, 3)]), Status::ARGUMENT),
        (Call::Placed(vec![run(6, 0)]), Status::ARGUMENT),
        (Call::Placed(vec![run(u64::MAX, 2)]), Status::ARGUMENT),
        (Call::Placed(vec![LateRun { ram: 1, ..run(6, 1) }]), Status::ARGUMENT),
        (Call::Placed(vec![LateRun { reserved: 1, ..run(6, 1) }]), Status::MALFORMED),
    ] {
        assert_eq!(soc.refused(&call).0, status, "{call:?}");
    }
    soc.ok(&Call::Placed(vec![run(6, 1), run(7, 1)]));
    assert_eq!(soc.refused(&Call::Placed(vec![run(6, 1)])).0, Status::ARGUMENT);
    soc.ok(&Call::PostCopy(false));
    assert_eq!(soc.refused(&Call::PostCopy(false)).0, Status::STATE);
    assert_eq!(soc.refused(&Call::Placed(vec![run(6, 1)])).0, Status::STATE);
    soc.ok(&Call::Lacks(vec![run(7, 1)]));
    soc.run();
    assert_eq!(soc.refused(&Call::PostCopy(true)).0, Status::STATE, "it runs");
    assert!(soc.shut_down().success());
}

#[test]
fn a_vm_ends_while_its_vcpu_waits_for_a_page() {
    let Some(mut soc) = start(&reads(&[6]), &[run(6, 1)]) else { return };
    soc.run();
    soc.until("it waits", |soc| wants(soc, 6));
    soc.lanes.clear();
    soc.ok(&Call::DestroyVm);
    // And the next one has a userfaultfd too.
    soc.seen.clear();
    soc.events.clear();
    soc.real_mode(1, Irqchip::Full, &reads(&[6]));
    soc.ok(&Call::Lacks(vec![run(6, 1)]));
    soc.ok(&Call::PostCopy(true));
    soc.run();
    soc.until("it waits", |soc| wants(soc, 6));
    soc.ok(&Call::Placed(vec![run(6, 1)]));
    soc.until("it goes on", |soc| !told(soc).is_empty());
    // So does the shim, whose SoC goes.
    soc.pause();
    soc.ok(&Call::PostCopy(false));
    let mut child = soc.child.take().unwrap();
    drop(soc);
    assert!(child.try_wait().is_ok());
    assert!(wait(child).success());
}

#[test]
fn a_shim_ends_with_its_soc_while_a_vcpu_waits_for_a_page() {
    let Some(mut soc) = start(&reads(&[6]), &[run(6, 1)]) else { return };
    soc.run();
    soc.until("it waits", |soc| wants(soc, 6));
    let child = soc.child.take().unwrap();
    drop(soc);
    assert!(wait(child).success());
}

#[test]
fn huge_pages_come_whole() {
    let Some(mut soc) = start(&reads(&[4]), &[run(6, 1)]) else { return };
    let request = RamRequest { id: 1, node: -1, len: 4 << 20, iova: 1 << 32, huge: 2 << 20 };
    if let Err((_, why)) = soc.call(&Call::AddRam(request)) {
        eprintln!("skipped: {why}");
        return;
    }
    soc.ok(&Call::Placed(vec![run(6, 1)]));
    soc.ok(&Call::PostCopy(false));
    let huge = |first, pages| LateRun { ram: 1, reserved: 0, first, pages };
    assert_eq!(soc.refused(&Call::Lacks(vec![huge(512, 1)])).0, Status::ARGUMENT);
    soc.ok(&Call::Lacks(vec![huge(512, 512)]));
    soc.ok(&Call::PostCopy(true));
    assert_eq!(soc.refused(&Call::Placed(vec![huge(512, 511)])).0, Status::ARGUMENT);
    soc.ok(&Call::Placed(vec![huge(512, 512)]));
    soc.ok(&Call::PostCopy(false));
    soc.ok(&Call::Kick(VCPU_ALL));
    assert!(soc.shut_down().success());
}
