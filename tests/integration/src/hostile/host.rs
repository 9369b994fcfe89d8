//! A host without KVM: it answers as a shim would, until it attacks.
//!
//! Everything that a host can write is in its reach: card memory, the mailbox, the packets of the function's socket.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api_channel::call::{Call, CpuidEntry, Extent, RamRequest, VmCreated};
use api_channel::codec::Writer;
use api_channel::event::Event;
use api_channel::lines::host as words;
use api_channel::message::{Class, HEADER, Header};
use api_channel::state::{MpState, Records, Regs, Sregs, Type as Record};
use api_channel::{Asked, Server, ServerWindows, Status};
use host_kvm_shim::socket::{accept, listen};
use ioreq_ring::wire::{LINE, POSTED_RING, STRING_PAGE, exit_reason};
use ioreq_ring::{BusMemory, Direction, HostLane, HostWindows, Kind, Request};
use nix::sys::socket::{MsgFlags, send};
use pcie_function::header::{HostHeader, MAGIC, Role, SocHeader, VERSION, epoch};
use pcie_function::local::{LocalHost, sealed_memfd};
use pcie_function::regions::{self, INBOX, Layout, OUTBOX, Type};
use pcie_function::{Bell, Doorbell, HostFunction, Window, Windowed};

use super::Dice;

/// What a host does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// Nothing: it has the guest write `V` to the debug-exit port.
    None(u8),
    /// A header of random words.
    Header,
    /// A header whose words change all the time.
    ChangingHeader,
    /// A header of another version.
    Version,
    /// A random region table.
    Table,
    /// A region table whose words change all the time.
    ChangingTable,
    /// One reply with a payload, bulk, or status that the call doesn't have.
    Reply,
    /// One reply sent twice, or another's number on it.
    StaleReply,
    /// Garbage in the rings of replies and events, and in their tails.
    Rings,
    /// Events with random payloads.
    Events,
    /// More log records than anybody can read, with what confuses terminals in them.
    Logs,
    /// Random words in the lanes' lines, changed while they are read.
    Lanes,
    /// Lawful requests, each with one thing wrong: sequence, length, kind, reserved bits.
    Requests,
    /// Posted rings with random slots and tails.
    Posted,
    /// The guest wants to be reset, over and over, without waiting for an answer.
    Reports,
    /// All of card memory, at random.
    Card,
    /// All of the mailbox, the SoC's own words too.
    Mailbox,
    /// The mailbox and guest memory are unmapped.
    Unmap,
    /// Doorbells that ring without end.
    Bells,
    /// Packets that no shim sends.
    Packets,
    /// No reply any more.
    Silence,
}

impl Attack {
    /// Every one that a peer can go on after, or not, as it likes.
    pub const ALL: [Self; 19] = [
        Self::Header,
        Self::ChangingHeader,
        Self::Version,
        Self::Table,
        Self::ChangingTable,
        Self::Reply,
        Self::StaleReply,
        Self::Rings,
        Self::Events,
        Self::Logs,
        Self::Lanes,
        Self::Requests,
        Self::Posted,
        Self::Reports,
        Self::Card,
        Self::Mailbox,
        Self::Unmap,
        Self::Bells,
        Self::Packets,
    ];
}

/// A host that serves one connection in a thread of its own, and hangs up after a while.
#[derive(Debug)]
pub struct HostileHost {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    /// Calls answered so far.
    calls: Arc<AtomicU32>,
}

impl HostileHost {
    /// Listens at `path`. The attack begins after `calls` honest answers, and `lasts` so long.
    pub fn listen(path: &Path, attack: Attack, seed: u64, calls: u32, lasts: Duration) -> Self {
        let listener = listen(path).expect("the path can be listened on");
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let (stops, counts) = (stop.clone(), answered.clone());
        let serve = move || {
            let Ok(peer) = accept(&listener) else { return };
            let raw = peer.try_clone().expect("a descriptor");
            let Ok(function) = LocalHost::new(peer) else { return };
            let dice = Dice::new(seed);
            // The SoC's end may go at any time: then there is nothing left to attack.
            let _ = Host::offer(function, raw, attack, dice).and_then(|host| host.serve(&stops, &counts, calls, lasts));
        };
        let thread = std::thread::Builder::new().name(format!("{attack:?}")).spawn(serve).expect("a thread");
        Self { thread: Some(thread), stop, calls: answered }
    }

