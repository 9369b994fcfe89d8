//! Copies of disks that are written meanwhile.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::block::{Extent, WatchSlot, check_range};

const SECTOR: usize = 512;
/// How long something may take that comes about.
const LIMIT: Duration = Duration::from_secs(60);

/// A disk in memory, with holes, and a guest's way to it.
struct HeapDisk {
    bytes: Mutex<Vec<u8>>,
    slot: WatchSlot,
    /// Whoever waits until a change may be told of.
    bell: Condvar,
    settled: Mutex<u64>,
    /// Calls that go well until one fails.
    left: AtomicUsize,
    /// Calls wait until they are interrupted.
    stalls: AtomicBool,
    /// One does.
    is_stalled: AtomicBool,
    interrupted: AtomicBool,
    zeroed: AtomicUsize,
}

impl HeapDisk {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            slot: WatchSlot::default(),
            bell: Condvar::new(),
            settled: Mutex::new(0),
            left: AtomicUsize::new(usize::MAX),
            stalls: false.into(),
            is_stalled: false.into(),
            interrupted: false.into(),
            zeroed: AtomicUsize::new(0),
        })
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    /// Writes as a guest: it knows of it when this returns.
    fn write(&self, data: &[u8], offset: u64) {
        self.write_at(data, offset).unwrap();
        let Some(watcher) = self.slot.get() else { return };
        let Some(ticket) = watcher.changed(offset, data.len() as u64) else { return };
        let mut settled = self.settled.lock().unwrap();
        while !watcher.is_settled(ticket) {
            settled = self.bell.wait_timeout(settled, Duration::from_millis(20)).unwrap().0;
        }
    }

    fn call(&self) -> Result<(), BlockError> {
        while self.stalls.load(Ordering::SeqCst) && !self.interrupted.load(Ordering::SeqCst) {
            self.is_stalled.store(true, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(1));
        }
        let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if left.is_err() || self.interrupted.load(Ordering::SeqCst) { Err(BlockError::FixedSize) } else { Ok(()) }
    }
}

impl BlockBackend for HeapDisk {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.size())?;
        self.call()?;
        // Sector by sector: a write may come between.
        for (number, sector) in buf.chunks_mut(SECTOR).enumerate() {
            let at = offset as usize + number * SECTOR;
            sector.copy_from_slice(&self.bytes.lock().unwrap()[at..at + sector.len()]);
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), BlockError> {
        check_range(offset, data.len() as u64, self.size())?;
        self.call()?;
        for (number, sector) in data.chunks(SECTOR).enumerate() {
            let at = offset as usize + number * SECTOR;
            self.bytes.lock().unwrap()[at..at + sector.len()].copy_from_slice(sector);
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.call()
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), BlockError> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> Result<(), BlockError> {
        self.call()?;
        self.zeroed.fetch_add(len as usize, Ordering::SeqCst);
        self.bytes.lock().unwrap()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }

    fn extent(&self, offset: u64, len: u64) -> Result<(Extent, u64), BlockError> {
        let bytes = self.bytes.lock().unwrap();
        let sectors = bytes[offset as usize..(offset + len) as usize].chunks(SECTOR);
        let zeros = sectors.take_while(|sector| sector.iter().all(|byte| *byte == 0)).count();
        Ok(if zeros > 0 { (Extent::Zero, (zeros * SECTOR) as u64) } else { (Extent::Data, SECTOR as u64) })
    }

    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::SeqCst);
    }
}

struct Guest(Arc<HeapDisk>);

impl Watched for Guest {
    fn image(&self) -> Arc<dyn BlockBackend> {
        self.0.clone()
    }

    fn watch(&self, watcher: Arc<dyn Watcher>) -> bool {
        self.0.slot.fill(watcher)
    }

    fn unwatch(&self) {
        self.0.slot.clear();
        self.wake();
    }

    fn wake(&self) {
        *self.0.settled.lock().unwrap() += 1;
        self.0.bell.notify_all();
    }
}

const SPEC: MirrorSpec = MirrorSpec { sync: MirrorSync::Full, cluster: 4096, speed: 0, blocking: false };

fn start(source: &Arc<HeapDisk>, target: &Arc<HeapDisk>, spec: MirrorSpec) -> (Mirror, Receiver<MirrorEvent>) {
    let (sender, events) = channel();
    let tell = move |event| sender.send(event).unwrap();
    (Mirror::start(Arc::new(Guest(source.clone())), target.clone(), spec, tell).unwrap(), events)
}

