//! What crosses the bus for an exit, counted on both ends of a modelled function.
//!
//! A count is exact or explained: a vCPU that sleeps says so by two stores and a read, a heartbeat is one store. It is the same
//! whether a crossing takes its time or none.

use std::ops::Sub;
use std::time::{Duration, Instant};

use api_channel::call::{Call, Irqchip, PostedRange, VmCreated};
use integration::soc::{Answer, Counters, PATIENCE, Seen, Shape, Soc};
use integration::{kvm, test_name};
use ioreq_ring::wire::{HEADER, IDLE, TAIL};
use ioreq_ring::{BusMemory, Completion, Kind};
use pcie_function::local::LocalSoc;
use pcie_function::modelled::{Counts, Latencies, ModelledSoc};
use pcie_function::regions::Type;

const PORT: u64 = 0x300;
/// As long as the host spins at all.
const SPIN: u64 = 10_000_000;
/// So short that it sleeps.
const SLEEP: u64 = 1_000;

/// A link as they are: a switch or two between host and SoC.
const MICROSECOND: Latencies = {
    let (posted, read) = (Duration::from_micros(1), Duration::from_nanos(1500));
    Latencies { posted_write: posted, read, dma_write: posted, dma_read: read, doorbell: posted, vector: posted }
};

type Modelled = Soc<ModelledSoc<LocalSoc>>;

/// A VM with one vCPU that will run real-mode `code`, across a link that is as slow as that.
fn vm(code: &[u8], spin_ns: u64, latencies: Latencies) -> (Modelled, Counters, VmCreated) {
    let (mut soc, counters) = Soc::modelled(latencies);
    let created = soc.create(&Shape { vcpus: 1, memory: 1 << 20, irqchip: Irqchip::Full, spin_ns, dirty_ring: 0 });
    soc.load_real_mode(code);
    (soc, counters, created)
}

/// Does `instruction` on port [`PORT`] (in DX) `count` times, then writes the next port.
fn repeat(count: u16, instruction: u8) -> Vec<u8> {
    let [low, high] = count.to_le_bytes();
    // mov cx, count; mov dx, PORT; again: instruction; loop again; inc dx; out dx, al; hlt
    vec![0xb9, low, high, 0xba, 0x00, 0x03, instruction, 0xe2, 0xfd, 0x42, 0xee, 0xf4]
}

const IN: u8 = 0xec;
const OUT: u8 = 0xee;

/// Everything that is counted, at one moment.
#[derive(Clone, Copy, Debug)]
struct Moment {
    host: Counts,
    soc: Counts,
    host_beats: u64,
    soc_beats: u64,
}

impl Moment {
    fn of(soc: &Modelled, counters: &Counters) -> Self {
        let (host, soc_counts) = (counters.host.counts(), counters.soc.counts());
        Self { host, soc: soc_counts, host_beats: soc.host_beats(), soc_beats: soc.beats }
    }
}

impl Sub for Moment {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        let minus = |a: Counts, b: Counts| Counts {
            posted: a.posted - b.posted,
            posted_bytes: a.posted_bytes - b.posted_bytes,
            reads: a.reads - b.reads,
            dma_writes: a.dma_writes - b.dma_writes,
            dma_write_bytes: a.dma_write_bytes - b.dma_write_bytes,
            dma_reads: a.dma_reads - b.dma_reads,
            dma_read_bytes: a.dma_read_bytes - b.dma_read_bytes,
            doorbells: a.doorbells - b.doorbells,
            vectors: a.vectors - b.vectors,
        };
        Self {
            host: minus(self.host, earlier.host),
            soc: minus(self.soc, earlier.soc),
            host_beats: self.host_beats - earlier.host_beats,
            soc_beats: self.soc_beats - earlier.soc_beats,
        }
    }
}

/// What one read costs where both sides poll.
const REQUEST: Counts = Counts {
    posted: 4,
    posted_bytes: 32,
    reads: 0,
    dma_writes: 0,
    dma_write_bytes: 0,
    dma_reads: 0,
    dma_read_bytes: 0,
    doorbells: 0,
    vectors: 0,
};
const COMPLETION: Counts = Counts { posted: 0, posted_bytes: 0, dma_writes: 1, dma_write_bytes: 32, ..REQUEST };

/// Waits for memory to become so: nothing is asked of the host meanwhile.
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < PATIENCE, "{what} does not come about");
        std::hint::spin_loop();
    }
}

#[test]
fn a_read_costs_four_stores_and_one_completion_and_nothing_is_read() {
    a_read_costs(Latencies::default());
}

#[test]
fn a_read_costs_four_stores_and_one_completion_and_nothing_is_read_across_a_link_that_takes_time() {
    a_read_costs(MICROSECOND);
}

