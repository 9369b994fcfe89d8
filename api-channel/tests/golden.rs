//! Every message's bytes, as docs/wire.md promises them: `tests/golden/channel/NAME.hex`.

use api_channel::call::{
    Call, CpuidEntry, CreateVm, DirtyFetch, DirtyLimit, DirtyRun, Discard, Extent, HostInfo, IoEvent, Irqchip, Irqfd,
    LateRun, Memslot, Msi, Name, NotifyPage, NumaNode, PciDevice, PostedRange, RamRequest, Route, RouteKind, SlotFlags,
    StateRequest, Statistic, VCPU_ALL, VM, VmCreated,
};
use api_channel::codec::Writer;
use api_channel::event::Event;
use api_channel::message::{Class, Header, Status};
use api_channel::state::{
    Clock, DebugRegs, Events, IoApic, Lapic, MpState, Msr, Pic, Pit, PitChannel, Records, Regs, Segment, Sregs, Table,
    Tsc, Type, Xcr, records,
};
use wire_kit::golden;

/// Compares, both ways where there is a way back.
#[track_caller]
fn holds(name: &str, bytes: &[u8]) {
    let file = format!("channel/{name}.hex");
    let hex = |bytes: &[u8]| {
        bytes.chunks(8).map(|c| c.iter().map(|b| format!("{b:02x}")).collect::<String>()).collect::<Vec<_>>().join("\n")
    };
    assert_eq!(hex(bytes), hex(&golden(&file)), "{file}");
}

#[track_caller]
fn call(name: &str, call: &Call) {
    holds(name, &call.encode());
    assert_eq!(Call::decode(call.opcode(), &golden(&format!("channel/{name}.hex"))), Ok(Some(call.clone())));
}

#[test]
fn headers() {
    let request = Header {
        opcode: 0x110,
        class: Class::Request,
        length: 40,
        sequence: 7,
        status: Status::OK,
        epoch: 0x0102_0304_0506_0708,
        extra: 60_000,
    };
    let reply = Header { class: Class::Reply, length: 24, status: Status::UNAVAILABLE, extra: 0, ..request };
    for (name, header) in [("header-request", request), ("header-reply", reply)] {
        holds(name, &header.to_bytes());
        assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
    }
}

#[test]
fn calls_of_the_vm() {
    let create = CreateVm {
        vcpus: 2,
        irqchip: Irqchip::Full as u32,
        flags: 0,
        dirty_ring: 0,
        spin_ns: 50_000,
        name: Name::new("web-1"),
    };
    call("create-vm", &Call::CreateVm(create));
    call("create-vm-hv-synic", &Call::CreateVm(CreateVm { flags: CreateVm::HV_SYNIC, ..create }));
    call("create-vm-dirty-ring", &Call::CreateVm(CreateVm { dirty_ring: 4096, ..create }));
    call("set-apic-ids", &Call::SetApicIds(vec![0, 1, 4, 5, 0x3ff]));
    call("add-ram", &Call::AddRam(RamRequest { id: 1, node: -1, len: 1 << 30, iova: 1 << 32, huge: 2 << 20 }));
    let slot = |base, flags| Memslot { base, len: 0xa0000, offset: 0x1000, ram: 2, flags };
    call("set-memslots", &Call::SetMemslots(vec![slot(0, 0), slot(0xfffc_0000, SlotFlags::READ_ONLY)]));
    call("discard", &Call::Discard(vec![Discard { ram: 1, reserved: 0, offset: 0x20_0000, len: 0x3000 }]));
    call("run", &Call::Run(VCPU_ALL));
    call("pause", &Call::Pause(3));
    call("kick", &Call::Kick(1));
}

#[test]
fn calls_of_a_vcpu() {
    let entry =
        CpuidEntry { function: 0xd, index: 1, flags: 1, eax: 0xf, ebx: 0x988, ecx: 0x1800, edx: 0, reserved: 0 };
    call("set-cpuid", &Call::SetCpuid { vcpu: 1, entries: vec![entry] });
    call("set-affinity", &Call::SetAffinity { vcpu: 1, cpus: vec![4, 5, 36] });
    call("get-state", &Call::GetState(StateRequest { target: VM, reserved: 0, groups: Type::PIT.group() }));
    call("set-state", &Call::SetState { target: 0, records: Records::default().bytes(Type::XSAVE, b"xsave").done() });
}

