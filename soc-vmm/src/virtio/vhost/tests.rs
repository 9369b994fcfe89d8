//! Shadow queues, each with a back end that is a model of one, and one that writes what it likes.

use std::collections::BTreeMap;
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use pcie_function::BusMemory;
use proptest::prelude::*;

use super::region::{BASES, Region, Share};
use super::ring::Manners;
use super::shadow::{Conduct, Filled, Loss, Shadow, Trouble};
use crate::interrupt::{InterruptLine, LineSink, Message, MessageRoute, MessageSink};
use crate::memory::test_ram::Ram;
use crate::memory::{GuestMemory, MemoryError};
use crate::pci::{ConfigSpace, Identity, Msix, MsixLayout};
use crate::virtio::{Chain, Interrupts, Lease, Queue, QueueError, Ring, RingFeatures, RingLayout, RingPosition};

const SIZE: u16 = 16;
/// Entries of the guest's ring and, where its buffers are, one page a descriptor.
const GUEST_SIZE: u16 = 64;
const BUFFERS: u64 = 0x1_0000;
const BUFFER: u64 = 0x2000;
const PAGES: usize = 64;

struct Nowhere;

impl LineSink for Nowhere {
    fn set_level(&self, _: u32, _: bool) {}
}

impl MessageSink for Nowhere {
    fn route(&self) -> Box<dyn MessageRoute> {
        Box::new(Self)
    }
}

impl MessageRoute for Nowhere {
    fn set(&self, _: Option<Message>) {}

    fn raise(&self) {}
}

/// What a chain has to be read, and where is to be written, and how much.
type Lent = (Vec<u8>, Vec<(u64, u32)>);

/// A guest with one queue.
struct Guest {
    ram: Arc<Ram>,
    queue: Queue,
    available: u16,
    used: u16,
    /// Chains that are the device's, by their head.
    lent: BTreeMap<u32, Lent>,
    /// Descriptors that nobody has.
    free: Vec<u16>,
    descriptors: BTreeMap<u32, Vec<u16>>,
}

impl Guest {
    fn new() -> Self {
        let ram = Arc::new(Ram::new((BUFFERS + u64::from(GUEST_SIZE) * BUFFER) as usize));
        let queue = Self::queue(&ram, RingPosition::default());
        let free = (0..GUEST_SIZE).collect();
        Self { ram, queue, available: 0, used: 0, lent: BTreeMap::new(), free, descriptors: BTreeMap::new() }
    }

    /// The queue, as a process has it that begins at `position`.
    fn queue(ram: &Arc<Ram>, position: RingPosition) -> Queue {
        let lease = Arc::new(Lease::new(ram.clone()));
        let at = RingLayout { size: GUEST_SIZE, descriptors: 0, available: 0x1000, used: 0x2000 };
        let ring = Ring::new(at, RingFeatures::default(), position, lease).unwrap();
        let identity = Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem: (0, 0) };
        let layout = MsixLayout { vectors: 1, bar: 1, table: 0, pending: 0x800 };
        let msix = Msix::new(&mut ConfigSpace::endpoint(&identity), layout, &Nowhere);
        let interrupts = Arc::new(Interrupts::new(1, msix.vectors(), InterruptLine::new(0, Arc::new(Nowhere))));
        let mut queue = Queue::new(ring, 0, interrupts, Arc::new(EventFd::new().unwrap()));
        queue.start().unwrap();
        queue
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(at, &mut bytes).unwrap();
        bytes
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.write(at, bytes).unwrap();
    }

    /// Makes a chain available: lengths of its buffers to read and to write. It needs descriptors.
    fn add(&mut self, reads: &[u32], writes: &[u32], seed: u8) {
        let count = reads.len() + writes.len();
        if self.free.len() < count || count == 0 {
            return;
        }
        let taken = self.free.split_off(self.free.len() - count);
        let (mut data, mut places) = (Vec::new(), Vec::new());
        let lens = reads.iter().map(|len| (*len, false)).chain(writes.iter().map(|len| (*len, true)));
        for (index, (len, writable)) in lens.enumerate() {
            let addr = BUFFERS + u64::from(taken[index]) * BUFFER;
            let bytes: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(7).wrapping_add(seed)).collect();
            if writable {
                self.put(addr, &vec![0xee; len as usize]);
                places.push((addr, len));
            } else {
                self.put(addr, &bytes);
                data.extend(bytes);
            }
            let next = taken.get(index + 1);
            let flags = u16::from(next.is_some()) | u16::from(writable) << 1;
            let words = u64::from(len) | u64::from(flags) << 32 | u64::from(next.copied().unwrap_or(0)) << 48;
            self.put(16 * u64::from(taken[index]), &[addr.to_le_bytes(), words.to_le_bytes()].concat());
        }
        let head = taken[0];
        self.put(0x1004 + 2 * u64::from(self.available % GUEST_SIZE), &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.put(0x1002, &self.available.to_le_bytes());
        self.lent.insert(head.into(), (data, places));
        self.descriptors.insert(head.into(), taken);
    }

    /// Takes what the device has used: what was to be read, what was written, and how many bytes it says.
    fn take(&mut self) -> Vec<(Vec<u8>, Vec<u8>, u32)> {
        let index = u16::from_le_bytes(self.get(0x2002, 2).try_into().unwrap());
        let mut taken = Vec::new();
        while self.used != index {
            let entry = self.get(0x2004 + 8 * u64::from(self.used % GUEST_SIZE), 8);
            self.used = self.used.wrapping_add(1);
            let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
            let (data, places) = self.lent.remove(&word(0)).expect("a chain that is the device's");
            self.free.extend(self.descriptors.remove(&word(0)).unwrap());
            let written = places.iter().flat_map(|(addr, len)| self.get(*addr, *len as usize)).collect();
            taken.push((data, written, word(4)));
        }
        taken
    }
}

