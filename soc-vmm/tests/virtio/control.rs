//! An interface's control queue, link, limits and reconnection, over networks that are the test's own.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use soc_vmm::net::{NetBackend, NetSource, Offloads};
use soc_vmm::virtio::net::{self, NetConfig, NetCounters, NetEngine, NetLink};
use soc_vmm::virtio::{Engine, QueueError};
use soc_vmm::virtio::{Rate, RateLimits};

use super::moves::{Way, stay, travel};
use super::rig::{Board, Driver, Guest, HeapNet, NEEDS_RESET, VERSION_1, eventually};

const GUEST_CSUM: u64 = 1 << 1;
const STATUS: u64 = 1 << 16;
const CONTROL: u64 = 1 << 17;
const RX: u64 = 1 << 18;
const VLAN: u64 = 1 << 19;
const RX_EXTRA: u64 = 1 << 20;
const ANNOUNCE: u64 = 1 << 21;
const MAC_ADDR: u64 = 1 << 23;
const ALL: u64 = STATUS | CONTROL | RX | VLAN | RX_EXTRA | ANNOUNCE | MAC_ADDR;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const COMMAND: u64 = 0x7_0000;
const BUFFERS: u64 = 0x8_0000;

struct Wire {
    guest: Guest,
    queues: [Driver; 3],
    counters: Arc<NetCounters>,
    link: Arc<NetLink>,
}

impl Wire {
    fn new(backend: Box<dyn NetBackend>, features: u64) -> Self {
        let config = NetConfig::new("net0".into(), vec![backend], MAC).unwrap();
        let (counters, link) = (config.counters.clone(), config.link.clone());
        let mut guest = Guest::new(|plumbing| net::new(config, plumbing));
        guest.negotiate(VERSION_1 | features);
        let queues = [0, 1, 2].map(|index| guest.queue(index, 64));
        guest.go();
        Self { guest, queues, counters, link }
    }

    /// What the device answers to a command.
    fn command(&mut self, class: u8, command: u8, data: &[u8]) -> u8 {
        let ram = &self.guest.board.ram;
        ram.set(COMMAND, &[&[class, command], data, &[0xee]].concat());
        let len = data.len() as u32;
        let answer = COMMAND + 2 + u64::from(len);
        self.queues[2].add(&[(COMMAND, 2, false), (COMMAND + 2, len, false), (answer, 1, true)]);
        self.guest.kick(2);
        assert_eq!(self.queues[2].wait_used().1, 1);
        self.guest.board.ram.get(answer, 1)[0]
    }

    fn status(&mut self) -> u64 {
        self.guest.get(0x2006, 2)
    }
}

fn frame(to: [u8; 6]) -> Vec<u8> {
    [&to[..], &[2, 9, 9, 9, 9, 9, 8, 0], &[7; 46]].concat()
}

#[test]
fn commands_are_obeyed_or_refused() {
    let mut wire = Wire::new(Box::new(HeapNet::new([], 9)), ALL);
    assert_eq!(wire.guest.offered() & (ALL | 1 << 22 | GUEST_CSUM | 1 << 2), ALL, "finished frames and one pair");
    let tables = [[1, 0, 0, 0].to_vec(), [2; 6].to_vec(), [0; 4].to_vec()].concat();
    let good: &[(u8, u8, &[u8])] = &[
        (0, 0, &[0]),
        (0, 1, &[1]),
        (0, 2, &[1]),
        (0, 3, &[0]),
        (0, 4, &[0]),
        (0, 5, &[0]),
        (1, 0, &tables),
        (1, 1, &[2; 6]),
        (2, 0, &[5, 0]),
        (2, 1, &[5, 0]),
        (3, 0, &[]),
    ];
    for (class, command, data) in good {
        assert_eq!(wire.command(*class, *command, data), 0, "{class} {command}");
    }
    let bad: &[(u8, u8, &[u8])] = &[
        (0, 0, &[]),
        (0, 0, &[0, 0]),
        (0, 6, &[0]),
        (1, 0, &tables[1..]),
        (1, 1, &[2; 5]),
        (1, 1, &[2; 7]),
        (1, 2, &[2; 6]),
        (2, 0, &[0, 0x10]),
        (2, 2, &[5, 0]),
        (2, 0, &[5]),
        (3, 1, &[]),
        (3, 0, &[0]),
        (4, 0, &[1, 0]),
        (5, 0, &[0; 8]),
        (6, 0, &[]),
        (255, 255, &[1; 100]),
        (1, 0, &[0; 20_000]),
    ];
    for (class, command, data) in bad {
        assert_eq!(wire.command(*class, *command, data), 1, "{class} {command}");
    }
    // What was not negotiated can't be ordered.
    let mut wire = Wire::new(Box::new(HeapNet::new([], 9)), CONTROL);
    for (class, command, data) in good {
        assert_eq!(wire.command(*class, *command, data), 1, "{class} {command}");
    }
    wire.queues[2].add(&[(COMMAND, 2, false)]);
    wire.guest.kick(2);
    eventually(|| (wire.guest.status() & NEEDS_RESET != 0).then_some(()));
}

