//! A disk with many requests under way, on real files and on disks that fail or wait.

use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::collection::vec;
use proptest::prelude::*;
use soc_vmm::block::{self, Aio, BlockBackend, BlockError, ImageProblem, ImageSpec, Watched, Watcher};
use soc_vmm::virtio::block::{
    BlockConfig, BlockEngine, DiskError, DiskErrorListener, DiskLimits, ErrorAction, ErrorPolicy, OnError, Sort,
};
use soc_vmm::virtio::{Engine, Rate, RateLimits, Session, Wait};

use super::rig::{Board, Driver, EVENT_INDEX, Guest, HeapDisk, INDIRECT, NEXT, TABLE, VERSION_1, WRITE};

const FLUSH: u64 = 1 << 9;
const MQ: u64 = 1 << 12;
/// Requests at most; each has an entry of the queue, a table, a header, a status and a sector.
const SLOTS: u16 = 32;
const TABLES: u64 = 0x6_0000;
const HEADERS: u64 = 0x7_0000;
const STATUS: u64 = 0x7_1000;
const DATA: u64 = 0x8_0000;

/// The hand of a clock that stands still.
#[derive(Default)]
struct Hand(AtomicU64);

impl Hand {
    fn advance(&self, time: Duration) {
        self.0.fetch_add(time.as_nanos() as u64, SeqCst);
    }
}

/// An engine and its driver on one thread.
struct Bench {
    board: Board,
    driver: Driver,
    session: Session,
    engine: BlockEngine,
    clock: Arc<Hand>,
}

impl Bench {
    fn new(backend: Arc<dyn BlockBackend>, with: impl FnOnce(&mut BlockConfig)) -> Self {
        let board = Board::default();
        let driver = Driver::new(&board.ram, 0x1_0000, SLOTS);
        let clock = Arc::new(Hand::default());
        let mut config = BlockConfig::new("disk0", backend, "s");
        let (hand, start) = (clock.clone(), Instant::now());
        config.clock = Arc::new(move || start + Duration::from_nanos(hand.0.load(SeqCst)));
        with(&mut config);
        let session = board.session(VERSION_1 | FLUSH | INDIRECT | EVENT_INDEX, &[driver.at]);
        Self { engine: BlockEngine::new(config).unwrap(), board, driver, session, clock }
    }

    /// Makes a request for one sector, or for none, in a slot of its own.
    fn ask(&mut self, slot: u16, kind: u32, sector: u64) {
        let n = u64::from(slot);
        let header = [kind.to_le_bytes().to_vec(), vec![0; 4], sector.to_le_bytes().to_vec()].concat();
        self.board.ram.set(HEADERS + 16 * n, &header);
        self.board.ram.set(STATUS + n, &[0xee]);
        let table = TABLES + 64 * n;
        let (len, flags) = (if kind == 4 { 0 } else { 512 }, if kind == 0 { NEXT | WRITE } else { NEXT });
        self.driver.descriptor(table, 0, HEADERS + 16 * n, 16, NEXT, 1);
        self.driver.descriptor(table, 1, DATA + 512 * n, len, flags, 2);
        self.driver.descriptor(table, 2, STATUS + n, 1, WRITE, 0);
        self.driver.descriptor(self.driver.at.descriptors, slot, table, 48, TABLE, 0);
        self.driver.offer(slot);
    }

    /// The driver resets the device, and starts it again.
    fn reset(&mut self) {
        self.session.control.end();
        self.board.ram.set(0x1_0000, &[0; 0x1000]);
        self.driver = Driver::new(&self.board.ram, 0x1_0000, SLOTS);
        self.session = self.board.session(self.session.features, &[self.driver.at]);
    }

    fn serve(&mut self) -> Wait {
        self.engine.serve(&mut self.session).unwrap()
    }