fn is_ready(events: &Receiver<MirrorEvent>) {
    let event = events.recv_timeout(LIMIT).unwrap();
    assert!(matches!(event, MirrorEvent::Ready), "{event:?}");
}

fn ending(events: &Receiver<MirrorEvent>) -> Ending {
    loop {
        if let MirrorEvent::Ended(ending) = events.recv_timeout(LIMIT).unwrap() {
            return ending;
        }
    }
}

/// A guest that writes one sector after the other, each with its number, until it is told to stop; the places of all.
fn writer(disk: &HeapDisk, seed: u64, stop: &AtomicBool, acknowledged: &AtomicUsize) -> Vec<usize> {
    let sectors = disk.size() as usize / SECTOR;
    let (mut places, mut state) = (Vec::new(), seed | 1);
    while !stop.load(Ordering::SeqCst) && places.len() < 200_000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Now and then the same few sectors.
        let place = if state >> 62 == 0 { (state >> 33) as usize % 4 } else { (state >> 33) as usize % sectors };
        places.push(place);
        let number = places.len() as u64;
        disk.write(&number.to_le_bytes().repeat(SECTOR / 8), (place * SECTOR) as u64);
        acknowledged.store(places.len(), Ordering::SeqCst);
    }
    places
}

/// The number in each sector, of which all words are the same.
fn numbers(bytes: &[u8]) -> Vec<u64> {
    let of = |sector: &[u8]| {
        assert!(sector.chunks(8).all(|word| word == &sector[..8]), "a torn sector");
        u64::from_le_bytes(sector[..8].try_into().unwrap())
    };
    bytes.chunks(SECTOR).map(of).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// While a guest writes without pause, the copy is what the disk was at one moment after its end was asked for: every write up to that
    /// one, which the guest knew of by then, and none behind it but the one that was under way.
    #[test]
    fn a_copy_is_the_disk_at_one_moment(
        seed in any::<u64>(),
        sectors in 9..600usize,
        cluster in prop::sample::select(vec![4096u64, 8192]),
        blocking in any::<bool>(),
        pause in 0..3000u64,
    ) {
        let source = HeapDisk::new(vec![0; sectors * SECTOR]);
        let target = HeapDisk::new(vec![0xee; sectors * SECTOR]);
        let (stop, acknowledged) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let guest = {
            let (source, stop, acknowledged) = (source.clone(), stop.clone(), acknowledged.clone());
            thread::spawn(move || writer(&source, seed, &stop, &acknowledged))
        };
        let (mirror, events) = start(&source, &target, MirrorSpec { cluster, blocking, ..SPEC });
        thread::sleep(Duration::from_micros(pause));
        let known = acknowledged.load(Ordering::SeqCst);
        mirror.finish();
        prop_assert_eq!(ending(&events), Ending::Complete);
        mirror.join();
        let copy = numbers(&target.bytes());
        stop.store(true, Ordering::SeqCst);
        let places = guest.join().unwrap();
        let last = copy.iter().copied().max().unwrap() as usize;
        // Sectors that were written again after the moment can't hide it: what was written last before it is there.
        let of_prefix = |count: usize| {
            let mut state = vec![0u64; sectors];
            places[..count].iter().enumerate().for_each(|(number, place)| state[*place] = number as u64 + 1);
            state
        };
        prop_assert!(last >= known, "{last} of {known} that were known");
        prop_assert!(copy == of_prefix(last), "{last}: {copy:?}");
        prop_assert!(source.slot.get().is_none());
    }
}

#[test]
fn a_ready_copy_follows_and_zeros_are_made() {
    let mut bytes = vec![7; 64 * 4096 - SECTOR];
    bytes[8 * 4096..40 * 4096].fill(0);
    let (source, target) = (HeapDisk::new(bytes), HeapDisk::new(vec![0xee; 64 * 4096 - SECTOR]));
    let (mirror, events) = start(&source, &target, SPEC);
    is_ready(&events);
    assert_eq!(source.bytes(), target.bytes());
    assert_eq!(target.zeroed.load(Ordering::SeqCst), 32 * 4096);
    let (done, total) = mirror.progress();
    assert_eq!((done, total), (64 * 4096 - SECTOR as u64, done));
    for round in 0..50u8 {
        source.write(&[round; SECTOR], u64::from(round) * 4096);
    }
    mirror.finish();
    assert_eq!(ending(&events), Ending::Complete);
    assert_eq!(source.bytes(), target.bytes());
    // Nothing more is copied.
    source.write(&[9; SECTOR], 0);
    mirror.join();
    assert_ne!(source.bytes(), target.bytes());
}

