//! Each line of a lane against its bytes in `tests/golden/lanes`, both ways: what one end stores, and what the other makes of it.

mod heap;

use heap::Heap;
use ioreq_ring::wire::{LINE, POSTED_RING, POSTED_SLOT, exit_reason};
use ioreq_ring::{
    BusMemory, Completion, Direction, HostLane, HostWindows, Kind, LineChange, Posted, Request, SocLane, SocWindows,
    Status, drain,
};

const TSC: u64 = 0x0123_4567_89ab_cdef;

/// `tests/golden/lanes/NAME.hex`: bytes in hex, `#` starts a comment.
macro_rules! golden {
    ($name:literal) => {
        ($name, include_str!(concat!("../../tests/golden/lanes/", $name, ".hex")))
    };
}

type Golden = (&'static str, &'static str);

fn bytes((name, text): Golden) -> Vec<u8> {
    let digits: String = text.lines().flat_map(|line| line.split('#').next()).flat_map(str::split_whitespace).collect();
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    assert!(rest.is_empty(), "{name}: odd number of digits");
    pairs.iter().map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).expect(name)).collect()
}

/// A fresh lane, and the memory behind it.
struct Lane {
    request: Heap,
    control: Heap,
    posted: Heap,
    completion: Heap,
    credit: Heap,
    host: HostLane<Heap, Heap>,
    soc: SocLane<Heap, Heap, Heap>,
}

impl Lane {
    fn new() -> Self {
        let line = || Heap::new(LINE);
        let (request, control, completion, credit) = (line(), line(), line(), line());
        let (posted, outs, ins) = (Heap::new(POSTED_RING), Heap::new(8), Heap::new(8));
        let host = HostLane::new(HostWindows {
            request: request.clone(),
            control: control.clone(),
            posted: posted.clone(),
            completion: completion.clone(),
            credit: credit.clone(),
            soc_idle: Heap::new(8),
            outs: outs.clone(),
            ins: ins.clone(),
        });
        let soc = SocLane::new(SocWindows {
            request: request.clone(),
            control: control.clone(),
            posted: posted.clone(),
            completion: completion.clone(),
            credit: credit.clone(),
            outs,
            ins,
            private: Heap::new(SocLane::<Heap, Heap, Heap>::PRIVATE),
        });
        Self { request, control, posted, completion, credit, host, soc }
    }
}

fn stored(memory: &Heap, golden: Golden) {
    let expected = bytes(golden);
    let mut found = vec![0; expected.len()];
    memory.copy_out(0, &mut found);
    assert_eq!(found, expected, "{}", golden.0);
}

#[test]
fn requests() {
    let access = |kind, direction, address, data, length| Request::access(kind, direction, address, data, length, TSC);
    let string = Request { length: 4096, string: true, ..access(Kind::PIO, Direction::Write, 0x1f0, 2, 0) };
    let call = access(Kind::HYPERCALL, Direction::Read, 5, 0, 8);
    let hv_call = access(Kind::HV_HYPERCALL, Direction::Read, 0x1_005d, 0, 8);
    let synic = access(Kind::HV_SYNIC, Direction::Write, 0x4000_0083, 0, 0);
    let report = access(Kind::EXIT_REPORT, Direction::Read, exit_reason::INTERNAL_ERROR, 0, 0);
    let cases = [
        (golden!("request-pio-read"), access(Kind::PIO, Direction::Read, 0x3fd, 0, 1)),
        (golden!("request-mmio-write"), access(Kind::MMIO, Direction::Write, 0xfee0_0300, 0x1122_3344, 4)),
        (golden!("request-string-write"), string),
        (golden!("request-msr-read"), access(Kind::MSR, Direction::Read, 0xc000_0080, 0, 8)),
        (golden!("request-hypercall"), Request { words: Some([1, 2, 3, 4]), ..call }),
        (golden!("request-exit-report"), Request { words: Some([1, 0x10, 0x20, 0x30]), ..report }),
        (golden!("request-hv-hypercall"), Request { words: Some([0x21, 7, 0, 0]), ..hv_call }),
        (golden!("request-hv-synic"), Request { words: Some([1, 0x5001, 0x6001, 0]), ..synic }),
        (golden!("request-eoi"), access(Kind::EOI, Direction::Write, 0x31, 0, 1)),
    ];
    for (golden, request) in cases {
        let mut lane = Lane::new();
        lane.host.submit(&request).unwrap();
        stored(&lane.request, golden);

        let mut lane = Lane::new();
        lane.request.copy_in(0, &bytes(golden));
        assert_eq!(lane.soc.poll(), Ok(Some(request)), "{}", golden.0);
    }
}

#[test]
fn completions() {
    let cases = [
        (golden!("completion-data"), Completion::ok(0x60)),
        (
            golden!("completion-lines"),
            Completion {
                data: u64::MAX,
                status: Status::DEVICE_FAILED,
                lines: [
                    Some(LineChange { gsi: 4, high: true, sequence: 7 }),
                    Some(LineChange { gsi: 11, high: false, sequence: 0xffff_fffe }),
                ],
                park: true,
            },
        ),
    ];
    let request = Request::access(Kind::PIO, Direction::Read, 0x64, 0, 1, TSC);
    for (golden, completion) in cases {
        let mut lane = Lane::new();
        lane.host.submit(&request).unwrap();
        lane.soc.poll().unwrap();
        lane.soc.complete(&completion).unwrap();
        stored(&lane.completion, golden);

        let mut lane = Lane::new();
        lane.host.submit(&request).unwrap();
        lane.completion.copy_in(0, &bytes(golden));
        assert_eq!(lane.host.poll(), Ok(Some(completion)), "{}", golden.0);
    }
}

#[test]
fn posted_writes_and_credits() {
    let write = Request::access(Kind::PIO, Direction::Write, 0x3f8, 0x41, 1, TSC);
    let (slot, control, credit) = (golden!("posted-slot"), golden!("control"), golden!("credit"));
    let mut lane = Lane::new();
    lane.host.post(&write).unwrap();
    stored(&lane.posted, slot);
    stored(&lane.control, control);
    for _ in 1..16 {
        lane.host.post(&write).unwrap();
    }
    drain(&mut [lane.soc], |_, _| {}).unwrap();
    stored(&lane.credit, credit);

    let lane = Lane::new();
    lane.posted.copy_in(0, &bytes(slot));
    lane.control.copy_in(0, &bytes(control));
    assert_eq!(lane.soc.host_sleeps(), Ok(false));
    let mut served = Vec::new();
    drain(&mut [lane.soc], |_, write| served.push(write.request)).unwrap();
    assert_eq!(served, [write]);

    let mut lane = Lane::new();
    let mut post = || lane.host.post(&write).unwrap();
    let room = (0..).find(|_| post() == Posted::Full).unwrap();
    assert_eq!(room, POSTED_RING / POSTED_SLOT);
    lane.credit.copy_in(0, &bytes(credit));
    assert_eq!((0..).find(|_| post() == Posted::Full), Some(16));
}
