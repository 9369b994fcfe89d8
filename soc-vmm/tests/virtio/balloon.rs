//! A balloon over memory that is a memfd, whose blocks say what the host holds.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use soc_vmm::virtio::QueueError;
use soc_vmm::virtio::balloon::{
    self, BalloonConfig, BalloonError, BalloonEvents, BalloonHandle, PAGE, PageRun, Pages, PagesError,
};

use super::moves::{Way, stay};
use super::rig::{Board, Driver, EVENT_INDEX, Guest, INDIRECT, NEEDS_RESET, VERSION_1, eventually};

const STATS: u64 = 1 << 1;
const ON_OOM: u64 = 1 << 2;
const POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;
/// Pages of the guest's memory.
const PAGES: u64 = 1024;
const LIST: u64 = 0x8_0000;

/// Guest memory on the host.
#[derive(Debug)]
struct Memory {
    file: File,
    /// What is revoked now; none of it may be touched.
    revoked: Mutex<Vec<PageRun>>,
    calls: Mutex<Vec<Vec<(u64, u64)>>>,
}

impl Memory {
    fn new() -> Arc<Self> {
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(PAGES * PAGE).unwrap();
        let memory = Self { file, revoked: Mutex::default(), calls: Mutex::default() };
        (0..PAGES).for_each(|page| memory.touch(page));
        assert_eq!(memory.held(), PAGES);
        Arc::new(memory)
    }

    fn touch(&self, page: u64) {
        self.file.write_all_at(&[page as u8 | 1; PAGE as usize], page * PAGE).unwrap();
    }

    fn byte(&self, page: u64) -> u8 {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, page * PAGE).unwrap();
        byte[0]
    }

    /// Pages that the host holds.
    fn held(&self) -> u64 {
        self.file.metadata().unwrap().blocks() * 512 / PAGE
    }

    fn calls(&self) -> usize {
        self.calls.lock().unwrap().len()
    }
}

/// Why memory doesn't go back: it never can, or the host says so each time.
const PINNED: &str = "the function reaches RAM by DMA";
const REFUSES: &str = "refuses";

