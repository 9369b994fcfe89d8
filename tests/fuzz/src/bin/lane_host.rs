//! The host's end of a lane against a SoC that stores any word in completion, credit and idle lines.
#![no_main]

use fuzz::Word;
use ioreq_ring::wire::{LINE, POSTED_RING, POSTED_SLOTS};
use ioreq_ring::{BusMemory, Direction, HostLane, HostWindows, Kind, Posted, Request};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use wire_kit::Heap;

#[derive(Arbitrary, Debug)]
enum Window {
    Completion,
    Credit,
    Idle,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Store {
        window: Window,
        index: u16,
        word: Word,
    },
    /// A completion that is as it must be, but for what its header says of it.
    Complete {
        words: [u64; 3],
        upper: u32,
    },
    Submit {
        address: u64,
    },
    Post {
        times: u8,
    },
    Poll,
    Sleep,
}

fuzz_target!(|steps: Vec<Step>| {
    let line = || Heap::new(LINE);
    let (control, completion, credit, soc_idle) = (line(), line(), line(), Heap::new(8));
    let mut lane = HostLane::new(HostWindows {
        request: line(),
        control: control.clone(),
        posted: Heap::new(POSTED_RING),
        completion: completion.clone(),
        credit: credit.clone(),
        soc_idle: soc_idle.clone(),
        outs: Heap::new(8),
        ins: Heap::new(8),
    });
    let mut submitted = 0;
    for step in steps {
        match step {
            Step::Store { window, index, word } => {
                let window = match window {
                    Window::Completion => &completion,
                    Window::Credit => &credit,
                    Window::Idle => &soc_idle,
                };
                word.store(window, index);
            }
            Step::Complete { words: [data, a, b], upper } => {
                completion.store_line(32, &[data, a, b, u64::from(upper) << 32 | submitted]);
            }
            Step::Submit { address } => {
                let waiting = lane.waiting();
                let request = Request::access(Kind::MMIO, Direction::Read, address, 0, 8, 0);
                assert_eq!(lane.submit(&request).is_err(), waiting);
                submitted += u64::from(!waiting);
            }
            Step::Post { times } => {
                for _ in 0..times {
                    let write = Request::access(Kind::MMIO, Direction::Write, 0, 0, 8, 0);
                    let posted = lane.post(&write);
                    if posted == Ok(Posted::Full) {
                        let tail = control.load(0) as u32;
                        assert_eq!(credit.load(0), u64::from(tail.wrapping_sub(POSTED_SLOTS)));
                    }
                }
            }
            Step::Poll => {
                let waiting = lane.waiting();
                if let Ok(Some(_)) = lane.poll() {
                    assert!(waiting && !lane.waiting());
                }
            }
            Step::Sleep => {
                lane.about_to_sleep();
                lane.awake();
            }
        }
    }
});
