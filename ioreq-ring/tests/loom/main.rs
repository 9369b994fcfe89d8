//! Models of the lanes' protocol, run by loom over every order that memory and bus allow.
//!
//! Each model tells its outcome; the protocol as it is must never lose anything, and without any one of its steps some execution
//! must. `RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p ioreq-ring --release --test loom`.
//!
//! What loom can't show: its SeqCst accesses are no stronger than acquire and release (the lanes use none; fences are modelled in
//! full), and it doesn't let a load take a value from a store that hasn't run yet. Neither is needed for a lost wake-up.
#![cfg(loom)]

mod bus;
#[path = "../heap/mod.rs"]
mod heap;
mod order;
mod posted;
mod sleep;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bus::{Bus, Omit, Side, View, World};
use heap::Heap;
use ioreq_ring::wire::{LINE, POSTED_RING};
use ioreq_ring::{Completion, Direction, HostLane, HostWindows, Kind, Request, SocIdle, SocLane, SocWindows, Status};

type Host = HostLane<View, View>;
type Soc = SocLane<View, View, Heap>;

/// A window through which one side does something that the other waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Through {
    HostRequest,
    HostControl,
    HostPosted,
    HostSocIdle,
    SocControl,
    SocPosted,
    SocCompletion,
    SocCredit,
    SocSocIdle,
}

/// A lane and its SoC's idle flag, without one step of the protocol.
struct Lane {
    host: Host,
    soc: Soc,
    idle: SocIdle<View>,
}

impl Lane {
    fn without(world: World, through: Through, omit: Omit) -> Self {
        Self::on(&Bus::new(world), through, omit)
    }

    fn on(bus: &Arc<Bus>, through: Through, omit: Omit) -> Self {
        let (request, control) = (bus.memory(Side::Soc, LINE), bus.memory(Side::Soc, LINE));
        let posted = bus.memory(Side::Soc, POSTED_RING);
        let (completion, credit) = (bus.memory(Side::Host, LINE), bus.memory(Side::Host, LINE));
        let (flag, outs, ins) = (bus.memory(Side::Host, 8), bus.memory(Side::Host, 8), bus.memory(Side::Host, 8));
        let view = |memory: &Arc<bus::Memory>, side, which| {
            memory.view(side).without(if which == Some(through) { omit } else { Omit::Nothing })
        };
        let host = HostLane::new(HostWindows {
            request: view(&request, Side::Host, Some(Through::HostRequest)),
            control: view(&control, Side::Host, Some(Through::HostControl)),
            posted: view(&posted, Side::Host, Some(Through::HostPosted)),
            completion: view(&completion, Side::Host, None),
            credit: view(&credit, Side::Host, None),
            soc_idle: view(&flag, Side::Host, Some(Through::HostSocIdle)),
            outs: view(&outs, Side::Host, None),
            ins: view(&ins, Side::Host, None),
        });
        let soc = SocLane::new(SocWindows {
            request: view(&request, Side::Soc, None),
            control: view(&control, Side::Soc, Some(Through::SocControl)),
            posted: view(&posted, Side::Soc, Some(Through::SocPosted)),
            completion: view(&completion, Side::Soc, Some(Through::SocCompletion)),
            credit: view(&credit, Side::Soc, Some(Through::SocCredit)),
            outs: view(&outs, Side::Soc, None),
            ins: view(&ins, Side::Soc, None),
            private: Heap::new(Soc::PRIVATE),
        });
        let idle = SocIdle::new(view(&flag, Side::Soc, Some(Through::SocSocIdle)));
        Self { host, soc, idle }
    }
}

fn write(data: u64, host_tsc: u64) -> Request {
    Request::access(Kind::MMIO, Direction::Write, 0xfee0_0000 + data, data, 4, host_tsc)
}

/// The answer that only `request` gets.
fn answer(request: &Request) -> Completion {
    Completion { data: !request.data, status: Status::OK, lines: [None; 2], park: false }
}

/// Whether any execution of `model` comes out true. `preemptions` bounds loom's search; `None` searches all.
fn ever(preemptions: Option<usize>, model: impl Fn() -> bool + Send + Sync + 'static) -> bool {
    let seen = Arc::new(AtomicBool::new(false));
    let found = seen.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 20_000;
    builder.check(move || {
        if model() {
            found.store(true, Ordering::Relaxed);
        }
    });
    seen.load(Ordering::Relaxed)
}
