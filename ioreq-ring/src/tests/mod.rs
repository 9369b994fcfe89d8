//! Properties of the two ends, run against each other on the heap.

#[path = "../../tests/heap/mod.rs"]
mod heap;
mod hostile;
mod reattach;
mod served;

use heap::Heap;
use proptest::prelude::*;

use crate::wire::{HEADER, LINE, POSTED_RING, STRING_PAGE, TAIL};
use crate::{
    BusMemory, Completion, Direction, HostLane, HostWindows, Kind, LineChange, Request, SocLane, SocWindows, Status,
};

/// A lane's memory.
#[derive(Debug)]
struct Memory {
    request: Heap,
    control: Heap,
    posted: Heap,
    completion: Heap,
    credit: Heap,
    soc_idle: Heap,
    outs: Heap,
    ins: Heap,
    private: Heap,
}

type Host = HostLane<Heap, Heap>;
type Soc = SocLane<Heap, Heap, Heap>;

impl Memory {
    /// Of a lane that has carried so many requests and posted writes.
    fn after(requests: u32, posts: u32) -> Self {
        let memory = Self {
            request: Heap::new(LINE),
            control: Heap::new(LINE),
            posted: Heap::new(POSTED_RING),
            completion: Heap::new(LINE),
            credit: Heap::new(LINE),
            soc_idle: Heap::new(8),
            outs: Heap::new(STRING_PAGE),
            ins: Heap::new(STRING_PAGE),
            private: Heap::new(Soc::PRIVATE),
        };
        memory.request.store(HEADER, u64::from(requests));
        memory.completion.store(HEADER, u64::from(requests));
        memory.control.store(TAIL, u64::from(posts));
        memory.credit.store(0, u64::from(posts));
        Soc::after(&memory.private, requests, posts);
        memory
    }

    fn host_windows(&self) -> HostWindows<Heap, Heap> {
        HostWindows {
            request: self.request.clone(),
            control: self.control.clone(),
            posted: self.posted.clone(),
            completion: self.completion.clone(),
            credit: self.credit.clone(),
            soc_idle: self.soc_idle.clone(),
            outs: self.outs.clone(),
            ins: self.ins.clone(),
        }
    }

    /// The SoC's windows, each as `through` shows it.
    fn soc_windows<W>(&self, through: impl Fn(&Heap) -> W) -> SocWindows<W, W, W> {
        SocWindows {
            request: through(&self.request),
            control: through(&self.control),
            posted: through(&self.posted),
            completion: through(&self.completion),
            credit: through(&self.credit),
            outs: through(&self.outs),
            ins: through(&self.ins),
            private: through(&self.private),
        }
    }
}

/// Counts of what a lane has carried: fresh, about to wrap around, any.
fn carried() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), u32::MAX - 70..=u32::MAX, any::<u32>()]
}

fn direction() -> impl Strategy<Value = Direction> {
    prop_oneof![Just(Direction::Read), Just(Direction::Write)]
}

/// Every request that a host may make.
fn request() -> impl Strategy<Value = Request> {
    let words = prop::option::of(any::<[u64; 4]>());
    let shape = prop_oneof![
        (0..=0xffffu64, prop::sample::select(vec![1, 2, 4])).prop_map(|(a, n)| (Kind::PIO, a, n, false, false)),
        (0..=0xffffu64, prop::sample::select(vec![4, 64, 4096])).prop_map(|(a, n)| (Kind::PIO, a, n, true, false)),
        (any::<u64>(), 1..=8u16).prop_map(|(a, n)| (Kind::MMIO, a, n, false, false)),
        (0..=0xffff_ffffu64).prop_map(|a| (Kind::MSR, a, 8, false, false)),
        any::<u64>().prop_map(|a| (Kind::HYPERCALL, a, 8, false, true)),
        (0..=0xffu64).prop_map(|a| (Kind::EOI, a, 1, false, false)),
        (1..=7u64).prop_map(|a| (Kind::EXIT_REPORT, a, 0, false, true)),
        any::<u64>().prop_map(|a| (Kind::HV_HYPERCALL, a, 8, false, true)),
        (0..=0xffff_ffffu64).prop_map(|a| (Kind::HV_SYNIC, a, 0, false, true)),
        (10..=0xffu8, any::<u64>(), 0..=4096u16).prop_map(|(k, a, n)| (Kind(k), a, n, false, true)),
    ];
    (shape, direction(), any::<u64>(), any::<u64>(), words).prop_map(|(shape, direction, data, host_tsc, words)| {
        let (kind, address, length, string, detailed) = shape;
        // These never come without.
        let words = words.or(matches!(kind, Kind::HV_HYPERCALL | Kind::HV_SYNIC).then_some([data; 4]));
        let data = if string { 1 << (data % 3) } else { data };
        Request { kind, direction, address, data, host_tsc, length, string, words: words.filter(|_| detailed) }
    })
}

/// Every answer that a SoC may give.
fn completion() -> impl Strategy<Value = Completion> {
    let line = (any::<u16>(), any::<bool>(), any::<u32>());
    let line = line.prop_map(|(gsi, high, sequence)| LineChange { gsi, high, sequence });
    let lines = [prop::option::of(line.clone()), prop::option::of(line)];
    (any::<u64>(), any::<u8>(), lines, any::<bool>()).prop_map(|(data, status, lines, park)| Completion {
        data,
        status: Status(status),
        lines,
        park,
    })
}
