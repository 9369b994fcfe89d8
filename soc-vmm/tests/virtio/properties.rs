//! What holds whatever a guest does.

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use soc_vmm::memory::GuestMemory;
use soc_vmm::virtio::block::{self, BlockConfig, BlockEngine};
use soc_vmm::virtio::net::{NetConfig, NetCounters, NetEngine};
use soc_vmm::virtio::{Chain, Engine, Lease, MAX_CHAIN, QueueError, Ring, RingFeatures, RingPosition};

use super::rig::{
    Board, Driver, EVENT_INDEX, Guest, HeapDisk, HeapNet, INDIRECT, NEXT, RAM, Ram, TABLE, VERSION_1, WRITE, eventually,
};

/// Where a queue and an indirect table of random chains are.
const QUEUE: u64 = 0x1_0000;
const TABLES: u64 = 0x3_0000;
const SIZE: u16 = 8;

#[derive(Clone, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Mostly what a driver could write, often enough what none would.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let addr = prop_oneof![8 => 0x8_0000u64..0x9_0000, 1 => RAM as u64 - 64..RAM as u64 + 64, 1 => any::<u64>()];
    let len = prop_oneof![8 => 0u32..600, 1 => Just(1), 1 => any::<u32>()];
    let flags = prop_oneof![3 => Just(0), 6 => Just(NEXT), 4 => Just(WRITE), 6 => Just(NEXT | WRITE)];
    let next = prop_oneof![20 => 0u16..SIZE, 1 => any::<u16>()];
    let plain = (addr, len, flags, next).prop_map(|(addr, len, flags, next)| Descriptor { addr, len, flags, next });
    let table = (0u64..4, prop_oneof![6 => 1u32..8, 1 => Just(0), 1 => 1000u32..1100], any::<bool>()).prop_map(
        |(at, len, odd)| Descriptor {
            addr: TABLES + 64 * at,
            len: 16 * len + u32::from(odd && len > 6),
            flags: TABLE,
            next: 0,
        },
    );
    prop_oneof![7 => plain, 1 => table]
}

fn place(driver: &Driver, queue: &[Descriptor], tables: &[Descriptor]) {
    for (table, list) in [(driver.at.descriptors, queue), (TABLES, tables)] {
        for (i, d) in (0..).zip(list) {
            driver.descriptor(table, i, d.addr, d.len, d.flags, d.next);
        }
    }
}

