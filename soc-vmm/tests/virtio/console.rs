//! Ports, whose other ends are sockets of the test's.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use soc_vmm::virtio::console::{
    self, ConsoleConfig, ConsoleHandle, HostEnd, PortConfig, PortError, PortEvents, queues_of,
};

use super::moves::{Way, stay};
use super::rig::{Driver, EVENT_INDEX, Guest, NEEDS_RESET, VERSION_1, eventually};

const MULTIPORT: u64 = 2;
const AGENT: &str = "org.qemu.guest_agent.0";
/// Where the driver has its messages, and its bytes.
const MESSAGES: u64 = 0x9_0000;
const BYTES: u64 = 0xa_0000;

#[derive(Default)]
struct Heard(Mutex<Vec<(String, bool)>>);

impl PortEvents for Heard {
    fn guest_open(&self, id: &str, open: bool) {
        self.0.lock().unwrap().push((id.into(), open));
    }
}

fn port(id: &str, name: &str, path: &Path) -> PortConfig {
    PortConfig { id: id.into(), name: name.into(), end: HostEnd::listen(path).unwrap() }
}

/// A guest with port 1, and a driver that speaks with the device.
struct Desk {
    guest: Guest,
    dir: tempfile::TempDir,
    handle: Arc<ConsoleHandle>,
    heard: Arc<Heard>,
    /// Control messages to the driver, and from it; bytes to port 1 and from it.
    inbox: Driver,
    outbox: Driver,
    receive: Driver,
    transmit: Driver,
}

impl Desk {
    fn new(features: u64) -> Self {
        Self::with(features, |dir| HostEnd::listen(&dir.join("agent")).unwrap())
    }

    fn with(features: u64, end: impl FnOnce(&Path) -> HostEnd) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let handle = Arc::new(ConsoleHandle::new().unwrap());
        let heard = Arc::new(Heard::default());
        let config = ConsoleConfig {
            name: "console".into(),
            ports: vec![PortConfig { id: "channel0".into(), name: AGENT.into(), end: end(dir.path()) }],
            handle: handle.clone(),
            events: heard.clone(),
        };
        let guest = Guest::new(|plumbing| console::new(config, plumbing));
        let driver = || Driver::new(&guest.board.ram, 0x1_0000, 16);
        let (inbox, outbox, receive, transmit) = (driver(), driver(), driver(), driver());
        let mut desk = Self { guest, dir, handle, heard, inbox, outbox, receive, transmit };
        desk.start(features);
        desk
    }

    fn start(&mut self, features: u64) {
        self.guest.negotiate(VERSION_1 | MULTIPORT | features);
        self.inbox = self.guest.queue(2, 16);
        self.outbox = self.guest.queue(3, 16);
        self.receive = self.guest.queue(4, 16);
        self.transmit = self.guest.queue(5, 16);
        self.guest.go();
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("agent")
    }

    /// Says something: port, event, value.
    fn say(&mut self, port: u32, event: u16, value: u16) {
        let bytes = [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.guest.board.ram.set(MESSAGES, &bytes);
        self.outbox.add(&[(MESSAGES, 8, false)]);
        self.guest.kick(3);
        self.outbox.wait_used();
    }

    /// The next thing that the device says: port, event, value, the rest.
    fn hear(&mut self) -> (u32, u16, u16, String) {
        let head = self.inbox.add(&[(MESSAGES + 0x100, 200, true)]);
        self.guest.kick(2);
        let (used, len) = self.inbox.wait_used();
        assert_eq!(used, u32::from(head));
        let ram = &self.guest.board.ram;
        let name = ram.get(MESSAGES + 0x108, len as usize - 8);
        let at = MESSAGES + 0x100;
        (ram.u32(at), ram.u16(at + 4), ram.u16(at + 6), String::from_utf8(name).unwrap())
    }

    /// What Linux does until port 1 is there and a program has it open.
    fn open(&mut self) {
        self.say(0, 0, 1);
        assert_eq!(self.hear(), (1, 1, 1, String::new()));
        self.say(1, 3, 1);
        assert_eq!(self.hear(), (1, 7, 1, AGENT.into()));
        self.say(1, 6, 1);
    }

    fn send(&mut self, bytes: &[u8]) {
        self.guest.board.ram.set(BYTES, bytes);
        self.transmit.add(&[(BYTES, bytes.len() as u32, false)]);
        self.guest.kick(5);
    }

    fn offer(&mut self, len: u32) {
        self.receive.add(&[(BYTES + 0x1_0000, len, true)]);
        self.guest.kick(4);
    }

    fn received(&mut self) -> Vec<u8> {
        let (_, len) = self.receive.wait_used();
        self.guest.board.ram.get(BYTES + 0x1_0000, len as usize)
    }
}

