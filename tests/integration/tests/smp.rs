//! Many vCPUs at once.

use api_channel::call::Irqchip;
use integration::soc::{Answer, Shape, Soc};
use integration::{Vm, kvm, test_name};
use ioreq_ring::{Completion, Kind};
use payloads::{PASSED, Payload, Privilege, pio, smp};

/// Runs a payload in which each vCPU says its APIC id; they must be `ids`.
fn brings_up(payload: &Payload, more: &[&str], ids: impl IntoIterator<Item = u32>) {
    let ended = Vm::payload(payload, more).wait();
    assert_eq!(ended.status.code(), Some(PASSED), "{}{}", ended.debugcon, ended.stderr);
    let mut lines: Vec<_> = ended.debugcon.lines().collect();
    assert_eq!(lines.pop(), Some("pass"));
    lines.sort_unstable();
    let expected: Vec<_> = ids.into_iter().map(|id| format!("vcpu {id:016x}")).collect();
    assert_eq!(lines, expected);
}

#[test]
fn sixty_four_processors_come_up_through_soc_vmm() {
    if !kvm(&test_name()) {
        return;
    }
    assert_eq!(payloads::MAX_VCPUS, 64);
    for vcpus in [2, 4, 8, 64] {
        brings_up(&smp::bring_up(vcpus).unwrap(), &[], 0..vcpus.into());
    }
}

#[test]
fn a_topology_decides_the_apic_ids() {
    if !kvm(&test_name()) {
        return;
    }
    let payload = |vcpus| smp::identify(vcpus).unwrap();
    brings_up(&payload(6), &["--cpus", "6,sockets=2"], [0, 1, 2, 4, 5, 6]);
    brings_up(&payload(6), &["--cpus", "6,sockets=3,cores=1,threads=2"], 0..6);
    brings_up(&payload(12), &["--cpus", "12,cores=3,threads=2"], [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    brings_up(&payload(64), &["--cpus", "64,sockets=2,threads=2"], 0..64);
}

/// As many as the wire has room for (docs/wire.md §7), each with its lane, thread and descriptors.
#[test]
fn a_thousand_and_twenty_four_vcpus_fit() {
    if !kvm(&test_name()) {
        return;
    }
    let ended = Vm::payload(&pio::pio(Privilege::Cpl0).unwrap(), &["--cpus", "1024"]).wait();
    assert_eq!(ended.status.code(), Some(PASSED), "{}{}", ended.debugcon, ended.stderr);
}

/// Ports of [`CODE`].
const ASK: u64 = 0x300;
const RIGHT: u64 = 0x301;
const READS: u32 = 25;

/// Reads 16 bits of port [`ASK`] [`READS`] times; each must give BX, the vCPU's number. Then writes [`RIGHT`], else the port after.
const CODE: [u8; 20] = [
    0xb9,
    READS as u8,
    0x00, // mov cx, READS
    0xba,
    0x00,
    0x03, // mov dx, ASK
    0xed, // again: in ax, dx
    0x39,
    0xd8, // cmp ax, bx
    0x75,
    0x05, // jne wrong
    0xe2,
    0xf9, // loop again
    0x42, // inc dx
    0xee, // out dx, al
    0xf4, // hlt
    0x42, // wrong: inc dx
    0x42, // inc dx
    0xee, // out dx, al
    0xf4, // hlt
];

#[test]
fn sixty_four_vcpus_share_vectors_and_none_misses_an_answer() {
    if !kvm(&test_name()) {
        return;
    }
    const VCPUS: u32 = 64;
    let mut soc = Soc::start(&[]);
    // They hardly spin: nearly every answer must wake a vCPU.
    let created =
        soc.create(&Shape { vcpus: VCPUS, memory: 1 << 20, irqchip: Irqchip::Full, spin_ns: 1000, dirty_ring: 0 });
    assert!(created.lane_vectors < VCPUS, "{} vectors: some lanes share one", created.lane_vectors);
    soc.load_real_mode(&CODE);
    soc.run();
    let mut asked = vec![0; VCPUS as usize];
    let mut right = 0;
    while right < VCPUS {
        let seen = soc.take();
        assert_eq!(seen.request.kind, Kind::PIO);
        let completion = match seen.request.address {
            ASK => {
                asked[seen.lane] += 1;
                Completion::ok(seen.lane as u64)
            }
            RIGHT => {
                right += 1;
                Completion { park: true, ..Completion::ok(0) }
            }
            _ => panic!("vCPU {} got another's answer", seen.lane),
        };
        soc.answer(&seen, Answer::Plain(completion));
    }
    assert_eq!(asked, vec![READS; VCPUS as usize]);
    assert!(soc.counter("shim.sleep") > 0);
    assert!(soc.shut_down().unwrap().success());
}
