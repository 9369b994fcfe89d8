//! Devices over vhost-user, with back ends of the vhost-user-backend crate in processes of their own, which die.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use soc_vmm::virtio::vhost::{VhostConfig, VhostDevice, VhostKind};
use tempfile::TempDir;
use testbed::debian::{self, Passt, Tools, Virtiofsd};
use testbed::fetch;

use crate::direct::board;
use crate::rig::{Board, Driver, EVENT_INDEX, Guest, INDIRECT, VERSION_1, eventually};

/// Where a process of this test finds what back end it is.
const BACKEND: &str = "OUTBOARD_TEST_VHOST_BACKEND";
pub(crate) const READ: u32 = 0;
pub(crate) const WRITE: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const BLOCK: usize = 4096;
pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

#[test]
#[ignore = "the process of a back end, which the other tests start"]
fn serve() {
    if let Ok(words) = std::env::var(BACKEND) {
        let words: Vec<String> = words.split('\n').map(str::to_owned).collect();
        vhost_backend::run(&words).unwrap();
    }
}

/// A part of the testbed that a test needs; none where it can't be had, which the summary of all tests says.
fn fetched<T>(test: &str, part: Result<T, fetch::Error>) -> Option<T> {
    match part {
        Ok(part) => Some(part),
        Err(error @ fetch::Error::Unreachable(_)) => {
            testbed::skip(test, &error.to_string());
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

/// A back end's process.
pub(crate) struct Backend(pub(crate) Child);

impl Backend {
    pub(crate) fn start(words: &[&str]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "vhost::serve", "--ignored"]).env(BACKEND, words.join("\n"));
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// On return it does nothing more.
    pub(crate) fn stop(&self) {
        kill(self.pid(), Signal::SIGSTOP).unwrap();
        let stopped = waitpid(self.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
    }

    pub(crate) fn go_on(&self) {
        kill(self.pid(), Signal::SIGCONT).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A place for sockets and files.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn word(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().unwrap()
    }

    pub(crate) fn disk(&self, blocks: usize) -> File {
        let file = File::options().read(true).write(true).create_new(true).open(self.path("disk")).unwrap();
        file.set_len((blocks * BLOCK) as u64).unwrap();
        file
    }

    /// Its back end, which dies if `death` says when.
    fn block(&self, death: Option<&str>) -> Backend {
        self.backend("block", death)
    }

    pub(crate) fn backend(&self, kind: &str, death: Option<&str>) -> Backend {
        let (disk, socket) = (self.word("disk"), self.word("socket"));
        Backend::start(&[kind, &disk, &socket].into_iter().chain(death).collect::<Vec<_>>())
    }
}

/// A device, once its back end listens.
pub(crate) fn open(kind: &VhostKind, queues: u16, socket: &Path) -> VhostDevice {
    let config = VhostConfig { socket: socket.into(), kind: kind.clone(), queues };
    eventually(|| VhostDevice::open(config.clone()).ok())
}

pub(crate) fn plug(kind: &VhostKind, queues: u16, socket: &Path) -> Guest {
    let device = open(kind, queues, socket);
    Guest::new(|plumbing| device.plug("v0", MAC, plumbing))
}

/// Where the request of `slot` is: its header, its data, its status.
pub(crate) fn request(slot: usize) -> [u64; 3] {
    let base = 0x8_0000 + 0x2000 * slot as u64;
    [base, base + 0x1000, base + 0x800]
}

/// Sends a request of one block.
pub(crate) fn send(guest: &Guest, queue: &mut Driver, slot: usize, kind: u32, block: usize) -> u16 {
    let [header, data, status] = request(slot);
    let sector = (block * (BLOCK / 512)) as u64;
    guest.board.ram.set(header, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    guest.board.ram.set(status, &[0xff]);
    let data = (data, BLOCK as u32, kind == READ);
    let first = 3 * slot as u16;
    match kind {
        FLUSH => queue.add_at(first, &[(header, 16, false), (status, 1, true)]),
        _ => queue.add_at(first, &[(header, 16, false), data, (status, 1, true)]),
    }
}

pub(crate) fn do_one(guest: &mut Guest, queue: &mut Driver, kind: u32, block: usize) -> Vec<u8> {
    let [_, data, status] = request(0);
    let head = send(guest, queue, 0, kind, block);
    guest.kick(0);
    assert_eq!(queue.wait_used().0, u32::from(head));
    assert_eq!(guest.board.ram.get(status, 1), [0]);
    guest.board.ram.get(data, BLOCK)
}

#[test]
fn a_disk_is_its_back_ends_and_a_reset_begins_again() {
    let place = Place::new();
    let disk = place.disk(64);
    let _backend = place.block(None);
    let mut guest = plug(&VhostKind::Block, 2, &place.path("socket"));
    // SIZE_MAX, SEG_MAX, FLUSH and MQ of the device; what of the rings the back end has doesn't matter to the guest.
    let features = VERSION_1 | INDIRECT | EVENT_INDEX | 1 << 1 | 1 << 2 | 1 << 9 | 1 << 12;
    assert_eq!(guest.offered() & !(1 << 36), features);
    for round in 0..3u8 {
        guest.negotiate(if round == 1 { VERSION_1 } else { features & !EVENT_INDEX });
        let mut queue = guest.queue(0, 128);
        guest.go();
        assert_eq!((guest.get(0x2000, 8), guest.get(0x2000 + 34, 2)), (64 * 8, 2));
        let data = vec![round + 1; BLOCK];
        guest.board.ram.set(request(0)[1], &data);
        do_one(&mut guest, &mut queue, WRITE, 5);
        do_one(&mut guest, &mut queue, FLUSH, 0);
        guest.board.ram.set(request(0)[1], &vec![0; BLOCK]);
        assert_eq!(do_one(&mut guest, &mut queue, READ, 5), data);
        let mut found = vec![0; BLOCK];
        disk.read_exact_at(&mut found, 5 * BLOCK as u64).unwrap();
        assert_eq!(found, data);
    }
}

/// Blocks of each slot; requests under way; queues.
pub(crate) const BLOCKS: usize = 8;
pub(crate) const SLOTS: usize = 16;
pub(crate) const QUEUES: usize = 2;

/// What the guest knows of a slot's blocks, and what it has under way.
pub(crate) struct Slot {
    /// What each block has been acknowledged to hold.
    holds: [u8; BLOCKS],
    /// The queue, the head, and the block and the byte that it will hold.
    asked: Option<(usize, u16, usize, Option<u8>)>,
}

/// A guest that reads and writes, and believes nothing.
pub(crate) struct Load {
    pub(crate) guest: Guest,
    queues: Vec<Driver>,
    slots: Vec<Slot>,
    rng: TestRng,
    pub(crate) done: usize,
}

impl Load {
    pub(crate) fn new(guest: Guest, queues: Vec<Driver>) -> Self {
        let slots = (0..SLOTS).map(|_| Slot { holds: [0; BLOCKS], asked: None }).collect();
        Self { guest, queues, slots, rng: TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]), done: 0 }
    }

    /// Sends no more; what is under way is done.
    pub(crate) fn finish(&mut self) {
        eventually(|| {
            self.take_all();
            self.is_idle().then_some(())
        });
    }

    /// Looks at the disk.
    pub(crate) fn check(&self, disk: &File) {
        for (index, slot) in self.slots.iter().enumerate() {
            for (block, byte) in slot.holds.iter().enumerate() {
                let mut found = vec![0; BLOCK];
                disk.read_exact_at(&mut found, ((index * BLOCKS + block) * BLOCK) as u64).unwrap();
                assert!(found.iter().all(|found| found == byte));
            }
        }
    }

    fn take_all(&mut self) {
        for queue in 0..QUEUES {
            while let Some((head, _)) = self.queues[queue].take_used() {
                self.take(queue, head);
            }
        }
    }

    /// Sends requests where there are none, and takes what was done.
    pub(crate) fn turn(&mut self) {
        for index in 0..SLOTS {
            if self.slots[index].asked.is_some() {
                continue;
            }
            let dice = self.rng.next_u64() as usize;
            let (queue, block, byte) = (dice % QUEUES, dice / 8 % BLOCKS, (dice >> 16) as u8);
            let data = request(index)[1];
            let (kind, will) = if dice & 4 == 0 { (READ, None) } else { (WRITE, Some(byte)) };
            self.guest.board.ram.set(data, &vec![will.unwrap_or(0xa5); BLOCK]);
            let head = send(&self.guest, &mut self.queues[queue], index, kind, index * BLOCKS + block);
            self.slots[index].asked = Some((queue, head, block, will));
        }
        (0..QUEUES as u16).for_each(|queue| self.guest.kick(queue));
        self.take_all();
    }

    fn take(&mut self, queue: usize, head: u32) {
        let is_it = |slot: &Slot| slot.asked.is_some_and(|(q, h, ..)| (q, u32::from(h)) == (queue, head));
        let index = self.slots.iter().position(is_it).expect("a request is done once");
        let [_, data, status] = request(index);
        assert_eq!(self.guest.board.ram.get(status, 1), [0]);
        let slot = &mut self.slots[index];
        let Some((_, _, block, will)) = slot.asked.take() else { unreachable!() };
        match will {
            Some(byte) => slot.holds[block] = byte,
            None => {
                let found = self.guest.board.ram.get(data, BLOCK);
                assert!(found.iter().all(|byte| *byte == slot.holds[block]), "a block that was written is another");
            }
        }
        self.done += 1;
    }

    fn is_idle(&self) -> bool {
        self.slots.iter().all(|slot| slot.asked.is_none())
    }
}

/// Kills a disk's back end a hundred times under load, then looks at all that was written. `start` starts one that dies when it is told to.
pub(crate) fn kill_a_hundred_times(
    disk: &File,
    plug: impl FnOnce(&Path) -> Guest,
    place: &Place,
    start: impl Fn(Option<&str>) -> Backend,
) {
    let mut backend = start(Some("before:1"));
    let mut guest = plug(&place.path("socket"));
    guest.negotiate(VERSION_1 | 1 << 12);
    let queues = (0..QUEUES as u16).map(|index| guest.queue(index, 128)).collect();
    guest.go();
    let mut load = Load::new(guest, queues);
    for kill in 0..100 {
        eventually(|| {
            load.turn();
            backend.has_ended().then_some(())
        });
        let dice = load.rng.next_u64();
        let place_of_death = ["before", "done", "told"][(dice % 3) as usize];
        let death = format!("{place_of_death}:{}", 1 + (dice >> 8) % 40);
        backend = start((kill < 99).then_some(&death));
    }
    eventually(|| {
        load.turn();
        (load.done > 1000).then_some(())
    });
    load.finish();
    load.check(disk);
}

#[test]
fn a_back_end_that_is_killed_a_hundred_times_loses_nothing_and_drops_nothing() {
    let place = Place::new();
    let disk = place.disk(BLOCKS * SLOTS);
    let plug = |socket: &Path| plug(&VhostKind::Block, QUEUES as u16, socket);
    kill_a_hundred_times(&disk, plug, &place, |death| place.block(death));
}

/// The next frame of a stream.
pub(crate) fn frame(stream: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut frame).unwrap();
    frame
}

#[test]
fn frames_pass_both_ways_and_the_link_is_down_while_there_is_no_back_end() {
    let place = Place::new();
    let network = UnixListener::bind(place.path("network")).unwrap();
    let words = ["net", &place.word("network"), &place.word("socket")];
    let mut backend = Backend::start(&words);
    let (mut stream, _) = network.accept().unwrap();
    let mut guest = plug(&VhostKind::Net, 1, &place.path("socket"));
    // MAC and STATUS: the back end has no offloads.
    assert_eq!(guest.offered() & !(VERSION_1 | INDIRECT | EVENT_INDEX | 1 << 36), 1 << 5 | 1 << 16);
    guest.negotiate(VERSION_1 | 1 << 5 | 1 << 16);
    let (mut receive, mut transmit) = (guest.queue(0, 256), guest.queue(1, 256));
    guest.go();
    assert_eq!(guest.get(0x2000, 6).to_le_bytes()[..6], MAC);
    for buffer in 0..8 {
        receive.add(&[(0x8_0000 + 0x1000 * buffer, 2048, true)]);
    }
    guest.kick(0);
    for round in 0..4u8 {
        eventually(|| (guest.get(0x2006, 2) == 1).then_some(()));
        let sent = vec![round + 1; 60 + usize::from(round)];
        guest.board.ram.set(0x9_8000, &[&[0; 12], &sent[..]].concat());
        transmit.add(&[(0x9_8000, 12 + sent.len() as u32, false)]);
        guest.kick(1);
        transmit.wait_used();
        // A back end of a queue that isn't started yet drops what comes, so the guest speaks first.
        assert_eq!(frame(&mut stream), sent);
        let answer = vec![0x80 + round; 100];
        stream.write_all(&[&100u32.to_be_bytes()[..], &answer].concat()).unwrap();
        let (_, len) = receive.wait_used();
        assert_eq!(len, 112);
        assert_eq!(guest.board.ram.get(0x8_0000 + 0x1000 * u64::from(round) + 12, 100), answer);
        drop(backend);
        eventually(|| (guest.get(0x2006, 2) == 0).then_some(()));
        // Nobody carries it.
        transmit.add(&[(0x9_8000, 72, false)]);
        guest.kick(1);
        transmit.wait_used();
        backend = Backend::start(&words);
        stream = network.accept().unwrap().0;
    }
}

#[test]
fn a_cable_that_is_pulled_carries_nothing_until_it_is_back() {
    let place = Place::new();
    let network = UnixListener::bind(place.path("network")).unwrap();
    let _backend = Backend::start(&["net", &place.word("network"), &place.word("socket")]);
    let (mut stream, _) = network.accept().unwrap();
    let device = open(&VhostKind::Net, 1, &place.path("socket"));
    let link = device.link().unwrap();
    let mut guest = Guest::new(|plumbing| device.plug("v0", MAC, plumbing));
    guest.negotiate(VERSION_1 | 1 << 5 | 1 << 16);
    let mut transmit = guest.queue(1, 256);
    guest.go();
    guest.board.ram.set(0x9_8000, &[7; 100]);
    for _ in 0..3 {
        link.set_up(false);
        eventually(|| (guest.get(0x2006, 2) == 0).then_some(()));
        transmit.add(&[(0x9_8000, 100, false)]);
        guest.kick(1);
        stream.set_nonblocking(true).unwrap();
        assert!(stream.read(&mut [0]).is_err());
        stream.set_nonblocking(false).unwrap();
        link.set_up(true);
        eventually(|| (guest.get(0x2006, 2) == 1).then_some(()));
        // This back end keeps a frame that others would drop.
        transmit.wait_used();
        assert_eq!(frame(&mut stream), [7; 88]);
    }
}

#[test]
fn a_back_end_that_has_too_little_is_refused_by_name() {
    let place = Place::new();
    place.disk(1);
    let open = |queues| {
        let config = VhostConfig { socket: place.path("socket"), kind: VhostKind::Block, queues };
        VhostDevice::open(config).map(drop).map_err(|error| error.to_string())
    };
    let socket = place.word("socket");
    let nobody = format!(
        "can't use the vhost-user back end at {socket}: can't connect: No such file or directory (os error 2) (start the back end that listens there)"
    );
    assert_eq!(open(1), Err(nobody));
    let _backend = place.block(None);
    let few = "the back end has 2 queues, where 3 are needed: give it more, or ask for fewer (queues=)";
    let refused = eventually(|| open(3).err().filter(|error| !error.contains("can't connect")));
    assert_eq!(refused, format!("can't use the vhost-user back end at {socket}: {few}"));
}

/// Opcodes of FUSE (Linux's fuse.h).
const FUSE_LOOKUP: u32 = 1;
const FUSE_OPEN: u32 = 14;
const FUSE_READ: u32 = 15;
const FUSE_INIT: u32 = 26;

/// Sends a request of a file system and waits: its error, and what follows the answer's header.
fn fuse(guest: &mut Guest, queue: &mut Driver, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
    let (header, answer) = (0x8_0000, 0x9_0000);
    let words = [u64::from(40 + body.len() as u32) | u64::from(opcode) << 32, 77, node, 0, 0];
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    guest.board.ram.set(header, &[&bytes[..], body].concat());
    guest.board.ram.set(answer, &[0; 4096]);
    queue.add(&[
        (header, 40, false),
        (header + 40, body.len() as u32, false),
        (answer, 16, true),
        (answer + 16, 4000, true),
    ]);
    guest.kick(1);
    let (_, len) = queue.wait_used();
    let bytes = guest.board.ram.get(answer, 4096);
    assert_eq!((u32::from_le_bytes(bytes[..4].try_into().unwrap()), bytes[8]), (len, 77));
    (i32::from_le_bytes(bytes[4..8].try_into().unwrap()), bytes[16..len as usize].to_vec())
}

#[test]
fn a_directory_is_read_through_virtiofsd_and_mounted_again_after_that_was_killed() {
    let test = "a_directory_is_read_through_virtiofsd_and_mounted_again_after_that_was_killed";
    if fetched(test, debian::virtiofsd()).is_none() {
        return;
    }
    let place = Place::new();
    let shared = TempDir::new().unwrap();
    std::fs::write(shared.path().join("hello"), "world").unwrap();
    let start = || Virtiofsd::start(shared.path(), place.path("socket")).unwrap();
    let mut backend = start();
    let mut guest = plug(&VhostKind::Fs { tag: "home".into() }, 1, &place.path("socket"));
    guest.negotiate(VERSION_1);
    let (_urgent, mut queue) = (guest.queue(0, 128), guest.queue(1, 128));
    guest.go();
    assert_eq!(guest.get(0x2000, 8), u64::from_le_bytes(*b"home\0\0\0\0"));
    for _ in 0..3 {
        let init: Vec<u8> = [7u32, 31, 65536, 0].into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!(fuse(&mut guest, &mut queue, FUSE_INIT, 0, &init).0, 0);
        let (error, entry) = fuse(&mut guest, &mut queue, FUSE_LOOKUP, 1, b"hello\0");
        assert_eq!(error, 0);
        let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
        let (error, open) = fuse(&mut guest, &mut queue, FUSE_OPEN, node, &[0; 8]);
        assert_eq!(error, 0);
        let read = [&open[..8], &0u64.to_le_bytes(), &100u64.to_le_bytes(), &[0; 16]].concat();
        assert_eq!(fuse(&mut guest, &mut queue, FUSE_READ, node, &read), (0, b"world".to_vec()));
        drop(backend);
        assert_eq!(fuse(&mut guest, &mut queue, FUSE_READ, node, &read).0, -107);
        backend = start();
        // Also when there is another one: it doesn't know the file.
        assert_eq!(fuse(&mut guest, &mut queue, FUSE_READ, node, &read).0, -107);
    }
}

#[test]
fn passt_answers_over_vhost_user() {
    let Some(tools) = fetched("passt_answers_over_vhost_user", debian::tools()) else { return };
    // Through shadow queues, and on the guest's own.
    [Board::default(), board(2).0].into_iter().for_each(|board| passt_answers(&tools, board));
}

fn passt_answers(tools: &Tools, board: Board) {
    let place = Place::new();
    let start = || Passt::start_vhost_user(tools, place.path("socket")).unwrap();
    let mut backend = start();
    let device = open(&VhostKind::Net, 1, &place.path("socket"));
    let mut guest = Guest::on(board, |plumbing| device.plug("v0", MAC, plumbing));
    let offered = guest.offered();
    // Buffers that are merged; without them its frames have no room.
    assert_ne!(offered & 1 << 15, 0);
    guest.negotiate(VERSION_1 | 1 << 5 | 1 << 15 | 1 << 16);
    let (mut receive, mut transmit) = (guest.queue(0, 256), guest.queue(1, 256));
    guest.go();
    for buffer in 0..64 {
        receive.add(&[(0x8_0000 + 0x800 * (buffer % 32), 2048, true)]);
    }
    guest.kick(0);
    let who = |address: u8| {
        let head = [&[0xff; 6][..], &MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
        [&[0; 12], &head[..], &MAC, &[10, 0, 2, 15], &[0; 6], &[10, 0, 2, address], &[0; 18]].concat()
    };
    for _ in 0..3 {
        eventually(|| (guest.get(0x2006, 2) == 1).then_some(()));
        let asked = who(2);
        guest.board.ram.set(0x9_8000, &asked);
        // It may answer nothing before it has looked around.
        let (head, len) = eventually(|| {
            transmit.add(&[(0x9_8000, asked.len() as u32, false)]);
            guest.kick(1);
            std::thread::sleep(std::time::Duration::from_millis(10));
            receive.take_used()
        });
        let answer = guest.board.ram.get(0x8_0000 + 0x800 * u64::from(head % 32), len as usize);
        // One buffer; an ARP reply of the one that was asked for.
        assert_eq!((&answer[10..12], &answer[24..26], &answer[32..34]), (&[1, 0][..], &[8, 6][..], &[0, 2][..]));
        assert_eq!(answer[40..44], [10, 0, 2, 2]);
        drop(backend);
        eventually(|| (guest.get(0x2006, 2) == 0).then_some(()));
        backend = start();
        while receive.take_used().is_some() {}
    }
}