impl Desk {
    /// Goes on here, or in another machine, in which port 1 has that end.
    fn go(&mut self, way: Way, end: impl FnOnce(&Path) -> HostEnd) {
        if way == Way::Stay {
            return stay(&mut self.guest);
        }
        (self.handle, self.heard) = (Arc::new(ConsoleHandle::new().unwrap()), Arc::default());
        let config = ConsoleConfig {
            name: "console".into(),
            ports: vec![PortConfig { id: "channel0".into(), name: AGENT.into(), end: end(self.dir.path()) }],
            handle: self.handle.clone(),
            events: self.heard.clone(),
        };
        way.take(&mut self.guest, |plumbing| console::new(config, plumbing));
    }
}

fn read(peer: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    peer.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_port_has_a_name_and_carries_bytes_both_ways() {
    for features in [0, EVENT_INDEX] {
        let mut desk = Desk::new(features);
        assert_eq!(desk.guest.function.read_config(0, 4), 0x1043_1af4);
        assert_eq!((desk.guest.get(0x2004, 4), desk.guest.get(0x12, 2)), (16, 34));
        desk.open();
        let mut peer = UnixStream::connect(desk.path()).unwrap();
        assert_eq!(desk.hear(), (1, 6, 1, String::new()));
        for round in 0..50u8 {
            desk.send(&vec![round; 100 + usize::from(round)]);
            assert_eq!(desk.transmit.wait_used().1, 0);
            assert_eq!(read(&mut peer, 100 + usize::from(round)), vec![round; 100 + usize::from(round)]);
            desk.offer(64);
            peer.write_all(&[round; 10]).unwrap();
            assert_eq!(desk.received(), [round; 10]);
        }
        let status = &desk.handle.ports()[0];
        assert_eq!((&status.id[..], &status.name[..], &status.path), ("channel0", AGENT, &desk.path()));
        assert!(status.guest_open && status.host_open);
        assert_eq!(*desk.heard.0.lock().unwrap(), [("channel0".to_string(), true)]);
    }
}

#[test]
fn a_guest_that_does_not_read_loses_nothing() {
    let mut desk = Desk::new(0);
    let mut peer = UnixStream::connect(desk.path()).unwrap();
    // Before there is a driver, before a program has the port open, and without buffers: it waits.
    peer.write_all(b"guest-ping").unwrap();
    desk.offer(6);
    desk.open();
    assert_eq!(desk.hear(), (1, 6, 1, String::new()));
    assert_eq!(desk.received(), b"guest-");
    desk.offer(100);
    assert_eq!(desk.received(), b"ping");
    // A peer that goes leaves what it wrote.
    let bytes: Vec<u8> = (0..5000u32).map(|i| (i / 7) as u8).collect();
    peer.write_all(&bytes).unwrap();
    drop(peer);
    let mut got = Vec::new();
    while got.len() < bytes.len() {
        desk.offer(999);
        got.extend(desk.received());
    }
    assert_eq!(got, bytes);
    desk.offer(1);
    // It hears of the end after the last byte, and the next one is another peer.
    assert_eq!(desk.hear(), (1, 6, 0, String::new()));
    let mut next = UnixStream::connect(desk.path()).unwrap();
    assert_eq!(desk.hear(), (1, 6, 1, String::new()));
    next.write_all(b"!").unwrap();
    assert_eq!(desk.received(), b"!");
}

#[test]
fn a_peer_that_does_not_read_stops_the_port_and_no_other() {
    let mut desk = Desk::new(0);
    let other = desk.dir.path().join("other");
    desk.handle.add(port("channel1", "other", &other)).unwrap();
    let mut out = {
        // Port 2's queues are beyond those of port 1.
        desk.guest.put(0x14, 1, 0);
        desk.guest.negotiate(VERSION_1 | MULTIPORT);
        desk.inbox = desk.guest.queue(2, 16);
        desk.outbox = desk.guest.queue(3, 16);
        desk.transmit = desk.guest.queue(5, 16);
        let out = desk.guest.queue(queues_of(2).1 as u16, 16);
        desk.guest.go();
        out
    };
    let mut peers = [desk.path(), other].map(|path| UnixStream::connect(path).unwrap());
    desk.say(0, 0, 1);
    for number in [1, 2] {
        assert_eq!(desk.hear(), (number, 1, 1, String::new()));
    }
    for number in [1, 2] {
        desk.say(number, 3, 1);
        assert_eq!((desk.hear().1, desk.hear()), (7, (number, 6, 1, String::new())));
        desk.say(number, 6, 1);
    }
    // Chains until one is not given back: the socket is full.
    let mut sent = 0;
    let stuck = loop {
        desk.send(&[sent as u8; 0x8000]);
        sent += 1;
        let before = desk.transmit.seen;
        // The other port answers whatever this one does; then what there was to do is done.
        for _ in 0..3 {
            desk.guest.board.ram.set(BYTES + 0x2_0000, b"ping");
            out.add(&[(BYTES + 0x2_0000, 4, false)]);
            desk.guest.kick(queues_of(2).1 as u16);
            out.wait_used();
            assert_eq!(read(&mut peers[1], 4), b"ping");
        }
        match desk.transmit.take_used() {
            Some(_) => {}
            None => break before,
        }
    };
    // Nothing of it is missing once the peer reads.
    for number in 0..sent {
        assert_eq!(read(&mut peers[0], 0x8000), vec![number as u8; 0x8000], "of {sent}");
    }
    assert_eq!(desk.transmit.wait_used().1, 0);
    assert_eq!(desk.transmit.seen, stuck + 1);
}

#[test]
fn what_nobody_reads_vanishes_and_holds_nobody_up() {
    let mut desk = Desk::new(EVENT_INDEX);
    desk.open();
    for _ in 0..40 {
        desk.send(&[1; 0x8000]);
        desk.transmit.wait_used();
    }
    let mut peer = UnixStream::connect(desk.path()).unwrap();
    assert_eq!(desk.hear(), (1, 6, 1, String::new()));
    desk.send(b"now");
    assert_eq!(read(&mut peer, 3), b"now");
    // One that goes with a full socket lets go of the guest's chains.
    for _ in 0..15 {
        desk.send(&[2; 0x8000]);
    }
    drop(peer);
    (0..16).for_each(|_| assert_eq!(desk.transmit.wait_used().1, 0));
}

#[test]
fn ports_come_and_go_while_the_guest_runs() {
    let mut desk = Desk::new(0);
    desk.open();
    let path = desk.dir.path().join("more");
    desk.handle.add(port("c1", "more", &path)).unwrap();
    assert_eq!(desk.hear(), (2, 1, 1, String::new()));
    desk.say(2, 3, 1);
    assert_eq!(desk.hear(), (2, 7, 1, "more".into()));
    desk.say(2, 6, 1);
    let mut peer = UnixStream::connect(&path).unwrap();
    assert_eq!(desk.hear(), (2, 6, 1, String::new()));
    desk.handle.remove("c1").unwrap();
    assert_eq!(desk.hear(), (2, 2, 1, String::new()));
    assert_eq!((peer.read(&mut [0]).unwrap(), path.exists()), (0, false));
    eventually(|| (desk.handle.ports().len() == 1).then_some(()));
    // The number is not used again at once.
    desk.handle.add(port("c1", "more", &path)).unwrap();
    assert_eq!(desk.hear(), (3, 1, 1, String::new()));
    assert_eq!(desk.handle.remove("c2"), Err(PortError::Unknown("c2".into())));
    let dir = tempfile::tempdir().unwrap();
    let new = |id: &str, name: &str| port(id, name, &dir.path().join(format!("s{id}")));
    assert_eq!(desk.handle.add(new("c1", "x")), Err(PortError::Taken("c1".into())));
    assert_eq!(desk.handle.add(new("c2", "more")), Err(PortError::Taken("more".into())));
    for name in ["", "a/b", "a\nb", &"x".repeat(128)] {
        assert!(matches!(desk.handle.add(new("c2", name)), Err(PortError::Name(_))));
    }
    for number in 0..13 {
        desk.handle.add(new(&format!("p{number}"), &format!("n{number}"))).unwrap();
    }
    assert_eq!(desk.handle.add(new("last", "last")), Err(PortError::Full));
    let heard = desk.heard.0.lock().unwrap().clone();
    assert_eq!(heard[1..], [("c1".to_string(), true), ("c1".to_string(), false)]);
}

#[test]
fn a_reset_closes_the_guest_s_end_and_the_peer_stays() {
    let mut desk = Desk::new(0);
    desk.open();
    let mut peer = UnixStream::connect(desk.path()).unwrap();
    assert_eq!(desk.hear().1, 6);
    desk.guest.put(0x14, 1, 0);
    desk.start(EVENT_INDEX);
    eventually(|| (desk.heard.0.lock().unwrap().last() == Some(&("channel0".into(), false))).then_some(()));
    desk.open();
    assert_eq!(desk.hear(), (1, 6, 1, String::new()));
    desk.send(b"again");
    assert_eq!(read(&mut peer, 5), b"again");
}

#[test]
fn an_end_may_connect_and_does_so_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("theirs");
    assert!(HostEnd::connect(&path).is_err());
    let listener = UnixListener::bind(&path).unwrap();
    let mut desk = Desk::with(0, |_| HostEnd::connect(&path).unwrap());
    let (mut peer, _) = listener.accept().unwrap();
    desk.open();
    assert_eq!(desk.hear(), (1, 6, 1, String::new()));
    desk.send(b"one");
    assert_eq!(read(&mut peer, 3), b"one");
    drop(peer);
    assert_eq!(desk.hear(), (1, 6, 0, String::new()));
    let (mut peer, _) = listener.accept().unwrap();
    assert_eq!(desk.hear(), (1, 6, 1, String::new()));
    desk.send(b"two");
    assert_eq!(read(&mut peer, 3), b"two");
}

