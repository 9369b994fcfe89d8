//! Every call in every state that it doesn't fit, and calls that can't be read: refused in a sentence, and nothing lost by it.

mod soc;

use std::os::fd::AsFd;

use api_channel::Status;
use api_channel::call::{
    Call, CpuidEntry, CreateVm, DirtyFetch, DirtyLimit, Discard, HostInfo, IoEvent, Irqchip, Irqfd, Memslot, Msi, Name,
    NotifyPage, PostedRange, RamRequest, Route, StateRequest, VCPU_ALL, VM, VmCreated,
};
use api_channel::codec::Reader;
use api_channel::state::{Lapic, Msr, Type, records};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pcie_function::SocFunction;
use soc::Soc;

fn create(vcpus: u32) -> CreateVm {
    CreateVm { vcpus, irqchip: 1, flags: 0, dirty_ring: 0, spin_ns: 0, name: Name::NONE }
}

fn ram(id: u32, len: u64) -> RamRequest {
    RamRequest { id, node: -1, len, iova: 0, huge: 0 }
}

fn slot(base: u64, len: u64, offset: u64) -> Memslot {
    Memslot { base, len, offset, ram: 0, flags: 0 }
}

fn state(target: u32) -> StateRequest {
    StateRequest { target, reserved: 0, groups: u64::MAX }
}

/// Every call that needs a VM.
fn of_a_vm() -> Vec<Call> {
    vec![
        Call::DestroyVm,
        Call::SetApicIds(vec![0]),
        Call::AddRam(ram(1, 4096)),
        Call::SetMemslots(vec![]),
        Call::Discard(vec![]),
        Call::SetCpuid { vcpu: 0, entries: vec![] },
        Call::GetState(state(0)),
        Call::SetState { target: 0, records: vec![] },
        Call::Run(VCPU_ALL),
        Call::Pause(VCPU_ALL),
        Call::Kick(VCPU_ALL),
        Call::SetRouting(vec![]),
        Call::Msi(Msi { address: 0xfee0_0000, data: 0x30, reserved: 0 }),
        Call::Lines(vec![]),
        Call::Irqfd(Irqfd { vector: 60, gsi: 4, on: 1, resample: 0 }),
        Call::IoEvent(IoEvent {
            address: 0x5000,
            data: 0,
            len: 4,
            port: 0,
            match_data: 0,
            on: 1,
            event: 0,
            reserved: 0,
        }),
        Call::PostedRanges(vec![]),
        Call::NotifyPages(vec![]),
        Call::DirtyLog(true),
        Call::DirtyFetch(DirtyFetch { ram: 0, flags: 0, first: 0, pages: 1 }),
        Call::Statistics,
    ]
}

#[test]
fn without_a_vm_every_call_of_one_is_refused() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    for call in of_a_vm() {
        let (status, why) = soc.refused(&call);
        assert_eq!(status, Status::STATE, "{call:?}: {why}");
    }
    soc.ok(&Call::Ping);
    assert!(soc.shut_down().success());
}

#[test]
fn before_the_first_memslots_there_are_no_vcpus() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    soc.create_vm(1, Irqchip::Full);
    let works = |call: &Call| {
        matches!(
            call,
            Call::SetApicIds(_) | Call::AddRam(_) | Call::Discard(_) | Call::IoEvent(_) | Call::PostedRanges(_)
        ) || matches!(call, Call::Statistics | Call::DestroyVm)
    };
    for call in of_a_vm().into_iter().filter(|c| !works(c)) {
        let (_, why) = soc.refused(&call);
        assert!(!why.is_empty(), "{call:?}");
    }
    let (status, _) = soc.refused(&Call::CreateVm(create(1)));
    assert_eq!(status, Status::STATE, "there is one already");
    assert!(soc.shut_down().success());
}

#[test]
fn memory_is_granted_once() {
    if !soc::has_kvm() {
        return;
    }
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    let kib: u64 = available.trim().trim_end_matches(" kB").parse().unwrap();
    let most_of_it = (kib / 10 * 7) << 10 & !4095;
    let mut soc = Soc::start(&[]);
    soc.create_vm(1, Irqchip::Full);
    // Nothing of the first is touched yet; it is no longer free for the second, nor for one on a node.
    soc.ok(&Call::AddRam(ram(0, most_of_it)));
    for node in [-1, 0] {
        let (status, why) = soc.refused(&Call::AddRam(RamRequest { node, iova: 1 << 40, ..ram(1, most_of_it) }));
        assert_eq!(status, Status::UNAVAILABLE, "{why}");
        assert!(why.contains("MiB free"), "{why}");
    }
    soc.ok(&Call::DestroyVm);
    soc.create_vm(1, Irqchip::Full);
    soc.ok(&Call::AddRam(ram(0, most_of_it)));
    assert!(soc.shut_down().success());
}