#[test]
fn a_driver_gets_what_it_wants() {
    let other = [2, 0, 0, 0, 0, 2];
    let (socket, mut peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let backend = soc_vmm::net::StreamBackend::new("test".into(), socket).unwrap();
    let mut wire = Wire::new(Box::new(backend), ALL);
    let mut unwanted = 0;
    let mut passes = |wire: &mut Wire, to: [u8; 6]| {
        wire.queues[0].add(&[(BUFFERS, 2000, true)]);
        wire.guest.kick(0);
        let before = wire.counters.received();
        for frame in [frame(to), frame([0xff; 6])] {
            peer.write_all(&[&(frame.len() as u32).to_be_bytes()[..], &frame].concat()).unwrap();
        }
        // Whichever came first; the other one is taken too, so that the next question finds nothing left.
        wire.queues[0].wait_used();
        let came = wire.guest.board.ram.get(BUFFERS + 12, 6) == to;
        if came {
            wire.queues[0].add(&[(BUFFERS, 2000, true)]);
            wire.guest.kick(0);
            wire.queues[0].wait_used();
        } else {
            unwanted += 1;
        }
        eventually(|| (wire.counters.received() == before + 1 + u64::from(came)).then_some(()));
        assert_eq!(wire.counters.unwanted(), unwanted);
        came
    };
    assert!(passes(&mut wire, other), "a driver that has said nothing");
    wire.command(0, 0, &[0]);
    assert_eq!([MAC, other].map(|to| passes(&mut wire, to)), [true, false]);
    wire.command(1, 1, &other);
    assert_eq!([MAC, other].map(|to| passes(&mut wire, to)), [false, true]);
    // The configuration has the address that the interface came with, and a reset brings it back.
    assert_eq!(wire.guest.get(0x2000, 4), 2);
    wire.guest.negotiate(VERSION_1 | ALL);
    wire.queues = [0, 1, 2].map(|index| wire.guest.queue(index, 64));
    wire.guest.go();
    wire.command(0, 0, &[0]);
    assert_eq!([MAC, other].map(|to| passes(&mut wire, to)), [true, false]);
}

#[test]
fn a_cable_that_is_pulled() {
    let network = HeapNet::new([], 100);
    let taken = network.from_guest.clone();
    let mut wire = Wire::new(Box::new(network), ALL);
    let send = |wire: &mut Wire| {
        wire.guest.board.ram.set(BUFFERS, &[0; 100]);
        wire.queues[1].add(&[(BUFFERS, 72, false)]);
        wire.guest.kick(1);
        wire.queues[1].wait_used();
    };
    assert_eq!((wire.status(), wire.link.is_up()), (1, true));
    for round in 0..3 {
        wire.link.set_up(false);
        eventually(|| (wire.status() == 0).then_some(()));
        eventually(|| (wire.guest.get(0x1000, 1) & 2 != 0).then_some(()));
        let unsent = wire.counters.unsent();
        send(&mut wire);
        assert_eq!((taken.lock().unwrap().len(), wire.counters.unsent()), (round, unsent + 1));
        wire.link.set_up(true);
        eventually(|| (wire.status() == 1).then_some(()));
        send(&mut wire);
        assert_eq!(taken.lock().unwrap().len(), round + 1);
    }
    // Before a driver is there nobody is told; then it finds what is.
    wire.guest.put(0x14, 1, 0);
    wire.link.set_up(false);
    wire.guest.negotiate(VERSION_1 | ALL);
    wire.guest.go();
    eventually(|| (wire.status() == 0).then_some(()));
}

#[test]
fn the_guest_announces_itself_when_it_is_asked() {
    let mut wire = Wire::new(Box::new(HeapNet::new([], 9)), ALL);
    for _ in 0..3 {
        wire.link.announce();
        eventually(|| (wire.status() == 3).then_some(()));
        assert_eq!(wire.command(3, 0, &[]), 0);
        eventually(|| (wire.status() == 1).then_some(()));
    }
    // One that doesn't know how isn't asked.
    let mut wire = Wire::new(Box::new(HeapNet::new([], 9)), ALL & !ANNOUNCE);
    wire.link.announce();
    wire.link.set_up(false);
    eventually(|| (wire.status() == 0).then_some(()));
}

#[test]
fn a_peer_that_comes_back_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let source = NetSource::Stream { path: path.clone(), reconnect: Some(Duration::from_millis(20)) };
    let backend = soc_vmm::net::open(&source).unwrap().remove(0);
    let mut wire = Wire::new(backend, ALL);
    let (mut peer, _) = listener.accept().unwrap();
    let mut listener = Some(listener);
    for round in 0..3u8 {
        // It leaves in the middle of a frame.
        peer.write_all(&[0, 0, 0, 100, 1, 2, 3]).unwrap();
        drop((listener.take(), peer));
        eventually(|| (wire.status() == 0).then_some(()));
        std::fs::remove_file(&path).unwrap();
        let again = listener.insert(UnixListener::bind(&path).unwrap());
        peer = again.accept().unwrap().0;
        eventually(|| (wire.status() == 1).then_some(()));
        let frame = frame([round; 6]);
        wire.queues[0].add(&[(BUFFERS, 2000, true)]);
        wire.guest.kick(0);
        peer.write_all(&[&(frame.len() as u32).to_be_bytes()[..], &frame].concat()).unwrap();
        assert_eq!(wire.queues[0].wait_used().1 as usize, 12 + frame.len());
        wire.guest.board.ram.set(BUFFERS, &[&[0; 12][..], &frame].concat());
        wire.queues[1].add(&[(BUFFERS, 12 + frame.len() as u32, false)]);
        wire.guest.kick(1);
        let mut got = vec![0; 4 + frame.len()];
        peer.read_exact(&mut got).unwrap();
        assert_eq!(got[4..], frame);
    }
}