/// The memory of a back end, by its addresses.
struct Seen(Share);

impl Seen {
    fn place(&self, addr: u64, len: usize) -> Result<usize, MemoryError> {
        let at = addr.checked_sub(self.0.base).filter(|at| *at + len as u64 <= self.0.window.len() as u64);
        at.map(|at| at as usize).ok_or(MemoryError::NotRam { addr, len: len as u64 })
    }
}

impl GuestMemory for Seen {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.0.window.read_bytes(self.place(addr, data.len())?, data);
        Ok(())
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.0.window.write_bytes(self.place(addr, data.len())?, data);
        Ok(())
    }
}

/// A back end that keeps the rules: a device's side of a queue over the shadow's memory.
struct Model {
    share: Share,
    ring: Ring,
    has: Vec<Chain>,
}

impl Model {
    fn attach(shadow: &mut Shadow, manners: Manners, base: u64) -> Self {
        let region = Region::new(&[shadow.layout()], base).unwrap();
        let share = region.share(0);
        shadow.attach(share.clone(), manners);
        let Share { base, at, .. } = share;
        let layout = RingLayout {
            size: at.size,
            descriptors: base,
            available: base + at.available as u64,
            used: base + at.used as u64,
        };
        let features = RingFeatures { indirect: manners.indirect, event_index: manners.event_index };
        let lease = Arc::new(Lease::new(Arc::new(Seen(share.clone()))));
        let mut ring = Ring::new(layout, features, RingPosition::default(), lease).unwrap();
        ring.start().unwrap();
        Self { share, ring, has: Vec::new() }
    }

    /// Takes all that there is.
    fn take(&mut self) {
        let mut chain = Chain::default();
        while self.ring.pop(&mut chain).unwrap() {
            self.has.push(std::mem::take(&mut chain));
        }
    }

    /// Does one of what it has: writes `part` of 256 of what can be written.
    fn work(&mut self, which: usize, part: u32) {
        if self.has.is_empty() {
            return;
        }
        let mut chain = self.has.remove(which % self.has.len());
        let mut data = vec![0; chain.readable() as usize];
        let lease = self.ring.lease().clone();
        chain.read(&lease, &mut data).unwrap();
        let len = (chain.writable() * u64::from(part) / 256) as usize;
        chain.write(&lease, &answer(&data, len)).unwrap();
        self.ring.push(chain.head(), len as u32).unwrap();
        self.ring.publish().unwrap();
    }
}

/// What a model writes for what it read.
fn answer(data: &[u8], len: usize) -> Vec<u8> {
    let sum = data.iter().fold(data.len() as u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(*byte));
    (0..len).map(|i| sum.wrapping_add(i as u8)).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Add(Vec<u32>, Vec<u32>, u8),
    Visit,
    Take,
    Work(usize, u32),
    Die,
    /// It stops, and goes on; or another one does, of another process.
    Move(bool),
    Garbage(usize, Vec<u8>),
}