#[test]
fn a_guest_whose_writes_wait_finds_each_in_the_copy() {
    let (source, target) = (HeapDisk::new(vec![1; 32 * 4096]), HeapDisk::new(vec![0; 32 * 4096]));
    let (mirror, events) = start(&source, &target, MirrorSpec { blocking: true, ..SPEC });
    for round in 0..100u8 {
        let at = u64::from(round % 32) * 4096;
        source.write(&[round; SECTOR], at);
        let mut there = [0; SECTOR];
        target.read_at(&mut there, at).unwrap();
        assert_eq!(there, [round; SECTOR]);
    }
    is_ready(&events);
    mirror.stop(Ending::Cancelled);
    assert_eq!(ending(&events), Ending::Cancelled);
    mirror.join();
}

#[test]
fn a_disk_that_fails_ends_it_and_says_which() {
    for side in [Side::Source, Side::Target] {
        let (source, target) = (HeapDisk::new(vec![1; 32 * 4096]), HeapDisk::new(vec![0; 32 * 4096]));
        let bad = if side == Side::Source { &source } else { &target };
        bad.left.store(0, Ordering::SeqCst);
        let (mirror, events) = start(&source, &target, SPEC);
        let event = events.recv_timeout(LIMIT).unwrap();
        assert!(matches!(event, MirrorEvent::Failed(failed) if failed == side), "{event:?}");
        assert!(matches!(ending(&events), Ending::Failed(why) if why.contains("can't grow")));
        mirror.join();
    }
}

#[test]
fn a_copy_that_stalls_is_ended_and_the_guest_goes_on() {
    let (source, target) = (HeapDisk::new(vec![1; 32 * 4096]), HeapDisk::new(vec![0; 32 * 4096]));
    target.stalls.store(true, Ordering::SeqCst);
    let (mirror, events) = start(&source, &target, MirrorSpec { blocking: true, ..SPEC });
    let guest = {
        let source = source.clone();
        thread::spawn(move || source.write(&[5; SECTOR], 4096))
    };
    // It waits, or will: either way it must come to an end.
    mirror.stop(Ending::Cancelled);
    assert_eq!(ending(&events), Ending::Cancelled);
    guest.join().unwrap();
    mirror.join();
}

#[test]
fn a_copy_whose_last_flush_stalls_is_ended() {
    let (source, target) = (HeapDisk::new(vec![1; 32 * 4096]), HeapDisk::new(vec![0; 32 * 4096]));
    let (mirror, events) = start(&source, &target, SPEC);
    is_ready(&events);
    target.stalls.store(true, Ordering::SeqCst);
    mirror.finish();
    while !target.is_stalled.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(1));
    }
    mirror.stop(Ending::Cancelled);
    assert_eq!(ending(&events), Ending::Cancelled);
    mirror.join();
}

#[test]
fn what_makes_no_copy_is_refused() {
    let source = HeapDisk::new(vec![1; 8 * 4096]);
    let other = HeapDisk::new(vec![1; 9 * 4096]);
    let start_of = |target: &Arc<HeapDisk>| {
        Mirror::start(Arc::new(Guest(source.clone())), target.clone(), SPEC, |_| {})
            .map(drop)
            .map_err(|e| e.to_string())
    };
    assert!(start_of(&other).unwrap_err().contains("36864 bytes and the disk 32768"));
    let (mirror, events) = start(&source, &HeapDisk::new(vec![0; 8 * 4096]), SPEC);
    assert!(start_of(&HeapDisk::new(vec![0; 8 * 4096])).unwrap_err().contains("already"));
    mirror.stop(Ending::Failed("no more".into()));
    assert_eq!(ending(&events), Ending::Failed("no more".into()));
    mirror.join();
}

#[test]
fn a_copy_is_held_to_its_speed() {
    const SIZE: usize = 16 << 20;
    let (source, target) = (HeapDisk::new(vec![1; SIZE]), HeapDisk::new(vec![0; SIZE]));
    // A byte a second: it doesn't end while anybody looks.
    let (mirror, events) = start(&source, &target, MirrorSpec { speed: 1, ..SPEC });
    thread::sleep(Duration::from_millis(50));
    // Each thread may have begun with a piece.
    let (done, total) = mirror.progress();
    assert!(done <= (COPIERS as u64) << 20 && total == SIZE as u64, "{done} of {total}");
    assert!(events.try_recv().is_err());
    mirror.set_speed(0);
    is_ready(&events);
    mirror.finish();
    assert_eq!(ending(&events), Ending::Complete);
    mirror.join();
    assert_eq!(source.bytes(), target.bytes());
}
