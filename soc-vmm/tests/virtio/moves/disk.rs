//! Disks with requests under way, which are finished or carried: each is answered once, and written once.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use soc_vmm::block::{self, Aio, BlockBackend, BlockError, ImageProblem, ImageSpec};
use soc_vmm::virtio::block::{
    self as disk, BlockConfig, DiskError, DiskErrorListener, DiskHandle, ErrorPolicy, OnError,
};
use soc_vmm::virtio::{Rate, RateLimits};

use super::{Way, elsewhere, halt, load, save, stay, travel};
use crate::rig::{Driver, EVENT_INDEX, Guest, HeapDisk, INDIRECT, NEXT, TABLE, VERSION_1, WRITE, eventually};

const FLUSH: u64 = 1 << 9;
/// Requests at most; each has an entry of the queue, a table, a header, a status and a sector.
const SLOTS: u16 = 32;
const TABLES: u64 = 0x6_0000;
const HEADERS: u64 = 0x7_0000;
const STATUS: u64 = 0x7_1000;
const DATA: u64 = 0x8_0000;
const READ: u32 = 0;
const TO_DISK: u32 = 1;
const SYNC: u32 = 4;

#[derive(Default)]
struct Listener(Mutex<Vec<DiskError>>);

impl DiskErrorListener for Listener {
    fn failed(&self, error: DiskError) {
        self.0.lock().unwrap().push(error);
    }
}

/// How a machine has the disk.
#[derive(Clone)]
struct Machine {
    image: Arc<dyn BlockBackend>,
    aio: Aio,
    limits: RateLimits,
    listener: Arc<Listener>,
}

impl Machine {
    fn new(image: Arc<dyn BlockBackend>, aio: Aio) -> Self {
        Self { image, aio, limits: RateLimits::default(), listener: Arc::default() }
    }

    fn config(&self) -> BlockConfig {
        let stop = ErrorPolicy { read: OnError::Stop, write: OnError::Stop };
        let config = BlockConfig::new("disk0", self.image.clone(), "s");
        BlockConfig {
            aio: self.aio,
            limits: self.limits,
            on_error: stop,
            listener: Some(self.listener.clone()),
            ..config
        }
    }
}

/// A guest with a disk.
struct Desk {
    guest: Guest,
    driver: Driver,
    way: Machine,
    handle: DiskHandle,
    /// What each slot has asked for and not been answered.
    asked: Vec<Option<u32>>,
}

impl Desk {
    fn new(way: Machine) -> Self {
        let mut handle = None;
        let mut guest = Guest::new(|plumbing| {
            let (function, its) = disk::new_with_handle(way.config(), plumbing)?;
            handle = Some(its);
            Ok(function)
        });
        guest.negotiate(VERSION_1 | FLUSH | INDIRECT | EVENT_INDEX);
        let driver = guest.queue(0, SLOTS);
        guest.go();
        Self { guest, driver, way, handle: handle.unwrap(), asked: vec![None; SLOTS.into()] }
    }

    /// Makes a request for the slot's own sector, or for none.
    fn ask(&mut self, slot: u16, kind: u32) {
        let (n, ram) = (u64::from(slot), &self.guest.board.ram);
        ram.set(HEADERS + 16 * n, &[kind.to_le_bytes().to_vec(), vec![0; 4], n.to_le_bytes().to_vec()].concat());
        ram.set(STATUS + n, &[0xee]);
        let table = TABLES + 64 * n;
        let (len, flags) = (if kind == SYNC { 0 } else { 512 }, if kind == READ { NEXT | WRITE } else { NEXT });
        self.driver.descriptor(table, 0, HEADERS + 16 * n, 16, NEXT, 1);
        self.driver.descriptor(table, 1, DATA + 512 * n, len, flags, 2);
        self.driver.descriptor(table, 2, STATUS + n, 1, WRITE, 0);
        self.driver.descriptor(self.driver.at.descriptors, slot, table, 48, TABLE, 0);
        self.driver.offer(slot);
        assert_eq!(self.asked[usize::from(slot)].replace(kind), None);
    }

    /// Takes an answer, if there is one: its slot and what that asked for.
    fn answer(&mut self) -> Option<(u16, u32)> {
        let (slot, _) = self.driver.take_used()?;
        let kind = self.asked[slot as usize].take().expect("each request is answered once");
        assert_eq!(self.guest.board.ram.get(STATUS + u64::from(slot), 1), [0]);
        Some((slot as u16, kind))
    }