fn a_read_costs(latencies: Latencies) {
    if !kvm(&test_name()) {
        return;
    }
    const READS: u16 = 3000;
    let (mut soc, counters, _) = vm(&repeat(READS, IN), SPIN, latencies);
    let request = soc.lane_window(Type::LANE_REQUESTS, 0);
    soc.run();
    let mut seen = soc.take();
    let first = Moment::of(&soc, &counters);
    let (mut last, mut exact, mut late) = (first, 0, 0);
    for n in 0..READS {
        assert_eq!((seen.request.kind, seen.request.address, seen.posted), (Kind::PIO, PORT, false));
        let asked = request.load(HEADER);
        soc.answer(&seen, Answer::Plain(Completion::ok(n.into())));
        late += u64::from(request.load(HEADER) != asked);
        seen = soc.take();
        let now = Moment::of(&soc, &counters);
        let exit = now - last;
        exact += u64::from((exit.host, exit.soc) == (REQUEST, COMPLETION));
        assert_eq!((soc.rings(), exit.soc.dma_reads), (0, 0), "this side polls: {exit:?}");
        last = now;
    }
    // Nearly all cost just that. Where this thread did not run for longer than the vCPU spins, it slept.
    assert!(exact >= 1000, "{exact} of {READS} exits were exact: {:?}", last - first);
    let Moment { host, soc: ours, host_beats, soc_beats } = last - first;
    let expected = 4 * u64::from(READS) + 2 * host.reads + host_beats;
    // At either end the vCPU may be just awake or asleep; a heartbeat is counted just before it is stored.
    assert!((expected - 1..=expected + 2).contains(&host.posted), "{host:?}, {host_beats} heartbeats");
    assert_eq!(host.posted_bytes, 8 * host.posted);
    assert_eq!(ours.dma_writes, u64::from(READS) + soc_beats);
    assert_eq!(ours.dma_write_bytes, 32 * u64::from(READS) + 8 * soc_beats);
    // Where this thread did not run between a completion and its look at the flag, that can be the next exit's sleep.
    let sleeps = host.reads + 1 + late;
    assert!(ours.vectors <= sleeps, "a vector for a vCPU that sleeps, none else: {host:?}, {ours:?}, {late} late");
    assert_eq!(seen.request.data as u8, (READS - 1) as u8, "the guest got the last answer");
    only_sleeps_read(soc, &seen, &counters);
}

/// Ends the VM, whose vCPU asks `last`. Whatever the host read from the BAR since its start, each read was a sleep's.
fn only_sleeps_read(mut soc: Modelled, last: &Seen, counters: &Counters) {
    soc.answer(last, Answer::Plain(Completion { park: true, ..Completion::ok(0) }));
    soc.pause(|seen| panic!("a parked vCPU asks {seen:?}"));
    let sleeps = soc.counter("shim.sleep");
    assert_eq!(counters.host.counts().reads, sleeps);
    soc.shut_down();
}

#[test]
fn a_soc_that_sleeps_is_rung_once_a_request() {
    a_soc_that_sleeps(Latencies::default());
}

#[test]
fn a_soc_that_sleeps_is_rung_once_a_request_across_a_link_that_takes_time() {
    a_soc_that_sleeps(MICROSECOND);
}

fn a_soc_that_sleeps(latencies: Latencies) {
    if !kvm(&test_name()) {
        return;
    }
    const READS: u16 = 1000;
    let (mut soc, counters, _) = vm(&repeat(READS, IN), SPIN, latencies);
    let awake = Moment::of(&soc, &counters);
    soc.sleeps();
    let asleep = Moment::of(&soc, &counters) - awake;
    let (writes, reads) = ((asleep.soc.dma_writes, asleep.soc.dma_write_bytes), asleep.soc.dma_reads);
    assert_eq!((writes, reads), ((1, 8), 1), "to sleep costs this side its flag and one DMA read");
    soc.run();
    let mut seen = soc.take();
    rings_once(&soc);
    for _ in 0..READS {
        soc.answer(&seen, Answer::Plain(Completion::ok(0)));
        seen = soc.take();
        // It rings after the request is there, perhaps after it was seen.
        rings_once(&soc);
    }
    let last = Moment::of(&soc, &counters);
    soc.polls();
    assert_eq!((Moment::of(&soc, &counters) - last).soc.dma_writes, 1, "to wake costs the flag");
    assert_eq!(soc.rings(), 0);
    only_sleeps_read(soc, &seen, &counters);
}

/// Waits for a ring. The channel's doorbell may ring at any time, and is another one.
fn rings_once(soc: &Modelled) {
    let mut rings = 0;
    until("a ring", || {
        rings = soc.rings();
        rings > 0
    });
    assert_eq!(rings, 1);
}

#[test]
fn a_vcpu_that_sleeps_reads_once() {
    a_vcpu_that_sleeps(Latencies::default());
}

#[test]
fn a_vcpu_that_sleeps_reads_once_across_a_link_that_takes_time() {
    a_vcpu_that_sleeps(MICROSECOND);
}

