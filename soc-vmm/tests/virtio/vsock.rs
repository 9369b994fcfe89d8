//! Connections between a driver of the test's and sockets of the test's.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use soc_vmm::virtio::vsock::{self, BUFFER, MAX_CONNECTIONS, VsockConfig};

use super::moves::{stay, travel};
use super::rig::{Driver, EVENT_INDEX, Guest, NEEDS_RESET, VERSION_1, eventually};

const CID: u64 = 7;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
/// Where the driver has what it sends, and its buffers.
const OUT: u64 = 0x6_0000;
const IN: u64 = 0x9_0000;
const ROOM: u32 = 0x4000;

/// A packet, without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packet {
    /// The host's port and the guest's.
    host: u32,
    guest: u32,
    op: u16,
    flags: u32,
    room: u32,
    forwarded: u32,
}

struct Desk {
    guest: Guest,
    dir: tempfile::TempDir,
    receive: Driver,
    transmit: Driver,
    events: Driver,
    /// The window that the driver tells.
    room: u32,
    forwarded: u32,
}

impl Desk {
    fn new(features: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = VsockConfig::listen("vsock".into(), CID as u32, &dir.path().join("v")).unwrap();
        let mut guest = Guest::new(|plumbing| vsock::new(config, plumbing));
        guest.negotiate(VERSION_1 | features);
        let (receive, transmit, events) = (guest.queue(0, 16), guest.queue(1, 16), guest.queue(2, 16));
        guest.go();
        Self { guest, dir, receive, transmit, events, room: 0x1_0000, forwarded: 0 }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    fn listener(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    fn send_raw(&mut self, cids: [u64; 2], ports: [u32; 2], kind: u16, op: u16, flags: u32, data: &[u8]) {
        let mut bytes = cids.iter().flat_map(|cid| cid.to_le_bytes()).collect::<Vec<_>>();
        let words = [ports[0], ports[1], data.len() as u32, u32::from(op) << 16 | u32::from(kind), flags, self.room];
        bytes.extend(words.into_iter().chain([self.forwarded]).flat_map(u32::to_le_bytes));
        self.guest.board.ram.set(OUT, &[&bytes, data].concat());
        self.transmit.add(&[(OUT, 44, false), (OUT + 44, data.len() as u32, false)]);
        self.guest.kick(1);
        self.transmit.wait_used();
    }

    /// Sends a packet from the guest's port to the host's.
    fn send(&mut self, guest: u32, host: u32, op: u16, flags: u32, data: &[u8]) {
        self.send_raw([CID, 2], [guest, host], 1, op, flags, data);
    }

    /// The next packet.
    fn receive(&mut self) -> (Packet, Vec<u8>) {
        self.receive.add(&[(IN, ROOM, true)]);
        self.guest.kick(0);
        let (_, len) = self.receive.wait_used();
        let ram = &self.guest.board.ram;
        let word = |at| ram.u32(IN + at);
        assert_eq!((word(0), word(8), ram.u16(IN + 28)), (2, CID as u32, 1));
        assert_eq!(word(24) + 44, len);
        let packet = Packet {
            host: word(16),
            guest: word(20),
            op: ram.u16(IN + 30),
            flags: word(32),
            room: word(36),
            forwarded: word(40),
        };
        (packet, ram.get(IN + 44, len as usize - 44))
    }

    /// The next packet is about that, of that connection.
    fn expect(&mut self, guest: u32, host: u32, op: u16, flags: u32) -> Packet {
        let (packet, data) = self.receive();
        assert_eq!((packet.guest, packet.host, packet.op, packet.flags), (guest, host, op, flags), "{data:?}");
        packet
    }

    /// A connection that the guest makes.
    fn connect(&mut self, listener: &UnixListener, guest: u32, host: u32) -> UnixStream {
        self.send(guest, host, REQUEST, 0, &[]);
        let packet = self.expect(guest, host, RESPONSE, 0);
        assert_eq!((packet.room, packet.forwarded), (BUFFER, 0));
        listener.accept().unwrap().0
    }
}

fn read(peer: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    peer.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn the_guest_connects_and_bytes_pass_both_ways() {
    for features in [0, EVENT_INDEX] {
        let mut desk = Desk::new(features);
        assert_eq!((desk.guest.function.read_config(0, 4), desk.guest.get(0x2000, 8)), (0x1053_1af4, CID));
        let listener = desk.listener(1024);
        let mut peer = desk.connect(&listener, 50, 1024);
        for round in 0..30u8 {
            desk.send(50, 1024, RW, 0, &[round; 1000]);
            assert_eq!(read(&mut peer, 1000), [round; 1000]);
            peer.write_all(&[round ^ 0xff; 700]).unwrap();
            let mut got = Vec::new();
            while got.len() < 700 {
                let (packet, data) = desk.receive();
                assert_eq!((packet.op, packet.host, packet.guest, packet.room), (RW, 1024, 50, BUFFER));
                got.extend(data);
            }
            assert_eq!(got, [round ^ 0xff; 700]);
            desk.forwarded += 700;
        }
        // The guest ends it: that is answered by a reset, and the peer sees its end.
        desk.send(50, 1024, SHUTDOWN, 3, &[]);
        assert_eq!(desk.expect(50, 1024, RST, 0).forwarded, 30_000);
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
        // Its ports are free again.
        desk.forwarded = 0;
        desk.connect(&listener, 50, 1024);
    }
}

#[test]
fn a_program_on_the_soc_connects() {
    let mut desk = Desk::new(0);
    let mut peer = UnixStream::connect(desk.path()).unwrap();
    // In pieces, and with the first bytes of the stream behind it.
    peer.write_all(b"CONN").unwrap();
    peer.write_all(b"ECT 22\nhello").unwrap();
    let (request, _) = desk.receive();
    assert_eq!((request.op, request.guest, request.room), (REQUEST, 22, BUFFER));
    assert!(request.host >= 1 << 30);
    desk.send(22, request.host, RESPONSE, 0, &[]);
    let (packet, data) = desk.receive();
    assert_eq!((packet.op, &data[..]), (RW, &b"hello"[..]));
    desk.send(22, request.host, RW, 0, b"world");
    let mut lines = BufReader::new(peer.try_clone().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", request.host));
    let mut bytes = [0; 5];
    lines.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"world");
    // A second one has a port of its own; the guest doesn't want it.
    let mut other = UnixStream::connect(desk.path()).unwrap();
    other.write_all(b"connect 22\r\n").unwrap();
    let (second, _) = desk.receive();
    assert_ne!(second.host, request.host);
    desk.send(22, second.host, RST, 0, &[]);
    assert_eq!(other.read(&mut [0]).unwrap(), 0);
}

#[test]
fn what_names_no_port_is_closed() {
    let desk = Desk::new(0);
    for words in ["CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "GET / HTTP/1.1 please\n", "CONNECT +5\n", "\n"] {
        let mut peer = UnixStream::connect(desk.path()).unwrap();
        peer.write_all(words.as_bytes()).unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        // What it left unread makes the end a reset.
        match peer.read(&mut [0]) {
            Ok(count) => assert_eq!(count, 0, "{words:?}"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{words:?}"),
        }
    }
}

#[test]
fn a_peer_that_does_not_read_is_held_by_the_window_and_holds_nobody_up() {
    let mut desk = Desk::new(0);
    let listener = desk.listener(1);
    let mut slow = desk.connect(&listener, 10, 1);
    let mut quick = desk.connect(&listener, 11, 1);
    // All that the window allows, as the device tells it.
    let (mut sent, mut forwarded) = (0u32, 0u32);
    let mut told = 0;
    while told < 3 {
        if sent - forwarded + 0x4000 <= BUFFER {
            desk.send(10, 1, RW, 0, &vec![(sent >> 14) as u8; 0x4000]);
            sent += 0x4000;
            continue;
        }
        // The window is closed: asked, the device says what it passed on.
        desk.send(10, 1, CREDIT_REQUEST, 0, &[]);
        let (packet, _) = desk.receive();
        assert_eq!((packet.op, packet.guest), (CREDIT_UPDATE, 10));
        told = if packet.forwarded == forwarded { told + 1 } else { 0 };
        forwarded = packet.forwarded;
        desk.send(11, 1, RW, 0, b"ping");
        assert_eq!(read(&mut quick, 4), b"ping");
    }
    assert!(forwarded < sent && sent - forwarded <= BUFFER);
    // The peer reads: all of it is there, in order, and the guest is told that there is room.
    for part in 0..sent >> 14 {
        assert_eq!(read(&mut slow, 0x4000), vec![part as u8; 0x4000]);
    }
    while forwarded < sent {
        let (packet, _) = desk.receive();
        assert!(packet.op == CREDIT_UPDATE && packet.forwarded > forwarded && packet.forwarded <= sent);
        forwarded = packet.forwarded;
        if sent - forwarded < BUFFER / 2 {
            break;
        }
    }
    // One byte more than the window: the connection is reset, and no other.
    desk.send(11, 1, RW, 0, &vec![0; 0x8000]);
    read(&mut quick, 0x8000);
    desk.expect(11, 1, CREDIT_UPDATE, 0);
    desk.send(10, 1, RW, 0, &vec![0; BUFFER as usize + 1]);
    desk.expect(10, 1, RST, 0);
    desk.send(11, 1, RW, 0, b"still");
    assert_eq!(read(&mut quick, 5), b"still");
}

#[test]
fn a_guest_gets_no_more_than_it_has_room_for() {
    let mut desk = Desk::new(0);
    desk.room = 100;
    let listener = desk.listener(1);
    let mut peer = desk.connect(&listener, 10, 1);
    let bytes: Vec<u8> = (0..250).collect();
    peer.write_all(&bytes).unwrap();
    let mut got = Vec::new();
    for round in 0..3 {
        let (packet, data) = desk.receive();
        assert_eq!((packet.op, data.len()), (RW, if round < 2 { 100 } else { 50 }));
        got.extend(data);
        if round < 2 {
            // It asks once; a guest that has no room yet says so, and isn't asked again.
            desk.expect(10, 1, CREDIT_REQUEST, 0);
            desk.send(10, 1, CREDIT_UPDATE, 0, &[]);
            desk.forwarded += 100;
            desk.send(10, 1, CREDIT_UPDATE, 0, &[]);
        }
    }
    assert_eq!(got, bytes);
    // What was never sent can't have been passed on.
    desk.forwarded = 251;
    desk.send(10, 1, CREDIT_UPDATE, 0, &[]);
    desk.expect(10, 1, RST, 0);
}

#[test]
fn a_window_moves_on() {
    let mut desk = Desk::new(0);
    let listener = desk.listener(1);
    let mut peer = desk.connect(&listener, 10, 1);
    desk.room = u32::MAX;
    let mut total = 0u32;
    for _ in 0..40 {
        peer.write_all(&[5; 0x4000 - 44]).unwrap();
        let mut got = 0;
        while got < 0x4000 - 44 {
            got += desk.receive().1.len();
        }
        total += got as u32;
        desk.forwarded = total;
        desk.send(10, 1, CREDIT_UPDATE, 0, &[]);
    }
    desk.room = 0;
    desk.send(10, 1, CREDIT_UPDATE, 0, &[]);
    peer.write_all(b"x").unwrap();
    desk.expect(10, 1, CREDIT_REQUEST, 0);
    desk.room = 1;
    desk.send(10, 1, CREDIT_UPDATE, 0, &[]);
    assert_eq!(desk.receive().1, b"x");
}

#[test]
fn each_direction_ends_by_itself() {
    let mut desk = Desk::new(0);
    let listener = desk.listener(1);
    let mut peer = desk.connect(&listener, 10, 1);
    // The peer says all it has and ends its direction.
    peer.write_all(b"question").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    assert_eq!(desk.receive().1, b"question");
    desk.expect(10, 1, SHUTDOWN, 2);
    desk.send(10, 1, RW, 0, b"answer");
    assert_eq!(read(&mut peer, 6), b"answer");
    // So does the guest.
    desk.send(10, 1, SHUTDOWN, 2, &[]);
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    drop(peer);
    desk.expect(10, 1, SHUTDOWN, 3);
    desk.send(10, 1, RST, 0, &[]);
    // The guest first; then it must not send.
    let mut peer = desk.connect(&listener, 11, 1);
    desk.send(11, 1, SHUTDOWN, 2, &[]);
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    desk.forwarded = 0;
    peer.write_all(b"late").unwrap();
    assert_eq!(desk.receive().1, b"late");
    desk.send(11, 1, RW, 0, b"x");
    desk.expect(11, 1, RST, 0);
}

#[test]
fn a_peer_that_goes_leaves_what_it_wrote() {
    let mut desk = Desk::new(0);
    let listener = desk.listener(1);
    let mut peer = desk.connect(&listener, 10, 1);
    peer.write_all(&[9; 30_000]).unwrap();
    drop(peer);
    let mut got = 0;
    while got < 30_000 {
        let (packet, data) = desk.receive();
        assert_eq!(packet.op, RW);
        got += data.len();
    }
    desk.expect(10, 1, SHUTDOWN, 3);
    // Nobody takes what the guest sends now.
    desk.send(10, 1, RW, 0, b"x");
    desk.expect(10, 1, RST, 0);
}

#[test]
fn what_the_guest_sent_before_it_ended_arrives() {
    let mut desk = Desk::new(0);
    let listener = desk.listener(1);
    let mut peer = desk.connect(&listener, 10, 1);
    // More than the socket holds.
    let (mut sent, mut forwarded) = (0u32, 0u32);
    while sent < 0x8_0000 {
        if sent - forwarded + 0x4000 > BUFFER {
            desk.send(10, 1, CREDIT_REQUEST, 0, &[]);
            let before = forwarded;
            forwarded = desk.receive().0.forwarded;
            if forwarded == before {
                break;
            }
        } else {
            desk.send(10, 1, RW, 0, &vec![(sent >> 14) as u8; 0x4000]);
            sent += 0x4000;
        }
    }
    desk.send(10, 1, SHUTDOWN, 3, &[]);
    desk.expect(10, 1, RST, 0);
    // The same ports, at once.
    let mut again = desk.connect(&listener, 10, 1);
    for part in 0..sent >> 14 {
        assert_eq!(read(&mut peer, 0x4000), vec![part as u8; 0x4000]);
    }
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    desk.send(10, 1, RW, 0, b"new");
    assert_eq!(read(&mut again, 3), b"new");
}

#[test]
fn packets_of_no_connection_are_answered_by_a_reset() {
    let mut desk = Desk::new(0);
    let listener = desk.listener(1);
    let _peer = desk.connect(&listener, 10, 1);
    // Nobody listens there; no such connection; one that is there already; an answer that nobody asked for; no operation.
    for (guest, host, op) in [(5, 2, REQUEST), (5, 1, RW), (5, 1, RESPONSE), (10, 1, REQUEST), (5, 1, 0)] {
        desk.send(guest, host, op, 0, &[]);
        desk.expect(guest, host, RST, 0);
    }
    // No stream; no host. What comes from elsewhere has no answer, nor has a reset.
    desk.send_raw([CID, 2], [5, 1], 2, REQUEST, 0, &[]);
    desk.receive.add(&[(IN, ROOM, true)]);
    desk.guest.kick(0);
    desk.receive.wait_used();
    assert_eq!((desk.guest.board.ram.u16(IN + 28), desk.guest.board.ram.u16(IN + 30)), (2, RST));
    desk.send_raw([CID, 9], [5, 1], 1, REQUEST, 0, &[]);
    desk.receive.add(&[(IN, ROOM, true)]);
    desk.guest.kick(0);
    desk.receive.wait_used();
    assert_eq!((desk.guest.board.ram.u32(IN), desk.guest.board.ram.u16(IN + 30)), (9, RST));
    desk.send_raw([CID + 1, 2], [5, 1], 1, REQUEST, 0, &[]);
    desk.send(5, 1, RST, 0, &[]);
    let mut peer = desk.connect(&listener, 6, 1);
    peer.write_all(b"x").unwrap();
    assert_eq!(desk.receive().1, b"x");
}

#[test]
fn a_guest_that_takes_no_resets_is_not_heard_for_ever() {
    let mut desk = Desk::new(0);
    // Answers that wait are bounded: then its packets wait.
    let header = [CID.to_le_bytes(), 2u64.to_le_bytes()].concat();
    let rest = [5, 1, 0, u32::from(RW) << 16 | 1, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes);
    desk.guest.board.ram.set(OUT, &header.into_iter().chain(rest).collect::<Vec<_>>());
    let mut taken = 0;
    for _ in 0..64 {
        desk.transmit.add(&[(OUT, 44, false)]);
        desk.guest.kick(1);
        desk.transmit.wait_used();
        taken += 1;
    }
    for _ in 0..10 {
        desk.transmit.add(&[(OUT, 44, false)]);
    }
    desk.guest.kick(1);
    for _ in 0..taken + 10 {
        desk.expect(5, 1, RST, 0);
    }
    for _ in 0..10 {
        desk.transmit.wait_used();
    }
}

#[test]
fn connections_are_bounded() {
    let mut desk = Desk::new(0);
    let listener = desk.listener(1);
    let mut peers = Vec::new();
    for guest in 0..MAX_CONNECTIONS as u32 {
        peers.push(desk.connect(&listener, guest, 1));
    }
    desk.send(9999, 1, REQUEST, 0, &[]);
    desk.expect(9999, 1, RST, 0);
    // One that comes from here waits until there is room.
    let mut peer = UnixStream::connect(desk.path()).unwrap();
    peer.write_all(b"CONNECT 7\n").unwrap();
    desk.send(0, 1, RST, 0, &[]);
    assert_eq!(desk.receive().0.op, REQUEST);
}

#[test]
fn a_reset_ends_every_connection() {
    let mut desk = Desk::new(0);
    let listener = desk.listener(1);
    let mut peer = desk.connect(&listener, 10, 1);
    desk.guest.put(0x14, 1, 0);
    desk.guest.negotiate(VERSION_1);
    (desk.receive, desk.transmit) = (desk.guest.queue(0, 16), desk.guest.queue(1, 16));
    desk.guest.go();
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    desk.connect(&listener, 10, 1);
}

#[test]
fn what_is_no_packet_and_no_buffer_is_an_error() {
    type Rule = (u16, &'static [(u64, u32, bool)]);
    let rules: [Rule; 5] = [
        (1, &[(OUT, 43, false)]),
        (1, &[(OUT, 44, false), (OUT, 44, true)]),
        (1, &[(OUT, 45, false)]),
        (0, &[(IN, 44, true)]),
        (0, &[(IN, 100, false)]),
    ];
    for (queue, buffers) in rules {
        let mut desk = Desk::new(0);
        let listener = desk.listener(1);
        let mut peer = desk.connect(&listener, 10, 1);
        let mut header = desk.guest.board.ram.get(OUT, 44);
        header[24] = 2;
        desk.guest.board.ram.set(OUT, &header);
        let driver = if queue == 0 { &mut desk.receive } else { &mut desk.transmit };
        driver.add(buffers);
        desk.guest.kick(queue);
        peer.write_all(b"x").unwrap();
        eventually(|| (desk.guest.status() & NEEDS_RESET != 0).then_some(()));
    }
}

#[test]
fn connections_go_on_here_and_end_elsewhere_of_which_the_driver_is_told() {
    for features in [0, EVENT_INDEX] {
        let mut desk = Desk::new(features);
        let listener = desk.listener(1024);
        let mut peer = desk.connect(&listener, 50, 1024);
        desk.events.add(&[(IN + 0x1_0000, 8, true)]);
        desk.guest.kick(2);
        for round in 0..5u8 {
            desk.send(50, 1024, RW, 0, &[round; 100]);
            peer.write_all(&[round ^ 0xff; 70]).unwrap();
            stay(&mut desk.guest);
            assert_eq!(read(&mut peer, 100), [round; 100]);
            let (packet, data) = desk.receive();
            assert_eq!((packet.op, data), (RW, vec![round ^ 0xff; 70]));
        }
        assert_eq!(desk.events.take_used(), None);
        let other = tempfile::tempdir().unwrap();
        let config = VsockConfig::listen("vsock".into(), CID as u32, &other.path().join("v")).unwrap();
        travel(&mut desk.guest, |plumbing| vsock::new(config, plumbing));
        desk.dir = other;
        assert_eq!(desk.events.wait_used(), (0, 4));
        assert_eq!(desk.guest.board.ram.get(IN + 0x1_0000, 4), [0; 4]);
        // What it still sends of the old ones is answered as what is of none.
        desk.send(50, 1024, RW, 0, &[1]);
        desk.expect(50, 1024, RST, 0);
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
        let listener = desk.listener(1024);
        let mut peer = desk.connect(&listener, 51, 1024);
        desk.send(51, 1024, RW, 0, b"again");
        assert_eq!(read(&mut peer, 5), b"again");
        assert_eq!(desk.events.take_used(), None);
    }
    // Another CID is another guest.
    let mut desk = Desk::new(0);
    let other = tempfile::tempdir().unwrap();
    let config = VsockConfig::listen("vsock".into(), 9, &other.path().join("v")).unwrap();
    let mut there = Guest::on(super::moves::elsewhere(&desk.guest.board), |plumbing| vsock::new(config, plumbing));
    super::moves::halt(&mut desk.guest);
    let refused = super::moves::load(&mut there, super::moves::save(&desk.guest)).unwrap_err().to_string();
    assert!(refused.contains("another CID"), "{refused}");
}