struct Shared(Arc<Memory>, Option<&'static str>);

impl Pages for Shared {
    fn pinned(&self) -> Option<String> {
        self.1.filter(|why| *why != REFUSES).map(Into::into)
    }

    fn revoke(&mut self, runs: &[PageRun]) -> Result<(), PagesError> {
        if let Some(bad) = runs.iter().find(|run| run.addr + run.len > PAGES * PAGE) {
            return Err(PagesError::NotRam { addr: bad.addr });
        }
        *self.0.revoked.lock().unwrap() = runs.to_vec();
        Ok(())
    }

    fn free(&mut self, runs: &[PageRun]) -> Result<u64, PagesError> {
        // The second phase is about what the first one was.
        assert_eq!(std::mem::take(&mut *self.0.revoked.lock().unwrap()), runs);
        self.0.calls.lock().unwrap().push(runs.iter().map(|run| (run.addr / PAGE, run.len / PAGE)).collect());
        if self.1.is_some() {
            return Err(PagesError::Refused("no such call".into()));
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for run in runs {
            fallocate(&self.0.file, flags, run.addr as i64, run.len as i64).unwrap();
        }
        Ok(runs.iter().map(|run| run.len).sum())
    }
}

#[derive(Default)]
struct Sizes(Mutex<Vec<u64>>);

impl BalloonEvents for Sizes {
    fn changed(&self, memory: u64) {
        self.0.lock().unwrap().push(memory);
    }
}

struct Desk {
    guest: Guest,
    memory: Arc<Memory>,
    handle: Arc<BalloonHandle>,
    sizes: Arc<Sizes>,
    queues: Vec<Driver>,
}

fn config(
    memory: &Arc<Memory>,
    why: Option<&'static str>,
    reporting: bool,
) -> (BalloonConfig, Arc<BalloonHandle>, Arc<Sizes>) {
    let handle = Arc::new(BalloonHandle::new(PAGES * PAGE).unwrap());
    let sizes = Arc::new(Sizes::default());
    let config = BalloonConfig {
        name: "balloon".into(),
        deflate_on_oom: true,
        reporting,
        pages: Box::new(Shared(memory.clone(), why)),
        handle: handle.clone(),
        events: sizes.clone(),
    };
    (config, handle, sizes)
}

impl Desk {
    fn new(features: u64) -> Self {
        Self::with(features, None)
    }

    fn with(features: u64, why: Option<&'static str>) -> Self {
        let memory = Memory::new();
        let (config, handle, sizes) = config(&memory, why, why != Some(PINNED));
        let guest = Guest::new(|plumbing| Ok(balloon::new(config, plumbing).unwrap()));
        let mut desk = Self { guest, memory, handle, sizes, queues: Vec::new() };
        desk.start(features);
        desk
    }

    fn start(&mut self, features: u64) {
        self.guest.negotiate(VERSION_1 | features);
        self.queues = (0..5).map(|index| self.guest.queue(index, 16)).collect();
        self.guest.go();
    }

    /// Puts a list of pages into a queue.
    fn list(&mut self, queue: u16, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.guest.board.ram.set(LIST, &bytes);
        self.use_buffers(queue, &[(LIST, bytes.len() as u32, false)]);
    }

    fn use_buffers(&mut self, queue: u16, buffers: &[(u64, u32, bool)]) {
        let driver = &mut self.queues[usize::from(queue)];
        driver.add(buffers);
        self.guest.kick(queue);
        assert_eq!(driver.wait_used().1, 0);
    }
}

#[test]
fn what_the_guest_gives_the_host_has() {
    for features in [0, EVENT_INDEX] {
        let mut desk = Desk::new(features);
        assert_eq!(desk.guest.function.read_config(0, 4), 0x1045_1af4);
        assert_eq!(desk.guest.offered() & 0x3f, STATS | ON_OOM | POISON | REPORTING);
        desk.handle.set_target((PAGES - 300) * PAGE).unwrap();
        eventually(|| (desk.guest.get(0x2000, 4) == 300).then_some(()));
        // 300 pages in two lists: neighbours in any order, and one by itself.
        let pages: Vec<u32> = (100..399).rev().collect();
        desk.list(0, &pages[..200]);
        desk.list(0, &[&pages[200..], &[50]].concat());
        assert_eq!(*desk.memory.calls.lock().unwrap(), [vec![(199, 200)], vec![(50, 1), (100, 99)]]);
        assert_eq!((desk.memory.held(), desk.handle.freed()), (PAGES - 300, 300 * PAGE));
        assert_eq!((desk.memory.byte(99), desk.memory.byte(100), desk.memory.byte(399)), (99, 0, 0x8f));
        // The guest says how much it gave; by whole words alone.
        desk.guest.put(0x2004, 2, 7);
        desk.guest.put(0x2005, 4, 7);
        desk.guest.put(0x2004, 4, 300);
        assert_eq!(
            (desk.guest.get(0x2004, 4), desk.guest.get(0x2005, 1), desk.guest.get(0x2000, 8)),
            (300, 1, 300 << 32 | 300)
        );
        eventually(|| (desk.handle.memory() == (PAGES - 300) * PAGE).then_some(()));
        // It takes pages back, and touches them.
        desk.handle.set_target(u64::MAX).unwrap();
        eventually(|| (desk.guest.get(0x2000, 4) == 0).then_some(()));
        desk.list(1, &pages);
        desk.memory.touch(150);
        assert_eq!((desk.memory.held(), desk.memory.byte(150)), (PAGES - 299, 151));
        desk.guest.put(0x2004, 4, 0);
        eventually(|| (desk.handle.memory() == PAGES * PAGE).then_some(()));
        assert_eq!(*desk.sizes.0.lock().unwrap(), [(PAGES - 300) * PAGE, PAGES * PAGE]);
        // More than there is to give is no number to believe.
        desk.guest.put(0x2004, 4, u32::MAX.into());
        eventually(|| (desk.handle.memory() == 0).then_some(()));
        desk.guest.put(0x14, 1, 0);
        assert_eq!(desk.guest.get(0x2004, 4), 0);
    }
}

#[test]
fn a_change_of_the_target_is_told() {
    let mut desk = Desk::new(0);
    let generation = desk.guest.get(0x15, 1);
    desk.handle.set_target(0).unwrap();
    eventually(|| (desk.guest.get(0x2000, 4) == PAGES).then_some(()));
    eventually(|| (desk.guest.get(0x1000, 1) & 2 != 0).then_some(()));
    assert_ne!(desk.guest.get(0x15, 1), generation);
    // Before there is a driver it is only remembered.
    desk.guest.put(0x14, 1, 0);
    desk.handle.set_target(PAGE).unwrap();
    desk.start(0);
    eventually(|| (desk.guest.get(0x2000, 4) == PAGES - 1).then_some(()));
}

#[test]
fn free_pages_are_reported_by_either_count_of_queues() {
    // By the specification the queue is the fifth; drivers that count their own have it in the fourth or third place.
    for (features, queue) in [(STATS, 4), (STATS, 3), (0, 2)] {
        let mut desk = Desk::new(REPORTING | EVENT_INDEX | features);
        let whole = |page: u64, count: u32| (page * PAGE, count * PAGE as u32, true);
        // Whole pages, and what of a buffer is one.
        desk.use_buffers(
            queue,
            &[whole(16, 16), whole(512, 256), (PAGE * 8 - 1, 2 * PAGE as u32, true), (5, 90, true)],
        );
        assert_eq!(*desk.memory.calls.lock().unwrap(), [vec![(16, 16), (512, 256), (8, 1)]]);
        assert_eq!((desk.memory.held(), desk.handle.memory()), (PAGES - 273, PAGES * PAGE));
    }
}

#[test]
fn pages_that_the_guest_fills_itself_stay() {
    let mut desk = Desk::new(REPORTING | POISON | STATS);
    desk.guest.put(0x200c, 4, 0xaaaa_aaaa);
    desk.use_buffers(4, &[(0, 16 * PAGE as u32, true)]);
    assert_eq!((desk.memory.held(), desk.memory.calls()), (PAGES, 0));
    desk.guest.put(0x200c, 4, 0);
    desk.use_buffers(4, &[(0, 16 * PAGE as u32, true)]);
    assert_eq!(desk.memory.held(), PAGES - 16);
}

#[test]
fn statistics_are_asked_for_as_often_as_wanted() {
    for features in [0, EVENT_INDEX] {
        let mut desk = Desk::new(STATS | features);
        let say = |desk: &mut Desk, free: u64| {
            let mut bytes = Vec::new();
            for (tag, value) in [(4u16, free), (5, 77), (99, 1), (9, 3)] {
                bytes.extend(tag.to_le_bytes());
                bytes.extend(value.to_le_bytes());
            }
            desk.guest.board.ram.set(LIST, &bytes);
            desk.queues[2].add(&[(LIST, bytes.len() as u32, false)]);
            desk.guest.kick(2);
        };
        let value = |desk: &Desk, name| desk.handle.stats().named().find(|(other, _)| *other == name).unwrap().1;
        assert_eq!(desk.handle.stats().updated, None);
        say(&mut desk, 1000);
        eventually(|| (value(&desk, "stat-free-memory") == Some(1000)).then_some(()));
        assert_eq!((value(&desk, "stat-total-memory"), value(&desk, "stat-htlb-pgfail")), (Some(77), Some(3)));
        assert_eq!(value(&desk, "stat-swap-in"), None);
        // Nobody asked: the buffer stays with the device. Then somebody does.
        desk.list(0, &[]);
        assert_eq!(desk.queues[2].take_used(), None);
        desk.handle.set_interval(Some(Duration::from_millis(1)));
        for round in 0..20 {
            assert_eq!(desk.queues[2].wait_used().1, 0);
            say(&mut desk, round);
            eventually(|| (value(&desk, "stat-free-memory") == Some(round)).then_some(()));
        }
        desk.handle.set_interval(None);
        assert_eq!(desk.handle.interval(), None);
        // A driver that begins again has a buffer of its own.
        desk.guest.put(0x14, 1, 0);
        desk.start(STATS | features);
        say(&mut desk, 5555);
        eventually(|| (value(&desk, "stat-free-memory") == Some(5555)).then_some(()));
    }
}

#[test]
fn pinned_memory_stays_with_the_guest() {
    let (config, handle, _) = config(&Memory::new(), Some(PINNED), true);
    let why = balloon::new(config, Board::default().plumbing()).err().unwrap();
    assert!(matches!(why, BalloonError::Reporting(_)));
    let text = why.to_string();
    assert!(text.contains(PINNED) && text.contains("leave it out"), "{text}");
    assert!(handle.set_target(PAGE).is_ok(), "there is no balloon, and nobody knows yet");

    let mut desk = Desk::with(STATS, Some(PINNED));
    assert_eq!(desk.guest.offered() & 0x3f, STATS | ON_OOM);
    desk.handle.set_target(PAGES * PAGE).unwrap();
    let why = desk.handle.set_target(PAGE).unwrap_err().to_string();
    assert!(why.contains(PINNED), "{why}");
    // What nobody asked for is taken and changes nothing.
    desk.list(0, &[1, 2, 3]);
    assert_eq!((desk.guest.get(0x2000, 4), desk.memory.calls(), desk.memory.held()), (0, 0, PAGES));
}

#[test]
fn a_host_that_refuses_holds_no_guest_up() {
    let mut desk = Desk::with(REPORTING | STATS, Some(REFUSES));
    for _ in 0..30 {
        desk.list(0, &[1, 2, 3]);
        desk.use_buffers(4, &[(0, PAGE as u32, true)]);
    }
    assert_eq!((desk.memory.calls(), desk.memory.held(), desk.handle.freed()), (60, PAGES, 0));
}

#[test]
fn what_is_no_page_is_an_error() {
    type Rule = (u16, &'static [(u64, u32, bool)]);
    let rules: [Rule; 6] = [
        (0, &[(LIST, 3, false)]),
        (0, &[(LIST, 4, true)]),
        (1, &[(LIST, 5, false)]),
        (4, &[(LIST, 4, false)]),
        (4, &[((PAGES - 1) * PAGE, 2 * PAGE as u32, true)]),
        (4, &[(u64::MAX - 2 * PAGE, PAGE as u32 + 7, true)]),
    ];
    for (queue, buffers) in rules {
        let mut desk = Desk::new(REPORTING | STATS | INDIRECT);
        desk.queues[usize::from(queue)].add_indirect(0x7_0000, buffers);
        desk.guest.kick(queue);
        eventually(|| (desk.guest.status() & NEEDS_RESET != 0).then_some(()));
        assert_eq!(desk.memory.calls(), 0);
    }
    let mut desk = Desk::new(0);
    desk.guest.board.ram.set(LIST, &(PAGES as u32).to_le_bytes());
    desk.queues[0].add(&[(LIST, 4, false)]);
    desk.guest.kick(0);
    eventually(|| (desk.guest.status() & NEEDS_RESET != 0).then_some(()));
    // A list that ends where memory does.
    let board = Board::default();
    let mut queue = Driver::new(&board.ram, 0x1_0000, 8);
    let mut session = board.session(VERSION_1, &[queue.at]);
    let memory = Memory::new();
    let mut engine = balloon::BalloonEngine::new(config(&memory, None, true).0).unwrap();
    queue.add(&[(LIST, u32::MAX - 3, false)]);
    let error = soc_vmm::virtio::Engine::serve(&mut engine, &mut session).unwrap_err();
    assert!(matches!(error, QueueError::Memory(_)), "{error}");
}

#[test]
fn a_balloon_is_as_large_elsewhere_and_its_statistics_come_there() {
    for way in Way::BOTH {
        let mut desk = Desk::new(STATS);
        desk.handle.set_target((PAGES - 300) * PAGE).unwrap();
        eventually(|| (desk.guest.get(0x2000, 4) == 300).then_some(()));
        desk.list(0, &(100..300).collect::<Vec<_>>());
        desk.guest.put(0x2004, 4, 200);
        eventually(|| (desk.handle.memory() == (PAGES - 200) * PAGE).then_some(()));
        desk.guest.board.ram.set(LIST, &[4, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
        desk.queues[2].add(&[(LIST, 10, false)]);
        desk.guest.kick(2);
        eventually(|| desk.handle.stats().updated.map(drop));
        let generation = desk.guest.get(0x15, 1);
        if way == Way::Stay {
            stay(&mut desk.guest);
        } else {
            let (config, handle, sizes) = config(&desk.memory, None, true);
            (desk.handle, desk.sizes) = (handle, sizes);
            way.take(&mut desk.guest, |plumbing| Ok(balloon::new(config, plumbing).unwrap()));
        }
        assert_eq!((desk.guest.get(0x2000, 8), desk.guest.get(0x15, 1)), (200 << 32 | 300, generation));
        eventually(|| (desk.handle.memory() == (PAGES - 200) * PAGE).then_some(()));
        // The buffer that the device held comes back, once.
        assert_eq!(desk.queues[2].take_used(), None);
        desk.handle.set_interval(Some(Duration::from_millis(1)));
        assert_eq!(desk.queues[2].wait_used().1, 0);
        desk.list(0, &[400]);
        assert_eq!(desk.queues[2].take_used(), None);
        desk.handle.set_target(PAGES * PAGE).unwrap();
        eventually(|| (desk.guest.get(0x2000, 4) == 0).then_some(()));
    }
}
