//! An interface, over a socket whose other end is the test.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use soc_vmm::net::{MAX_FRAME, StreamBackend};
use soc_vmm::virtio::net::{self, NetConfig, NetCounters};

use super::rig::{Driver, EVENT_INDEX, Guest, NEEDS_RESET, VERSION_1, eventually};

const MERGEABLE: u64 = 1 << 15;
const MTU: u64 = 1 << 3;
const BUFFERS: u64 = 0x8_0000;

struct Wire {
    guest: Guest,
    peer: UnixStream,
    counters: Arc<NetCounters>,
    receive: Driver,
    transmit: Driver,
}

impl Wire {
    fn new(features: u64) -> Self {
        let (ours, peer) = UnixStream::pair().unwrap();
        let counters = Arc::new(NetCounters::default());
        let backend = Box::new(StreamBackend::new("test".into(), ours).unwrap());
        let config = NetConfig::new("net0".into(), vec![backend], [0x52, 0x54, 0, 1, 2, 3]).unwrap();
        let config = NetConfig { mtu: Some(9000), counters: counters.clone(), ..config };
        let mut guest = Guest::new(|plumbing| net::new(config, plumbing));
        guest.negotiate(VERSION_1 | features);
        let (receive, transmit) = (guest.queue(0, 64), guest.queue(1, 64));
        guest.go();
        Self { guest, peer, counters, receive, transmit }
    }

    /// Gives the device a buffer for frames; its number is its place.
    fn offer(&mut self, number: u64, len: u32) {
        self.receive.add(&[(BUFFERS + 0x1000 * number, len, true)]);
        self.guest.kick(0);
    }

    fn buffer(&self, number: u64, len: usize) -> Vec<u8> {
        self.guest.board.ram.get(BUFFERS + 0x1000 * number, len)
    }

    fn send(&mut self, frame: &[u8]) {
        let addr = BUFFERS + 0x4_0000;
        self.guest.board.ram.set(addr, &[0; 12]);
        self.guest.board.ram.set(addr + 12, frame);
        self.transmit.add(&[(addr, 12, false), (addr + 12, frame.len() as u32, false)]);
        self.guest.kick(1);
        assert_eq!(self.transmit.wait_used().1, 0);
    }

    fn peer_sends(&mut self, frame: &[u8]) {
        self.peer.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
        self.peer.write_all(frame).unwrap();
    }

    fn peer_receives(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.peer.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.peer.read_exact(&mut frame).unwrap();
        frame
    }

    fn link(&mut self) -> u64 {
        self.guest.get(0x2006, 2)
    }
}

fn header(buffers: u8) -> Vec<u8> {
    [vec![0; 10], vec![buffers, 0]].concat()
}

#[test]
fn frames_pass_both_ways() {
    for features in [0, EVENT_INDEX, MERGEABLE] {
        let mut wire = Wire::new(features);
        assert_eq!(wire.guest.get(0x2000, 4) | wire.guest.get(0x2004, 2) << 32, 0x0302_0100_5452);
        assert_eq!(
            (wire.link(), wire.guest.offered() & (MTU | MERGEABLE), wire.guest.get(0x200a, 2)),
            (1, MTU | MERGEABLE, 9000)
        );
        for round in 0..100u8 {
            let frame: Vec<u8> = (0..60 + round).map(|i| i ^ round).collect();
            wire.send(&frame);
            assert_eq!(wire.peer_receives(), frame);
            wire.offer(0, 2000);
            wire.peer_sends(&frame);
            assert_eq!(wire.receive.wait_used().1, 12 + frame.len() as u32);
            assert_eq!(wire.buffer(0, 12 + frame.len()), [header(1), frame].concat());
        }
        let counters = &wire.counters;
        assert_eq!((counters.sent(), counters.received()), (100, 100));
        assert_eq!((counters.unsent(), counters.unreceived()), (0, 0));
    }
}

#[test]
fn a_frame_may_be_spread_over_buffers() {
    let mut wire = Wire::new(MERGEABLE);
    let frame: Vec<u8> = (0..3000u32).map(|i| (i * 3) as u8).collect();
    (0..3).for_each(|number| wire.offer(number, 1024));
    wire.peer_sends(&frame);
    let used: Vec<_> = (0..3).map(|_| wire.receive.wait_used().1).collect();
    assert_eq!(used, [1024, 1024, 964]);
    let got: Vec<u8> = used.iter().zip(0..).flat_map(|(len, number)| wire.buffer(number, *len as usize)).collect();
    assert_eq!(got, [header(3), frame].concat());
}

