//! The SoC's end of two lanes against a host that stores any word in request, control and posted lines.
#![no_main]

use fuzz::Word;
use ioreq_ring::wire::{LINE, POSTED_RING, POSTED_SLOTS, STRING_PAGE};
use ioreq_ring::{BusMemory, Completion, Phase, SocLane, SocWindows, drain};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use wire_kit::Heap;

#[derive(Arbitrary, Debug)]
enum Window {
    Request,
    Control,
    Posted,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Store {
        lane: bool,
        window: Window,
        index: u16,
        word: Word,
    },
    /// A posted write that is as it must be, but for what the slot says of it.
    Post {
        lane: bool,
        address: u64,
        host_tsc: u64,
        upper: u32,
    },
    Poll {
        lane: bool,
    },
    Drain,
    Complete {
        lane: bool,
        data: u64,
    },
    Look {
        lane: bool,
    },
    Reattach {
        lane: bool,
    },
}

type Lane = SocLane<Heap, Heap, Heap>;

#[derive(Debug)]
struct Memory {
    request: Heap,
    control: Heap,
    posted: Heap,
    private: Heap,
}

impl Memory {
    fn new() -> Self {
        Self {
            request: Heap::new(LINE),
            control: Heap::new(LINE),
            posted: Heap::new(POSTED_RING),
            private: Heap::new(Lane::PRIVATE),
        }
    }

    fn attach(&self) -> Lane {
        SocLane::new(SocWindows {
            request: self.request.clone(),
            control: self.control.clone(),
            posted: self.posted.clone(),
            completion: Heap::new(LINE),
            credit: Heap::new(LINE),
            outs: Heap::new(8),
            ins: Heap::new(8),
            private: self.private.clone(),
        })
    }

    fn post(&self, address: u64, host_tsc: u64, upper: u32) {
        let tail = self.control.load(0) as u32;
        let next = tail.wrapping_add(1);
        let header = u64::from(upper) << 32 | u64::from(next);
        self.posted.store_line((tail % POSTED_SLOTS) as usize * 32, &[address, 0, host_tsc, header]);
        self.control.store(0, next.into());
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let memories = [Memory::new(), Memory::new()];
    let mut lanes = memories.each_ref().map(Memory::attach);
    for step in steps {
        match step {
            Step::Store { lane, window, index, word } => {
                let memory = &memories[usize::from(lane)];
                let window = match window {
                    Window::Request => &memory.request,
                    Window::Control => &memory.control,
                    Window::Posted => &memory.posted,
                };
                word.store(window, index);
            }
            Step::Post { lane, address, host_tsc, upper } => memories[usize::from(lane)].post(address, host_tsc, upper),
            Step::Poll { lane } => {
                let lane = &mut lanes[usize::from(lane)];
                if let Ok(Some(request)) = lane.poll() {
                    assert!(usize::from(request.length) <= STRING_PAGE && request.kind.0 != 0, "{request:?}");
                    assert_eq!(lane.phase(), Phase::Processing);
                }
            }
            Step::Drain => {
                let mut served = 0;
                let _ = drain(&mut lanes, |_, write| {
                    served += 1;
                    assert!(write.request.postable(), "{write:?}");
                });
                assert!(served <= 2 * POSTED_SLOTS);
            }
            Step::Complete { lane, data } => {
                let lane = &mut lanes[usize::from(lane)];
                let taken = lane.phase() == Phase::Processing;
                assert_eq!(lane.complete(&Completion::ok(data)).is_ok(), taken);
            }
            Step::Look { lane } => {
                let lane = &mut lanes[usize::from(lane)];
                let _ = (lane.has_work(), lane.host_sleeps(), lane.in_flight(), lane.resend());
            }
            Step::Reattach { lane } => lanes[usize::from(lane)] = memories[usize::from(lane)].attach(),
        }
    }
});