#[test]
fn limits_hold_by_the_clock() {
    let board = Board::default();
    let mut queues = [Driver::new(&board.ram, 0x1_0000, 64), Driver::new(&board.ram, 0x2_0000, 64)];
    let frames = (0..40).map(|_| frame(MAC));
    let network = HeapNet::new(frames, 1000);
    let taken: Arc<Mutex<Vec<Vec<u8>>>> = network.from_guest.clone();
    let config = NetConfig::new("n".into(), vec![Box::new(network)], MAC).unwrap();
    let counters = config.counters.clone();
    // One more may pass every 10 ms, 10 at once.
    let limits = RateLimits { operations: Some(Rate::new(100)), bytes: None };
    let (start, now) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let time = now.clone();
    let clock = Arc::new(move || start + Duration::from_millis(time.load(SeqCst)));
    let mut engine = NetEngine::with_clock(NetConfig { limits, ..config }, clock).unwrap();
    let mut session = board.session(VERSION_1, &[queues[0].at, queues[1].at]);
    for _ in 0..40 {
        queues[0].add(&[(BUFFERS, 2000, true)]);
        queues[1].add(&[(BUFFERS + 0x1000, 72, false)]);
    }
    let mut passed = 10;
    for _ in 0..3 {
        let wait = engine.serve(&mut session).unwrap();
        assert_eq!((taken.lock().unwrap().len(), counters.received()), (passed, passed as u64));
        assert_eq!(wait.timeout, Some(Duration::from_millis(10)));
        // Nothing passes before its time.
        now.fetch_add(9, SeqCst);
        assert_eq!(engine.serve(&mut session).unwrap().timeout, Some(Duration::from_millis(1)));
        assert_eq!(taken.lock().unwrap().len(), passed);
        now.fetch_add(41, SeqCst);
        passed += 5;
    }
    now.fetch_add(3_600_000, SeqCst);
    engine.serve(&mut session).unwrap();
    assert_eq!((taken.lock().unwrap().len(), counters.received()), (passed + 5, passed as u64 + 5));
}

