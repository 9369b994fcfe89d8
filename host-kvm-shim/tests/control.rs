//! A VM under the SoC's hands: paused and read, moved, its memory changed and watched.

mod soc;

use std::time::{Duration, Instant};

use api_channel::call::{Call, DirtyFetch, DirtyRun, Groups, Irqchip, Memslot, SlotFlags, VCPU_ALL, VM};
use api_channel::codec::Reader;
use api_channel::state::{Regs, Type};
use api_channel::{Status, state};
use ioreq_ring::{Completion, Direction, Kind};
use pcie_function::SocFunction;
use soc::Soc;

/// Counts in SI for ever, and writes it to [0x4000]: inc si; mov [0x4000], si; jmp back
const COUNT: [u8; 7] = [0x46, 0x89, 0x36, 0x00, 0x40, 0xeb, 0xf9];

/// Pauses vCPU 0 once its registers are `so`, and gives them: a busy machine lets it run when it likes.
fn pause_once(soc: &mut Soc, so: impl Fn(&Regs) -> bool) -> Regs {
    let deadline = Instant::now() + soc::PATIENCE;
    loop {
        soc.pause();
        let regs = soc.regs(0);
        if so(&regs) {
            return regs;
        }
        assert!(Instant::now() < deadline, "it doesn't go on: {regs:x?}");
        soc.ok(&Call::Run(0));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Moves RAM and every record from one paused VM into a new one of another shim.
fn moved(from: &mut Soc) -> Soc {
    let mut memory = vec![0; 1 << 20];
    from.function.read(0, &mut memory).unwrap();
    let vcpu = from.state(0, Groups::ALL);
    let vm = from.state(VM, Groups::ALL);
    let kinds: Vec<_> = state::records(&vcpu).unwrap().iter().map(|r| r.kind).collect();
    let order = [
        Type::SREGS,
        Type::XCRS,
        Type::XSAVE,
        Type::REGS,
        Type::DEBUG,
        Type::LAPIC,
        Type::MSRS,
        Type::TSC,
        Type::MP_STATE,
        Type::EVENTS,
    ];
    // KVM tells of the TSC's offset since Linux 5.16.
    let told = |kind: &Type| *kind != Type::TSC || kinds.contains(kind);
    assert_eq!(kinds, order.into_iter().filter(told).collect::<Vec<_>>(), "the order of setting");
    let mut to = Soc::start(&[]);
    to.create_vm(1, Irqchip::Full);
    let iova = to.add_ram(1 << 20);
    to.function.write(iova, &memory).unwrap();
    to.set_cpuid(0);
    to.ok(&Call::SetState { target: VM, records: vm });
    to.ok(&Call::SetState { target: 0, records: vcpu.clone() });
    // What was set is what is read, but for what moves by itself: the clocks.
    let again = to.state(0, Groups::ALL & !Type::MSRS.group() & !Type::LAPIC.group());
    let still = |list: &[u8]| -> Vec<(Type, Vec<u8>)> {
        let all = state::records(list).unwrap();
        all.iter()
            .filter(|r| ![Type::MSRS, Type::LAPIC].contains(&r.kind))
            .map(|r| (r.kind, r.payload.to_vec()))
            .collect()
    };
    assert_eq!(still(&again), still(&vcpu));
    to
}

#[test]
fn a_guest_stopped_mid_loop_goes_on_in_another_shim() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    soc.real_mode(1, Irqchip::Full, &COUNT);
    soc.run();
    let stopped = pause_once(&mut soc, |regs| regs.rsi != 0);
    assert!((0x1000..0x1007).contains(&stopped.rip), "{stopped:x?}");
    assert_eq!(soc.regs(0), stopped, "a paused vCPU stands still");
    let mut to = moved(&mut soc);
    assert_eq!(to.regs(0), stopped);
    to.run();
    pause_once(&mut to, |regs| regs.rsi != stopped.rsi);
    assert!(soc.shut_down().success() && to.shut_down().success());
}

#[test]
fn a_pause_finishes_a_page_split_access_and_a_string_before_state_is_read() {
    if !soc::has_kvm() {
        return;
    }
    // mov ax, 0xffff; mov ds, ax; mov eax, [0x100e] (0x100ffe: across a page end); mov di, 0x4000; mov cx, 3; mov dx, 0x170;
    // rep insb; mov [cs-less] … ; out 0x90, eax
    let code = [
        &[0xb8, 0xff, 0xff, 0x8e, 0xd8][..],
        &[0x66, 0xa1, 0x0e, 0x10],
        &[0xfc, 0xbf, 0x00, 0x40, 0xb9, 3, 0, 0xba, 0x70, 0x01, 0xf3, 0x6c],
        &[0x66, 0xe7, 0x90],
        &[0xf4, 0xeb, 0xfd],
    ]
    .concat();
    let answer = |seen: &soc::Seen, lane: &soc::Lane| {
        use ioreq_ring::BusMemory;
        let request = seen.request;
        match (request.kind, request.address) {
            (Kind::MMIO, 0x10_0ffe) => Completion::ok(0x2211),
            (Kind::MMIO, 0x10_1000) => Completion::ok(0x4433),
            (Kind::PIO, 0x170) if request.string => {
                lane.ins().copy_in(0, b"abc");
                Completion::ok(0)
            }
            (Kind::PIO, 0x170) => Completion::ok(b'a'.into()),
            _ => Completion::ok(0),
        }
    };
    // Stopped before each answer in turn: the pause waits for it, and for what the same instruction still asks.
    for stop_at in 0..3 {
        let mut soc = Soc::start(&[]);
        soc.real_mode(1, Irqchip::Full, &code);
        let mut count = 0;
        soc.handler = Box::new(move |seen, lane| {
            count += 1;
            (count != stop_at + 1).then(|| answer(seen, lane))
        });
        soc.run();
        soc.until("stopped", |soc| soc.seen.len() == stop_at + 1);
        let (status, why) = soc.call_within(&Call::Pause(VCPU_ALL), 50).unwrap_err();
        assert_eq!(status, Status::LATE);
        assert!(why.contains("vCPU 0 still waits"), "{why}");
        let sequence = soc.client.send(&Call::Pause(VCPU_ALL), 0).unwrap();
        soc.function.raise(0);
        // Calls are taken in their order: after this one the vCPU knows of the pause.
        soc.ok(&Call::Ping);
        assert!(soc.pump(Some(sequence)).is_none(), "paused without its answer");
        let late = soc.seen[stop_at].clone();
        let completion = answer(&late, &soc.lanes[0]);
        soc.complete(0, &completion);
        let deadline = Instant::now() + soc::PATIENCE;
        while soc.pump(Some(sequence)).is_none() {
            assert!(Instant::now() < deadline);
        }
        let so_far = soc.seen.len();
        let mut to = moved(&mut soc);
        to.handler = Box::new(move |seen, lane| Some(answer(seen, lane)));
        to.run();
        to.until("done", |to| to.seen.last().is_some_and(|s| s.request.address == 0x90));
        assert_eq!(to.seen.last().unwrap().request.data, 0x4433_2211, "stopped at {stop_at}");
        let mut string = [0; 4];
        to.function.read(0x4000, &mut string).unwrap();
        // Answered one by one here, or as one string.
        assert!(&string[..3] == b"abc" || &string[..3] == b"aaa", "{string:?}");
        assert!(soc.seen[so_far..].is_empty());
        assert!(soc.shut_down().success() && to.shut_down().success());
    }
}

#[test]
fn a_vcpu_stays_on_the_cpus_that_it_is_given() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    soc.real_mode(2, Irqchip::Full, &COUNT);
    let allowed = |soc: &Soc, name: &str| {
        let tasks = format!("/proc/{}/task", soc.child.as_ref().unwrap().id());
        let mut tasks = std::fs::read_dir(tasks).unwrap().map(|task| task.unwrap().path());
        let task = tasks.find(|task| std::fs::read_to_string(task.join("comm")).unwrap().trim() == name).unwrap();
        let status = std::fs::read_to_string(task.join("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        line.trim().to_owned()
    };
    let (before, cpu) = (allowed(&soc, "vcpu0"), allowed(&soc, "vcpu1"));
    let last: u32 = cpu.rsplit([',', '-']).next().unwrap().parse().unwrap();
    soc.ok(&Call::SetAffinity { vcpu: 1, cpus: vec![last] });
    assert_eq!(allowed(&soc, "vcpu1"), last.to_string());
    assert_eq!(allowed(&soc, "vcpu0"), before);
    for (vcpu, cpus, status) in [
        (1, vec![], Status::ARGUMENT),
        (1, vec![1023], Status::ARGUMENT),
        (1, vec![1024], Status::ARGUMENT),
        (1, vec![last, u32::MAX], Status::ARGUMENT),
        (2, vec![last], Status::ARGUMENT),
        (VCPU_ALL, vec![last], Status::ARGUMENT),
    ] {
        let (found, why) = soc.refused(&Call::SetAffinity { vcpu, cpus });
        assert_eq!(found, status, "{why}");
    }
    assert_eq!(allowed(&soc, "vcpu1"), last.to_string());
    soc.run();
    assert_eq!(soc.refused(&Call::SetAffinity { vcpu: 1, cpus: vec![last] }).0, Status::STATE);
    assert!(soc.shut_down().success());
}

#[test]
fn two_vcpus_pause_run_and_are_kicked_apart() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    soc.real_mode(2, Irqchip::Split, &COUNT);
    soc.run();
    soc.ok(&Call::Pause(1));
    let one = soc.regs(1);
    let (status, why) =
        soc.refused(&Call::GetState(api_channel::call::StateRequest { target: 0, reserved: 0, groups: 1 << 1 }));
    assert_eq!(status, Status::STATE);
    assert!(why.contains("vCPU 0 runs"), "{why}");
    let (status, _) =
        soc.refused(&Call::GetState(api_channel::call::StateRequest { target: VM, reserved: 0, groups: Groups::ALL }));
    assert_eq!(status, Status::STATE);
    for _ in 0..50 {
        soc.ok(&Call::Kick(VCPU_ALL));
    }
    assert_eq!(soc.regs(1), one, "a kick lets no paused vCPU run");
    soc.ok(&Call::Pause(0));
    let zero = soc.regs(0);
    soc.ok(&Call::Run(0));
    pause_once(&mut soc, |regs| regs.rsi != zero.rsi);
    assert_eq!(soc.regs(1), one);
    assert!(soc.shut_down().success());
}

/// The runs of a fetch over all of RAM 0.
fn fetch(soc: &mut Soc, clear: u32) -> Vec<(u64, u64)> {
    let (payload, bulk) = soc.ok(&Call::DirtyFetch(DirtyFetch { ram: 0, flags: clear, first: 0, pages: u64::MAX }));
    let next: u64 = Reader::new(&payload).take().unwrap();
    assert_eq!(next, 256);
    let runs: Vec<DirtyRun> = Reader::new(&bulk).list(1 << 16).unwrap();
    runs.iter().map(|r| (r.first, r.pages)).collect()
}

#[test]
fn the_dirty_log_is_exact_and_survives_the_slots_it_was_kept_for() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    // Writes a byte to segment AX:0 for each port write's answer: in ax, 0x90; mov ds, ax; mov [0], al; jmp back
    let code = [0xe5, 0x90, 0x8e, 0xd8, 0xa2, 0x00, 0x00, 0xeb, 0xf7];
    soc.real_mode(1, Irqchip::Full, &code);
    let pages = std::rc::Rc::new(std::cell::RefCell::new(std::collections::VecDeque::new()));
    let todo = pages.clone();
    soc.handler = Box::new(move |_, _| todo.borrow_mut().pop_front().map(|page: u64| Completion::ok(page << 8)));
    let (status, _) =
        soc.refused(&Call::DirtyFetch(DirtyFetch { ram: 0, flags: DirtyFetch::CLEAR, first: 0, pages: 1 }));
    assert_eq!(status, Status::STATE, "no log is kept yet");
    soc.run();
    soc.until("asks", |soc| soc.seen.len() == 1);
    soc.ok(&Call::DirtyLog(true));
    assert_eq!(fetch(&mut soc, 1), [(0, 256)], "at its start everything counts as dirty");
    assert_eq!(fetch(&mut soc, 1), []);
    let write = |soc: &mut Soc, list: &[u64]| {
        // The request that waits is answered by hand, and the guest asks again after each write.
        let seen = soc.seen.len();
        pages.borrow_mut().extend(&list[1..]);
        soc.complete(0, &Completion::ok(list[0] << 8));
        soc.until("written", |soc| soc.seen.len() == seen + list.len());
    };
    write(&mut soc, &[7, 8, 9, 200, 255]);
    let expected = [(7, 3), (200, 1), (255, 1)];
    assert_eq!(fetch(&mut soc, 0), expected);
    assert_eq!(fetch(&mut soc, 1), expected, "a look clears nothing");
    assert_eq!(fetch(&mut soc, 1), []);
    write(&mut soc, &[9]);
    assert_eq!(fetch(&mut soc, 1), [(9, 1)], "a cleared page is logged again");

    // While the guest runs, RAM is cut in three, the middle read-only; what was dirty stays so, new slots bring nothing.
    write(&mut soc, &[5, 130]);
    let slot = |first: u64, pages: u64, flags| Memslot {
        base: first << 12,
        len: pages << 12,
        offset: first << 12,
        ram: 0,
        flags,
    };
    soc.ok(&Call::SetMemslots(vec![slot(0, 100, 0), slot(100, 50, SlotFlags::READ_ONLY), slot(150, 106, 0)]));
    write(&mut soc, &[150]);
    assert_eq!(fetch(&mut soc, 1), [(5, 1), (130, 1), (150, 1)]);
    // A write to read-only memory is an exit.
    soc.complete(0, &Completion::ok(120 << 8));
    soc.until("exits", |soc| soc.seen.last().is_some_and(|s| s.request.kind == Kind::MMIO));
    let exit = soc.seen.last().unwrap().request;
    assert_eq!((exit.address, exit.direction, exit.length), (120 << 12, Direction::Write, 1));
    assert_eq!(fetch(&mut soc, 1), []);
    soc.ok(&Call::DirtyLog(false));
    soc.refused(&Call::DirtyFetch(DirtyFetch { ram: 0, flags: DirtyFetch::CLEAR, first: 0, pages: 1 }));
    assert!(soc.shut_down().success());
}

#[test]
fn memslots_change_under_running_vcpus_without_one_stray_exit() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    soc.real_mode(2, Irqchip::Full, &COUNT);
    soc.run();
    let slot =
        |first: u64, pages: u64| Memslot { base: first << 12, len: pages << 12, offset: first << 12, ram: 0, flags: 0 };
    for _ in 0..50 {
        soc.ok(&Call::SetMemslots(vec![slot(0, 3), slot(3, 2), slot(5, 251)]));
        soc.ok(&Call::SetMemslots(vec![slot(0, 256)]));
    }
    soc.pause();
    assert_eq!(soc.seen, [], "a vCPU saw memory missing");
    assert!(soc.shut_down().success());
}