fn lens() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(prop_oneof![1u32..70, 1u32..5000, Just(64), Just(4096), Just(512)], 0..6)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (lens(), lens(), any::<u8>()).prop_map(|(reads, writes, seed)| Step::Add(reads, writes, seed)),
        5 => Just(Step::Visit),
        3 => Just(Step::Take),
        5 => (any::<usize>(), 0u32..=256).prop_map(|(which, part)| Step::Work(which, part)),
        1 => Just(Step::Die),
        1 => any::<bool>().prop_map(Step::Move),
    ]
}

fn hostile_step() -> impl Strategy<Value = Step> {
    let garbage = (any::<usize>(), prop::collection::vec(any::<u8>(), 1..16));
    prop_oneof![5 => step(), 2 => garbage.prop_map(|(at, bytes)| Step::Garbage(at, bytes))]
}

fn manners() -> impl Strategy<Value = Manners> {
    (any::<bool>(), any::<bool>()).prop_map(|(indirect, event_index)| Manners { indirect, event_index })
}

/// A device, its guest and its back end.
struct World {
    guest: Guest,
    shadow: Shadow,
    model: Model,
    manners: Manners,
    loss: Loss,
    hostile: bool,
    added: usize,
    done: usize,
}

impl World {
    fn new(loss: Loss, manners: Manners, hostile: bool) -> Self {
        let conduct = Conduct { loss, whole: false };
        let mut shadow = Shadow::new(0, SIZE, PAGES, conduct, manners.indirect);
        let model = Model::attach(&mut shadow, manners, BASES[0]);
        Self { guest: Guest::new(), shadow, model, manners, loss, hostile, added: 0, done: 0 }
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Add(reads, writes, seed) => {
                self.added -= self.guest.lent.len();
                self.guest.add(&reads, &writes, seed);
                self.added += self.guest.lent.len();
            }
            Step::Visit => self.visit(),
            Step::Take if !self.hostile => self.model.take(),
            Step::Take => {}
            Step::Work(which, part) if !self.hostile => self.model.work(which, part),
            Step::Work(which, _) => self.forge(which),
            Step::Die => self.die(),
            Step::Move(elsewhere) => self.travel(elsewhere),
            Step::Garbage(at, bytes) => {
                let Share { window, at: layout, .. } = &self.model.share;
                // The ring's parts: what is behind them is data.
                let at = at % (layout.small - bytes.len());
                window.write_bytes(at, &bytes);
            }
        }
    }

    fn visit(&mut self) {
        match self.shadow.collect(&mut self.guest.queue) {
            Ok(_) => {}
            Err(Trouble::Backend(_)) if self.hostile => self.die(),
            Err(error) => panic!("{error:?}"),
        }
        self.shadow.fill(&mut self.guest.queue, &mut false).unwrap();
        self.shadow.show();
        self.check();
    }

    fn die(&mut self) {
        self.shadow.detach(&mut self.guest.queue, &mut false).unwrap();
        self.check();
        let base = BASES.into_iter().find(|base| *base != self.model.share.base);
        self.model = Model::attach(&mut self.shadow, self.manners, base.unwrap());
    }

    fn travel(&mut self, elsewhere: bool) {
        self.shadow.pause(&mut self.guest.queue).unwrap();
        self.check();
        if elsewhere {
            let heads = self.shadow.heads();
            let conduct = Conduct { loss: self.loss, whole: false };
            self.shadow = Shadow::new(0, SIZE, PAGES, conduct, self.manners.indirect);
            self.shadow.take_over(heads);
            self.guest.queue = Guest::queue(&self.guest.ram, self.guest.queue.position());
        }
        let base = BASES.into_iter().find(|base| *base != self.model.share.base);
        self.model = Model::attach(&mut self.shadow, self.manners, base.unwrap());
    }

    /// A used entry that may be right.
    fn forge(&mut self, which: usize) {
        let Share { window, at, .. } = &self.model.share;
        let mut index = [0; 2];
        window.read_bytes(at.used + 2, &mut index);
        let index = u16::from_le_bytes(index);
        let entry = at.used + 4 + 8 * usize::from(index % SIZE);
        window.store_u32(entry, (which % usize::from(2 * SIZE)) as u32);
        window.store_u32(entry + 4, (which >> 8) as u32 % 64);
        window.write_bytes(at.used + 2, &index.wrapping_add(1).to_le_bytes());
    }

    /// Looks at what the guest was given.
    fn check(&mut self) {
        for (data, written, len) in self.guest.take() {
            self.done += 1;
            let len = len as usize;
            assert!(len <= written.len());
            // Beyond what was written all is as it was.
            assert!(written[len..].iter().all(|byte| *byte == 0xee));
            if !self.hostile {
                assert_eq!(written[..len], answer(&data, len));
            }
        }
    }

    /// A back end that keeps the rules does all that there is.
    fn settle(&mut self) {
        if self.hostile {
            self.die();
            self.hostile = false;
        }
        for _ in 0..self.added + 1 {
            self.visit();
            self.model.take();
            while !self.model.has.is_empty() {
                self.model.work(0, 256);
            }
        }
        self.visit();
        assert_eq!((self.done, self.guest.lent.len(), self.shadow.under_way()), (self.added, 0, 0), "{:?}", self.loss);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_chain_is_used_once_with_what_its_back_end_wrote_whichever_that_was(
        steps in prop::collection::vec(step(), 1..80), manners in manners(), replay in any::<bool>(),
    ) {
        let mut world = World::new(if replay { Loss::Replay } else { Loss::Drop }, manners, false);
        steps.into_iter().for_each(|step| world.run(step));
        world.settle();
    }

    #[test]
    fn a_back_end_that_writes_what_it_likes_gets_no_further_than_its_own_chains(
        steps in prop::collection::vec(hostile_step(), 1..80), manners in manners(),
    ) {
        let mut world = World::new(Loss::Replay, manners, true);
        steps.into_iter().for_each(|step| world.run(step));
        world.settle();
    }
}

