//! What a driver and the peers of a small device do, as a list of bytes: each device is run by any such list, from the tests of
//! properties and from the fuzzer.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use soc_vmm::virtio::balloon::{
    BalloonConfig, BalloonEngine, BalloonEvents, BalloonHandle, PageRun, Pages, PagesError,
};
use soc_vmm::virtio::console::{
    ConsoleConfig, ConsoleEngine, ConsoleHandle, HostEnd, PortConfig, PortEvents, queues_of,
};
use soc_vmm::virtio::entropy::{EntropyConfig, EntropyEngine, RateLimit};
use soc_vmm::virtio::vsock::{VsockConfig, VsockEngine};
use soc_vmm::virtio::{Engine, QueueError, Session, Wait};

use super::rig::{Board, Driver, NEXT, RAM, TABLE, VERSION_1, WRITE};

/// Entries of each queue, and bytes from one to the next.
const SIZE: u16 = 8;
const QUEUE: u64 = 0x1_0000;
/// Indirect tables, messages, and other bytes.
const TABLES: u64 = 0x8_0000;
const SLOTS: u64 = 0x9_0000;
const BYTES: u64 = 0xa_0000;
/// Calls after which an engine has done what there was to do.
const CALLS: usize = 10_000;
/// Peers at once.
const PEERS: usize = 4;
/// Connections to the device, in all.
const MADE: usize = 12;

/// Which device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Entropy,
    Console,
    Vsock,
    Balloon,
}

/// The bytes that are left; zeros behind their end.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, limit: u64) -> u64 {
        u64::from(self.byte()) % limit
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// A place that is mostly memory.
    fn place(&mut self) -> u64 {
        match self.below(8) {
            0..4 => SLOTS + 64 * self.below(8),
            4..6 => BYTES + 0x100 * self.below(16),
            6 => RAM as u64 - self.below(100),
            _ => u64::from(self.word()) << 16 | u64::from(self.word()),
        }
    }

    fn len(&mut self) -> u32 {
        match self.below(8) {
            0..3 => [8, 44, 4, 10][self.below(4) as usize],
            3 => self.below(64) as u32,
            4..7 => 0x100 * self.below(256) as u32,
            _ => self.word(),
        }
    }

    /// A number that is mostly one that means something.
    fn number(&mut self) -> u32 {
        match self.byte() {
            byte @ 0..200 => u32::from(byte) % 4,
            200..230 => 0x1000 * self.below(64) as u32,
            _ => self.word(),
        }
    }
}

struct Nobody;

impl PortEvents for Nobody {
    fn guest_open(&self, id: &str, _: bool) {
        assert_eq!(id, "c");
    }
}

impl BalloonEvents for Nobody {
    fn changed(&self, memory: u64) {
        assert!(memory <= RAM as u64);
    }
}

/// RAM of which nothing is asked that isn't right.
struct Strict(Vec<PageRun>);

impl Pages for Strict {
    fn pinned(&self) -> Option<String> {
        None
    }

    fn revoke(&mut self, runs: &[PageRun]) -> Result<(), PagesError> {
        assert!(!runs.is_empty() && self.0.is_empty());
        for run in runs {
            assert!(run.len > 0 && run.addr % 4096 == 0 && run.len % 4096 == 0);
            if run.addr.checked_add(run.len).is_none_or(|end| end > RAM as u64) {
                return Err(PagesError::NotRam { addr: run.addr });
            }
        }
        self.0 = runs.to_vec();
        Ok(())
    }

    fn free(&mut self, runs: &[PageRun]) -> Result<u64, PagesError> {
        assert_eq!(std::mem::take(&mut self.0), runs);
        Ok(runs.iter().map(|run| run.len).sum())
    }
}

/// The world outside of a device.
struct Outside {
    path: PathBuf,
    /// Where the guest connects.
    listener: Option<UnixListener>,
    peers: Vec<UnixStream>,
    /// Connections that were made to the device: one more than its socket's queue holds would wait for it.
    made: usize,
    balloon: Option<Arc<BalloonHandle>>,
}