#[test]
fn vcpus_have_the_apic_ids_that_were_set() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    soc.create_vm(3, Irqchip::Full);
    for (bad, said) in [
        (vec![], "0 APIC ids for 3"),
        (vec![0, 1], "2 APIC ids for 3"),
        (vec![0, 1, 2, 3], "4 APIC ids for 3"),
        (vec![1, 0, 2], "boot processor"),
        (vec![0, 7, 7], "two vCPUs with the APIC id 7"),
        (vec![0, 1, u32::MAX], "APIC id 4294967295"),
    ] {
        let (status, why) = soc.refused(&Call::SetApicIds(bad));
        assert_eq!(status, Status::ARGUMENT);
        assert!(why.contains(said), "{why}");
    }
    // More than 8 bits, and in no order: KVM's ids are APIC ids, not numbers of vCPUs.
    let ids = [0, 300, 6];
    soc.ok(&Call::SetApicIds(ids.to_vec()));
    soc.add_ram(1 << 20);
    assert_eq!(soc.refused(&Call::SetApicIds(ids.to_vec())).0, Status::STATE);
    for (vcpu, id) in (0..).zip(ids) {
        let groups = Type::LAPIC.group();
        let (_, bulk) = soc.ok(&Call::GetState(StateRequest { target: vcpu, reserved: 0, groups }));
        let lapic: Lapic = records(&bulk).unwrap()[0].get().unwrap();
        // The id register of an APIC in xAPIC mode has 8 bits (Intel SDM volume 3A §11.4.6).
        assert_eq!(u32::from(lapic.registers[0x23]), id & 0xff, "vCPU {vcpu}");
    }
    assert!(soc.shut_down().success());
}

#[test]
fn vcpus_have_a_synic_where_kvm_has_one() {
    const SYNIC: u32 = 1 << 2;
    const SIMP: u32 = 0x4000_0083;
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    let (_, bulk) = soc.ok(&Call::SupportedHvCpuid);
    let leaves: Vec<CpuidEntry> = Reader::new(&bulk).list(64).unwrap();
    let has_it = leaves.iter().any(|leaf| leaf.function == 0x4000_0003 && leaf.eax & SYNIC != 0);
    let create = Call::CreateVm(CreateVm { flags: CreateVm::HV_SYNIC, ..create(2) });
    if !has_it {
        let (status, why) = soc.refused(&create);
        assert_eq!(status, Status::UNAVAILABLE, "{why}");
        assert!(why.contains("KVM_CAP_HYPERV_SYNIC"), "{why}");
        assert!(soc.shut_down().success());
        return;
    }
    soc.ok(&create);
    soc.ok(&Call::AddRam(ram(0, 1 << 20)));
    soc.ok(&Call::SetMemslots(vec![slot(0, 1 << 20, 0)]));
    let sint = |vcpu, sint| Call::SetRouting(vec![Route { gsi: 24, kind: 3, address: vcpu, data: sint, reserved: 0 }]);
    soc.ok(&sint(1, 15));
    for bad in [sint(2, 0), sint(0, 16), sint(u64::MAX, 0)] {
        assert_eq!(soc.refused(&bad).0, Status::ARGUMENT, "{bad:?}");
    }
    let list = soc.state(1, Type::MSRS.group());
    let msrs: Vec<Msr> = records(&list).unwrap()[0].get_list().unwrap();
    assert!(msrs.iter().any(|msr| msr.index == SIMP), "{msrs:x?}");
    soc.ok(&Call::SetState { target: 1, records: list.clone() });
    assert!(soc.shut_down().success());
}

