//! Exits of a tiny real-mode guest, and what its vCPU gets for them.

mod soc;

use std::os::fd::AsFd;

use api_channel::call::{Call, IoEvent, Irqchip, PostedRange};
use ioreq_ring::wire::exit_reason;
use ioreq_ring::{BusMemory, Completion, Direction, Kind, Status};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pcie_function::SocFunction;
use soc::Soc;

/// `hlt`, for ever.
const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

fn code(parts: &[&[u8]]) -> Vec<u8> {
    let mut code = parts.concat();
    code.extend(HALT);
    code
}

#[test]
fn port_and_memory_accesses_reach_the_soc_with_their_data_and_take_its_answer() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    let guest = code(&[
        &[0xb0, 0x5a, 0xe6, 0x80],             // mov al, 0x5a; out 0x80, al
        &[0xba, 0xcd, 0xab, 0xed],             // mov dx, 0xabcd; in ax, dx
        &[0x66, 0x05, 0x01, 0x00, 0x00, 0x00], // add eax, 1
        &[0x66, 0xef],                         // out dx, eax
        &[0xb8, 0x00, 0xf0, 0x8e, 0xd8],       // mov ax, 0xf000; mov ds, ax  (nothing there beyond 1 MiB - this is RAM)
        &[0xb8, 0xff, 0xff, 0x8e, 0xd8],       // mov ax, 0xffff; mov ds, ax
        &[0xa1, 0x10, 0x00],                   // mov ax, [0x10] = 0x100000
        &[0xc6, 0x06, 0x20, 0x00, 0x77],       // mov byte [0x20] = 0x100010, 0x77
        &[0xe7, 0x90],                         // out 0x90, ax
    ]);
    soc.handler = Box::new(|seen, _| {
        Some(match (seen.request.kind, seen.request.address) {
            (Kind::PIO, 0xabcd) if seen.request.direction == Direction::Read => Completion::ok(0x1_2233),
            (Kind::MMIO, 0x10_0000) => Completion::ok(0xbeef),
            (Kind::PIO, 0x90) => Completion { park: true, ..Completion::ok(0) },
            _ => Completion { status: Status::UNCLAIMED, ..Completion::ok(7) },
        })
    });
    soc.real_mode(1, Irqchip::Full, &guest);
    soc.run();
    soc.until("parked", |soc| soc.seen.len() == 6);
    let seen: Vec<_> = soc
        .seen
        .iter()
        .map(|s| (s.request.kind, s.request.direction, s.request.address, s.request.length, s.request.data))
        .collect();
    use Direction::{Read, Write};
    assert_eq!(
        seen,
        [
            (Kind::PIO, Write, 0x80, 1, 0x5a),
            (Kind::PIO, Read, 0xabcd, 2, 0),
            (Kind::PIO, Write, 0xabcd, 4, 0x2234),
            (Kind::MMIO, Read, 0x10_0000, 2, 0),
            (Kind::MMIO, Write, 0x10_0010, 1, 0x77),
            (Kind::PIO, Write, 0x90, 2, 0xbeef),
        ]
    );
    assert!(soc.seen.windows(2).all(|pair| pair[0].request.host_tsc < pair[1].request.host_tsc));
    // Parked as if by a pause: its state can be read once it is out.
    soc.pause();
    assert_eq!(soc.regs(0).rax & 0xffff, 0xbeef);
    assert_eq!((soc.counter("shim.pio"), soc.counter("shim.mmio"), soc.counter("shim.unclaimed")), (4, 2, 3));
    // Fragments of page-split accesses apart, KVM counts as many. (It counts no port access of an emulated instruction.)
    assert_eq!(soc.counter("mmio_exits"), 2);
    assert!(soc.shut_down().success());
}