impl Outside {
    fn act(&mut self, source: &mut Source<'_>) {
        let peer = self.peers.len().checked_sub(1).map(|last| source.below(last as u64 + 1) as usize);
        match (source.below(6), peer) {
            (0, _) if self.peers.len() < PEERS && self.made < MADE => {
                self.made += 1;
                self.peers.extend(UnixStream::connect(&self.path));
            }
            (1, _) => {
                if let Some(listener) = &self.listener
                    && let Ok((peer, _)) = listener.accept()
                    && self.peers.len() < PEERS
                {
                    self.peers.push(peer);
                }
            }
            (2, Some(peer)) => {
                let words: &[u8] = [&b"CONNECT 1\n"[..], b"CONNECT 2\nabc", b"x", &[7; 5000]][source.below(4) as usize];
                finish((|| {
                    self.peers[peer].set_nonblocking(true)?;
                    self.peers[peer].write(words)
                })());
            }
            (3, Some(peer)) => {
                finish((|| {
                    self.peers[peer].set_nonblocking(true)?;
                    self.peers[peer].read(&mut [0; 9000])
                })());
            }
            (4, Some(peer)) => drop(self.peers.swap_remove(peer)),
            _ => {}
        }
        if let Some(handle) = &self.balloon {
            handle.set_target(u64::from(source.number()) << 4).expect("nothing is pinned");
            handle.set_interval((source.byte() < 100).then_some(Duration::from_nanos(1)));
        }
    }
}