    /// How many calls were answered honestly.
    pub fn calls(&self) -> u32 {
        self.calls.load(Ordering::Relaxed)
    }
}

impl Drop for HostileHost {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take().filter(JoinHandle::is_finished) {
            let _ = thread.join();
        }
    }
}

struct Host {
    function: LocalHost,
    /// The function's socket, for packets.
    raw: OwnedFd,
    attack: Attack,
    dice: Dice,
    card: Window,
    bell: <LocalHost as HostFunction>::Bell,
    layout: Layout,
    inbox: (u64, Window),
    outbox: (u64, Window),
    header: HostHeader,
    /// The lanes' inbox and outbox, once there is a VM.
    lanes: Option<[(u64, Window); 2]>,
    lane: Option<HostLane<Window, Window>>,
    rams: Vec<(u64, OwnedFd)>,
    last: Option<Asked>,
    struck: u32,
}

/// vCPUs that a VM here may have.
const MOST_VCPUS: usize = 8;

impl Host {
    /// Lays the function out and offers it.
    fn offer(mut function: LocalHost, raw: OwnedFd, attack: Attack, mut dice: Dice) -> Option<Self> {
        let card = function.card_memory();
        let layout = regions::layout(card.len() as u64).ok()?;
        let inbox = function.map_mailbox(INBOX, true).ok()?;
        let outbox = function.map_mailbox(OUTBOX, false).ok()?;
        regions::store(&card, &layout.regions);
        let header = HostHeader {
            versions: (VERSION, VERSION),
            features: 0,
            inbox: inbox.0,
            inbox_len: INBOX as u32,
            outbox: outbox.0,
            outbox_len: OUTBOX as u32,
            table: regions::TABLE,
            regions: layout.regions.len() as u16,
            role: Role::Vm,
            nonce: dice.word() | 1,
        };
        let bell = function.bell();
        let mut host = Self {
            function,
            raw,
            attack,
            dice,
            card,
            bell,
            layout,
            inbox,
            outbox,
            header,
            lanes: None,
            lane: None,
            rams: Vec::new(),
            last: None,
            struck: 0,
        };
        host.put_header();
        Some(host)
    }

    fn put_header(&mut self) {
        let dice = &mut self.dice;
        match self.attack {
            Attack::Version => {
                HostHeader { versions: (VERSION + 1, VERSION + 3), ..self.header }.store(&self.card);
            }
            Attack::Header => {
                self.header.store(&self.card);
                let rounds = 1 + dice.below(3);
                for _ in 0..rounds {
                    // The nonce stays: without one there is nobody to talk to.
                    self.card.store(dice.below(7) as usize * 8, dice.nasty());
                }
            }
            Attack::Table => {
                let rounds = 1 + dice.below(4);
                for _ in 0..rounds {
                    let word = dice.below(self.layout.regions.len() as u64 * 4);
                    self.card.store(regions::TABLE as usize + word as usize * 8, dice.nasty());
                }
                self.header.store(&self.card);
            }
            _ => self.header.store(&self.card),
        }
        self.bell.ring(Doorbell::Channel);
    }