#[test]
fn strings_travel_whole_and_in_order() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    let guest = code(&[
        &[0xfc, 0xbf, 0x00, 0x40, 0xb9, 0x2c, 0x01, 0xba, 0x70, 0x01], // cld; mov di, 0x4000; mov cx, 300; mov dx, 0x170
        &[0xf3, 0x6d],                                                 // rep insw
        &[0xbe, 0x00, 0x40, 0xb9, 0x2c, 0x01],                         // mov si, 0x4000; mov cx, 300
        &[0xf3, 0x6f],                                                 // rep outsw
        &[0xe6, 0x90],                                                 // out 0x90, al
    ]);
    let mut next = 0u16;
    soc.handler = Box::new(move |seen, lane| {
        let request = seen.request;
        if request.string && request.direction == Direction::Read {
            assert_eq!(request.data, 2);
            let mut bytes = Vec::new();
            for _ in 0..request.length / 2 {
                next += 1;
                bytes.extend(next.to_le_bytes());
            }
            lane.ins().copy_in(0, &bytes);
        } else if request.direction == Direction::Read {
            next += 1;
            return Some(Completion::ok(next.into()));
        }
        Some(Completion { park: request.address == 0x90, ..Completion::ok(0) })
    });
    soc.real_mode(1, Irqchip::Full, &guest);
    soc.run();
    soc.until("done", |soc| soc.seen.last().is_some_and(|s| s.request.address == 0x90));
    let mut written: Vec<u8> = Vec::new();
    for seen in soc.seen.iter().filter(|s| s.request.direction == Direction::Write && s.request.address == 0x170) {
        if seen.request.string {
            written.extend(&seen.string);
        } else {
            written.extend(&(seen.request.data as u16).to_le_bytes());
        }
    }
    let expected: Vec<u8> = (1..=300u16).flat_map(u16::to_le_bytes).collect();
    assert_eq!(written, expected);
    assert!(soc.counter("shim.string") >= 1, "no string came as one");
    assert!(soc.shut_down().success());
}

#[test]
fn an_unclaimed_string_gives_all_ones() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    // cld; mov di, 0x4000; mov cx, 40; mov dx, 0x170; rep insb; out 0x90, al
    let guest = code(&[&[0xfc, 0xbf, 0x00, 0x40, 0xb9, 40, 0, 0xba, 0x70, 0x01, 0xf3, 0x6c, 0xe6, 0x90]]);
    soc.handler = Box::new(|seen, _| {
        let status = if seen.request.address == 0x170 { Status::UNCLAIMED } else { Status::OK };
        Some(Completion { status, park: seen.request.address == 0x90, ..Completion::ok(0) })
    });
    soc.real_mode(1, Irqchip::Full, &guest);
    soc.run();
    soc.until("done", |soc| soc.seen.last().is_some_and(|s| s.request.address == 0x90));
    let mut bytes = [0; 41];
    soc.function.read(0x4000, &mut bytes).unwrap();
    assert_eq!(bytes[..40], [0xff; 40]);
    assert_eq!(bytes[40], 0);
    assert!(soc.shut_down().success());
}

#[test]
fn what_ends_a_vcpu_is_reported_and_parks_it_until_it_is_set_anew() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    // jmp 0xffff:0x10, which is past the end of RAM: no instruction comes from there.
    soc.real_mode(1, Irqchip::Full, &[0xea, 0x10, 0x00, 0xff, 0xff]);
    soc.run();
    soc.until("reported", |soc| !soc.seen.is_empty());
    let report = soc.seen[0].request;
    assert_eq!((report.kind, report.length), (Kind::EXIT_REPORT, 0));
    assert_eq!(report.address, exit_reason::INTERNAL_ERROR, "{report:?}");
    assert_eq!(report.words.unwrap()[0], 1, "KVM_INTERNAL_ERROR_EMULATION");
    assert_eq!(soc.counter("shim.report"), 1);
    soc.pause();
    // The same vCPU goes on once it has another state: out 0x90, al.
    soc.function.write(0x2000, &code(&[&[0xe6, 0x90]])).unwrap();
    soc.set_real_mode(0, 0x2000);
    soc.run();
    soc.until("went on", |soc| soc.seen.len() == 2);
    assert_eq!(soc.seen[1].request.address, 0x90);
    assert!(soc.shut_down().success());
}

