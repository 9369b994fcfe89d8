//! An interface with a control queue and two pairs of queues over a network that does offloads, against a driver that sends any header and
//! orders anything. What becomes of broken rings is `virtio_queues`'.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use rig::{Board, Driver, HeapNet};
use soc_vmm::net::{NetBackend, Offloads};
use soc_vmm::virtio::net::{NetConfig, NetEngine};
use soc_vmm::virtio::{Engine, Rate, RateLimits};

#[allow(dead_code, reason = "shared with the devices' own tests")]
#[path = "../../../../soc-vmm/tests/virtio/rig.rs"]
mod rig;

const SIZE: u16 = 16;
const QUEUES: usize = 5;
const CONTROL: usize = 4;
const BYTES: u64 = 0x8_0000;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// A header and a frame, cut in two.
    Send {
        pair: bool,
        header: [u8; 12],
        frame: &'a [u8],
        cut: u8,
    },
    Command {
        class: u8,
        command: u8,
        data: &'a [u8],
        cut: u8,
    },
    Buffer {
        pair: bool,
        len: u16,
    },
    Link(bool),
    Announce,
    Wait(u16),
    /// Another driver, with other features.
    Restart(u64),
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    features: u64,
    offloads: Option<[bool; 4]>,
    limits: [u32; 2],
    frames: Vec<&'a [u8]>,
    left: u8,
    steps: Vec<Step<'a>>,
}

fuzz_target!(|input: Input<'_>| {
    let board = Board::default();
    let offloads =
        input.offloads.map(|[checksum, tso4, tso6, ecn]| Offloads { checksum, tso4, tso6, ecn }.consistent());
    let frames: Vec<Vec<u8>> =
        input.frames.iter().take(16).filter(|frame| frame.len() > 12).map(|f| f.to_vec()).collect();
    let came = 2 * frames.len() as u64;
    let network = || {
        let mut network = HeapNet::new(frames.clone(), input.left.into());
        network.offloads = offloads;
        Box::new(network) as Box<dyn NetBackend>
    };
    let config = NetConfig::new(String::new(), vec![network(), network()], [2; 6]).expect("descriptors");
    let [bytes, operations] = input.limits.map(|rate| (rate > 0).then(|| Rate::new(rate.into())));
    let limits = RateLimits { operations, bytes };
    let (counters, link) = (config.counters.clone(), config.link.clone());
    let (start, now) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let time = now.clone();
    let clock = Arc::new(move || start + Duration::from_millis(time.load(Relaxed)));
    let mut engine = NetEngine::with_clock(NetConfig { limits, ..config }, clock).expect("descriptors");
    // A driver takes what is offered alone: without a header before frames, no offloads.
    let known = if offloads.is_some() { u64::MAX } else { !0x7fff };
    let features = |features: u64| (features & known & 0xff_ffff) | rig::VERSION_1;
    let begin = || [0, 1, 2, 3, 4].map(|index: u64| Driver::new(&board.ram, 0x1_0000 * (index + 1), SIZE));
    let mut drivers = begin();
    let mut session = board.session(features(input.features), &drivers.each_ref().map(|driver| driver.at));
    for step in input.steps.into_iter().take(64) {
        match step {
            Step::Send { pair, header, frame, cut } => {
                let bytes = [&header[..], &frame[..frame.len().min(4000)]].concat();
                add(&board, &mut drivers[1 + 2 * usize::from(pair)], &bytes, cut, 0);
            }
            Step::Command { class, command, data, cut } => {
                let bytes = [&[class % 8, command % 8], &data[..data.len().min(4000)]].concat();
                add(&board, &mut drivers[CONTROL.min(QUEUES - 1)], &bytes, cut, 1);
            }
            Step::Buffer { pair, len } => {
                add(&board, &mut drivers[2 * usize::from(pair)], &[], 0, 12 + u32::from(len) % 3000);
            }
            Step::Link(up) => link.set_up(up),
            Step::Announce => link.announce(),
            Step::Wait(ms) => {
                now.fetch_add(ms.into(), Relaxed);
            }
            Step::Restart(other) => {
                session.control.end();
                board.ram.set(0x1_0000, &[0; 0x5_0000]);
                drivers = begin();
                session = board.session(features(other), &drivers.each_ref().map(|driver| driver.at));
            }
        }
        // A driver without the second pair has its control queue in the third place: what is none there is broken, and may be.
        if engine.serve(&mut session).is_err() {
            break;
        }
    }
    assert!(counters.received() + counters.unreceived() + counters.unwanted() <= came);
});

fn add(board: &Board, driver: &mut Driver, bytes: &[u8], cut: u8, writable: u32) {
    let at = BYTES + 0x2000 * u64::from(driver.available % 16);
    board.ram.set(at, bytes);
    let (len, cut) = (bytes.len() as u32, u32::from(cut).min(bytes.len() as u32));
    let all = [(at, cut, false), (at + u64::from(cut), len - cut, false), (at + 0x1800 - 0x200, writable, true)];
    let buffers: Vec<_> = all.into_iter().filter(|(_, len, _)| *len > 0).collect();
    if !buffers.is_empty() {
        driver.add(&buffers);
    }
}