    /// Serves until the SoC's end goes, or the attack has lasted long enough.
    fn serve(mut self, stop: &AtomicBool, counts: &AtomicU32, calls: u32, lasts: Duration) -> Option<()> {
        let start = Instant::now();
        let mut began: Option<Instant> = None;
        let mut server: Option<Server<Window, Window>> = None;
        let is_honest = matches!(self.attack, Attack::None(_));
        // What attacks before any call is lasts from the start; nothing lasts when nobody comes to be attacked.
        while !stop.load(Ordering::Relaxed) && start.elapsed() < lasts.max(Duration::from_secs(40)) {
            self.function.check().ok()?;
            if !is_honest && began.is_some_and(|since| since.elapsed() > lasts) {
                return Some(());
            }
            if matches!(self.attack, Attack::Header | Attack::Table | Attack::ChangingHeader | Attack::ChangingTable) {
                began.get_or_insert(start);
                self.strike();
            }
            match &mut server {
                None => {
                    if let Ok(Some(soc)) = SocHeader::load(&self.inbox.1, self.header.nonce) {
                        server = Some(Server::new(self.windows()?, epoch(self.header.nonce, soc.nonce)));
                    }
                }
                Some(open) => {
                    // Its own words may be garbage by now: an attacker doesn't mind.
                    while let Ok(Some((asked, call))) = open.poll() {
                        let answered = counts.load(Ordering::Relaxed);
                        let attacks = answered >= calls;
                        // Before the answer: who has the last one may look at once.
                        counts.store(answered + 1, Ordering::Relaxed);
                        self.answer(open, asked, &call, attacks)?;
                    }
                    if counts.load(Ordering::Relaxed) >= calls {
                        began.get_or_insert_with(Instant::now);
                        self.strike_channel(open);
                        self.strike();
                    }
                    open.beat();
                }
            }
            if !matches!(self.attack, Attack::ChangingHeader | Attack::ChangingTable) {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Some(())
    }

    fn windows(&self) -> Option<ServerWindows<Window, Window>> {
        Some(ServerWindows {
            host_lines: self.region(Type::HOST_LINES)?,
            replies: self.region(Type::REPLIES)?,
            events: self.region(Type::EVENTS)?,
            soc_lines: self.region(Type::SOC_LINES)?,
            requests: self.region(Type::REQUESTS)?,
            bulk: self.region(Type::BULK)?,
        })
    }

    fn region(&self, kind: Type) -> Option<Window> {
        let region = self.layout.regions.iter().find(|region| region.kind == kind)?;
        let memory = match region.space {
            regions::Space::Card => &self.card,
            regions::Space::Inbox => &self.inbox.1,
            regions::Space::Outbox => &self.outbox.1,
        };
        regions::window(memory, region)
    }

    /// Answers a call, honestly unless the attack is on replies and `attacks`.
    fn answer(&mut self, server: &mut Server<Window, Window>, asked: Asked, call: &Call, attacks: bool) -> Option<()> {
        let (mut payload, mut bulk) = self.honest(call)?;
        if attacks && self.attack == Attack::Silence {
            return Some(());
        }
        if attacks && self.attack == Attack::StaleReply {
            // The last one's once more, in the place of this one's.
            server.reply(self.last.unwrap_or(asked), &payload, &bulk).ok()?;
            self.bell.ring(Doorbell::Channel);
            return Some(());
        }
        if attacks && self.attack == Attack::Reply {
            let dice = &mut self.dice;
            match dice.below(6) {
                0 => payload = dice.bytes(payload.len()),
                1 => bulk = dice.bytes(bulk.len()),
                2 => {
                    let len = dice.below(48 << 10) as usize;
                    payload = dice.bytes(len);
                }
                3 => {
                    let len = dice.below(128 << 10) as usize;
                    bulk = dice.bytes(len);
                }
                4 => {
                    let text = dice.bytes(4000);
                    server.refuse(asked, Status(dice.nasty() as u32 | 1), &String::from_utf8_lossy(&text)).ok()?;
                    self.bell.ring(Doorbell::Channel);
                    return Some(());
                }
                // A word of what is right is wrong.
                _ => {
                    let of = if bulk.is_empty() { &mut payload } else { &mut bulk };
                    if of.len() >= 8 {
                        let at = dice.below(of.len() as u64 / 8) as usize * 8;
                        of[at..at + 8].copy_from_slice(&dice.nasty().to_le_bytes());
                    }
                }
            }
        }
        server.reply(asked, &payload, &bulk).ok()?;
        self.last = Some(asked);
        self.bell.ring(Doorbell::Channel);
        Some(())
    }

    /// What a shim would answer.
    fn honest(&mut self, call: &Call) -> Option<(Vec<u8>, Vec<u8>)> {
        let nothing = (Vec::new(), Vec::new());
        Some(match call {
            Call::CreateVm(_) => (Writer::default().put(&self.create()?).done(), Vec::new()),
            Call::AddRam(request) => (Writer::default().list(&[self.add_ram(request)?]).done(), Vec::new()),
            Call::SupportedCpuid => (Vec::new(), Writer::default().list(&cpuid()).done()),
            Call::GetState(_) => {
                let records = Records::default().put(Record::REGS, &Regs::default());
                let records = records.put(Record::SREGS, &Sregs::default()).put(Record::MP_STATE, &MpState::RUNNABLE);
                (Vec::new(), records.done())
            }
            Call::Run(_) => {
                if let Attack::None(value) = self.attack {
                    let request = Request::access(Kind::PIO, Direction::Write, 0xf4, value.into(), 1, 1);
                    self.lane.as_mut()?.submit(&request).ok()?;
                    self.bell.ring(Doorbell::Lanes);
                }
                nothing
            }
            Call::Statistics => (Vec::new(), Writer::default().list::<u64>(&[]).done()),
            _ => nothing,
        })
    }

    fn create(&mut self) -> Option<VmCreated> {
        let (inbox, outbox) = (MOST_VCPUS * (2 * LINE + STRING_PAGE), MOST_VCPUS * STRING_PAGE);
        let inbox = self.function.map_mailbox(inbox, true).ok()?;
        let outbox = self.function.map_mailbox(outbox, false).ok()?;
        let (ins, lines) = (inbox.0, inbox.0 + (MOST_VCPUS * STRING_PAGE) as u64);
        let created = VmCreated {
            completions: lines,
            credits: lines + (MOST_VCPUS * LINE) as u64,
            ins,
            outs: outbox.0,
            tsc_khz: 2_000_000,
            lane_vector: 1,
            lane_vectors: 1,
            free_vector: 2,
            free_vectors: 8,
            features: VmCreated::POSTING,
        };
        let at = |address: u64, len| inbox.1.cut((address - inbox.0) as usize, len);
        let windows = HostWindows {
            request: self.region(Type::LANE_REQUESTS)?.cut(0, LINE)?,
            control: self.region(Type::LANE_CONTROLS)?.cut(0, LINE)?,
            posted: self.region(Type::LANE_POSTED)?.cut(0, POSTED_RING)?,
            completion: at(created.completions, LINE)?,
            credit: at(created.credits, LINE)?,
            soc_idle: self.region(Type::SOC_LINES)?.cut(api_channel::lines::soc::LANES_IDLE, 8)?,
            outs: outbox.1.cut(0, STRING_PAGE)?,
            ins: at(created.ins, STRING_PAGE)?,
        };
        self.lane = Some(HostLane::new(windows));
        self.lanes = Some([inbox, outbox]);
        Some(created)
    }

    fn add_ram(&mut self, request: &RamRequest) -> Option<Extent> {
        let memory = sealed_memfd("ram", request.len).ok()?;
        self.function.map_ram(memory.as_fd(), 0, request.iova, request.len, true).ok()?;
        self.rams.push((request.iova, memory));
        Some(Extent { offset: 0, iova: request.iova, len: request.len })
    }

    /// Attacks through the channel.
    fn strike_channel(&mut self, server: &mut Server<Window, Window>) {
        let dice = &mut self.dice;
        match self.attack {
            Attack::Logs => {
                for _ in 0..100 {
                    let text = format!("\x1b[2J{}\r\nsoc-vmm: a lie\u{7f}", "x".repeat(dice.below(600) as usize));
                    let _ = server.event(&Event::Log { level: dice.below(6) as u8, text });
                }
                let _ = server.event(&Event::Eoi { gsi: dice.nasty() as u32 });
            }
            Attack::Events => {
                let why = String::from_utf8_lossy(&dice.bytes(300)).into_owned();
                let _ = match dice.below(40) {
                    0..4 => server.event(&Event::Log { level: dice.nasty() as u8, text: why }),
                    _ => server.event(&Event::Eoi { gsi: dice.nasty() as u32 }),
                };
            }
            _ => return,
        }
        self.bell.ring(Doorbell::Channel);
    }

    /// Attacks by what a host can write.
    fn strike(&mut self) {
        self.struck += 1;
        match self.attack {
            Attack::ChangingHeader => self.change(0, 7, HEADER_WORDS),
            Attack::ChangingTable => {
                let table = regions::TABLE as usize;
                self.change(table, self.layout.regions.len() as u64 * 4, 1);
            }
            Attack::Rings => self.scribble_rings(),
            Attack::Lanes => self.scribble(&[Type::LANE_REQUESTS, Type::LANE_CONTROLS, Type::LANE_POSTED], LINE),
            Attack::Requests => self.nearly_lawful(),
            Attack::Posted => self.scribble(&[Type::LANE_POSTED, Type::LANE_CONTROLS], POSTED_RING),
            Attack::Reports => self.report(),
            Attack::Card => {
                let kinds = [Type::HOST_LINES, Type::REPLIES, Type::EVENTS, Type::LANE_REQUESTS, Type::LANE_CONTROLS];
                self.scribble(&kinds, 1 << 16);
            }
            Attack::Mailbox => {
                let lanes = self.lanes.iter().flatten().map(|(_, memory)| memory.clone());
                for memory in lanes.chain([self.inbox.1.clone(), self.outbox.1.clone()]) {
                    for _ in 0..64 {
                        let at = self.dice.below(memory.len() as u64 / 8) as usize * 8;
                        memory.store(at, self.dice.nasty());
                    }
                }
            }
            Attack::Unmap if self.struck == 1 => {
                let lanes = self.lanes.iter().flatten().map(|(iova, _)| *iova);
                let rams = self.rams.iter().map(|(iova, _)| *iova);
                let mut all: Vec<_> = lanes.chain(rams).chain([self.inbox.0, self.outbox.0]).collect();
                let first = self.dice.below(all.len() as u64) as usize;
                all.rotate_left(first);
                for iova in all {
                    let _ = self.function.unmap(iova);
                }
            }
            Attack::Packets => {
                let len = *self.dice.one(&[0, 1, 8, 47, 48, 49, 4096]);
                let mut packet = self.dice.bytes(len);
                if len >= 16 && self.dice.below(2) == 0 {
                    packet[..8].copy_from_slice(b"OUTBLOC1");
                    packet[8..16].copy_from_slice(&(1 + self.dice.below(6)).to_le_bytes());
                }
                let _ = send(self.raw.as_raw_fd(), &packet, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
            }
            _ => {}
        }
        let rings = !matches!(self.attack, Attack::None(_) | Attack::Silence | Attack::StaleReply | Attack::Reply);
        if rings {
            Doorbell::ALL.iter().for_each(|&bell| self.bell.ring(bell));
        }
    }

    /// Changes words in place, faster than anybody reads them, and puts what is right back.
    fn change(&mut self, at: usize, count: u64, magic: u64) {
        for _ in 0..20_000 {
            let word = at + self.dice.below(count) as usize * 8;
            let before = self.card.load(word);
            let other = if word == 0 && magic != 1 { MAGIC } else { self.dice.nasty() };
            self.card.store(word, other);
            self.card.store(word, before);
        }
    }

    /// Random words at random places of the first `most` bytes of regions of card memory.
    fn scribble(&mut self, kinds: &[Type], most: usize) {
        for &kind in kinds {
            let Some(window) = self.region(kind) else { continue };
            for _ in 0..16 {
                let at = self.dice.below(window.len().min(most) as u64 / 8) as usize * 8;
                let word = self.dice.nasty();
                // Often a sequence that is the next one: the rest of the line is looked at then.
                let word = if self.dice.below(2) == 0 { word & !0xffff_ffff | (1 + self.dice.below(2)) } else { word };
                window.store(at, word);
            }
        }
    }

    /// Messages with something wrong in the rings, and tails that say that they are there.
    fn scribble_rings(&mut self) {
        let (Some(lines), Some(replies), Some(events)) =
            (self.region(Type::HOST_LINES), self.region(Type::REPLIES), self.region(Type::EVENTS))
        else {
            return;
        };
        let dice = &mut self.dice;
        let (ring, tail) =
            if dice.below(2) == 0 { (replies, words::REPLIES_TAIL) } else { (events, words::EVENTS_TAIL) };
        let header = Header {
            opcode: dice.nasty() as u16,
            class: *dice.one(&[Class::Request, Class::Order, Class::Reply, Class::Event]),
            length: dice.nasty() as u32,
            sequence: dice.below(20) as u32,
            status: Status(dice.nasty() as u32),
            epoch: dice.nasty(),
            extra: dice.nasty() as u32,
        };
        let bytes: [u8; HEADER] = header.to_bytes();
        let slot = lines.load(tail) as usize % (ring.len() / 64) * 64;
        ring.copy_in(slot, &bytes);
        let step = if dice.below(4) == 0 { dice.nasty() } else { 1 };
        lines.store(tail, lines.load(tail).wrapping_add(step));
    }

    /// A request that is right but for one word, or one field of the last.
    fn nearly_lawful(&mut self) {
        let Some(line) = self.region(Type::LANE_REQUESTS) else { return };
        let dice = &mut self.dice;
        let kind = 1 + dice.below(8);
        let length = *dice.one(&[1u64, 2, 4, 8, 0, 3, 4096, 4097, 0xffff]);
        let flags = dice.below(8);
        let sequence = u64::from(self.struck) & 0xffff_ffff;
        let header = sequence | kind << 32 | flags << 40 | length << 48;
        let header = if dice.below(8) == 0 { header ^ 1 << dice.below(64) } else { header };
        for word in 0..6 {
            line.store(word * 8, dice.nasty());
        }
        line.store(32, *dice.one(&[0x3f8, 0x402, 0x600, 0x70, 0xcf9, 0xfee0_0000, u64::MAX]));
        line.store(40, *dice.one(&[1, 2, 4, 0, u64::MAX]));
        line.store(56, header);
    }

    /// Lawful exit reports, as many as are served.
    fn report(&mut self) {
        for _ in 0..200 {
            let Some(lane) = &mut self.lane else { return };
            let report = Request {
                words: Some([0; 4]),
                ..Request::access(Kind::EXIT_REPORT, Direction::Write, exit_reason::SHUTDOWN, 0, 0, 1)
            };
            if lane.poll().is_err() {
                return;
            }
            let _ = lane.submit(&report);
            self.bell.ring(Doorbell::Lanes);
            std::thread::yield_now();
        }
    }
}

/// Words of the header that may change.
const HEADER_WORDS: u64 = 7;

/// A CPUID table with what every guest needs.
fn cpuid() -> Vec<CpuidEntry> {
    let entry = |function, eax, edx| CpuidEntry { function, index: 0, flags: 0, eax, ebx: 0, ecx: 0, edx, reserved: 0 };
    vec![
        entry(0, 1, 0),
        entry(1, 0x000a_0671, 0x0788_fbff),
        entry(0x8000_0000, 0x8000_0008, 0),
        entry(0x8000_0001, 0, 0x2000_0000),
        entry(0x8000_0008, 0x3030, 0),
    ]
}