    /// Waits until something is done or rings.
    fn wait(&self) {
        poll(&mut [PollFd::new(self.engine.source().unwrap(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
    }

    /// Serves until a request is given back: its slot and its status.
    fn answer(&mut self) -> (u16, u8) {
        loop {
            self.serve();
            if let Some((slot, _)) = self.driver.take_used() {
                return (slot as u16, self.board.ram.get(STATUS + u64::from(slot), 1)[0]);
            }
            self.wait();
        }
    }
}

fn file(dir: &Path, sectors: usize) -> Arc<dyn BlockBackend> {
    let path = dir.join("disk");
    std::fs::write(&path, vec![7; sectors * 512]).unwrap();
    block::open(&ImageSpec::new(path)).unwrap()
}

#[test]
fn at_depth_32_an_interrupt_and_a_submission_are_for_eight_requests() {
    let dir = tempfile::tempdir().unwrap();
    for aio in [Aio::IoUring, Aio::Threads] {
        let mut bench = Bench::new(file(dir.path(), 2048), |config| config.aio = aio);
        let (mut asked, mut answered) = (0u64, 0u64);
        for slot in 0..SLOTS {
            bench.ask(slot, 0, asked);
            asked += 1;
        }
        while answered < 2048 {
            bench.serve();
            let before = answered;
            while let Some((slot, used)) = bench.driver.take_used() {
                assert_eq!((used, bench.board.ram.get(DATA + 512 * u64::from(slot), 512)), (513, vec![7; 512]));
                answered += 1;
                if asked < 2048 {
                    bench.ask(slot as u16, 0, asked);
                    asked += 1;
                }
            }
            if answered == before {
                bench.wait();
            }
        }
        let handle = bench.engine.handle();
        let counters = handle.counters();
        let [requests, publications, submissions] =
            [&counters.requests, &counters.publications, &counters.submissions].map(|counter| counter.load(SeqCst));
        assert_eq!((requests, counters.read.load(SeqCst)), (2048, 2048 * 512));
        assert!(publications * 8 <= requests, "{aio:?}: {publications} interrupts");
        assert!(submissions * 8 <= requests, "{aio:?}: {submissions} submissions");
    }
}

/// A disk whose first sector is read when that is allowed.
fn waiting() -> (mpsc::Sender<()>, Arc<HeapDisk>) {
    let (allow, allowed) = mpsc::channel();
    let allowed = Mutex::new(allowed);
    let disk = HeapDisk::hooked(64, move |writes, offset| {
        if !writes && offset == 0 {
            allowed.lock().unwrap().recv().unwrap();
        }
        Ok(())
    });
    (allow, Arc::new(disk))
}

/// A disk that has no room, for reading either, as long as that is true.
fn full() -> (Arc<AtomicBool>, Arc<HeapDisk>) {
    let full = Arc::new(AtomicBool::new(true));
    let is_full = full.clone();
    let disk = HeapDisk::hooked(64, move |_, _| {
        let source = ImageProblem::Io { action: "write it", source: nix::errno::Errno::ENOSPC.into() };
        let error = BlockError::Image { path: "/images/a".into(), source };
        if is_full.load(SeqCst) { Err(error) } else { Ok(()) }
    });
    (full, Arc::new(disk))
}

#[test]
fn a_request_overtakes_one_that_waits() {
    let (allow, disk) = waiting();
    let mut bench = Bench::new(disk, |_| {});
    bench.ask(3, 0, 0);
    bench.ask(5, 0, 1);
    bench.ask(6, 4, 0);
    let mut early = [bench.answer(), bench.answer()];
    early.sort_unstable();
    assert_eq!(early, [(5, 0), (6, 0)]);
    allow.send(()).unwrap();
    assert_eq!(bench.answer(), (3, 0));
}

#[test]
fn a_limit_is_kept_and_loses_nothing() {
    let disk = Arc::new(HeapDisk::new(64));
    let rate = Rate { per_second: 10, burst: 2 };
    let mut bench = Bench::new(disk, |config| config.limits.operations = Some(rate));
    for slot in 0..5 {
        bench.ask(slot, 0, 0);
    }
    let mut first = [bench.answer().0, bench.answer().0];
    first.sort_unstable();
    assert_eq!(first, [0, 1]);
    for slot in 2..5 {
        let timeout = bench.serve().timeout.expect("it waits for the time");
        assert_eq!((bench.driver.take_used(), timeout.as_millis()), (None, 100));
        bench.clock.advance(timeout.saturating_sub(Duration::from_nanos(1)));
        bench.serve();
        assert_eq!(bench.driver.take_used(), None, "a nanosecond early");
        bench.clock.advance(Duration::from_nanos(1));
        assert_eq!(bench.answer(), (slot, 0));
    }
}

#[test]
fn limits_can_be_changed_while_a_request_waits_for_them() {
    let disk = Arc::new(HeapDisk::new(64));
    let rate = Rate { per_second: 1, burst: 1 };
    let mut bench = Bench::new(disk, |config| config.limits.operations = Some(rate));
    let handle = bench.engine.handle();
    assert_eq!(handle.limits().all.operations, Some(rate));
    for slot in 0..3 {
        bench.ask(slot, 0, 0);
    }
    assert_eq!(bench.answer(), (0, 0));
    bench.serve();
    assert_eq!(bench.driver.take_used(), None, "it waits a second");
    handle.set_limits(DiskLimits::default());
    bench.wait();
    let mut rest = [bench.answer(), bench.answer()];
    rest.sort_unstable();
    assert_eq!((rest, handle.limits()), ([(1, 0), (2, 0)], DiskLimits::default()));
}

#[test]
fn reads_pass_writes_that_are_held_to_limits_of_their_own() {
    const READ: u32 = 0;
    const WRITE: u32 = 1;
    let rate = Rate { per_second: 10, burst: 1 };
    let one = |operations| RateLimits { operations: Some(operations), bytes: None };
    let mut bench = Bench::new(Arc::new(HeapDisk::new(64)), |_| {});
    let limits = DiskLimits { writes: one(rate), ..DiskLimits::default() };
    bench.engine.handle().set_limits(limits);
    for (slot, kind) in [(0, WRITE), (1, WRITE), (2, READ), (3, WRITE), (4, READ)] {
        bench.ask(slot, kind, 0);
    }
    let mut first = [bench.answer(), bench.answer(), bench.answer()];
    first.sort_unstable();
    assert_eq!(first, [(0, 0), (2, 0), (4, 0)]);
    // In the order in which they came, each in its time.
    for slot in [1, 3] {
        let timeout = bench.serve().timeout.expect("it waits for the time");
        assert_eq!((bench.driver.take_used(), timeout.as_millis()), (None, 100));
        bench.clock.advance(timeout);
        assert_eq!(bench.answer(), (slot, 0));
    }

    // Beside one of their own both have that of all.
    let slow = Rate { per_second: 1, burst: 1 };
    bench.engine.handle().set_limits(DiskLimits { all: one(slow), reads: one(rate), ..DiskLimits::default() });
    bench.ask(5, READ, 0);
    bench.ask(6, READ, 0);
    assert_eq!(bench.answer(), (5, 0));
    assert_eq!(bench.serve().timeout.map(|timeout| timeout.as_millis()), Some(1000));
    bench.clock.advance(Duration::from_secs(1));
    assert_eq!(bench.answer(), (6, 0));
    assert_eq!(bench.serve().timeout, None, "nothing is held");
}

#[test]
fn requests_are_counted_and_timed_by_what_they_are() {
    let (allow, disk) = waiting();
    let mut bench = Bench::new(disk, |_| {});
    bench.ask(0, 0, 0);
    bench.serve();
    bench.clock.advance(Duration::from_micros(7));
    bench.ask(1, 1, 2);
    bench.ask(2, 4, 0);
    // A sector that isn't there.
    bench.ask(3, 1, 64);
    let mut early = [bench.answer(), bench.answer(), bench.answer()];
    early.sort_unstable();
    assert_eq!(early, [(1, 0), (2, 0), (3, 1)]);
    allow.send(()).unwrap();
    assert_eq!(bench.answer(), (0, 0));
    let handle = bench.engine.handle();
    let of = |sort| {
        let counters = handle.counters().of(sort);
        [&counters.done, &counters.failed, &counters.nanoseconds].map(|counter| counter.load(SeqCst))
    };
    assert_eq!(of(Sort::Read), [1, 0, 7000]);
    assert_eq!(of(Sort::Write), [1, 1, 0]);
    assert_eq!(of(Sort::Flush), [1, 0, 0]);
    assert_eq!(of(Sort::Discard), [0, 0, 0]);
}

#[derive(Default)]
struct Listener(Mutex<Vec<DiskError>>);

impl DiskErrorListener for Listener {
    fn failed(&self, error: DiskError) {
        self.0.lock().unwrap().push(error);
    }
}

#[test]
fn a_write_without_room_waits_for_the_vm() {
    let (full, disk) = full();
    let listener = Arc::new(Listener::default());
    let mut bench = Bench::new(disk.clone(), |config| config.listener = Some(listener.clone()));
    bench.board.ram.set(DATA, &[9; 512]);
    bench.ask(0, 1, 5);
    while listener.0.lock().unwrap().is_empty() {
        bench.serve();
        if listener.0.lock().unwrap().is_empty() {
            bench.wait();
        }
    }
    let heard = listener.0.lock().unwrap()[0].clone();
    assert_eq!((heard.disk.as_str(), heard.is_write, heard.no_space), ("disk0", true, true));
    assert_eq!(heard.action, ErrorAction::Stop);
    assert!(heard.reason.starts_with("can't use disk image /images/a: can't write it: No space left"), "{heard:?}");
    // What the driver does with its buffer meanwhile is another request's.
    bench.board.ram.set(DATA, &[1; 512]);
    bench.ask(1, 4, 0);
    bench.serve();
    assert_eq!(bench.driver.take_used(), None, "nothing new while it waits");
    full.store(false, SeqCst);
    bench.engine.handle().retry();
    bench.wait();
    let mut both = [bench.answer(), bench.answer()];
    both.sort_unstable();
    assert_eq!(both, [(0, 0), (1, 0)]);
    assert_eq!(disk.bytes.lock().unwrap()[5 * 512..6 * 512], [9; 512]);
}

#[test]
fn errors_are_told_or_not_as_it_was_said() {
    for (on_error, status, byte) in [(OnError::Report, 1, 0xaa), (OnError::Ignore, 0, 0), (OnError::Stop, 1, 0xaa)] {
        let (_, disk) = full();
        // Nobody hears of it, so there is nobody to stop the VM for.
        let mut bench = Bench::new(disk, |config| config.on_error = ErrorPolicy { read: on_error, write: on_error });
        bench.board.ram.set(DATA, &[0xaa; 512]);
        bench.ask(0, 0, 1);
        assert_eq!(bench.answer(), (0, status));
        assert_eq!(bench.board.ram.get(DATA, 512), [byte; 512]);
        bench.ask(0, 1, 1);
        assert_eq!(bench.answer(), (0, status));
    }
}

#[test]
fn every_queue_is_served_and_interrupts_for_itself() {
    let mut config = BlockConfig::new("d", Arc::new(HeapDisk::new(64)), "");
    config.queues = 4;
    let mut guest = Guest::new(|plumbing| soc_vmm::virtio::block::new(config, plumbing));
    assert_eq!((guest.get(0x2022, 2), guest.offered() & MQ), (4, MQ));
    guest.enable_msix(5);
    guest.negotiate(VERSION_1 | FLUSH | MQ);
    let mut queues: Vec<_> = (0..4).map(|index| guest.queue(index, 16)).collect();
    for index in 0..4u64 {
        guest.put(0x16, 2, index);
        guest.put(0x1a, 2, index + 1);
    }
    guest.go();
    for (index, queue) in (0u16..).zip(&mut queues) {
        guest.board.ram.set(DATA, &[0; 16]);
        queue.add(&[(DATA, 16, false), (DATA + 512, 512, true), (STATUS, 1, true)]);
        guest.kick(index);
        assert_eq!(queue.wait_used().1, 513);
        super::rig::eventually(|| {
            let raised = guest.board.messages.raised();
            raised.iter().any(|message| message.data == 0x41 + u32::from(index)).then_some(())
        });
    }
}

#[test]
fn a_disk_grows_under_its_guest_and_never_shrinks() {
    let dir = tempfile::tempdir().unwrap();
    let mut handle = None;
    let mut guest = Guest::new(|plumbing| {
        let config = BlockConfig::new("d", file(dir.path(), 64), "");
        let (function, disk) = soc_vmm::virtio::block::new_with_handle(config, plumbing)?;
        handle = Some(disk);
        Ok(function)
    });
    let handle = handle.unwrap();
    guest.negotiate(VERSION_1 | FLUSH);
    let mut queue = guest.queue(0, 16);
    guest.go();
    let generation = guest.get(0x15, 1);
    assert!(matches!(handle.resize(63 * 512), Err(BlockError::Shrinks { .. })));
    assert!(matches!(handle.resize(64 * 512 + 1), Err(BlockError::OddSize { .. })));
    handle.resize(128 * 512).unwrap();
    super::rig::eventually(|| (guest.get(0x2000, 8) == 128).then_some(()));
    assert_ne!(guest.get(0x15, 1), generation);
    super::rig::eventually(|| (guest.get(0x1000, 1) == 2).then_some(()));
    guest.board.ram.set(HEADERS, &[vec![0; 8], 127u64.to_le_bytes().to_vec()].concat());
    queue.add(&[(HEADERS, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    guest.kick(0);
    assert_eq!((queue.wait_used(), guest.board.ram.get(DATA, 512)), ((0, 513), vec![0; 512]));
}

/// A round of a driver's: requests for sectors of their own, all made at once, and whether the driver resets the device before it has
/// seen the answers.
#[derive(Clone, Debug)]
struct Round {
    /// What each slot asks for, if it does: a write of a byte, or a read.
    asks: Vec<Option<(bool, u8)>>,
    reset: bool,
    served: bool,
}

fn round() -> impl Strategy<Value = Round> {
    let ask = proptest::option::weighted(0.8, (any::<bool>(), 1u8..));
    (vec(ask, usize::from(SLOTS)), any::<bool>(), any::<bool>()).prop_map(|(asks, reset, served)| Round {
        asks,
        reset,
        served,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// What is acknowledged stays, whatever was under way at a reset; and what was then never comes later, to disk or memory.
    #[test]
    fn a_reset_loses_nothing_and_lets_nothing_through(rounds in vec(round(), 1..12)) {
        let dir = tempfile::tempdir().unwrap();
        for (aio, name) in [(Aio::IoUring, "ring"), (Aio::Threads, "threads")] {
            let path = dir.path().join(name);
            std::fs::write(&path, vec![0; usize::from(SLOTS) * 512]).unwrap();
            let image = block::open(&ImageSpec::new(&path)).unwrap();
            let mut bench = Bench::new(image.clone(), |config| config.aio = aio);
            // What each sector may hold.
            let mut model: Vec<Vec<u8>> = vec![vec![0]; SLOTS.into()];
            for Round { asks, reset, served } in &rounds {
                for (slot, ask) in (0..SLOTS).zip(asks) {
                    let Some((is_write, byte)) = ask else { continue };
                    bench.board.ram.set(DATA + 512 * u64::from(slot), &[*byte; 512]);
                    bench.ask(slot, u32::from(*is_write), slot.into());
                }
                if *reset {
                    if *served {
                        bench.serve();
                    }
                    bench.reset();
                    for (may, ask) in model.iter_mut().zip(asks) {
                        may.extend(ask.filter(|(is_write, _)| *is_write).map(|(_, byte)| byte));
                    }
                    bench.board.ram.set(DATA, &[0xee; 512 * SLOTS as usize]);
                    bench.serve();
                    prop_assert_eq!(bench.board.ram.get(DATA, 512 * usize::from(SLOTS)), vec![0xee; 512 * usize::from(SLOTS)]);
                    continue;
                }
                for _ in asks.iter().flatten() {
                    let (slot, status) = bench.answer();
                    let (is_write, byte) = asks[usize::from(slot)].unwrap();
                    let may = &mut model[usize::from(slot)];
                    prop_assert_eq!(status, 0);
                    if is_write {
                        *may = vec![byte];
                    } else {
                        let data = bench.board.ram.get(DATA + 512 * u64::from(slot), 512);
                        prop_assert!(data == [data[0]; 512] && may.contains(&data[0]), "{} of {:?}", data[0], may);
                        *may = vec![data[0]];
                    }
                }
            }
            drop(bench);
            let bytes = std::fs::read(&path).unwrap();
            for (sector, may) in bytes.chunks(512).zip(&model) {
                prop_assert!(sector == [sector[0]; 512] && may.contains(&sector[0]));
            }
        }
    }
}

/// Whoever hears of changes.
#[derive(Default)]
struct Recorder {
    told: Mutex<Vec<(u64, u64)>>,
    settled: AtomicBool,
}

impl Watcher for Recorder {
    fn changed(&self, offset: u64, len: u64) -> Option<u64> {
        let mut told = self.told.lock().unwrap();
        told.push((offset, len));
        Some(told.len() as u64)
    }

    fn is_settled(&self, _: u64) -> bool {
        self.settled.load(SeqCst)
    }
}

#[test]
fn who_hears_of_changes_hears_before_the_guest_and_may_have_it_wait() {
    let mut bench = Bench::new(Arc::new(HeapDisk::new(64)), |_| {});
    let handle = bench.engine.handle();
    bench.ask(0, 1, 1);
    assert_eq!(bench.answer(), (0, 0), "nobody listens yet");
    let recorder = Arc::new(Recorder::default());
    assert!(handle.watch(recorder.clone()) && !handle.watch(recorder.clone()));
    assert!(matches!(handle.resize(1 << 20), Err(BlockError::Copied)));
    bench.ask(1, 0, 1);
    assert_eq!(bench.answer(), (1, 0), "a read changes nothing");
    bench.ask(2, 1, 5);
    let told = |bench: &mut Bench, count| {
        bench.serve();
        while recorder.told.lock().unwrap().len() < count {
            bench.wait();
            bench.serve();
        }
    };
    told(&mut bench, 1);
    assert_eq!(*recorder.told.lock().unwrap(), [(5 * 512, 512)]);
    assert_eq!(bench.driver.take_used(), None, "it waits");
    // A disk that is to stand still does once nothing waits.
    assert!(bench.engine.halt(&mut bench.session).unwrap().is_some());
    recorder.settled.store(true, SeqCst);
    handle.wake();
    bench.wait();
    assert!(bench.engine.halt(&mut bench.session).unwrap().is_none());
    assert_eq!(bench.driver.take_used().map(|(slot, _)| slot), Some(2));

    recorder.settled.store(false, SeqCst);
    bench.ask(3, 1, 6);
    told(&mut bench, 2);
    // A driver that is gone waits for nothing, and the next one isn't told of it.
    bench.reset();
    bench.ask(0, 0, 6);
    assert_eq!(bench.answer(), (0, 0));
    assert_eq!(recorder.told.lock().unwrap().len(), 2);
    recorder.settled.store(true, SeqCst);
    handle.unwatch();
    bench.ask(1, 1, 7);
    assert_eq!(bench.answer(), (1, 0));
    assert_eq!(recorder.told.lock().unwrap().len(), 2, "nobody listens any more");
}