fn a_vcpu_that_sleeps(latencies: Latencies) {
    if !kvm(&test_name()) {
        return;
    }
    const READS: u16 = 1000;
    let (mut soc, counters, _) = vm(&repeat(READS, IN), SLEEP, latencies);
    let control = soc.lane_window(Type::LANE_CONTROLS, 0);
    soc.run();
    let mut seen = soc.take();
    until("sleep", || control.load(IDLE) == 0);
    soc.answer(&seen, Answer::Plain(Completion::ok(0)));
    seen = soc.take();
    until("sleep", || control.load(IDLE) == 0 && counters.host.counts().reads == 2);
    let first = Moment::of(&soc, &counters);
    for n in 1..u64::from(READS) {
        soc.answer(&seen, Answer::Plain(Completion::ok(0)));
        seen = soc.take();
        // The flag is read back after it is stored.
        until("sleep", || control.load(IDLE) == 0 && counters.host.counts().reads >= 2 + n);
        let Moment { host, soc: ours, host_beats, .. } = Moment::of(&soc, &counters) - first;
        assert!(host.reads == n && ours.vectors <= n, "one read a sleep, one vector to end it: {host:?}, {ours:?}");
        let expected = (4 + 2) * n + host_beats;
        assert!((expected..=expected + 1).contains(&host.posted), "{host:?}, {host_beats} heartbeats");
    }
    // A vCPU whose last look before it sleeps finds the completion may be up again before this side looks at its flag.
    let raised = (Moment::of(&soc, &counters) - first).soc.vectors;
    assert!(raised >= u64::from(READS) * 9 / 10, "{raised} vectors for {READS} sleeps");
    only_sleeps_read(soc, &seen, &counters);
}

#[test]
fn a_posted_write_costs_its_stores_and_nobody_waits() {
    a_posted_write_costs(Latencies::default());
}

#[test]
fn a_posted_write_costs_its_stores_and_nobody_waits_across_a_link_that_takes_time() {
    a_posted_write_costs(MICROSECOND);
}

fn a_posted_write_costs(latencies: Latencies) {
    if !kvm(&test_name()) {
        return;
    }
    const WRITES: u16 = 100;
    const SLOTS: u64 = ioreq_ring::wire::POSTED_SLOTS as u64;
    let (mut soc, counters, created) = vm(&repeat(WRITES, OUT), SPIN, latencies);
    if created.features & VmCreated::POSTING == 0 {
        testbed::skip(&test_name(), "this host's TSCs are not known to be synchronised: it posts no writes");
        return;
    }
    soc.ok(&Call::PostedRanges(vec![PostedRange { base: PORT, len: 1, ports: 1 }]));
    let control = soc.lane_window(Type::LANE_CONTROLS, 0);
    let request = soc.lane_window(Type::LANE_REQUESTS, 0);
    soc.run();
    // Nobody serves: the guest goes on until the ring is full. The next write waits.
    until("a write that waits", || request.load(HEADER) != 0);
    assert_eq!(control.load(TAIL), SLOTS);
    let started = Moment::of(&soc, &counters);
    let mut served = 0;
    let mut seen = soc.take();
    while seen.posted {
        served += 1;
        seen = soc.take();
    }
    assert_eq!((served, seen.request.address), (SLOTS, PORT), "the ring, then what found no room in it");
    soc.answer(&seen, Answer::Plain(Completion::ok(0)));
    seen = soc.take();
    while seen.posted {
        served += 1;
        seen = soc.take();
    }
    assert_eq!((served, seen.request.address), (u64::from(WRITES) - 1, PORT + 1));
    let Moment { host, soc: ours, host_beats, soc_beats } = Moment::of(&soc, &counters) - started;
    // Since the ring was full: what was posted, five stores each, and the last write, four.
    let expected = 5 * (u64::from(WRITES) - 1 - SLOTS) + 4 + 2 * host.reads + host_beats;
    assert!((expected - 1..=expected + 2).contains(&host.posted), "{host:?}, {host_beats} heartbeats");
    assert_eq!(soc.rings(), 0, "this side polls: {host:?}");
    // One completion; credits come back in batches of a quarter of the ring.
    assert_eq!(ours.dma_writes, 1 + (u64::from(WRITES) - 1) / (SLOTS / 4) + soc_beats, "{ours:?}");
    assert_eq!(ours.dma_reads, 0);
    only_sleeps_read(soc, &seen, &counters);
}

#[test]
fn a_read_takes_its_way_there_and_back() {
    if !kvm(&test_name()) {
        return;
    }
    const READS: u16 = 300;
    // Longer than anything else in an exit.
    let [there, back] = [Duration::from_micros(200), Duration::from_micros(100)];
    let slow = Latencies { posted_write: there, dma_write: back, ..MICROSECOND };
    let (mut soc, counters, _) = vm(&repeat(READS, IN), SPIN, slow);
    soc.run();
    let mut seen = soc.take();
    let start = Instant::now();
    for _ in 0..READS {
        soc.answer(&seen, Answer::Plain(Completion::ok(0)));
        seen = soc.take();
    }
    let took = start.elapsed();
    assert!(took >= (there + back) * READS.into(), "{READS} reads took {took:?}");
    only_sleeps_read(soc, &seen, &counters);
}