/// A frame for the guest to send: near TCP over either protocol, with bytes changed, and a header that is near what it asks for.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    let changes = || vec((0usize..90, any::<u8>()), 0..3);
    (any::<bool>(), 0usize..2000, changes(), proptest::option::of(any::<[u8; 12]>())).prop_map(
        |(v6, len, changes, header)| {
            let (kind, start, ip): (_, u8, _) = if v6 { (4, 54, [0x86, 0xdd, 0x60]) } else { (1, 34, [8, 0, 0x45]) };
            let mut packet = vec![1, kind, 0, 0, 100, 0, start, 0, 16, 0, 0, 0];
            packet.extend([2; 12]);
            packet.extend(ip);
            packet.resize(12 + usize::from(start) + 20 + len, 0);
            packet[12 + 23] = 6;
            packet[12 + usize::from(start) + 12] = 0x50;
            for (at, value) in changes {
                if let Some(byte) = packet.get_mut(at) {
                    *byte = value;
                }
            }
            if let Some(header) = header {
                packet[..12].copy_from_slice(&header);
            }
            packet
        },
    )
}

/// A chain for one of the queues: what is in it, how it is cut, and how much of it is there to be written.
#[derive(Clone, Debug)]
struct Offer {
    queue: usize,
    bytes: Vec<u8>,
    cuts: Vec<usize>,
    writable: u32,
}

fn offer() -> impl Strategy<Value = Offer> {
    let command = (0u8..7, 0u8..6, vec(any::<u8>(), 0..40))
        .prop_map(|(class, command, data)| [&[class, command][..], &data].concat());
    let small = (0u8..6, 0u8..6, 0u8..3).prop_map(|(class, command, data)| vec![class, command, data]);
    let bytes = prop_oneof![
        4 => (Just(1), packet(), Just(0u32)),
        2 => (Just(2), command, 1u32..3),
        2 => (Just(2), small, Just(1)),
        3 => (Just(0), Just(Vec::new()), 12u32..3000),
    ];
    (bytes, vec(0usize..100, 0..4)).prop_map(|((queue, bytes, writable), cuts)| Offer { queue, bytes, cuts, writable })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What a network gets is what it can do (the network insists), every command has an answer, and nothing else in memory is touched.
    #[test]
    fn a_network_is_asked_for_what_it_can_do(
        offers in vec(offer(), 1..40),
        features: u64,
        came in vec(vec(any::<u8>(), 13..1500), 0..10),
        left in 0usize..60,
    ) {
        const HEADERS: u64 = 0x3_ffff & !(1 << 4 | 1 << 6 | 1 << 10 | 1 << 14);
        let offloads = Offloads { checksum: true, tso4: true, tso6: true, ecn: true };
        let board = Board::default();
        let mut queues = [0x1_0000, 0x2_0000, 0x3_0000].map(|base| Driver::new(&board.ram, base, 64));
        let mut network = HeapNet::new(came, left);
        network.offloads = Some(offloads);
        let config = NetConfig::new("n".into(), vec![Box::new(network)], MAC).unwrap();
        let counters = config.counters.clone();
        let mut engine = NetEngine::new(config).unwrap();
        let features = features & (HEADERS | ALL) | VERSION_1 | CONTROL;
        let layouts = [0, 1, 2].map(|queue: usize| queues[queue].at);
        let mut session = board.session(features, &layouts);
        let (mut sent, mut at) = (0, BUFFERS);
        for Offer { queue, bytes, cuts, writable } in offers {
            let mut buffers = Vec::new();
            board.ram.set(at, &bytes);
            let (mut from, mut rest) = (at, bytes.len());
            for piece in cuts.into_iter().chain([usize::MAX]) {
                let piece = piece.min(rest);
                buffers.push((from, piece as u32, false));
                (from, rest) = (from + piece as u64, rest - piece);
            }
            board.ram.set(from, &[0xee; 3001]);
            buffers.push((from, writable, true));
            queues[queue].add(&buffers);
            prop_assert!(engine.serve(&mut session).is_ok());
            prop_assert_eq!(board.ram.get(from + u64::from(writable), 1), vec![0xee]);
            if queue == 2 {
                prop_assert_eq!(queues[2].take_used().map(|(_, len)| len), Some(1));
                prop_assert!(board.ram.get(from, 1)[0] <= 1);
            }
            sent += u64::from(queue == 1);
            prop_assert_eq!(counters.sent() + counters.unsent(), sent);
            at = BUFFERS + (from + 3001 - BUFFERS) % 0x6_0000;
        }
        session.control.end();
        prop_assert_eq!(engine.serve(&mut session), Err(QueueError::Revoked));
    }
}

