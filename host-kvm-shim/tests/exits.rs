//! Exits of a tiny real-mode guest, and what its vCPU gets for them.

mod soc;

use api_channel::call::{Call, Irqchip, PostedRange, VCPU_ALL};
use ioreq_ring::wire::exit_reason;
use ioreq_ring::{BusMemory, Completion, Direction, Kind, Status};
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
    // Parked as if by a pause: its state can be read.
    soc.until("out", |_| true);
    soc.pause();
    assert_eq!(soc.regs(0).rax & 0xffff, 0xbeef);
    assert_eq!((soc.counter("shim.pio"), soc.counter("shim.mmio"), soc.counter("shim.unclaimed")), (4, 2, 3));
    // Fragments of page-split accesses apart, KVM counts as many. (It counts no port access of an emulated instruction.)
    assert_eq!(soc.counter("mmio_exits"), 2);
    assert!(soc.shut_down().success());
}