    fn wait(&mut self) -> (u16, u32) {
        eventually(|| self.answer())
    }

    /// Goes on here or elsewhere.
    fn go(&mut self, way: Way) {
        let (mut handle, config) = (None, self.way.config());
        way.take(&mut self.guest, |plumbing| {
            let (function, its) = disk::new_with_handle(config, plumbing)?;
            handle = Some(its);
            Ok(function)
        });
        if let Some(handle) = handle {
            self.handle = handle;
        }
    }
}

/// A disk whose every call waits until it may, and that counts its writes.
fn gated() -> (mpsc::Sender<()>, Arc<AtomicUsize>, Arc<HeapDisk>) {
    let (allow, allowed) = mpsc::channel();
    let (allowed, writes) = (Mutex::new(allowed), Arc::new(AtomicUsize::new(0)));
    let counted = writes.clone();
    let disk = HeapDisk::hooked(SLOTS.into(), move |is_write, _| {
        allowed.lock().unwrap().recv().unwrap();
        counted.fetch_add(is_write.into(), SeqCst);
        Ok(())
    });
    (allow, writes, Arc::new(disk))
}

#[test]
fn what_the_image_is_at_work_on_is_finished_first_and_who_waits_for_that_may_give_up() {
    for way in Way::BOTH {
        let (allow, writes, image) = gated();
        let mut desk = Desk::new(Machine::new(image.clone(), Aio::Threads));
        desk.guest.board.ram.set(DATA, &[7; 512]);
        desk.ask(0, TO_DISK);
        desk.guest.kick(0);
        // The image has it once the device asks for another kick.
        eventually(|| (desk.driver.available_event() == 1).then_some(()));
        // One that hangs: nothing halts, and it goes on as if nothing had been.
        desk.guest.function.halt();
        for _ in 0..3 {
            assert!(!desk.guest.function.is_halted());
            desk.guest.function.go_on();
            desk.guest.function.halt();
        }
        allow.send(()).unwrap();
        halt(&mut desk.guest);
        assert_eq!((desk.answer(), writes.load(SeqCst)), (Some((0, TO_DISK)), 1));
        desk.guest.function.go_on();
        desk.ask(1, READ);
        desk.guest.kick(0);
        allow.send(()).unwrap();
        assert_eq!(desk.wait(), (1, READ));
        desk.go(way);
        desk.ask(2, TO_DISK);
        desk.guest.kick(0);
        allow.send(()).unwrap();
        assert_eq!((desk.wait(), writes.load(SeqCst)), ((2, TO_DISK), 2));
        assert_eq!(image.bytes.lock().unwrap()[..512], [7; 512]);
    }
}

#[test]
fn what_a_driver_left_behind_at_its_reset_is_finished_too() {
    let (allow, writes, image) = gated();
    let mut desk = Desk::new(Machine::new(image, Aio::Threads));
    desk.ask(0, TO_DISK);
    desk.guest.kick(0);
    // As above.
    eventually(|| (desk.driver.available_event() == 1).then_some(()));
    desk.guest.put(0x14, 1, 0);
    desk.guest.function.halt();
    assert!(!desk.guest.function.is_halted());
    allow.send(()).unwrap();
    eventually(|| desk.guest.function.is_halted().then_some(()));
    assert_eq!(writes.load(SeqCst), 1);
    desk.guest.function.go_on();
}

#[test]
fn requests_that_their_limit_holds_are_begun_where_they_come_to() {
    for way in Way::BOTH {
        let image = Arc::new(HeapDisk::new(SLOTS.into()));
        let slow = Rate { per_second: 1, burst: 2 };
        let mut machine = Machine::new(image, Aio::Threads);
        machine.limits.operations = Some(slow);
        let mut desk = Desk::new(machine);
        for slot in 0..5 {
            desk.ask(slot, if slot % 2 == 0 { TO_DISK } else { SYNC });
        }
        desk.guest.kick(0);
        let mut answered = vec![desk.wait().0, desk.wait().0];
        desk.way.limits = RateLimits::default();
        desk.go(way);
        desk.handle.set_limits(disk::DiskLimits::default());
        answered.extend((0..3).map(|_| desk.wait().0));
        answered.sort_unstable();
        assert_eq!(answered, [0, 1, 2, 3, 4]);
    }
}