#[test]
fn a_driver_without_ports_finds_a_console_on_which_nobody_listens() {
    let mut desk = Desk::new(0);
    desk.guest.put(0x14, 1, 0);
    desk.guest.negotiate(VERSION_1);
    let mut queue = desk.guest.queue(1, 16);
    desk.guest.go();
    for _ in 0..20 {
        queue.add(&[(BYTES, 0x1000, false)]);
        desk.guest.kick(1);
        queue.wait_used();
    }
}

#[test]
fn what_is_no_message_and_no_buffer_is_an_error() {
    type Rule = (u16, &'static [(u64, u32, bool)]);
    let rules: [Rule; 5] = [
        (3, &[(MESSAGES, 7, false)]),
        (3, &[(MESSAGES, 8, false), (MESSAGES, 8, true)]),
        (2, &[(MESSAGES, 7, true)]),
        (4, &[(MESSAGES, 7, false)]),
        (5, &[(MESSAGES, 7, true)]),
    ];
    for (queue, buffers) in rules {
        let mut desk = Desk::new(0);
        desk.open();
        let mut peer = UnixStream::connect(desk.path()).unwrap();
        peer.write_all(b"x").unwrap();
        let driver = match queue {
            2 => &mut desk.inbox,
            3 => &mut desk.outbox,
            4 => &mut desk.receive,
            _ => &mut desk.transmit,
        };
        driver.add(buffers);
        desk.guest.kick(queue);
        eventually(|| (desk.guest.status() & NEEDS_RESET != 0).then_some(()));
    }
    // What is said of ports that there aren't is nothing.
    let mut desk = Desk::new(0);
    for (port, event) in [(u32::MAX, 3), (16, 6), (2, 6), (0, 6), (1, 99)] {
        desk.say(port, event, 1);
    }
    desk.open();
}

#[test]
fn a_driver_goes_on_with_its_ports_in_the_middle_of_meeting_them() {
    for way in Way::BOTH {
        let mut desk = Desk::new(0);
        let mut machine = 0;
        let mut go = |desk: &mut Desk| {
            machine += 1;
            desk.go(way, |dir| HostEnd::listen(&dir.join(format!("agent{machine}"))).unwrap());
        };
        desk.say(0, 0, 1);
        go(&mut desk);
        assert_eq!(desk.hear(), (1, 1, 1, String::new()));
        go(&mut desk);
        desk.say(1, 3, 1);
        go(&mut desk);
        assert_eq!(desk.hear(), (1, 7, 1, AGENT.into()));
        desk.say(1, 6, 1);
        go(&mut desk);
        // Who listens there knows what is open, once.
        eventually(|| desk.handle.ports()[0].guest_open.then_some(()));
        assert_eq!(*desk.heard.0.lock().unwrap(), [("channel0".to_string(), true)]);
        let mut peer = UnixStream::connect(&desk.handle.ports()[0].path).unwrap();
        assert_eq!(desk.hear(), (1, 6, 1, String::new()));
        desk.send(b"hello");
        assert_eq!(read(&mut peer, 5), b"hello");
        desk.offer(100);
        go(&mut desk);
        if way == Way::Travel {
            // The peer is another one now, and a buffer that was offered there is good here.
            assert_eq!(desk.hear(), (1, 6, 0, String::new()));
            peer = UnixStream::connect(&desk.handle.ports()[0].path).unwrap();
            assert_eq!(desk.hear(), (1, 6, 1, String::new()));
        }
        peer.write_all(b"answer").unwrap();
        assert_eq!(desk.received(), b"answer");
    }
}

#[test]
fn bytes_that_the_peer_has_not_taken_go_to_the_one_that_is_there_next() {
    for way in Way::BOTH {
        let mut listener = None;
        let mut desk = Desk::with(EVENT_INDEX, |dir| {
            listener = Some(UnixListener::bind(dir.join("agent")).unwrap());
            HostEnd::connect(&dir.join("agent")).unwrap()
        });
        let (mut peer, _) = listener.unwrap().accept().unwrap();
        desk.say(0, 0, 1);
        desk.hear();
        desk.say(1, 3, 1);
        assert_eq!((desk.hear().1, desk.hear().1), (7, 6));
        desk.say(1, 6, 1);
        // One chain that no socket has room for.
        let bytes: Vec<u8> = (0..0x5_0000u32).map(|n| (n ^ n >> 8 ^ n >> 16) as u8).collect();
        desk.send(&bytes);
        let mut got = read(&mut peer, 0x1_0000);
        let mut next = None;
        desk.go(way, |dir| {
            let listener = UnixListener::bind(dir.join("next")).unwrap();
            let end = HostEnd::connect(&dir.join("next")).unwrap();
            next = Some(listener.accept().unwrap().0);
            end
        });
        if let Some(next) = next {
            peer.read_to_end(&mut got).unwrap();
            peer = next;
        }
        got.extend(read(&mut peer, bytes.len() - got.len()));
        assert!(got == bytes);
        assert_eq!(desk.transmit.wait_used().1, 0);
        desk.send(b"more");
        assert_eq!(read(&mut peer, 4), b"more");
    }
}