/// Frames that an interface sent in its guest's place: how many, all from that address.
fn announced(frames: &Mutex<Vec<Vec<u8>>>, mac: [u8; 6]) -> usize {
    let frames = frames.lock().unwrap();
    let is_one = |frame: &&Vec<u8>| frame[..6] == [0xff; 6] && frame[6..12] == mac && frame[12..14] == [0x80, 0x35];
    frames.iter().filter(is_one).count()
}

#[test]
fn a_driver_that_begins_anew_elsewhere_has_the_address_that_it_knows() {
    let there = [2, 0, 0, 0, 0, 9];
    let mut wire = Wire::new(Box::new(HeapNet::new([], 9)), ALL);
    let network = HeapNet::new([frame(there), frame(MAC)], 99);
    let config = NetConfig::new("net0".into(), vec![Box::new(network)], there).unwrap();
    wire.counters = config.counters.clone();
    travel(&mut wire.guest, |plumbing| net::new(config, plumbing));
    wire.guest.function.reset();
    eventually(|| (wire.guest.status() == 0).then_some(()));
    wire.guest.negotiate(VERSION_1 | ALL);
    wire.queues = [0, 1, 2].map(|index| wire.guest.queue(index, 64));
    wire.guest.go();
    assert_eq!([0, 1, 2, 3, 4, 5].map(|at| wire.guest.get(0x2000 + at, 1) as u8), MAC);
    assert_eq!(wire.command(0, 0, &[0]), 0);
    for buffer in 0..2 {
        wire.queues[0].add(&[(BUFFERS + 2048 * buffer, 2000, true)]);
    }
    wire.guest.kick(0);
    eventually(|| (wire.counters.received() + wire.counters.unwanted() == 2).then_some(()));
    assert_eq!((wire.counters.received(), wire.counters.unwanted()), (1, 1));
}