/// A disk that has no room as long as that is true, and that counts what it has written of each sector.
fn full() -> (Arc<AtomicBool>, Arc<Mutex<Vec<usize>>>, Arc<HeapDisk>) {
    let (full, writes) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(vec![0; SLOTS.into()])));
    let (is_full, counted) = (full.clone(), writes.clone());
    let disk = HeapDisk::hooked(SLOTS.into(), move |is_write, offset| {
        let source = ImageProblem::Io { action: "write it", source: nix::errno::Errno::ENOSPC.into() };
        if is_full.load(SeqCst) {
            return Err(BlockError::Image { path: "/images/a".into(), source });
        }
        counted.lock().unwrap()[offset as usize / 512] += usize::from(is_write);
        std::thread::sleep(Duration::from_micros(offset / 512));
        Ok(())
    });
    (full, writes, Arc::new(disk))
}

#[test]
fn requests_that_wait_for_room_are_made_again_where_they_come_to() {
    for way in Way::BOTH {
        let (full, writes, image) = full();
        let mut desk = Desk::new(Machine::new(image.clone(), Aio::Threads));
        let listener = desk.way.listener.clone();
        desk.guest.board.ram.set(DATA, &[9; 1024]);
        desk.ask(0, TO_DISK);
        desk.ask(1, TO_DISK);
        desk.guest.kick(0);
        eventually(|| (!listener.0.lock().unwrap().is_empty()).then_some(()));
        assert!(desk.handle.trouble().is_some());
        desk.ask(2, READ);
        stay(&mut desk.guest);
        assert_eq!((desk.answer(), desk.handle.trouble().is_some()), (None, true));
        full.store(false, SeqCst);
        desk.go(way);
        if way == Way::Stay {
            desk.handle.retry();
        }
        let mut answered = [desk.wait(), desk.wait(), desk.wait()];
        answered.sort_unstable();
        assert_eq!(answered, [(0, TO_DISK), (1, TO_DISK), (2, READ)]);
        assert_eq!((&writes.lock().unwrap()[..3], desk.handle.trouble()), (&[1, 1, 0][..], None));
        assert_eq!(image.bytes.lock().unwrap()[..1024], [9; 1024]);
    }
}

#[test]
fn a_disk_that_has_grown_shows_it_elsewhere_and_its_handle_works_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; 64 * 512]).unwrap();
    let open = || block::open(&ImageSpec::new(&path)).unwrap();
    let mut desk = Desk::new(Machine::new(open(), Aio::IoUring));
    desk.handle.resize(128 * 512).unwrap();
    eventually(|| (desk.guest.get(0x2000, 8) == 128).then_some(()));
    let generation = desk.guest.get(0x15, 1);
    halt(&mut desk.guest);
    let states = save(&desk.guest);
    // The source ends, since an image is one process's.
    let board = elsewhere(&desk.guest.board);
    let Desk { guest, driver, way, handle, asked } = desk;
    drop((guest, way, handle));
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(256 * 512).unwrap();
    let way = Machine::new(open(), Aio::IoUring);
    let mut handle = None;
    let guest = Guest::on(board, |plumbing| {
        let (function, its) = disk::new_with_handle(way.config(), plumbing)?;
        handle = Some(its);
        Ok(function)
    });
    let mut desk = Desk { guest, driver, way, handle: handle.unwrap(), asked };
    load(&mut desk.guest, states).unwrap();
    assert_eq!((desk.guest.get(0x2000, 8), desk.guest.get(0x15, 1)), (128, generation));
    desk.guest.function.go_on();
    eventually(|| (desk.guest.get(0x2000, 8) == 256).then_some(()));
    desk.handle.resize(512 * 512).unwrap();
    eventually(|| (desk.guest.get(0x2000, 8) == 512).then_some(()));
    desk.ask(0, TO_DISK);
    desk.guest.kick(0);
    assert_eq!(desk.wait(), (0, TO_DISK));
}