#[test]
fn a_frame_waits_for_a_buffer_then_it_is_dropped() {
    let mut wire = Wire::new(EVENT_INDEX | MERGEABLE);
    // Too little for the frame: those buffers wait with it.
    wire.offer(0, 100);
    wire.peer_sends(&[7; 300]);
    eventually(|| (wire.counters.unreceived() == 1).then_some(()));
    wire.peer_sends(&[8; 300]);
    eventually(|| (wire.counters.unreceived() == 2).then_some(()));
    wire.offer(1, 1000);
    wire.peer_sends(&[9; 300]);
    assert_eq!((wire.receive.wait_used().1, wire.receive.wait_used().1), (100, 212));
    assert_eq!(wire.buffer(0, 100), [header(2), vec![9; 88]].concat());
    // One for which the guest makes room in time.
    wire.peer_sends(&[5; 60]);
    wire.offer(2, 1000);
    assert_eq!(wire.receive.wait_used().1, 72);
    assert_eq!(wire.counters.received(), 2);
}

#[test]
fn a_frame_that_fits_no_buffer_does_not_stop_the_next() {
    let mut wire = Wire::new(0);
    wire.offer(0, 100);
    wire.peer_sends(&[7; 300]);
    wire.peer_sends(&[8; 60]);
    assert_eq!(wire.receive.wait_used().1, 72);
    assert_eq!((wire.buffer(0, 13)[12], wire.counters.unreceived()), (8, 1));
}

#[test]
fn a_slow_peer_costs_frames_and_holds_nobody_up() {
    let mut wire = Wire::new(0);
    // Nobody reads: the socket's buffer fills, and the guest's frames are used all the same.
    while wire.counters.unsent() < 10 {
        wire.send(&[0x55; 1500]);
    }
    let sent = wire.counters.sent();
    // What was taken arrives whole, and then the way is free.
    for _ in 0..sent {
        assert_eq!(wire.peer_receives(), [0x55; 1500]);
    }
    wire.send(&[0x66; 100]);
    assert_eq!(wire.peer_receives(), [0x66; 100]);
}

#[test]
fn a_peer_that_leaves_takes_the_link_down() {
    let mut wire = Wire::new(0);
    let (other, _) = UnixStream::pair().unwrap();
    wire.offer(0, 2000);
    wire.peer_sends(&[1; 60]);
    assert_eq!(wire.receive.wait_used().1, 72);
    let generation = wire.guest.get(0x15, 1);
    wire.peer = other;
    eventually(|| (wire.link() == 0).then_some(()));
    assert_ne!(wire.guest.get(0x15, 1), generation);
    eventually(|| (wire.guest.get(0x1000, 1) & 2 != 0).then_some(()));
    wire.send(&[1; 60]);
    assert_eq!((wire.counters.unsent(), wire.guest.status()), (1, 0xf));
    wire.guest.put(0x14, 1, 0);
    assert_eq!(wire.link(), 0);
}

#[test]
fn a_peer_that_talks_nonsense_is_left() {
    for length in [0, MAX_FRAME as u32 + 1, u32::MAX] {
        let mut wire = Wire::new(0);
        wire.peer.write_all(&length.to_be_bytes()).unwrap();
        eventually(|| (wire.link() == 0).then_some(()));
    }
    let mut wire = Wire::new(MERGEABLE);
    (0..5).for_each(|number| wire.offer(number, 0x8000));
    let frame: Vec<u8> = (0..MAX_FRAME).map(|i| (i / 256) as u8).collect();
    // In pieces, as a stream may bring it.
    let bytes = [(frame.len() as u32).to_be_bytes().to_vec(), frame].concat();
    for piece in bytes.chunks(1000) {
        wire.peer.write_all(piece).unwrap();
    }
    assert_eq!((0..3).map(|_| wire.receive.wait_used().1).sum::<u32>() as usize, 12 + MAX_FRAME);
}

#[test]
fn what_is_no_frame_is_not_sent() {
    let mut wire = Wire::new(0);
    let at = BUFFERS;
    wire.guest.board.ram.set(at, &[0; 100]);
    // Nothing behind the header; a request for an offload that was not negotiated; more than a frame.
    wire.guest.board.ram.set(at + 0x100, &[1, 0]);
    wire.guest.board.ram.set(at + 0x200, &[0, 1]);
    let long = [(at, 12, false), (0, 0x4_0000, false)];
    for buffers in [&[(at, 12, false)][..], &[(at + 0x100, 80, false)], &[(at + 0x200, 80, false)], &long] {
        wire.transmit.add(buffers);
        wire.guest.kick(1);
        wire.transmit.wait_used();
    }
    assert_eq!((wire.counters.unsent(), wire.counters.sent()), (4, 0));
    wire.send(&[3; 60]);
    assert_eq!(wire.peer_receives(), [3; 60]);
    wire.transmit.add(&[(at, 11, false)]);
    wire.guest.kick(1);
    eventually(|| (wire.guest.status() & NEEDS_RESET != 0).then_some(()));
}

#[test]
fn a_buffer_that_can_not_be_one_is_an_error() {
    for buffer in [(BUFFERS, 11, true), (BUFFERS, 100, false)] {
        let mut wire = Wire::new(MERGEABLE);
        wire.receive.add(&[buffer]);
        wire.guest.kick(0);
        wire.peer_sends(&[1; 60]);
        eventually(|| (wire.guest.status() & NEEDS_RESET != 0).then_some(()));
    }
}