#[test]
fn what_a_driver_has_said_holds_elsewhere_and_its_network_hears_of_it() {
    let (other, group) = ([2, 0, 0, 0, 0, 2], [3, 0, 0, 0, 0, 3]);
    for (way, features) in [(Way::Stay, ALL), (Way::Travel, ALL), (Way::Travel, ALL & !ANNOUNCE)] {
        let mut wire = Wire::new(Box::new(HeapNet::new([], 9)), features);
        let tables = [&[0; 4][..], &[1, 0, 0, 0], &group].concat();
        for (class, command, data) in [(0, 0, &[0][..]), (1, 0, &tables), (1, 1, &other), (2, 0, &[5, 0])] {
            assert_eq!(wire.command(class, command, data), 0);
        }
        if way == Way::Stay {
            stay(&mut wire.guest);
            assert_eq!((wire.status(), wire.command(3, 0, &[])), (1, 0));
            continue;
        }
        let tagged = |to: [u8; 6], id: u8| [&to[..], &[2, 9, 9, 9, 9, 9, 0x81, 0, 0, id, 8, 0], &[7; 46]].concat();
        let network = HeapNet::new([frame(MAC), frame(other), frame(group), tagged(other, 5), tagged(other, 6)], 99);
        let sent = network.from_guest.clone();
        let config = NetConfig::new("net0".into(), vec![Box::new(network)], MAC).unwrap();
        (wire.counters, wire.link) = (config.counters.clone(), config.link.clone());
        for buffer in 0..8 {
            wire.queues[0].add(&[(BUFFERS + 2048 * buffer, 2000, true)]);
        }
        travel(&mut wire.guest, |plumbing| net::new(config, plumbing));
        // Frames for it, its group and its VLAN, and no others.
        eventually(|| (wire.counters.received() == 3).then_some(()));
        assert_eq!(wire.counters.unwanted(), 2);
        eventually(|| (announced(&sent, other) == 5).then_some(()));
        if features & ANNOUNCE != 0 {
            assert_eq!((wire.status(), wire.command(3, 0, &[])), (3, 0));
        }
        eventually(|| (wire.status() == 1).then_some(()));
        assert_eq!((announced(&sent, other), sent.lock().unwrap().len()), (5, 5));
    }
}

#[test]
fn pairs_in_use_and_a_pulled_cable_are_so_elsewhere() {
    const MQ: u64 = 1 << 22;
    let plug = |sent: &mut Vec<Arc<Mutex<Vec<Vec<u8>>>>>| {
        let networks: Vec<HeapNet> = (0..3).map(|_| HeapNet::new([], 99)).collect();
        *sent = networks.iter().map(|network| network.from_guest.clone()).collect();
        let backends = networks.into_iter().map(|network| Box::new(network) as Box<dyn NetBackend>).collect();
        NetConfig::new("net0".into(), backends, MAC).unwrap()
    };
    let mut sent = Vec::new();
    let config = plug(&mut sent);
    let link = config.link.clone();
    let mut guest = Guest::new(|plumbing| net::new(config, plumbing));
    guest.negotiate(VERSION_1 | STATUS | CONTROL | MQ);
    let mut queues: Vec<Driver> = (0..5).map(|index| guest.queue(index, 64)).collect();
    let mut control = guest.queue(6, 64);
    guest.go();
    let command = BUFFERS + 0x1000;
    guest.board.ram.set(command, &[4, 0, 2, 0, 0xee]);
    control.add(&[(command, 4, false), (command + 4, 1, true)]);
    guest.kick(6);
    control.wait_used();
    assert_eq!(guest.board.ram.get(command + 4, 1), [0]);
    link.set_up(false);
    eventually(|| (guest.get(0x2006, 2) == 0).then_some(()));
    let config = plug(&mut sent);
    let link = config.link.clone();
    travel(&mut guest, |plumbing| net::new(config, plumbing));
    assert!(!link.is_up());
    // Without a network nobody hears of it.
    guest.board.ram.set(BUFFERS, &[0; 100]);
    queues[3].add(&[(BUFFERS, 72, false)]);
    guest.kick(3);
    queues[3].wait_used();
    assert!((guest.get(0x2006, 2), sent[1].lock().unwrap().len()) == (0, 0));
    link.set_up(true);
    eventually(|| (guest.get(0x2006, 2) == 1).then_some(()));
    queues[3].add(&[(BUFFERS, 72, false)]);
    guest.kick(3);
    queues[3].wait_used();
    assert_eq!(sent[1].lock().unwrap().len(), 1);
}