#[test]
fn a_chain_waits_for_room_and_one_that_never_has_any_is_refused() {
    let manners = Manners { indirect: true, event_index: true };
    let mut world = World::new(Loss::Replay, manners, false);
    // Each takes half of the pages, and a little.
    for _ in 0..3 {
        world.run(Step::Add(vec![0x2000; 16], vec![1], 3));
    }
    let fill = |world: &mut World| world.shadow.fill(&mut world.guest.queue, &mut false);
    assert_eq!(fill(&mut world), Ok(Filled::NoRoom));
    assert_eq!(world.shadow.under_way(), 2);
    world.settle();
    world.run(Step::Add(vec![0x2000; 33], vec![1], 3));
    assert_eq!(fill(&mut world), Err(QueueError::Broken("a chain of more bytes than its device takes")));
}

#[test]
fn the_ends_of_a_chain_keep_their_size_and_the_middle_is_one_buffer() {
    let manners = Manners { indirect: true, event_index: false };
    let mut world = World::new(Loss::Replay, manners, false);
    world.run(Step::Add(vec![16, 512, 512], vec![4096, 4096, 1], 0));
    world.shadow.fill(&mut world.guest.queue, &mut false).unwrap();
    let Share { window, base, at } = &world.model.share;
    let descriptor = |place: usize| {
        let mut bytes = [0; 16];
        window.read_bytes(place, &mut bytes);
        let address = u64::from_le_bytes(bytes[..8].try_into().unwrap()) - base;
        let word = u64::from_le_bytes(bytes[8..].try_into().unwrap());
        (address as usize, word as u32, (word >> 32) as u16)
    };
    let (table, bytes, flags) = descriptor(0);
    assert_eq!((table, bytes, flags), (at.tables, 64, 4));
    let parts: Vec<_> = (0..4).map(|index| descriptor(table + 16 * index)).collect();
    assert_eq!(
        parts.iter().map(|(_, len, flags)| (*len, *flags)).collect::<Vec<_>>(),
        [(16, 1), (1024, 1), (8192, 3), (1, 2)]
    );
    // What a disk reads and writes is where a disk can.
    assert!(parts[1].0.is_multiple_of(4096) && parts[2].0.is_multiple_of(4096));
}