/// What a chain is, by the letter of §2.7: bytes of either side, or none if it breaks a rule.
fn walk(ram: &Ram, driver: &Driver, head: u16, indirect: bool) -> Option<(u64, u64)> {
    let (mut table, mut entries, mut index, mut is_table) =
        (driver.at.descriptors, u32::from(SIZE), u32::from(head), false);
    let (mut readable, mut writable, mut steps, mut writes) = (0, 0, 0, false);
    let mut total = 0;
    loop {
        if index >= entries {
            return None;
        }
        let at = table + 16 * u64::from(index);
        let bytes = |at, len| (at + len as u64 <= RAM as u64).then(|| ram.get(at, len));
        let d = bytes(at, 16)?;
        let addr = u64::from_le_bytes(d[..8].try_into().unwrap());
        let len = u32::from_le_bytes(d[8..12].try_into().unwrap());
        let flags = u16::from_le_bytes(d[12..14].try_into().unwrap());
        if flags & TABLE != 0 {
            if is_table || !indirect || len % 16 != 0 || len == 0 || len / 16 > MAX_CHAIN as u32 {
                return None;
            }
            // It is read as a whole.
            bytes(addr, len as usize)?;
            (table, entries, index, is_table, steps) = (addr, len / 16, 0, true, 0);
            continue;
        }
        steps += 1;
        total += u64::from(len);
        if steps > entries || total > u64::from(u32::MAX) || addr.checked_add(len.into()).is_none() {
            return None;
        }
        match flags & WRITE != 0 {
            true => {
                writable += u64::from(len);
                writes |= len > 0;
            }
            false if writes => return None,
            false => readable += u64::from(len),
        }
        if flags & NEXT == 0 {
            return Some((readable, writable));
        }
        index = u32::from(u16::from_le_bytes(d[14..].try_into().unwrap()));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Access { region: usize, offset: u64, len: u8, data: Option<u64> },
    Config { word: u16, len: u8, data: Option<u32> },
    Poke { at: u64, data: Vec<u8> },
    Start { features: u64, index_event: bool },
    Offer { head: u16 },
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let offset = prop_oneof![6 => 0u64..0x40, 1 => 0x1000u64..0x1004, 2 => 0x2000u64..0x2048, 2 => 0x3000u64..0x3010, 1 => 0u64..0x1_0000];
    let value = prop_oneof![4 => 0u64..16, 1 => any::<u64>(), 1 => Just(QUEUE)];
    prop_oneof![
        12 => (prop_oneof![1 => 0usize..6, 1 => Just(1), 6 => Just(4)], offset, 1u8..=8, proptest::option::of(value))
            .prop_map(|(region, offset, len, data)| Step::Access { region, offset, len, data }),
        4 => (0u16..0x50, 1u8..=4, proptest::option::of(any::<u32>()))
            .prop_map(|(word, len, data)| Step::Config { word, len, data }),
        3 => (QUEUE..QUEUE + 0x200, vec(any::<u8>(), 1..20)).prop_map(|(at, data)| Step::Poke { at, data }),
        4 => (any::<u64>(), any::<bool>()).prop_map(|(features, index_event)| Step::Start { features, index_event }),
        6 => (0u16..SIZE + 1).prop_map(|head| Step::Offer { head }),
        1 => Just(Step::Reset),
    ]
}

/// A word near a register of virtio's, for accesses that hit something.
fn take(guest: &mut Guest, driver: &mut Driver, step: Step) {
    match step {
        Step::Access { region, offset, len, data } => {
            guest.access(region, offset, len, data);
        }
        Step::Config { word, len, data: None } => {
            guest.function.read_config(4 * word, len);
        }
        Step::Config { word, len, data: Some(data) } => guest.function.write_config(4 * word, len, data),
        Step::Poke { at, data } => guest.board.ram.set(at, &data),
        Step::Start { features, index_event } => {
            let features = features & 0x6644 & !EVENT_INDEX | VERSION_1 | INDIRECT;
            guest.negotiate(if index_event { features | EVENT_INDEX } else { features });
            guest.board.ram.set(driver.at.available, &[0; 0x100]);
            guest.board.ram.set(driver.at.used, &[0; 0x100]);
            *driver = Driver::new(&guest.board.ram, QUEUE, SIZE);
            guest.set_queue(0, &driver.at);
            guest.go();
        }
        Step::Offer { head } => {
            driver.offer(head);
            guest.kick(0);
        }
        Step::Reset => guest.function.reset(),
    }
}

/// Where good requests have their bytes.
const READABLE: u64 = 0x5_0000;
const WRITABLE: u64 = 0x6_0000;
const SECTORS: u64 = 16;

/// A request that a driver might make, cut into buffers in any way.
#[derive(Clone, Debug)]
struct Request {
    kind: u32,
    sector: u64,
    len: u32,
    cuts: Vec<u32>,
    fill: u8,
}

fn request() -> impl Strategy<Value = Request> {
    let kind = prop_oneof![4 => Just(0), 4 => Just(1), 1 => Just(4), 1 => Just(99)];
    let sector = prop_oneof![8 => 0..SECTORS + 1, 1 => any::<u64>().prop_map(|sector| sector >> 10)];
    let len = prop_oneof![8 => (0u32..5).prop_map(|sectors| 512 * sectors), 1 => 0u32..2000];
    (kind, sector, len, cuts(), any::<u8>()).prop_map(|(kind, sector, len, cuts, fill)| Request {
        kind,
        sector,
        len,
        cuts,
        fill,
    })
}

fn cuts() -> impl Strategy<Value = Vec<u32>> {
    vec(prop_oneof![0u32..20, 0u32..2000], 0..6)
}

/// Buffers for `len` bytes at `addr`: pieces of the lengths of `cuts`, and the rest.
fn cut(addr: u64, len: u32, cuts: &[u32], writable: bool) -> Vec<(u64, u32, bool)> {
    let mut at = 0;
    let mut buffers = Vec::new();
    for piece in cuts.iter().copied().chain([u32::MAX]) {
        let piece = piece.min(len - at);
        buffers.push((addr + u64::from(at), piece, writable));
        at += piece;
    }
    buffers
}

fn disk(disk: &Arc<HeapDisk>) -> BlockConfig {
    BlockConfig::new("d", disk.clone(), "s")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn chains_are_read_by_the_letter(
        queue in vec(descriptor(), usize::from(SIZE)),
        tables in vec(descriptor(), 24),
        head in 0..SIZE + 1,
        indirect: bool,
    ) {
        let board = Board::default();
        let mut driver = Driver::new(&board.ram, QUEUE, SIZE);
        place(&driver, &queue, &tables);
        driver.offer(head);
        let lease = Arc::new(Lease::new(board.ram.clone() as Arc<dyn GuestMemory>));
        let features = RingFeatures { indirect, event_index: false };
        let mut ring = Ring::new(driver.at, features, RingPosition::default(), lease).unwrap();
        let mut chain = Chain::default();
        let got = match ring.pop(&mut chain) {
            Ok(true) => Some((chain.readable(), chain.writable())),
            Ok(false) => panic!("it is there"),
            Err(error) => {
                prop_assert!(matches!(error, QueueError::Broken(_) | QueueError::Memory(_)));
                None
            }
        };
        prop_assert_eq!(got, walk(&board.ram, &driver, head, indirect));
    }

    #[test]
    fn a_disk_is_what_was_written_to_it(requests in vec(request(), 1..40), features in 0u64..4) {
        let board = Board::default();
        let mut driver = Driver::new(&board.ram, QUEUE, 64);
        let heap = Arc::new(HeapDisk::new(SECTORS as usize));
        let mut engine = BlockEngine::new(disk(&heap)).unwrap();
        let mut session = board.session(features << 28 | VERSION_1, &[driver.at]);
        let mut model = vec![0u8; SECTORS as usize * 512];
        for (number, Request { kind, sector, len, cuts, fill }) in (0u8..).zip(requests) {
            let header = [kind.to_le_bytes().to_vec(), vec![0; 4], sector.to_le_bytes().to_vec()].concat();
            let from_guest = if kind == 0 { 0 } else { len };
            board.ram.set(READABLE, &header);
            board.ram.set(READABLE + 16, &vec![fill; from_guest as usize]);
            board.ram.set(WRITABLE, &[0xee; 0x2000]);
            let to_guest = len - from_guest;
            let buffers = [cut(READABLE, 16 + from_guest, &cuts, false), cut(WRITABLE, to_guest + 1, &cuts, true)].concat();
            let head = if features & 1 != 0 && fill & 1 != 0 { driver.add_indirect(TABLES, &buffers) } else { driver.add(&buffers) };
            let used = eventually(|| {
                engine.serve(&mut session).unwrap();
                driver.take_used()
            });
            // What the request does to a disk that is a list of bytes.
            let (at, len) = (sector as usize * 512, len as usize);
            let good = kind == 4 || kind < 2 && len % 512 == 0 && sector <= SECTORS && at + len <= model.len();
            let status = if good { 0 } else if kind > 4 { 2 } else { 1 };
            if kind == 1 && good {
                model[at..at + len].fill(fill);
            }
            let expected = if kind == 0 && good { model[at..at + len].to_vec() } else { vec![0xee; to_guest as usize] };
            let written = if good || to_guest == 0 { to_guest + 1 } else { 0 };
            prop_assert_eq!(used, (head.into(), written), "request {}", number);
            prop_assert_eq!(board.ram.get(WRITABLE, to_guest as usize), expected);
            // One byte of status, and nothing behind it.
            prop_assert_eq!(board.ram.get(WRITABLE + u64::from(to_guest), 2), vec![status, 0xee]);
        }
        prop_assert_eq!(&*heap.bytes.lock().unwrap(), &model);
    }

    #[test]
    fn frames_arrive_as_they_were_sent(
        sent in vec((1u32..5000, cuts(), any::<u8>()), 0..20),
        came in vec((1usize..5000, any::<u8>()), 0..20),
        buffers in vec((12u32..6000, cuts()), 0..60),
        features in 0u64..4,
        mergeable: bool,
        left in prop_oneof![Just(usize::MAX), 0usize..20],
    ) {
        let board = Board::default();
        let mut drivers = [Driver::new(&board.ram, QUEUE, 256), Driver::new(&board.ram, 2 * QUEUE, 256)];
        let counters = Arc::new(NetCounters::default());
        let network = HeapNet::new(came.iter().map(|(len, fill)| vec![*fill; *len]), left);
        let taken = network.from_guest.clone();
        let backend = Box::new(network);
        let config = NetConfig::new("n".into(), vec![backend], [2; 6]).unwrap();
        let mut engine = NetEngine::new(NetConfig { counters: counters.clone(), ..config }).unwrap();
        let features = features << 28 | VERSION_1 | u64::from(mergeable) << 15;
        let mut session = board.session(features, &[drivers[0].at, drivers[1].at]);
        // Buffers one behind the other.
        let mut places = Vec::new();
        for (len, cuts) in buffers.into_iter().filter(|(_, cuts)| cuts.len() < 4) {
            let at = WRITABLE + 0x2000 * places.len() as u64;
            places.push((at, drivers[0].add(&cut(at, len, &cuts, true))));
        }
        for (len, cuts, fill) in &sent {
            board.ram.set(READABLE, &[0; 12]);
            board.ram.set(READABLE + 12, &vec![*fill; *len as usize]);
            drivers[1].add(&cut(READABLE, 12 + len, cuts, false));
            prop_assert!(engine.serve(&mut session).is_ok());
            prop_assert!(drivers[1].take_used().is_some());
        }
        prop_assert!(engine.serve(&mut session).is_ok());
        // Of what was sent, all that the network took while it was there, in order.
        let arrived: Vec<_> = taken.lock().unwrap().iter().map(|frame| (frame.len() as u32, frame[0])).collect();
        let expected: Vec<_> = sent.iter().take(left).map(|(len, _, fill)| (*len, *fill)).collect();
        prop_assert_eq!(arrived, expected);
        prop_assert_eq!(counters.sent() + counters.unsent(), sent.len() as u64);
        // Of what came, each was dropped for want of room or is there whole.
        let mut used = std::iter::from_fn(|| drivers[0].take_used()).peekable();
        let mut frames = came.iter();
        let mut received = 0;
        while let Some((head, len)) = used.next() {
            let place = |head: u32| places.iter().find(|(_, h)| u32::from(*h) == head).unwrap().0;
            let mut bytes = board.ram.get(place(head), len as usize);
            let count = u16::from_le_bytes([bytes[10], bytes[11]]);
            prop_assert!(count == 1 || mergeable);
            for _ in 1..count {
                let (head, len) = used.next().unwrap();
                bytes.extend(board.ram.get(place(head), len as usize));
            }
            prop_assert!(frames.any(|(len, fill)| bytes[12..] == vec![*fill; *len]), "none that came, in its order");
            received += 1;
        }
        prop_assert_eq!(counters.received(), received);
    }

    #[test]
    fn no_access_does_harm(
        queue in vec(descriptor(), usize::from(SIZE)),
        tables in vec(descriptor(), 24),
        steps in vec(step(), 1..80),
    ) {
        let heap = Arc::new(HeapDisk::new(64));
        let mut guest = Guest::new(|plumbing| block::new(disk(&heap), plumbing));
        let mut driver = Driver::new(&guest.board.ram, QUEUE, SIZE);
        place(&driver, &queue, &tables);
        for step in steps {
            take(&mut guest, &mut driver, step);
        }
        guest.function.reset();
        prop_assert_eq!((guest.status(), guest.board.pin.is_high()), (0, false));
        // It is as good as new.
        guest.negotiate(VERSION_1);
        let mut queue = guest.queue(0, 16);
        guest.go();
        guest.board.ram.set(0x8_0000, &[0; 16]);
        queue.add(&[(0x8_0000, 16, false), (0x8_1000, 512, true), (0x8_0100, 1, true)]);
        guest.kick(0);
        prop_assert_eq!(queue.wait_used(), (0, 513));
    }
}