/// A step of a driver's, or of who moves its machine.
#[derive(Clone, Debug)]
enum Step {
    /// A request of a slot that has none.
    Ask(u16, u32, u8),
    Kick,
    /// Takes what is there.
    Take,
    /// The image has no room from now on, or has it again.
    Fill(bool),
    Move(Way),
    /// A moment passes.
    Rest(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..SLOTS, prop_oneof![Just(READ), Just(TO_DISK), Just(TO_DISK), Just(SYNC)], 1u8..)
            .prop_map(|(slot, kind, byte)| Step::Ask(slot, kind, byte)),
        4 => Just(Step::Kick),
        2 => Just(Step::Take),
        1 => any::<bool>().prop_map(Step::Fill),
        2 => prop_oneof![Just(Way::Stay), Just(Way::Travel)].prop_map(Step::Move),
        1 => any::<u8>().prop_map(Step::Rest),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever is under way whenever the disk halts: each request is answered once, each write is written once, and what was acknowledged stays.
    #[test]
    fn nothing_is_lost_and_nothing_is_done_twice(steps in vec(step(), 1..120)) {
        let (full, writes, image) = full();
        full.store(false, SeqCst);
        let mut desk = Desk::new(Machine::new(image.clone(), Aio::Threads));
        // What each sector holds, and what a write under way will make of it; how often it was written.
        let mut holds = vec![0u8; SLOTS.into()];
        let mut coming = vec![0u8; SLOTS.into()];
        let mut written = vec![0usize; SLOTS.into()];
        let check = |desk: &Desk, holds: &mut [u8], coming: &[u8], written: &mut [usize], (slot, kind): (u16, u32)| {
            let n = usize::from(slot);
            if kind == TO_DISK {
                holds[n] = coming[n];
                written[n] += 1;
            } else if kind == READ {
                assert_eq!(desk.guest.board.ram.get(DATA + 512 * u64::from(slot), 512), [holds[n]; 512]);
            }
        };
        for step in steps {
            match step {
                Step::Ask(slot, kind, byte) if desk.asked[usize::from(slot)].is_none() => {
                    coming[usize::from(slot)] = byte;
                    desk.guest.board.ram.set(DATA + 512 * u64::from(slot), &[byte; 512]);
                    desk.ask(slot, kind);
                }
                Step::Ask(..) => {}
                Step::Kick => desk.guest.kick(0),
                Step::Take => while let Some(answer) = desk.answer() {
                    check(&desk, &mut holds, &coming, &mut written, answer);
                },
                Step::Fill(now) => {
                    full.store(now, SeqCst);
                    desk.handle.retry();
                }
                Step::Move(way) => desk.go(way),
                Step::Rest(time) => std::thread::sleep(Duration::from_micros(time.into())),
            }
        }
        full.store(false, SeqCst);
        desk.guest.kick(0);
        while desk.asked.iter().any(Option::is_some) {
            let answer = eventually(|| {
                // Whatever failed before there was room.
                desk.handle.retry();
                desk.answer()
            });
            check(&desk, &mut holds, &coming, &mut written, answer);
        }
        prop_assert_eq!(&*writes.lock().unwrap(), &written);
        for (sector, byte) in image.bytes.lock().unwrap().chunks(512).zip(holds) {
            prop_assert_eq!(sector, [byte; 512]);
        }
        drop(desk);
    }
}

#[test]
fn a_real_image_moves_at_any_depth() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; usize::from(SLOTS) * 512]).unwrap();
    // Both machines have the image open here; who else may is not the device's to say.
    let image = block::open(&ImageSpec::new(&path)).unwrap();
    for aio in [Aio::IoUring, Aio::Threads] {
        let mut desk = Desk::new(Machine::new(image.clone(), aio));
        for round in 1..40u8 {
            for slot in 0..SLOTS {
                desk.guest.board.ram.set(DATA + 512 * u64::from(slot), &[round; 512]);
                desk.ask(slot, TO_DISK);
            }
            desk.guest.kick(0);
            let way = Way::BOTH[usize::from(round % 2)];
            desk.go(way);
            for _ in 0..SLOTS {
                desk.wait();
            }
            assert_eq!(std::fs::read(&path).unwrap(), vec![round; usize::from(SLOTS) * 512]);
        }
    }
}

#[test]
fn a_device_that_waits_for_a_reset_does_so_elsewhere() {
    let image = Arc::new(HeapDisk::new(SLOTS.into()));
    let mut desk = Desk::new(Machine::new(image, Aio::Threads));
    desk.driver.add(&[(HEADERS, 15, false)]);
    desk.guest.kick(0);
    eventually(|| (desk.guest.status() == 0x4f).then_some(()));
    let config = desk.way.config();
    travel(&mut desk.guest, |plumbing| disk::new(config, plumbing));
    assert_eq!(desk.guest.status(), 0x4f);
    desk.guest.negotiate(VERSION_1 | FLUSH | INDIRECT | EVENT_INDEX);
    desk.driver = desk.guest.queue(0, SLOTS);
    desk.guest.go();
    desk.ask(3, TO_DISK);
    desk.guest.kick(0);
    assert_eq!(desk.wait(), (3, TO_DISK));
}
