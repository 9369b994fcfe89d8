//! Bytes of ports and connections arrive as they were sent, however chains, windows and peers cut them.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use soc_vmm::virtio::console::{
    CONTROL_RECEIVE, CONTROL_TRANSMIT, ConsoleConfig, ConsoleEngine, ConsoleHandle, HostEnd, PortConfig, PortEvents,
    queues_of,
};
use soc_vmm::virtio::vsock::{BUFFER, VsockConfig, VsockEngine};
use soc_vmm::virtio::{Engine, Session, Wait};

use super::rig::{Board, Driver, INDIRECT, VERSION_1};

const OUT: u64 = 0x8_0000;
const IN: u64 = 0xb_0000;
const MULTIPORT: u64 = 2;

/// What the two sides do, in any order.
#[derive(Clone, Debug)]
enum Step {
    GuestSends(usize),
    /// A buffer of so many bytes.
    GuestReceives(u32),
    PeerSends(usize),
    PeerReceives(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (1usize..0x8000).prop_map(Step::GuestSends),
        1 => (1u32..0x4000).prop_map(Step::GuestReceives),
        1 => (1usize..0x8000).prop_map(Step::PeerSends),
        1 => (1usize..0x2000).prop_map(Step::PeerReceives),
    ]
}

/// Bytes of which no two stretches are alike.
fn bytes(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| (at ^ at >> 8 ^ at >> 15) as u8).collect()
}

fn serve(engine: &mut dyn Engine, session: &mut Session) {
    while engine.serve(session).unwrap() == Wait::NOTHING {}
}

/// A peer that never waits.
struct Peer {
    socket: UnixStream,
    sent: usize,
    received: Vec<u8>,
}

impl Peer {
    fn new(socket: UnixStream) -> Self {
        socket.set_nonblocking(true).unwrap();
        Self { socket, sent: 0, received: Vec::new() }
    }

    fn send(&mut self, len: usize) {
        self.sent += self.socket.write(&bytes(self.sent, len)).unwrap_or(0);
    }

    fn receive(&mut self, len: usize) {
        let mut buffer = vec![0; len];
        let count = self.socket.read(&mut buffer).unwrap_or(0);
        self.received.extend(&buffer[..count]);
    }
}

struct Nobody;

impl PortEvents for Nobody {
    fn guest_open(&self, _: &str, _: bool) {}
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn of_a_port(steps in vec(step(), 1..150)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        let port = PortConfig { id: "c".into(), name: "n".into(), end: HostEnd::listen(&path).unwrap() };
        let handle = Arc::new(ConsoleHandle::new().unwrap());
        let config = ConsoleConfig { name: "c".into(), ports: vec![port], handle, events: Arc::new(Nobody) };
        let mut engine = ConsoleEngine::new(config).unwrap();
        let board = Board::default();
        let mut drivers: Vec<_> = (1..7).map(|at| Driver::new(&board.ram, 0x1_0000 * at, 128)).collect();
        let layouts: Vec<_> = drivers.iter().map(|driver| driver.at).collect();
        let mut session = board.session(VERSION_1 | MULTIPORT, &layouts);
        let mut peer = Peer::new(UnixStream::connect(&path).unwrap());
        for _ in 0..8 {
            drivers[CONTROL_RECEIVE].add(&[(0x7_0000, 100, true)]);
        }
        for words in [[0u32, 0x1_0000], [1, 0x1_0003], [1, 0x1_0006]] {
            board.ram.set(0x7_1000, &words.map(u32::to_le_bytes).concat());
            drivers[CONTROL_TRANSMIT].add(&[(0x7_1000, 8, false)]);
            serve(&mut engine, &mut session);
        }
        let (to_guest, from_guest) = queues_of(1);
        let (mut sent, mut received, mut busy) = (0, Vec::new(), false);
        let last = [Step::PeerReceives(0x10_0000), Step::GuestReceives(0x4000)];
        for step in steps.into_iter().chain(std::iter::repeat_n(last, 100).flatten()) {
            match step {
                Step::GuestSends(len) if !busy => {
                    board.ram.set(OUT, &bytes(sent, len));
                    drivers[from_guest].add(&[(OUT, 1, false), (OUT + 1, len as u32 - 1, false)]);
                    (sent, busy) = (sent + len, true);
                }
                Step::GuestSends(_) => {}
                Step::GuestReceives(len) => {
                    drivers[to_guest].add(&[(IN, len / 2, true), (IN + u64::from(len / 2), len - len / 2, true)]);
                    serve(&mut engine, &mut session);
                    match drivers[to_guest].take_used() {
                        Some((_, len)) => received.extend(board.ram.get(IN, len as usize)),
                        // It waits there: what comes next comes into it.
                        None => {
                            peer.send(1);
                            serve(&mut engine, &mut session);
                            let (_, len) = drivers[to_guest].take_used().unwrap();
                            received.extend(board.ram.get(IN, len as usize));
                        }
                    }
                }
                Step::PeerSends(len) => peer.send(len),
                Step::PeerReceives(len) => peer.receive(len),
            }
            serve(&mut engine, &mut session);
            busy &= drivers[from_guest].take_used().is_none();
        }
        prop_assert_eq!(peer.received, bytes(0, sent));
        prop_assert_eq!(&received, &bytes(0, received.len()));
        prop_assert_eq!(received.len(), peer.sent);
    }