/// A peer may find its socket full, empty or closed.
fn finish(result: std::io::Result<usize>) {
    if let Err(error) = result {
        let known = [ErrorKind::WouldBlock, ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
        assert!(known.contains(&error.kind()), "{error}");
    }
}

/// Runs a device. It must neither panic nor go on for ever, and break off only for what the driver did.
pub(crate) fn run(kind: Kind, program: &[u8]) {
    let mut source = Source(program);
    let place = format!("{}-{:?}", std::process::id(), std::thread::current().id());
    let path = std::env::temp_dir().join(format!("outboard-{}", place.replace(['(', ')'], "")));
    let there = path.with_extension("v_1");
    // What a run that failed left behind.
    let _ = std::fs::remove_file(&there);
    let mut outside =
        Outside { path: path.with_extension("v"), listener: None, peers: Vec::new(), made: 0, balloon: None };
    let (mut engine, features, queues) = device(kind, source.byte(), &mut outside);
    let ring_features = u64::from(source.byte() & 3) << 28;
    let board = Board::default();
    let mut drivers: Vec<_> = (0..queues).map(|index| Driver::new(&board.ram, QUEUE * (index + 1), SIZE)).collect();
    let layouts: Vec<_> = drivers.iter().map(|driver| driver.at).collect();
    let mut session = board.session(VERSION_1 | features | ring_features, &layouts);
    let mut revoked = false;
    for _ in 0..200 {
        if source.0.is_empty() {
            break;
        }
        match source.below(8) {
            0 | 1 => add(&mut drivers, &mut source),
            2 => message(kind, &board, &mut source),
            3 | 4 => {
                outside.act(&mut source);
                match serve(&mut *engine, &mut session) {
                    Ok(()) => assert!(!revoked || layouts.is_empty()),
                    Err(error) => {
                        assert_eq!(revoked, error == QueueError::Revoked, "{error}");
                        break;
                    }
                }
            }
            5 => outside.act(&mut source),
            6 => spoil(&mut drivers, &board, &mut source),
            _ if source.byte() == 0 => {
                session.control.end();
                revoked = true;
            }
            _ => {}
        }
    }
    drop(engine);
    let _ = std::fs::remove_file(&there);
}

/// Serves until there is no more to do.
fn serve(engine: &mut dyn Engine, session: &mut Session) -> Result<(), QueueError> {
    for _ in 0..CALLS {
        if engine.serve(session)? != Wait::NOTHING {
            return Ok(());
        }
    }
    panic!("it finds more to do for ever");
}

fn device(kind: Kind, choice: u8, outside: &mut Outside) -> (Box<dyn Engine>, u64, u64) {
    match kind {
        Kind::Entropy => {
            let limit = RateLimit { bytes: u64::from(choice) * 100 + 1, period: Duration::from_nanos(1) };
            let source = EntropyConfig { name: String::new(), limit: (choice < 128).then_some(limit) };
            (Box::new(EntropyEngine::new(source)), 0, 1)
        }
        Kind::Console => {
            let end = HostEnd::listen(&outside.path).expect("a path of its own");
            let console = ConsoleConfig {
                name: String::new(),
                ports: vec![PortConfig { id: "c".into(), name: "name".into(), end }],
                handle: Arc::new(ConsoleHandle::new().expect("a descriptor")),
                events: Arc::new(Nobody),
            };
            let engine = ConsoleEngine::new(console).expect("descriptors");
            (Box::new(engine), u64::from(choice != 0) << 1, queues_of(1).1 as u64 + 1)
        }
        Kind::Vsock => {
            let vsock = VsockConfig::listen(String::new(), 3, &outside.path).expect("a path of its own");
            let listener = UnixListener::bind(outside.path.with_extension("v_1")).expect("the same");
            listener.set_nonblocking(true).expect("a socket");
            outside.listener = Some(listener);
            (Box::new(VsockEngine::new(vsock).expect("descriptors")), 0, 3)
        }
        Kind::Balloon => {
            let handle = Arc::new(BalloonHandle::new(RAM as u64).expect("a descriptor"));
            outside.balloon = Some(handle.clone());
            let balloon = BalloonConfig {
                name: String::new(),
                deflate_on_oom: true,
                reporting: true,
                even_pinned: false,
                pages: Box::new(Strict(Vec::new())),
                handle,
                events: Arc::new(Nobody),
            };
            (Box::new(BalloonEngine::new(balloon).expect("descriptors")), u64::from(choice) & 0x36, 5)
        }
    }
}

/// A chain as drivers make it, in any queue.
fn add(drivers: &mut [Driver], source: &mut Source<'_>) {
    let queue = source.below(drivers.len() as u64) as usize;
    let shape = source.byte();
    let mut buffers: Vec<_> = (0..shape & 3).map(|_| (source.place(), source.len(), false)).collect();
    buffers.extend((0..shape >> 2 & 3).map(|_| (source.place(), source.len(), true)));
    if buffers.is_empty() {
        return;
    }
    if shape & 0x10 != 0 {
        drivers[queue].add_indirect(TABLES + 0x100 * source.below(16), &buffers);
    } else {
        drivers[queue].add(&buffers);
    }
}

/// A message as drivers make it, with any numbers in it.
fn message(kind: Kind, board: &Board, source: &mut Source<'_>) {
    let slot = SLOTS + 64 * source.below(8);
    let bytes: Vec<u8> = match kind {
        Kind::Vsock => {
            let (guest, host) = (source.number(), if source.byte() < 200 { 1 } else { source.number() });
            let op = source.below(9) as u32;
            let kind = if source.byte() < 240 { 1 } else { source.below(4) as u32 };
            let len = if source.byte() < 128 { 0 } else { source.number() };
            let (flags, room, forwarded) = (source.number(), source.number(), source.number());
            let cids = [3, 0, if source.byte() < 250 { 2 } else { 9 }, 0];
            let words = [guest, host, len, op << 16 | kind, flags, room, forwarded];
            cids.into_iter().chain(words).flat_map(u32::to_le_bytes).collect()
        }
        Kind::Console => [source.number(), u32::from(source.byte() % 9) | source.number() << 16]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect(),
        Kind::Entropy | Kind::Balloon => (0..12).flat_map(|_| source.number().to_le_bytes()).collect(),
    };
    board.ram.set(slot, &bytes);
}

/// What no driver does.
fn spoil(drivers: &mut [Driver], board: &Board, source: &mut Source<'_>) {
    let queue = source.below(drivers.len() as u64) as usize;
    let driver = &mut drivers[queue];
    match source.below(4) {
        0 => {
            let flags = u16::from(source.byte()) & (NEXT | WRITE | TABLE);
            let (index, next) = (source.below(16) as u16, source.below(16) as u16);
            driver.descriptor(driver.at.descriptors, index, source.place(), source.len(), flags, next);
        }
        1 => driver.offer(source.below(u64::from(SIZE) + 1) as u16),
        2 => board.ram.set(driver.at.available + 2 * source.below(16), &[source.byte(), source.byte()]),
        _ => board.ram.set(driver.at.used + 2 * source.below(40), &[source.byte(), source.byte()]),
    }
}