#[test]
fn posted_writes_wait_for_nobody_and_keep_their_order() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    let guest = code(&[
        &[0xb9, 200, 0],           // mov cx, 200
        &[0x88, 0xc8, 0xe6, 0xe0], // 1: mov al, cl; out 0xe0, al     posted
        &[0xe2, 0xfa],             // loop 1
        &[0xe6, 0x90],             // out 0x90, al                    waits
        &[0xe4, 0xe0, 0xe7, 0xe0], // in al, 0xe0; out 0xe0, ax       a read is never posted; two ports are not one
        &[0xe6, 0x91],             // out 0x91, al
    ]);
    soc.real_mode(1, Irqchip::Full, &guest);
    assert_eq!(soc.created.unwrap().features & 1, 1, "TSCs are synchronised here");
    soc.ok(&Call::PostedRanges(vec![PostedRange { base: 0xe0, len: 1, ports: 1 }]));
    soc.handler = Box::new(|seen, _| Some(Completion { park: seen.request.address == 0x91, ..Completion::ok(0) }));
    soc.run();
    soc.until("done", |soc| soc.seen.last().is_some_and(|s| s.request.address == 0x91));
    let data: Vec<_> = soc.seen.iter().filter(|s| s.request.length == 1).map(|s| s.request.data as u8).collect();
    let expected: Vec<u8> = (1..=200).rev().chain([1, 0, 0]).collect();
    assert_eq!(data, expected);
    let synchronous: Vec<_> =
        soc.seen.iter().filter(|s| !s.posted).map(|s| (s.request.address, s.request.length)).collect();
    let own = [(0x90, 1), (0xe0, 1), (0xe0, 2), (0x91, 1)];
    assert!(synchronous.ends_with(&own), "{synchronous:?}");
    // Those that found the ring full went synchronously.
    assert!(synchronous[..synchronous.len() - own.len()].iter().all(|s| *s == (0xe0, 1)));
    assert_eq!(soc.counter("shim.posted") + soc.counter("shim.posted_full"), 200);
    assert_eq!(soc.counter("shim.pio"), 204);
    assert!(soc.shut_down().success());
}

#[test]
fn a_full_ring_goes_synchronously() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    // mov cx, 100; 1: out 0xe0, al; loop 1; out 0x90, al
    soc.real_mode(1, Irqchip::Full, &code(&[&[0xb9, 100, 0, 0xe6, 0xe0, 0xe2, 0xfc, 0xe6, 0x90]]));
    soc.ok(&Call::PostedRanges(vec![PostedRange { base: 0xe0, len: 1, ports: 1 }]));
    // The SoC looks at nothing until the guest waits for it.
    let lanes = std::mem::take(&mut soc.lanes);
    soc.run();
    let deadline = std::time::Instant::now() + soc::PATIENCE;
    while soc.counter("shim.posted_full") != 1 {
        assert!(std::time::Instant::now() < deadline, "{} posted", soc.counter("shim.posted"));
    }
    assert_eq!(soc.counter("shim.posted"), 64);
    soc.lanes = lanes;
    soc.until("done", |soc| soc.seen.last().is_some_and(|s| s.request.address == 0x90));
    assert_eq!(soc.seen.len(), 101);
    assert!(soc.shut_down().success());
}

#[test]
fn a_shared_eventfd_is_signalled_without_an_exit() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    // in al, 0x90; out 0xe4, al; in al, 0x90; hlt
    soc.real_mode(1, Irqchip::Full, &code(&[&[0xe4, 0x90, 0xe6, 0xe4, 0xe4, 0x90]]));
    soc.handler = Box::new(|_, _| Some(Completion::ok(7)));
    let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
    let event = soc.function.share(bell.as_fd()).unwrap();
    let io = IoEvent { address: 0xe4, data: 7, len: 1, port: 1, match_data: 1, on: 1, event, reserved: 0 };
    soc.ok(&Call::IoEvent(io));
    soc.run();
    soc.until("asked twice", |soc| soc.seen.len() == 2);
    assert!(soc.seen.iter().all(|s| s.request.address == 0x90), "{:?}", soc.seen);
    assert_eq!(bell.read(), Ok(1));
    assert!(soc.shut_down().success());
}

#[test]
fn lanes_that_share_a_vector_take_no_wake_up_from_each_other() {
    if !soc::has_kvm() {
        return;
    }
    const VCPUS: u32 = 40;
    let mut soc = Soc::start(&[]);
    // in al, 0x90; jmp back
    soc.real_mode(VCPUS, Irqchip::Split, &[0xe4, 0x90, 0xeb, 0xfc]);
    let created = soc.created.unwrap();
    assert!(created.lane_vectors < VCPUS);
    soc.handler = Box::new(|_, _| None);
    soc.run();
    for round in 1..=3 {
        soc.until("asked", |soc| soc.seen.len() == (round * VCPUS) as usize);
        let deadline = std::time::Instant::now() + soc::PATIENCE;
        while soc.counter("shim.sleep") < u64::from(round * VCPUS) {
            assert!(std::time::Instant::now() < deadline, "all sleep at last");
        }
        // Those that share a vector are answered one after the other.
        for lane in 0..VCPUS as usize {
            soc.complete(lane, &Completion::ok(0));
        }
    }
    soc.until("asked", |soc| soc.seen.len() == 4 * VCPUS as usize);
    assert!(soc.shut_down().success());
}
