//! A disk and an interface against a driver that writes anything into its rings, chains, tables and requests.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use nix::poll::{PollFd, PollFlags, poll};
use rig::{Board, Driver, HeapDisk, HeapNet, NEXT, Ram, TABLE, WRITE};
use soc_vmm::virtio::block::{BlockConfig, BlockEngine};
use soc_vmm::virtio::net::{NetConfig, NetCounters, NetEngine};
use soc_vmm::virtio::{Engine, QueueError, Session};

#[allow(dead_code, reason = "shared with the devices' own tests")]
#[path = "../../../../soc-vmm/tests/virtio/rig.rs"]
mod rig;

/// Entries of each queue, and bytes from one to the next.
const SIZE: u16 = 8;
const QUEUE: u64 = 0x1_0000;
/// Indirect tables, requests, and what devices fill.
const TABLES: u64 = 0x3_0000;
const BYTES: u64 = 0x5_0000;

#[derive(Arbitrary, Debug)]
enum Place {
    Request(u8),
    Data(u16),
    /// The queue itself.
    Ring(u16),
    Any(u64),
}

impl Place {
    fn addr(&self) -> u64 {
        match *self {
            Self::Request(slot) => BYTES + 32 * u64::from(slot % 16),
            Self::Data(offset) => BYTES + 0x1000 + u64::from(offset),
            Self::Ring(offset) => QUEUE + u64::from(offset % 0x400),
            Self::Any(addr) => addr,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Length {
    Header,
    Status,
    Sectors(u8),
    Any(u32),
}

impl Length {
    fn bytes(&self) -> u32 {
        match *self {
            Self::Header => 16,
            Self::Status => 1,
            Self::Sectors(count) => 512 * u32::from(count % 4),
            Self::Any(len) => len,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// A chain as drivers make it.
    Add {
        queue: bool,
        table: Option<u8>,
        readable: Vec<(Place, Length)>,
        writable: Vec<(Place, Length)>,
    },
    /// A descriptor as none makes it.
    Descriptor {
        queue: bool,
        table: Option<u8>,
        index: u8,
        at: Place,
        len: Length,
        flags: u16,
        next: u16,
    },
    Offer {
        queue: bool,
        head: u16,
    },
    Request {
        slot: u8,
        kind: u8,
        sector: u64,
    },
    Poke {
        at: u16,
        data: &'a [u8],
    },
    /// A number over a ring's flags, index or entries.
    Ring {
        queue: bool,
        used: bool,
        at: u8,
        value: u16,
    },
    Serve,
    Fail(bool),
    Revoke,
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    features: u8,
    disk: bool,
    read_only: bool,
    frames: Vec<u16>,
    left: u8,
    steps: Vec<Step<'a>>,
}

fuzz_target!(|input: Input<'_>| {
    let board = Board::default();
    let mut drivers = [0, 1].map(|index| Driver::new(&board.ram, QUEUE * (index + 1), SIZE));
    let mut disk = HeapDisk::new(16);
    disk.read_only = input.read_only;
    let disk = Arc::new(disk);
    let counters = Arc::new(NetCounters::default());
    let frames = input.frames.iter().take(32).map(|len| vec![7; usize::from(*len).max(1)]);
    let came = frames.len();
    let network = Box::new(HeapNet::new(frames, input.left.into()));
    let taken = network.from_guest.clone();
    let mut engine: Box<dyn Engine> = if input.disk {
        Box::new(BlockEngine::new(BlockConfig::new("", disk.clone(), "s")).expect("descriptors"))
    } else {
        let counters = counters.clone();
        let config = NetConfig::new(String::new(), vec![network], [2; 6]).expect("descriptors");
        Box::new(NetEngine::new(NetConfig { counters, ..config }).expect("descriptors"))
    };
    let bits = u64::from(input.features);
    let features = rig::VERSION_1 | (bits & 3) << 28 | (bits >> 2 & 1) << 15 | (bits >> 3 & 1) << 9;
    let layouts = [drivers[0].at, drivers[1].at];
    let mut session = board.session(features, if input.disk { &layouts[..1] } else { &layouts });
    let mut revoked = false;
    for step in input.steps.into_iter().take(100) {
        match step {
            Step::Serve => match served(&mut *engine, &mut session) {
                Ok(()) => assert!(!revoked),
                Err(error) => {
                    assert_eq!(revoked, error == QueueError::Revoked);
                    break;
                }
            },
            Step::Revoke => {
                session.control.end();
                revoked = true;
            }
            Step::Fail(fails) => disk.fails.store(fails, std::sync::atomic::Ordering::SeqCst),
            step => prepare(&board.ram, &mut drivers, step),
        }
    }
    assert!(counters.received() + counters.unreceived() <= came as u64);
    assert!(counters.sent() <= taken.lock().expect("no panic under the lock").len() as u64);
});

/// Serves what is there, and what a disk's threads have done of it in a short time.
fn served(engine: &mut dyn Engine, session: &mut Session) -> Result<(), QueueError> {
    engine.serve(session)?;
    if let Some(source) = engine.source() {
        let _ = poll(&mut [PollFd::new(source, PollFlags::POLLIN)], 1u8);
    }
    engine.serve(session).map(|_| ())
}

fn prepare(ram: &Ram, drivers: &mut [Driver; 2], step: Step<'_>) {
    let table_at = |table: u8| TABLES + 0x100 * u64::from(table % 16);
    match step {
        Step::Add { queue, table, readable, writable } => {
            let side = |list: &[(Place, Length)], writable| -> Vec<_> {
                list.iter().take(3).map(|(at, len)| (at.addr(), len.bytes(), writable)).collect()
            };
            let buffers = [side(&readable, false), side(&writable, true)].concat();
            let driver = &mut drivers[usize::from(queue)];
            match table {
                _ if buffers.is_empty() => {}
                Some(table) => {
                    driver.add_indirect(table_at(table), &buffers);
                }
                None => {
                    driver.add(&buffers);
                }
            }
        }
        Step::Descriptor { queue, table, index, at, len, flags, next } => {
            let driver = &drivers[usize::from(queue)];
            let table = table.map_or(driver.at.descriptors, table_at);
            let flags = flags & (NEXT | WRITE | TABLE);
            driver.descriptor(table, u16::from(index) % 16, at.addr(), len.bytes(), flags, next % 16);
        }
        Step::Offer { queue, head } => drivers[usize::from(queue)].offer(head % (SIZE + 1)),
        Step::Request { slot, kind, sector } => {
            let kind = u32::from(kind % 20);
            let header = [kind.to_le_bytes().to_vec(), vec![0; 4], sector.to_le_bytes().to_vec()].concat();
            ram.set(Place::Request(slot).addr(), &header);
        }
        Step::Poke { at, data } => ram.set(QUEUE + u64::from(at), &data[..data.len().min(64)]),
        Step::Ring { queue, used, at, value } => {
            let layout = drivers[usize::from(queue)].at;
            let ring = if used { layout.used } else { layout.available };
            ram.set(ring + 2 * u64::from(at % 40), &value.to_le_bytes());
        }
        Step::Serve | Step::Fail(_) | Step::Revoke => {}
    }
}