#[test]
fn calls_about_interrupts_and_notifications() {
    let pin = Route { gsi: 4, kind: RouteKind::Pin as u32, address: 2, data: 4, reserved: 0 };
    let msi = Route { gsi: 24, kind: RouteKind::Msi as u32, address: 0xfee0_1000, data: 0x41, reserved: 0 };
    call("set-routing", &Call::SetRouting(vec![pin, msi]));
    let sint = Route { gsi: 25, kind: RouteKind::Sint as u32, address: 1, data: 2, reserved: 0 };
    call("set-routing-sint", &Call::SetRouting(vec![sint]));
    call("msi", &Call::Msi(Msi { address: 0xfee0_0000, data: 0x30, reserved: 0 }));
    call("lines", &Call::Lines(vec![0x8001_0009_0000_0003]));
    call("irqfd", &Call::Irqfd(Irqfd { vector: 9, gsi: 24, on: 1, resample: 1 }));
    let notify =
        IoEvent { address: 0xfe00_3000, data: 1, len: 2, port: 0, match_data: 1, on: 1, event: 5, reserved: 0 };
    call("io-event", &Call::IoEvent(notify));
    call("posted-ranges", &Call::PostedRanges(vec![PostedRange { base: 0x402, len: 1, ports: 1 }]));
    let page = |page, base| NotifyPage { base, page, reserved: 0 };
    call("notify-pages", &Call::NotifyPages(vec![page(0, 0x8_0000_4000), page(31, 0x8_0000_7000)]));
}

#[test]
fn calls_of_the_dirty_log() {
    call("dirty-log", &Call::DirtyLog(true));
    call("dirty-limit", &Call::DirtyLimit(DirtyLimit { vcpu: 1, reserved: 0, pages: 2560 }));
    call(
        "dirty-fetch",
        &Call::DirtyFetch(DirtyFetch { ram: 0, flags: DirtyFetch::CLEAR, first: 0x100, pages: 0x8000 }),
    );
}

#[test]
fn calls_of_post_copy() {
    let run = |first, pages| LateRun { ram: 1, reserved: 0, first, pages };
    call("can-post-copy", &Call::CanPostCopy);
    call("lacks", &Call::Lacks(vec![run(0x200, 3), run(0x8_0000, 0x200)]));
    call("post-copy", &Call::PostCopy(true));
    call("placed", &Call::Placed(vec![run(0x201, 1)]));
}

#[test]
fn answers() {
    let created = VmCreated {
        completions: 1 << 56,
        credits: 1 << 56 | 0x1000,
        ins: 1 << 56 | 0x2000,
        outs: 1 << 56 | 0x4000,
        tsc_khz: 2_300_000,
        lane_vector: 1,
        lane_vectors: 2,
        free_vector: 3,
        free_vectors: 61,
        features: VmCreated::POSTING | VmCreated::RESAMPLE,
    };
    holds("answer-create-vm", &Writer::default().put(&created).done());
    let extent = Extent { offset: 0, iova: 1 << 32, len: 1 << 30 };
    holds("answer-add-ram", &Writer::default().list(&[extent]).done());
    holds("bulk-dirty-fetch", &Writer::default().list(&[DirtyRun { first: 0x105, pages: 3 }]).done());
    let mut name = [0; 48];
    name[..10].copy_from_slice(b"mmio_exits");
    holds("bulk-statistics", &Writer::default().list(&[Statistic { name, target: 1, value: 4711 }]).done());
    let info = HostInfo {
        cpu_model: "A CPU".into(),
        cpu_vendor: "AuthenticAMD".into(),
        cpu_flags: "fpu svm".into(),
        cpus: 4,
        memory_kib: 2_015_308,
        kernel: "6.12.1".into(),
        nodes: vec![NumaNode { node: 0, memory_kib: 2_015_308, cpus: "0-3".into() }],
        pci: vec![PciDevice {
            address: "0000:01:00.0".into(),
            vendor: 0x0b0d,
            device: 1,
            class: 0x0b_4000,
            numa_node: -1,
        }],
    };
    holds("bulk-host-info", &info.encode());
    assert_eq!(HostInfo::decode(&info.encode()), Ok(info));
}