    #[test]
    fn of_a_connection(steps in vec(step(), 1..150), window in 1u32..0x2_0000, indirect: bool) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let listener = UnixListener::bind(dir.path().join("v_1")).unwrap();
        let mut engine = VsockEngine::new(VsockConfig::listen("v".into(), 3, &path).unwrap()).unwrap();
        let board = Board::default();
        let mut drivers: Vec<_> = (1..3).map(|at| Driver::new(&board.ram, 0x1_0000 * at, 128)).collect();
        let layouts: Vec<_> = drivers.iter().map(|driver| driver.at).collect();
        let mut session = board.session(VERSION_1 | if indirect { INDIRECT } else { 0 }, &layouts);
        // The driver's count of what it received, which it says it has passed on, and what the device says.
        let (mut received, mut sent, mut passed) = (Vec::new(), 0u32, 0u32);
        let say = |drivers: &mut [Driver], op: u32, forwarded: usize, data: &[u8]| {
            let words = [3, 0, 2, 0, 9, 1, data.len() as u32, op << 16 | 1, 0, window, forwarded as u32];
            board.ram.set(OUT, &words.map(u32::to_le_bytes).concat());
            board.ram.set(OUT + 44, data);
            let buffers = [(OUT, 30, false), (OUT + 30, 14 + data.len() as u32, false)];
            if indirect { drivers[1].add_indirect(0x7_0000, &buffers) } else { drivers[1].add(&buffers) };
        };
        say(&mut drivers, 1, 0, &[]);
        serve(&mut engine, &mut session);
        let mut peer = Peer::new(listener.accept().unwrap().0);
        let last = [Step::PeerReceives(0x10_0000), Step::GuestReceives(0x4000), Step::GuestReceives(0x4000)];
        for step in steps.into_iter().chain(std::iter::repeat_n(last, 400).flatten()) {
            match step {
                Step::GuestSends(len) => {
                    let len = len.min((BUFFER - (sent - passed)) as usize);
                    say(&mut drivers, 5, received.len(), &bytes(sent as usize, len));
                    sent += len as u32;
                }
                Step::GuestReceives(room) => {
                    drivers[0].add(&[(IN, 44 + room, true)]);
                    serve(&mut engine, &mut session);
                    // Nothing to say: then it is asked what it has passed on, which is an answer.
                    let used = drivers[0].take_used().unwrap_or_else(|| {
                        say(&mut drivers, 7, received.len(), &[]);
                        serve(&mut engine, &mut session);
                        drivers[0].take_used().unwrap()
                    });
                    let data = board.ram.get(IN + 44, used.1 as usize - 44);
                    prop_assert!(data.len() <= window as usize, "more than there is room for");
                    prop_assert_ne!(board.ram.u16(IN + 30), 3, "a reset");
                    received.extend(data);
                    passed = board.ram.u32(IN + 40);
                    prop_assert!(passed <= sent);
                    say(&mut drivers, 6, received.len(), &[]);
                }
                Step::PeerSends(len) => peer.send(len),
                Step::PeerReceives(len) => peer.receive(len),
            }
            serve(&mut engine, &mut session);
            while drivers[1].take_used().is_some() {}
        }
        prop_assert_eq!(&peer.received, &bytes(0, sent as usize));
        prop_assert_eq!(&received, &bytes(0, received.len()));
        prop_assert!(received.len() == peer.sent || window < 0x1000);
    }
}