/// A request of a file system: its header's first bytes, in a buffer of its own.
fn fuse(world: &mut World, opcode: u32, unique: u64) -> u32 {
    let before: Vec<u32> = world.guest.lent.keys().copied().collect();
    world.run(Step::Add(vec![40, 24], vec![16, 100], 0));
    let (head, _) = world.guest.lent.iter().find(|(head, _)| !before.contains(head)).unwrap();
    let addr = BUFFERS + u64::from(world.guest.descriptors[head][0]) * BUFFER;
    world.guest.put(addr, &[&64u32.to_le_bytes()[..], &opcode.to_le_bytes(), &unique.to_le_bytes()].concat());
    *head
}

#[test]
fn a_file_systems_session_ends_with_its_back_end_and_the_next_mount_begins_one() {
    const INIT: u32 = 26;
    const READ: u32 = 15;
    const FORGET: u32 = 2;
    let manners = Manners { indirect: true, event_index: true };
    let mut world = World::new(Loss::Fuse, manners, false);
    let mut lost = false;
    let fill = |world: &mut World, lost: &mut bool| world.shadow.fill(&mut world.guest.queue, lost);
    let answers = |world: &mut World| {
        let unique = |answer: &[u8]| u64::from_le_bytes(answer[8..16].try_into().unwrap());
        let error = |answer: &[u8]| i32::from_le_bytes(answer[4..8].try_into().unwrap());
        let taken = world.guest.take();
        taken.iter().map(|(_, answer, len)| (unique(answer), error(answer), *len)).collect::<Vec<_>>()
    };
    fuse(&mut world, READ, 1);
    fill(&mut world, &mut lost).unwrap();
    world.shadow.detach(&mut world.guest.queue, &mut lost).unwrap();
    // What it was at work on, and what comes then: ENOTCONN.
    fuse(&mut world, READ, 2);
    assert_eq!(fill(&mut world, &mut lost), Ok(Filled::Empty));
    assert_eq!((answers(&mut world), lost), (vec![(1, -107, 16), (2, -107, 16)], true));
    // There is another one, which knows nothing of the session.
    world.model = Model::attach(&mut world.shadow, manners, BASES[0]);
    fuse(&mut world, READ, 3);
    fuse(&mut world, FORGET, 4);
    fill(&mut world, &mut lost).unwrap();
    let nothing = u64::from_le_bytes([0xee; 8]);
    assert_eq!((answers(&mut world), lost), (vec![(3, -107, 16), (nothing, i32::from_le_bytes([0xee; 4]), 0)], true));
    assert_eq!(world.shadow.under_way(), 0);
    // It is mounted while there is none: that waits for one, and goes through the loss of that.
    world.shadow.detach(&mut world.guest.queue, &mut lost).unwrap();
    fuse(&mut world, INIT, 5);
    assert_eq!((fill(&mut world, &mut lost), answers(&mut world)), (Ok(Filled::NoRoom), vec![]));
    for _ in 0..2 {
        world.model = Model::attach(&mut world.shadow, manners, BASES[0]);
        fill(&mut world, &mut lost).unwrap();
        assert_eq!((world.shadow.under_way(), lost), (1, false));
        world.shadow.detach(&mut world.guest.queue, &mut lost).unwrap();
        assert!(!lost);
    }
    world.model = Model::attach(&mut world.shadow, manners, BASES[0]);
    fuse(&mut world, READ, 6);
    fill(&mut world, &mut lost).unwrap();
    world.shadow.show();
    world.model.take();
    assert_eq!(world.model.has.len(), 2);
}

#[test]
fn a_batch_is_one_kick_and_one_call() {
    let manners = Manners { indirect: true, event_index: true };
    let mut world = World::new(Loss::Replay, manners, false);
    for depth in [1, 8] {
        assert!(!world.shadow.allow_calls());
        for _ in 0..depth {
            world.run(Step::Add(vec![16], vec![512, 1], 0));
        }
        // The back end sleeps.
        assert!(!world.model.ring.allow_kicks().unwrap());
        world.shadow.fill(&mut world.guest.queue, &mut false).unwrap();
        assert!(world.shadow.show() && !world.shadow.show());
        world.model.take();
        // A call for the first that is done; then the shadow is awake until it says otherwise.
        let mut calls = 0;
        for _ in 0..depth {
            let chain = world.model.has.remove(0);
            world.model.ring.push(chain.head(), 0).unwrap();
            calls += usize::from(world.model.ring.publish().unwrap());
        }
        assert_eq!(calls, 1);
        assert_eq!(world.shadow.collect(&mut world.guest.queue).unwrap(), depth);
        world.guest.take();
    }
}