#[test]
fn a_limit_of_dirty_pages_needs_rings() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    soc.create_vm(1, Irqchip::Full);
    let limit = |vcpu, reserved| Call::DirtyLimit(DirtyLimit { vcpu, reserved, pages: 1000 });
    assert_eq!(soc.refused(&limit(0, 0)).0, Status::STATE, "there is no vCPU yet");
    soc.ok(&Call::AddRam(ram(0, 1 << 20)));
    soc.ok(&Call::SetMemslots(vec![slot(0, 1 << 20, 0)]));
    assert_eq!(soc.refused(&limit(0, 0)).0, Status::UNAVAILABLE);
    assert_eq!(soc.refused(&limit(0, 1)).0, Status::MALFORMED);
    assert_eq!(soc.refused(&limit(7, 0)).0, Status::ARGUMENT);
    assert!(soc.shut_down().success());
}

#[test]
fn arguments_out_of_range_are_refused_by_name() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    for (bad, status) in [
        (create(0), Status::ARGUMENT),
        (create(1025), Status::ARGUMENT),
        (create(u32::MAX), Status::ARGUMENT),
        (CreateVm { irqchip: 3, ..create(1) }, Status::ARGUMENT),
        (CreateVm { flags: 2, ..create(1) }, Status::MALFORMED),
        (CreateVm { spin_ns: u64::MAX, ..create(1) }, Status::ARGUMENT),
        (CreateVm { dirty_ring: 1, ..create(1) }, Status::ARGUMENT),
        (CreateVm { dirty_ring: 1000, ..create(1) }, Status::ARGUMENT),
        (CreateVm { dirty_ring: 1 << 31, ..create(1) }, Status::ARGUMENT),
    ] {
        let (found, why) = soc.refused(&Call::CreateVm(bad));
        // Not every KVM has rings.
        let status = if bad.dirty_ring != 0 && found == Status::UNAVAILABLE { found } else { status };
        assert_eq!(found, status, "{bad:?}: {why}");
    }
    soc.create_vm(2, Irqchip::Full);
    for (bad, status) in [
        (ram(64, 4096), Status::ARGUMENT),
        (ram(0, 0), Status::ARGUMENT),
        (ram(0, 4095), Status::ARGUMENT),
        (RamRequest { iova: 1, ..ram(0, 4096) }, Status::ARGUMENT),
        (RamRequest { huge: 4096, ..ram(0, 4096) }, Status::ARGUMENT),
        (RamRequest { huge: 2 << 20, ..ram(0, 4096) }, Status::ARGUMENT),
        (RamRequest { node: -2, ..ram(0, 4096) }, Status::ARGUMENT),
        (RamRequest { node: 999, ..ram(0, 4096) }, Status::UNAVAILABLE),
        (ram(0, 1 << 45), Status::UNAVAILABLE),
        (ram(0, !4095), Status::ARGUMENT),
        (RamRequest { huge: 1 << 30, ..ram(0, 1 << 40) }, Status::UNAVAILABLE),
    ] {
        let (found, why) = soc.refused(&Call::AddRam(bad));
        assert_eq!(found, status, "{bad:?}: {why}");
    }
    let (_, why) = soc.refused(&Call::AddRam(ram(0, 1 << 45)));
    assert!(why.contains("33554432 MiB of guest memory, the host has"), "{why}");
    soc.ok(&Call::AddRam(ram(0, 1 << 20)));
    assert_eq!(soc.refused(&Call::AddRam(ram(0, 4096))).0, Status::ARGUMENT, "its id is taken");
    for bad in [
        vec![],
        vec![slot(0, 0, 0)],
        vec![slot(1, 4096, 0)],
        vec![slot(0, 4097, 0)],
        vec![slot(0, 4096, 1)],
        vec![slot(0, 2 << 20, 0)],
        vec![slot(0, 4096, 1 << 20)],
        vec![slot(0, 8192, 0), slot(4096, 4096, 0)],
        vec![slot(!4095, 8192, 0)],
        vec![slot(0, 4096, !4095)],
        vec![Memslot { ram: 1, ..slot(0, 4096, 0) }],
        vec![Memslot { flags: 2, ..slot(0, 4096, 0) }],
    ] {
        assert_eq!(soc.refused(&Call::SetMemslots(bad.clone())).0, Status::ARGUMENT, "{bad:?}");
    }
    soc.ok(&Call::SetMemslots(vec![slot(0, 1 << 20, 0)]));
    let discard = |ram, offset, len| Discard { ram, reserved: 0, offset, len };
    let range = |base, len, ports| PostedRange { base, len, ports };
    let io = IoEvent { address: 0x5000, data: 0, len: 4, port: 0, match_data: 0, on: 1, event: 0, reserved: 0 };
    for bad in [
        Call::Run(2),
        Call::Pause(2),
        Call::Kick(7),
        Call::GetState(state(2)),
        Call::GetState(state(VCPU_ALL)),
        Call::SetState { target: 9, records: vec![] },
        Call::SetCpuid { vcpu: 2, entries: vec![] },
        Call::SetRouting(vec![Route { gsi: 4096, kind: 2, address: 0, data: 0, reserved: 0 }]),
        Call::SetRouting(vec![Route { gsi: 1, kind: 3, address: 0, data: 0, reserved: 0 }]),
        Call::SetRouting(vec![Route { gsi: 1, kind: 1, address: 3, data: 0, reserved: 0 }]),
        Call::SetRouting(vec![Route { gsi: 1, kind: 1, address: 2, data: 24, reserved: 0 }]),
        Call::Irqfd(Irqfd { vector: 60, gsi: 4096, on: 1, resample: 0 }),
        Call::Irqfd(Irqfd { vector: 60, gsi: 4, on: 2, resample: 0 }),
        Call::Irqfd(Irqfd { vector: u32::MAX, gsi: 4, on: 1, resample: 0 }),
        Call::IoEvent(IoEvent { len: 3, ..io }),
        Call::IoEvent(IoEvent { len: 0, match_data: 1, ..io }),
        Call::IoEvent(IoEvent { port: 1, address: 0x1_0000, ..io }),
        Call::Discard(vec![discard(0, 0, 0)]),
        Call::Discard(vec![discard(0, 1, 4096)]),
        Call::Discard(vec![discard(0, 4096, 4095)]),
        Call::Discard(vec![discard(0, 1 << 20, 4096)]),
        Call::Discard(vec![discard(0, 4096, !4095)]),
        Call::Discard(vec![discard(1, 0, 4096)]),
        Call::PostedRanges(vec![range(0, 0, 0)]),
        Call::PostedRanges(vec![range(0, 8, 0), range(7, 1, 0)]),
    ] {
        let (status, why) = soc.refused(&bad);
        assert_eq!(status, Status::ARGUMENT, "{bad:?}: {why}");
    }
    soc.ok(&Call::DirtyLog(true));
    for bad in
        [DirtyFetch { ram: 1, flags: 0, first: 0, pages: 1 }, DirtyFetch { ram: 0, flags: 0, first: 257, pages: 1 }]
    {
        assert_eq!(soc.refused(&Call::DirtyFetch(bad)).0, Status::ARGUMENT, "{bad:?}");
    }
    let malformed = [
        Call::DirtyFetch(DirtyFetch { ram: 0, flags: 4, first: 0, pages: 1 }),
        Call::GetState(StateRequest { reserved: 1, ..state(0) }),
        Call::SetState { target: 0, records: vec![1; 7] },
        Call::SetState {
            target: 0,
            records: api_channel::state::Records::default().bytes(api_channel::state::Type::REGS, &[0; 8]).done(),
        },
        Call::Msi(Msi { address: 0, data: 0, reserved: 1 }),
        Call::SetRouting(vec![Route { gsi: 1, kind: 2, address: 0, data: 0, reserved: 1 }]),
        Call::PostedRanges(vec![range(0, 8, 2)]),
        Call::Discard(vec![Discard { reserved: 1, ..discard(0, 0, 4096) }]),
        Call::IoEvent(IoEvent { reserved: 1, ..io }),
        Call::IoEvent(IoEvent { on: 0, event: 1, ..io }),
        Call::NotifyPages(vec![NotifyPage { base: 1 << 30, page: 0, reserved: 1 }]),
    ];
    for bad in malformed {
        assert_eq!(soc.refused(&bad).0, Status::MALFORMED, "{bad:?}");
    }
    // A record of another target, and one that may be skipped.
    let other = |kind| api_channel::state::Records::default().bytes(api_channel::state::Type(kind), &[0; 8]).done();
    assert_eq!(soc.refused(&Call::SetState { target: 0, records: other(19) }).0, Status::ARGUMENT);
    assert_eq!(soc.refused(&Call::SetState { target: VM, records: other(1) }).0, Status::ARGUMENT);
    soc.ok(&Call::SetState { target: 0, records: other(0x8063) });
    // A function of this machine has none: a guest's writes signal what both ends share.
    let page = NotifyPage { base: 1 << 30, page: 0, reserved: 0 };
    assert_eq!(soc.created.unwrap().features & VmCreated::NOTIFY, 0);
    assert_eq!(soc.refused(&Call::NotifyPages(vec![page])).0, Status::UNAVAILABLE);
    soc.ok(&Call::NotifyPages(vec![]));
    assert_ne!(soc.created.unwrap().features & VmCreated::DISCARD, 0);
    soc.function.write(0x3fff, &[1; 0x2002]).unwrap();
    soc.ok(&Call::Discard(vec![discard(0, 0x4000, 0x1000), discard(0, 0x8000, 0x2000)]));
    let mut left = [2; 0x2002];
    soc.function.read(0x3fff, &mut left).unwrap();
    assert!(left[0] == 1 && left[1..0x1001] == [0; 0x1000] && left[0x1001..] == [1; 0x1001]);
    // After all that the VM is whole.
    soc.set_cpuid(0);
    soc.function.write(0x1000, &[0xe6, 0x90, 0xf4, 0xeb, 0xfd]).unwrap();
    soc.set_real_mode(0, 0x1000);
    soc.ok(&Call::Run(0));
    soc.until("runs", |soc| soc.seen.len() == 1);
    assert_eq!(soc.refused(&Call::IoEvent(io)).0, Status::UNAVAILABLE, "nothing is shared");
    let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
    let io = IoEvent { event: soc.function.share(bell.as_fd()).unwrap(), ..io };
    let off = IoEvent { on: 0, event: 0, ..io };
    soc.ok(&Call::IoEvent(io));
    assert_eq!(soc.refused(&Call::IoEvent(io)).0, Status::STATE);
    soc.ok(&Call::IoEvent(off));
    assert_eq!(soc.refused(&Call::IoEvent(off)).0, Status::STATE);
    assert_eq!(soc.refused(&Call::IoEvent(io)).0, Status::UNAVAILABLE, "an eventfd is given once");
    // Something else than an eventfd.
    let event = soc.function.share(std::io::stderr().as_fd()).unwrap();
    soc.refused(&Call::IoEvent(IoEvent { event, ..io }));
    assert!(soc.shut_down().success());
}

