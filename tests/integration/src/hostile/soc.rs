//! A SoC that asks a real shim for anything, in any state of its VM.

use std::path::Path;
use std::time::{Duration, Instant};

use api_channel::Status;
use api_channel::call::{
    Call, CpuidEntry, CreateVm, DirtyFetch, DirtyLimit, Discard, IoEvent, Irqchip, Irqfd, LateRun, Memslot, Msi, Name,
    NotifyPage, PostedRange, RamRequest, Route, StateRequest, VCPU_ALL, VM, VmCreated,
};
use api_channel::codec::Reader;
use api_channel::lines::{host as host_words, soc as soc_words};
use api_channel::message::{Class, HEADER, Header, SLOT};
use api_channel::state::{MpState, Records, Regs, Segment, Sregs, Table, Type as Record};
use ioreq_ring::{BusMemory, LineChange};
use pcie_function::header::{HostHeader, SocHeader, VERSION, epoch};
use pcie_function::local::{LocalRemote, LocalSoc};
use pcie_function::regions::{self, Spaces, Type};
use pcie_function::{SocFunction, Window};

use super::Dice;

/// How long an honest answer may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// RAM of its VMs, in bytes.
const MEMORY: u64 = 1 << 20;

/// How far a VM has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// There is none.
    None,
    /// Created, without memory.
    Created,
    /// With memory that no slot shows.
    Ram,
    /// Its two vCPUs stand.
    Ready,
    /// Its vCPUs run, and each waits for the answer to its first exit.
    Running,
    /// The same, told to pause: the pause waits for the answers.
    Pausing,
    /// Its vCPUs stand, its writes are logged.
    Logging,
}

impl Stage {
    /// Every stage.
    pub const ALL: [Self; 7] =
        [Self::None, Self::Created, Self::Ram, Self::Ready, Self::Running, Self::Pausing, Self::Logging];
}

/// The other end of a shim, free to break every rule. It speaks the channel word by word.
#[derive(Debug)]
pub struct HostileSoc {
    function: LocalSoc,
    header: HostHeader,
    epoch: u64,
    host_lines: Window,
    replies: (Window, u64),
    events: (Window, u64),
    /// The SoC's lines in the inbox.
    pub lines: LocalRemote,
    requests: (LocalRemote, u64),
    bulk: LocalRemote,
    fetched: u64,
    sequence: u32,
    /// The inbox, whole.
    pub inbox: LocalRemote,
    /// The VM's lanes, once it was created honestly.
    pub created: Option<VmCreated>,
}

/// What a message was answered with: status, payload, bulk.
type Answer = (Status, Vec<u8>, Vec<u8>);

impl HostileSoc {
    /// Connects to the shim at `path`, honestly.
    ///
    /// # Panics
    /// It doesn't offer its function.
    pub fn dial(path: &Path) -> Self {
        let start = Instant::now();
        let function = loop {
            // A shim that still cleans up after the last one keeps the next waiting.
            match LocalSoc::dial(path) {
                Ok(function) => break function,
                Err(why) => assert!(start.elapsed() < PATIENCE, "the shim is not there any more: {why}"),
            }
        };
        Self::answer(function, 0)
    }

