//! An interface's frames.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use pcie_function::modelled::Counts;
use soc_vmm::net::StreamBackend;
use soc_vmm::virtio::Session;
use soc_vmm::virtio::net::{NetConfig, NetEngine};

use super::{Bus, serve};
use crate::rig::{Driver, EVENT_INDEX, VERSION_1};

const MERGEABLE: u64 = 1 << 15;
/// Bytes of a frame, and of what virtio puts before it (virtio 1.2 §5.1.6).
const FRAME: u64 = 1500;
const HEADER: u64 = 12;
const BUFFERS: u64 = 0x4_0000;
/// Bytes of a buffer.
const BUFFER: u64 = 2048;
/// Frames under way together.
const DEPTH: u64 = 32;

/// An interface and its driver, with a bus between them.
struct Bench {
    bus: Bus,
    receive: Driver,
    transmit: Driver,
    session: Session,
    engine: NetEngine,
    peer: UnixStream,
}

impl Bench {
    fn new() -> Self {
        let bus = Bus::new();
        let receive = Driver::new(&bus.board.ram, 0x1_0000, 128);
        let transmit = Driver::new(&bus.board.ram, 0x2_0000, 128);
        let (ours, peer) = UnixStream::pair().unwrap();
        let backend = Box::new(StreamBackend::new("test".into(), ours).unwrap());
        let config = NetConfig::new("net0".into(), vec![backend], [0x52, 0x54, 0, 1, 2, 3]).unwrap();
        let session = bus.board.session(VERSION_1 | MERGEABLE | EVENT_INDEX, &[receive.at, transmit.at]);
        let engine = NetEngine::new(config).unwrap();
        Self { bus, receive, transmit, session, engine, peer }
    }

    /// The guest sends so many frames at once.
    fn sends(&mut self, count: u64) -> Counts {
        for n in 0..count {
            self.bus.board.ram.set(BUFFERS + BUFFER * n, &[0; HEADER as usize]);
            self.transmit.add(&[(BUFFERS + BUFFER * n, (HEADER + FRAME) as u32, false)]);
        }
        let before = self.bus.crossings.counts();
        let (transmit, mut sent) = (&mut self.transmit, 0);
        serve(&mut self.engine, &mut self.session, || {
            sent += std::iter::from_fn(|| transmit.take_used()).count() as u64;
            sent == count
        });
        let cost = self.bus.since(before);
        self.peer.read_exact(&mut vec![0; (count * (4 + FRAME)) as usize]).unwrap();
        cost
    }

    /// The guest is sent so many frames at once, for which it has a buffer each.
    fn receives(&mut self, count: u64) -> Counts {
        for n in 0..count {
            self.receive.add(&[(BUFFERS + BUFFER * n, BUFFER as u32, true)]);
        }
        let frame = [&(FRAME as u32).to_be_bytes()[..], &[0xff; FRAME as usize]].concat();
        self.peer.write_all(&frame.repeat(count as usize)).unwrap();
        let before = self.bus.crossings.counts();
        let (receive, mut received) = (&mut self.receive, 0);
        serve(&mut self.engine, &mut self.session, || {
            while let Some((_, used)) = receive.take_used() {
                assert_eq!(u64::from(used), HEADER + FRAME);
                received += 1;
            }
            received == count
        });
        self.bus.since(before)
    }
}

#[test]
fn a_frame_by_itself_costs_its_bytes_and_little_else() {
    let mut bench = Bench::new();
    for _ in 0..20 {
        let (sent, received) = (bench.sends(1), bench.receives(1));
        // The used ring's entry and its index; a frame comes with its header.
        assert_eq!((sent.dma_writes, sent.dma_write_bytes), (2, 8 + 8), "{sent:?}");
        assert_eq!((received.dma_writes, received.dma_write_bytes), (3, HEADER + FRAME + 8 + 8), "{received:?}");
        // Which frames there are, and the other queue is looked at too.
        assert!(sent.dma_reads <= 7 && sent.dma_read_bytes <= HEADER + FRAME + 192, "{sent:?}");
        assert!(received.dma_reads <= 6 && received.dma_read_bytes <= 192, "{received:?}");
        assert_eq!((sent.posted, sent.reads, received.posted, received.reads), (0, 0, 0, 0));
    }
}

#[test]
fn of_32_frames_at_once_each_costs_one_transfer() {
    let mut bench = Bench::new();
    for _ in 0..20 {
        let (sent, received) = (bench.sends(DEPTH), bench.receives(DEPTH));
        let bytes = DEPTH * (HEADER + FRAME);
        // Used entries, indices, descriptors and the available ring are shared: a quarter of a transfer each.
        assert!(sent.dma_writes <= 4 && sent.dma_write_bytes <= 10 * DEPTH, "{sent:?}");
        assert!(sent.dma_reads <= DEPTH + DEPTH / 4 && sent.dma_read_bytes <= bytes + 48 * DEPTH, "{sent:?}");
        assert!(received.dma_writes <= DEPTH + 4, "{received:?}");
        assert!(received.dma_write_bytes <= bytes + 10 * DEPTH, "{received:?}");
        assert!(received.dma_reads <= DEPTH / 4 + 2 && received.dma_read_bytes <= 48 * DEPTH, "{received:?}");
    }
}