#[test]
fn events() {
    let wanted = Event::Wanted(LateRun { ram: 1, reserved: 0, first: 0x201, pages: 1 });
    let all = [
        ("event-eoi", Event::Eoi { gsi: 10 }),
        ("event-log", Event::Log { level: 2, text: "a warning".into() }),
        ("event-wanted", wanted),
    ];
    for (name, event) in all {
        holds(name, &event.encode());
        assert_eq!(Event::decode(event.opcode(), &event.encode()), Ok(Some(event)));
    }
}

#[test]
fn state_records() {
    let segment = Segment { base: 0xffff_0000, limit: 0xffff, selector: 0xf000, attributes: 0x9b };
    let regs = Regs { rip: 0xfff0, rflags: 2, r8_r15: [8, 9, 10, 11, 12, 13, 14, 15], ..Regs::default() };
    let sregs = Sregs {
        cs: segment,
        idt: Table { base: 0, limit: 0xffff },
        cr0: 0x6000_0010,
        apic_base: 0xfee0_0900,
        ..Sregs::default()
    };
    let list = Records::default()
        .put(Type::SREGS, &sregs)
        .put(Type::REGS, &regs)
        .put(Type::DEBUG, &DebugRegs { dr6: 0xffff_0ff0, dr7: 0x400, ..DebugRegs::default() })
        .list(Type::MSRS, &[Msr { index: 0x10, reserved: 0, value: 123_456_789 }])
        .put(Type::CLOCK, &Clock { kvmclock: 1, realtime: 2, host_tsc: 3, flags: 6 })
        .done();
    holds("state-records", &list);
}

#[test]
fn state_records_of_a_vcpu() {
    let lapic = Lapic { registers: std::array::from_fn(|i| (i * 7) as u8) };
    let events = Events {
        exception: [1, 14, 1, 0],
        error_code: 0x10,
        interrupt: [1, 0x30, 0, 2],
        nmi: [0, 1, 1, 0],
        sipi_vector: 0x9a,
        flags: 0x2d,
        smi: [0, 1, 0, 1],
        more: [1, 1, 0, 0],
        payload: 0xfeed_0000_beef,
    };
    let xcrs = [Xcr { number: 0, value: 7 }, Xcr { number: 1, value: 3 }];
    let list = Records::default()
        .list(Type::XCRS, &xcrs)
        .put(Type::LAPIC, &lapic)
        .put(Type::TSC, &Tsc { offset: 0xffff_ff00_1234_5678 })
        .put(Type::MP_STATE, &MpState { state: 3 })
        .put(Type::EVENTS, &events)
        .done();
    holds("state-records-vcpu", &list);
    let read = records(&list).unwrap();
    assert_eq!(read[0].get_list(), Ok(xcrs.to_vec()));
    assert_eq!((read[1].get(), read[3].get(), read[4].get()), (Ok(lapic), Ok(MpState { state: 3 }), Ok(events)));
    assert_eq!(read[2].get(), Ok(Tsc { offset: 0xffff_ff00_1234_5678 }));
}

#[test]
fn state_records_of_the_chips() {
    let pic = Pic { chips: [std::array::from_fn(|i| 0x10 + i as u8), std::array::from_fn(|i| 0x20 + i as u8)] };
    let ioapic = IoApic {
        base: 0xfec0_0000,
        select: 0x11,
        id: 2,
        irr: 0x10,
        reserved: 0,
        redirection: std::array::from_fn(|pin| 0x1_0000 | pin as u64),
    };
    let channel = |i: u8| PitChannel {
        count: 0x1_0000 - u32::from(i),
        latched_count: 0x1234 + u16::from(i),
        bytes: std::array::from_fn(|byte| i * 16 + byte as u8),
        load_time: -5 + i64::from(i) * 1_000_000,
    };
    let pit = Pit { channels: [channel(0), channel(1), channel(2)], flags: 2 };
    let list = Records::default().put(Type::PIC, &pic).put(Type::IOAPIC, &ioapic).put(Type::PIT, &pit).done();
    holds("state-records-chips", &list);
    let read = records(&list).unwrap();
    assert_eq!((read[0].get(), read[1].get(), read[2].get()), (Ok(pic), Ok(ioapic), Ok(pit)));
}