    /// Answers the function's next offer, another one than `known`.
    fn answer(function: LocalSoc, known: u64) -> Self {
        let card = function.card_memory();
        let start = Instant::now();
        let header = loop {
            match HostHeader::load(&card).expect("the host's header") {
                Some(header) if header.nonce != known => break header,
                _ => assert!(start.elapsed() < PATIENCE, "the shim offers nothing"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let spaces =
            Spaces { card: card.len() as u64, inbox: header.inbox_len.into(), outbox: header.outbox_len.into() };
        let regions = regions::load(&card, header.table, header.regions, &spaces).expect("the host's regions");
        let find = |kind| regions::find(&regions, kind, 0, 0).expect("a region");
        let inbox = function.remote(header.inbox, header.inbox_len as usize);
        let outbox = function.remote(header.outbox, header.outbox_len as usize);
        let here = |kind| regions::window(&card, &find(kind)).expect("a region of card memory");
        let there = |memory: &LocalRemote, kind| regions::window(memory, &find(kind)).expect("a region of the mailbox");
        let nonce = header.nonce.rotate_left(7) | 1;
        let soc = Self {
            epoch: epoch(header.nonce, nonce),
            host_lines: here(Type::HOST_LINES),
            replies: (here(Type::REPLIES), 0),
            events: (here(Type::EVENTS), 0),
            lines: there(&inbox, Type::SOC_LINES),
            requests: (there(&inbox, Type::REQUESTS), 0),
            bulk: there(&outbox, Type::BULK),
            fetched: 0,
            sequence: 0,
            inbox,
            created: None,
            header,
            function,
        };
        SocHeader { version: VERSION, features: 0, host_nonce: header.nonce, nonce }.store(&soc.lines);
        soc.function.raise(0);
        soc
    }

    /// Calls honestly and waits.
    ///
    /// # Panics
    /// The shim doesn't answer, or refuses.
    pub fn ok(&mut self, call: &Call) -> (Vec<u8>, Vec<u8>) {
        self.send(Class::Request, call.opcode(), &call.encode());
        let start = Instant::now();
        loop {
            for (sequence, (status, payload, bulk)) in self.take() {
                if sequence == self.sequence {
                    assert_eq!(status, Status::OK, "{call:?}: {}", String::from_utf8_lossy(&payload));
                    return (payload, bulk);
                }
            }
            assert!(start.elapsed() < PATIENCE, "no answer to {call:?}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Brings a VM as far as `stage`.
    pub fn reach(&mut self, stage: Stage) {
        if stage >= Stage::Created {
            let create = CreateVm {
                vcpus: 2,
                irqchip: Irqchip::Full as u32,
                flags: 0,
                dirty_ring: 0,
                spin_ns: 0,
                name: Name::NONE,
            };
            let (payload, _) = self.ok(&Call::CreateVm(create));
            self.created = Some(Reader::new(&payload).take().expect("what was created"));
        }
        if stage >= Stage::Ram {
            self.ok(&Call::AddRam(RamRequest { id: 0, node: -1, len: MEMORY, iova: 0, huge: 0 }));
        }
        if stage >= Stage::Ready {
            self.ok(&Call::SetMemslots(vec![Memslot { base: 0, len: MEMORY, offset: 0, ram: 0, flags: 0 }]));
            // in al, 0x80; jmp back
            self.function.write(CODE, &[0xe4, 0x80, 0xeb, 0xfc]).expect("DMA to the guest's memory");
            for vcpu in 0..2 {
                self.ok(&Call::SetState { target: vcpu, records: real_mode() });
            }
        }
        if matches!(stage, Stage::Running | Stage::Pausing) {
            self.ok(&Call::Run(VCPU_ALL));
        }
        if stage == Stage::Pausing {
            self.send(Class::Request, Call::Pause(0).opcode(), &Call::Pause(VCPU_ALL).encode());
        }
        if stage == Stage::Logging {
            self.ok(&Call::DirtyLog(true));
        }
    }

    /// Sends a message of this connection, if there is room for it.
    pub fn send(&mut self, class: Class, opcode: u16, payload: &[u8]) {
        self.sequence = self.sequence.wrapping_add(1);
        let header = Header {
            opcode,
            class,
            length: payload.len() as u32,
            sequence: self.sequence,
            status: Status::OK,
            epoch: self.epoch,
            extra: 0,
        };
        self.put(&header, payload);
    }

    /// Puts a message into the ring, whatever it says, if there is room for it.
    pub fn put(&mut self, header: &Header, payload: &[u8]) {
        let (ring, tail) = &mut self.requests;
        let capacity = (ring.len() / SLOT) as u64;
        let bytes = [&header.to_bytes()[..], payload].concat();
        let slots = bytes.len().div_ceil(SLOT) as u64;
        if *tail + slots - self.host_lines.load(host_words::REQUESTS_HEAD) > capacity {
            return;
        }
        for (i, slot) in bytes.chunks(SLOT).enumerate() {
            ring.copy_in(((*tail + i as u64) % capacity) as usize * SLOT, slot);
        }
        *tail += slots;
        self.lines.store(soc_words::REQUESTS_TAIL, *tail);
        self.function.raise(0);
    }

    /// Lets the shim go on: its answers and events count as read.
    pub fn discard(&mut self) {
        self.take();
    }

    /// Takes what the shim has answered, by sequence; its events count as read.
    fn take(&mut self) -> Vec<(u32, Answer)> {
        let mut all = Vec::new();
        let capacity = (self.replies.0.len() / SLOT) as u64;
        let tail = self.host_lines.load(host_words::REPLIES_TAIL);
        while self.replies.1 < tail {
            let slot = |n: u64| (n % capacity) as usize * SLOT;
            let mut bytes = vec![0; SLOT];
            self.replies.0.copy_out(slot(self.replies.1), &mut bytes);
            let header = Header::parse(bytes[..HEADER].try_into().expect("a header")).expect("a lawful header");
            let slots = (HEADER + header.length as usize).div_ceil(SLOT) as u64;
            for i in 1..slots {
                let mut more = vec![0; SLOT];
                self.replies.0.copy_out(slot(self.replies.1 + i), &mut more);
                bytes.extend(more);
            }
            self.replies.1 += slots;
            let payload = bytes[HEADER..][..header.length as usize].to_vec();
            let mut bulk = vec![0; header.extra as usize];
            if !bulk.is_empty() {
                self.bulk.copy_out(0, &mut bulk);
                self.fetched += 1;
                self.lines.store(soc_words::BULK_FETCHED, self.fetched);
            }
            all.push((header.sequence, (header.status, payload, bulk)));
        }
        self.lines.store(soc_words::REPLIES_HEAD, self.replies.1);
        self.events.1 = self.host_lines.load(host_words::EVENTS_TAIL);
        self.lines.store(soc_words::EVENTS_HEAD, self.events.1);
        self.function.raise(0);
        all
    }

    /// Whether the shim has ended this connection: it hung up, or offers the function anew.
    pub fn is_over(&self) -> bool {
        let anew = HostHeader::load(&self.function.card_memory())
            .is_ok_and(|h| h.is_none_or(|h| h.nonce != self.header.nonce));
        anew || self.function.check().is_err()
    }

    /// Whether the shim is still there after all that was sent: it answers, or has ended the connection.
    ///
    /// # Panics
    /// It does neither.
    pub fn is_answered(&mut self, what: &str) {
        let start = Instant::now();
        let mut sent = None;
        while !self.is_over() {
            let answers = self.take();
            if sent.is_some_and(|sent| answers.iter().any(|(sequence, _)| *sequence == sent)) {
                return;
            }
            // There may be no room before what was sent has been read.
            let before = self.requests.1;
            if sent.is_none() {
                self.send(Class::Request, Call::Ping.opcode(), &[]);
                sent = (self.requests.1 != before).then_some(self.sequence);
            }
            assert!(start.elapsed() < PATIENCE, "{what}: the shim hangs");
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// Takes the function up again if the shim has ended the connection and offers it anew.
    pub fn again_if_over(self) -> Option<Self> {
        if !self.is_over() || self.function.check().is_err() {
            return None;
        }
        Some(Self::answer(self.function, self.header.nonce))
    }

    /// A window of host memory, wherever it is said to be.
    pub fn remote(&self, iova: u64, len: usize) -> LocalRemote {
        self.function.remote(iova, len)
    }

    /// Raises a vector.
    pub fn raise(&self, vector: u32) {
        self.function.raise(vector);
    }
}

const CODE: u64 = 0x1000;

/// A vCPU in real mode at [`CODE`].
fn real_mode() -> Vec<u8> {
    let segment = |attributes| Segment { base: 0, limit: 0xffff, selector: 0, attributes };
    let (data, table) = (segment(0x93), Table { base: 0, limit: 0xffff });
    let sregs = Sregs {
        cs: segment(0x9b),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: segment(0x8b),
        ldt: segment(0x82),
        gdt: table,
        idt: table,
        cr0: 0x6000_0010,
        apic_base: 0xfee0_0800,
        ..Sregs::default()
    };
    let regs = Regs { rip: CODE, rsp: 0x8000, rflags: 2, ..Regs::default() };
    let records = Records::default().put(Record::SREGS, &sregs).put(Record::REGS, &regs);
    records.put(Record::MP_STATE, &MpState::RUNNABLE).done()
}

/// Opcodes of every call but the one that ends the shim.
const OPCODES: &[u16] = &[
    0x001, 0x010, 0x011, 0x012, 0x100, 0x101, 0x102, 0x110, 0x111, 0x112, 0x200, 0x201, 0x210, 0x211, 0x300, 0x301,
    0x302, 0x400, 0x401, 0x402, 0x403, 0x500, 0x501, 0x502, 0x600, 0x601, 0x602, 0x610, 0x611, 0x612, 0x613, 0x700,
    0x8001,
];

/// A call that nobody should make: an opcode and a payload, random or nearly right.
pub fn random_call(dice: &mut Dice) -> (u16, Vec<u8>) {
    let opcode = *dice.one(OPCODES);
    if dice.below(3) == 0 {
        let len = if dice.below(8) == 0 { dice.below(8000) } else { dice.below(96) };
        return (opcode, dice.bytes(len as usize));
    }
    let call = nearly_right(dice, opcode);
    let mut payload = call.encode();
    if dice.below(6) == 0 {
        let len = dice.below(payload.len() as u64 + 9) as usize;
        payload.resize(len, 0xff);
    }
    (call.opcode(), payload)
}

fn nearly_right(dice: &mut Dice, opcode: u16) -> Call {
    let vcpu = *dice.one(&[0, 1, 2, VCPU_ALL, VM, 1 << 20]);
    let count = dice.below(5);
    match opcode {
        0x100 => Call::CreateVm(CreateVm {
            vcpus: *dice.one(&[0, 1, 2, 3, 1 << 20, u32::MAX]),
            irqchip: *dice.one(&[0, 1, 1, 2, 2, 3]),
            flags: *dice.one(&[0, 0, 0, CreateVm::HV_SYNIC, 2, u32::MAX]),
            dirty_ring: *dice.one(&[0, 0, 0, 1024, 1, 1000, 1 << 31, u32::MAX]),
            spin_ns: *dice.one(&[0, 1000, 10_000_001, u64::MAX]),
            name: Name(*dice.one(&[[0; 64], [b'n'; 64], [0x1b; 64], [0xff; 64]])),
        }),
        0x101 => Call::DestroyVm,
        0x102 => Call::SetApicIds((0..count).map(|_| *dice.one(&[0, 1, 1, 2, 254, 255, 4095, u32::MAX])).collect()),
        0x110 => Call::AddRam(RamRequest {
            id: *dice.one(&[0, 1, 2, 63, 64, u32::MAX]),
            node: *dice.one(&[-1, -1, 0, 1, -2, i32::MAX]),
            len: *dice.one(&[4096, 1 << 20, 4 << 20, 0, 4097, 1 << 46, 1 << 63, u64::MAX - 4095]),
            iova: *dice.one(&[0, 1 << 20, 1 << 32, 4097, 1 << 56, u64::MAX - 4095]),
            huge: *dice.one(&[0, 0, 0, 0x20_0000, 0x4000_0000, 1]),
        }),
        0x111 => {
            let slot = |dice: &mut Dice| Memslot {
                base: *dice.one(&[0, 4096, 1 << 20, 0xfee0_0000, u64::MAX - 4095, 1]),
                len: *dice.one(&[4096, 1 << 20, 0, 1, 1 << 40, u64::MAX - 4095]),
                offset: *dice.one(&[0, 0, 4096, 1 << 20, u64::MAX - 4095]),
                ram: *dice.one(&[0, 0, 1, 2, 64]),
                flags: *dice.one(&[0, 0, 1, 2, u32::MAX]),
            };
            Call::SetMemslots((0..count).map(|_| slot(dice)).collect())
        }
        0x112 => {
            let run = |dice: &mut Dice| Discard {
                ram: *dice.one(&[0, 0, 1, 64]),
                reserved: *dice.one(&[0, 0, 0, 1]),
                offset: *dice.one(&[0, 4096, 1 << 20, 1, u64::MAX - 4095]),
                len: *dice.one(&[4096, 1 << 20, 0, 1, u64::MAX - 4095]),
            };
            Call::Discard((0..count).map(|_| run(dice)).collect())
        }
        0x200 => {
            let mut word = || dice.nasty() as u32;
            let mut entry = || CpuidEntry {
                function: word() & 0x8000_001f,
                index: word() & 3,
                flags: word() & 1,
                eax: word(),
                ebx: word(),
                ecx: word(),
                edx: word(),
                reserved: 0,
            };
            let entries = (0..count * 20).map(|_| entry()).collect();
            Call::SetCpuid { vcpu, entries }
        }
        0x201 => Call::SetAffinity { vcpu, cpus: (0..count).map(|_| *dice.one(&[0, 1, 1023, u32::MAX])).collect() },
        0x210 => Call::GetState(StateRequest { target: vcpu, reserved: 0, groups: dice.nasty() }),
        0x211 => {
            // Registers that any guest may have; what KVM makes of worse is KVM's.
            let regs = Regs { rip: dice.below(MEMORY), rflags: 2, rax: dice.word(), ..Regs::default() };
            let records = match dice.below(3) {
                0 => Records::default().put(Record::REGS, &regs).done(),
                1 => Records::default().put(Record::MP_STATE, &MpState { state: dice.nasty() }).done(),
                _ => {
                    let mut records = Records::default().put(Record::REGS, &regs).done();
                    let at = dice.below(8) as usize;
                    records[at] ^= 1 << dice.below(8);
                    records
                }
            };
            Call::SetState { target: vcpu, records }
        }
        0x300 => Call::Run(vcpu),
        0x301 => Call::Pause(vcpu),
        0x302 => Call::Kick(vcpu),
        0x400 => {
            let route = |dice: &mut Dice| Route {
                gsi: *dice.one(&[0, 4, 23, 24, 4095, u32::MAX]),
                kind: dice.below(5) as u32,
                address: if dice.below(3) == 0 { dice.below(3) } else { dice.nasty() },
                data: if dice.below(3) == 0 { dice.below(18) as u32 } else { dice.nasty() as u32 },
                reserved: *dice.one(&[0, 0, 1]),
            };
            Call::SetRouting((0..count).map(|_| route(dice)).collect())
        }
        0x401 => Call::Msi(Msi { address: dice.nasty(), data: dice.nasty() as u32, reserved: 0 }),
        0x402 => {
            let line = |dice: &mut Dice| match dice.below(2) {
                0 => dice.nasty(),
                _ => LineChange { gsi: dice.below(30) as u16, high: dice.below(2) == 0, sequence: dice.word() as u32 }
                    .to_word(),
            };
            Call::Lines((0..count).map(|_| line(dice)).collect())
        }
        0x403 => Call::Irqfd(Irqfd {
            vector: dice.below(70) as u32,
            gsi: *dice.one(&[0, 4, 23, 24, u32::MAX]),
            on: dice.below(3) as u32,
            resample: dice.below(3) as u32,
        }),
        0x500 => Call::IoEvent(IoEvent {
            address: dice.nasty(),
            data: dice.nasty(),
            len: *dice.one(&[0, 1, 2, 3, 4, 8, 9, u32::MAX]),
            port: dice.below(3) as u32,
            match_data: dice.below(3) as u32,
            on: dice.below(3) as u32,
            event: *dice.one(&[0, 0, 1, u32::MAX]),
            reserved: *dice.one(&[0, 0, 0, 1]),
        }),
        0x501 => {
            let range = |dice: &mut Dice| PostedRange { base: dice.nasty(), len: dice.nasty(), ports: dice.below(3) };
            Call::PostedRanges((0..count).map(|_| range(dice)).collect())
        }
        0x502 => {
            let page = |dice: &mut Dice| NotifyPage {
                base: *dice.one(&[0, 4096, 1 << 20, 0xfee0_0000, 1 << 40, 1, u64::MAX - 4095]),
                page: *dice.one(&[0, 1, 31, 32, u32::MAX]),
                reserved: *dice.one(&[0, 0, 0, 1]),
            };
            Call::NotifyPages((0..count).map(|_| page(dice)).collect())
        }
        0x600 => Call::DirtyLog(dice.below(2) == 0),
        0x601 => Call::DirtyFetch(DirtyFetch {
            ram: *dice.one(&[0, 0, 1, 64]),
            flags: dice.below(5) as u32,
            first: dice.nasty(),
            pages: dice.nasty(),
        }),
        0x602 => Call::DirtyLimit(DirtyLimit {
            vcpu,
            reserved: *dice.one(&[0, 0, 0, 1]),
            pages: *dice.one(&[0, 1, 1 << 20, u64::MAX]),
        }),
        0x610 => Call::CanPostCopy,
        0x611 | 0x613 => {
            let run = |dice: &mut Dice| LateRun {
                ram: *dice.one(&[0, 0, 1, 64]),
                reserved: *dice.one(&[0, 0, 0, 1]),
                first: *dice.one(&[0, 1, 17, 1 << 20, u64::MAX]),
                pages: *dice.one(&[0, 1, 1, 64, 1 << 20, u64::MAX]),
            };
            let runs = (0..count).map(|_| run(dice)).collect();
            if opcode == 0x611 { Call::Lacks(runs) } else { Call::Placed(runs) }
        }
        0x612 => Call::PostCopy(dice.below(2) == 0),
        0x010 => Call::HostInfo,
        0x011 => Call::SupportedCpuid,
        0x012 => Call::SupportedHvCpuid,
        0x700 => Call::Statistics,
        _ => Call::Ping,
    }
}