#[test]
fn the_host_s_inventory_is_the_kernel_s() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&["--role", "host"]);
    let (_, bulk) = soc.ok(&Call::HostInfo);
    let info = HostInfo::decode(&bulk).unwrap();
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    assert_eq!(info.cpus as usize, cpuinfo.lines().filter(|l| l.starts_with("processor")).count());
    let line = |key: &str| {
        let line = cpuinfo.lines().find(|l| l.starts_with(key)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    assert_eq!(
        (info.cpu_model, info.cpu_vendor, info.cpu_flags),
        (line("model name"), line("vendor_id"), line("flags"))
    );
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(info.kernel, release.trim());
    assert!(info.memory_kib > 0);
    let devices = std::fs::read_dir("/sys/bus/pci/devices").map_or(0, Iterator::count);
    assert_eq!(info.pci.len(), devices);
    let (status, why) = soc.refused(&Call::CreateVm(create(1)));
    assert_eq!(status, Status::STATE);
    assert!(why.contains("runs no VM"), "{why}");
    assert!(soc.shut_down().success());
}

#[test]
fn one_vm_after_the_other_without_a_trace_of_the_last() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    let pid = soc.child.as_ref().unwrap().id();
    let count = |dir: &str| std::fs::read_dir(format!("/proc/{pid}/{dir}")).unwrap().count();
    let mut before = None;
    for _ in 0..5 {
        soc.seen.clear();
        // mov [0x4000], al; out 0x90, al: memory is zero before, the port's answer nobody's.
        soc.real_mode(2, Irqchip::Full, &[0xa0, 0x00, 0x40, 0xe6, 0x90, 0xfe, 0x06, 0x00, 0x40, 0xf4, 0xeb, 0xfd]);
        soc.ok(&Call::Run(0));
        soc.until("runs", |soc| soc.seen.len() == 1);
        assert_eq!(soc.seen[0].request.data, 0);
        soc.ok(&Call::DestroyVm);
        soc.lanes.clear();
        assert!(soc.function.read(0, &mut [0; 8]).is_err(), "RAM is still within reach");
        let now = count("fd");
        assert_eq!(*before.get_or_insert(now), now, "descriptors leak");
    }
    soc.created = None;
    assert!(soc.shut_down().success());
}
