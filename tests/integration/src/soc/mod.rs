//! A small SoC side: what a test puts in soc-vmm's place to see every request, and to decide on every answer.
//!
//! It is one thread, the test's own. [`Soc::take`] waits for what a vCPU wants, [`Soc::answer`] answers it, [`Soc::call`] asks the
//! host for something. On the other end is a real shim: a process ([`Soc::start`]), or a thread of the test ([`Soc::modelled`]),
//! where both ends' crossings of the bus are counted.

mod board;
mod guest;
mod ioapic;
mod level;
mod shim;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api_channel::call::{Call, Statistic, VCPU_ALL, VmCreated};
use api_channel::codec::Reader;
use api_channel::event::Event;
use api_channel::{Client, ClientWindows, Incoming, Status};
use ioreq_ring::{BusMemory, Completion, Direction, Kind, Request, SocIdle, SocLane, drain};
use pcie_function::header::{HostHeader, SocHeader, VERSION, epoch};
use pcie_function::local::LocalSoc;
use pcie_function::modelled::{Crossings, Latencies, Link, ModelledHost, ModelledSoc};
use pcie_function::regions::{self, Region, Spaces, Type};
use pcie_function::{Doorbell, SocFunction, Window, Windowed};

pub use board::Board;
pub use guest::{FLAT_CODE, Shape};
pub use ioapic::Ioapic;
pub use level::resampled;
use shim::Shim;

/// What is waited for at most, anywhere: a hang is a failure, not a wait.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A lane of a function of type `F`.
pub type Lane<F> = SocLane<<F as SocFunction>::Card, <F as SocFunction>::Remote, Window>;

/// What a call was answered with: payload and bulk.
pub type Reply = (Vec<u8>, Vec<u8>);

/// A request, or a posted write, as the SoC saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Whose.
    pub lane: usize,
    /// What.
    pub request: Request,
    /// Whether nobody waits for an answer.
    pub posted: bool,
    /// The bytes of a string write.
    pub string: Vec<u8>,
}

impl Seen {
    /// Whether it reads `port`.
    pub fn reads(&self, port: u16) -> bool {
        self.touches(port, Direction::Read)
    }

    /// Whether it writes `port`.
    pub fn writes(&self, port: u16) -> bool {
        self.touches(port, Direction::Write)
    }

    fn touches(&self, port: u16, direction: Direction) -> bool {
        let Request { kind, address, .. } = self.request;
        (kind, address, self.request.direction) == (Kind::PIO, port.into(), direction)
    }
}

/// An answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// As it stands.
    Plain(Completion),
    /// To a string read: its bytes.
    String(Vec<u8>),
}

/// The SoC's end of a function with a VM on it.
pub struct Soc<F: SocFunction = LocalSoc> {
    // Lanes and client first: the function's hang-up ends the shim.
    lanes: Vec<Lane<F>>,
    client: Client<F::Card, F::Remote>,
    idle: SocIdle<F::Remote>,
    /// The function.
    pub function: F,
    regions: Vec<Region>,
    created: Option<VmCreated>,
    vcpus: u32,
    /// IOVA of RAM 0, and its bytes.
    ram: (u64, u64),
    waiting: VecDeque<Seen>,
    /// What the host reported.
    pub events: Vec<Event>,
    last_beat: Instant,
    /// Heartbeats sent: each is a DMA write.
    pub beats: u64,
    shim: Shim,
}

/// Counters of both ends of a modelled function.
pub struct Counters {
    /// What the host's end did.
    pub host: Arc<Crossings>,
    /// What the SoC's end did.
    pub soc: Arc<Crossings>,
}

impl Soc<LocalSoc> {
    /// Connects to a shim of its own, a process that serves one VM; `more` are more arguments of it.
    pub fn start(more: &[&str]) -> Self {
        let (shim, socket) = Shim::process(crate::program("host-kvm-shim"), more);
        Self::connect(LocalSoc::new(socket).expect("the shim's function"), shim)
    }

    /// As [`Soc::start`], with a shim that is optimized whatever the test is.
    pub fn start_optimized() -> Self {
        let (shim, socket) = Shim::process(crate::optimized_program("host-kvm-shim"), &[]);
        Self::connect(LocalSoc::new(socket).expect("the shim's function"), shim)
    }

    /// Connects to a shim that serves one VM in a thread of this process.
    pub fn in_process() -> Self {
        let (shim, socket) = Shim::thread(|function| function);
        Self::connect(LocalSoc::new(socket).expect("the shim's function"), shim)
    }
}

impl Soc<ModelledSoc<LocalSoc>> {
    /// As [`Soc::in_process`], with every crossing counted, and as slow as that.
    pub fn modelled(latencies: Latencies) -> (Self, Counters) {
        let counters = Counters { host: Arc::default(), soc: Arc::default() };
        let link = Link::new(latencies).expect("a link");
        let (host, its_end) = (counters.host.clone(), link.clone());
        let (shim, socket) = Shim::thread(move |function| ModelledHost::across(function, host, &its_end));
        let function = LocalSoc::new(socket).expect("the shim's function");
        (Self::connect(ModelledSoc::across(function, counters.soc.clone(), &link), shim), counters)
    }
}

impl<F: SocFunction> Soc<F> {
    /// Connects to the shim behind `function`, whoever started it.
    pub fn on(function: F) -> Self {
        Self::connect(function, Shim::Elsewhere)
    }

    fn connect(function: F, shim: Shim) -> Self {
        let card = function.card_memory();
        let deadline = Instant::now() + PATIENCE;
        let header = loop {
            function.renew().expect("the function carries");
            if let Some(header) = HostHeader::load(&card).expect("the host's header") {
                break header;
            }
            assert!(Instant::now() < deadline, "the shim offers nothing");
            std::thread::sleep(Duration::from_micros(200));
        };
        let spaces =
            Spaces { card: card.len() as u64, inbox: header.inbox_len.into(), outbox: header.outbox_len.into() };
        let regions = regions::load(&card, header.table, header.regions, &spaces).expect("the host's regions");
        let inbox = function.remote(header.inbox, header.inbox_len as usize);
        let outbox = function.remote(header.outbox, header.outbox_len as usize);
        let find = |kind| regions::find(&regions, kind, 0, 0).expect("a region");
        let here = |kind| regions::window(&card, &find(kind)).expect("a region of card memory");
        let there = |memory: &F::Remote, kind| regions::window(memory, &find(kind)).expect("a region of the mailbox");
        let soc_lines = there(&inbox, Type::SOC_LINES);
        let windows = ClientWindows {
            host_lines: here(Type::HOST_LINES),
            replies: here(Type::REPLIES),
            events: here(Type::EVENTS),
            soc_lines: soc_lines.clone(),
            requests: there(&inbox, Type::REQUESTS),
            bulk: there(&outbox, Type::BULK),
        };
        const NONCE: u64 = 0x5eed;
        let client = Client::new(windows, epoch(header.nonce, NONCE));
        SocHeader { version: VERSION, features: header.features, host_nonce: header.nonce, nonce: NONCE }.store(&inbox);
        function.raise(CHANNEL_VECTOR);
        let idle = soc_lines.cut(api_channel::lines::soc::LANES_IDLE, 8).expect("a line");
        Self {
            lanes: Vec::new(),
            client,
            idle: SocIdle::new(idle),
            function,
            regions,
            created: None,
            vcpus: 0,
            ram: (0, 0),
            waiting: VecDeque::new(),
            events: Vec::new(),
            last_beat: Instant::now(),
            beats: 0,
            shim,
        }
    }

    /// The next thing that a vCPU wants, in the order in which it must be served.
    ///
    /// # Panics
    /// Nothing comes.
    pub fn take(&mut self) -> Seen {
        let mut wait = Wait::new();
        loop {
            if let Some(seen) = self.try_take() {
                return seen;
            }
            wait.a_little("a request");
        }
    }

    /// The next thing that a vCPU wants, if there is one.
    pub fn try_take(&mut self) -> Option<Seen> {
        self.beat();
        if self.waiting.is_empty() {
            self.look();
        }
        self.waiting.pop_front()
    }

    /// Looks at every lane once. Posted writes of all lanes come before a request.
    fn look(&mut self) {
        for lane in 0..self.lanes.len() {
            if let Some(request) = self.lanes[lane].poll().expect("a lawful request") {
                self.drain();
                let mut string = Vec::new();
                if request.string && request.direction == Direction::Write {
                    string.resize(request.length.into(), 0);
                    self.lanes[lane].outs().copy_out(0, &mut string);
                }
                self.waiting.push_back(Seen { lane, request, posted: false, string });
            }
        }
        self.drain();
    }

    fn drain(&mut self) {
        drain(&mut self.lanes, |lane, write| {
            self.waiting.push_back(Seen { lane, request: write.request, posted: true, string: Vec::new() });
        })
        .expect("lawful posted writes");
    }

    /// Answers what [`Soc::take`] gave, unless nobody waits.
    pub fn answer(&mut self, seen: &Seen, answer: Answer) {
        if seen.posted {
            return;
        }
        let completion = match answer {
            Answer::Plain(completion) => completion,
            Answer::String(bytes) => {
                self.lanes[seen.lane].ins().copy_in(0, &bytes);
                Completion::ok(0)
            }
        };
        self.complete(seen.lane, completion);
    }

    /// Answers the request that a lane has waiting.
    pub fn complete(&mut self, lane: usize, completion: Completion) {
        self.lanes[lane].complete(&completion).expect("a request waits");
        if self.lanes[lane].host_sleeps().expect("the function carries") {
            self.function.raise(self.created().vector_of(lane as u32));
        }
    }

    /// Serves with `board` until it has seen the debug-exit port; what was written there. The vCPU is parked then.
    pub fn run_to_exit(&mut self, board: &mut Board) -> u8 {
        while board.exit.is_none() {
            let seen = self.take();
            let answer = board.serve(&seen);
            self.answer(&seen, answer);
        }
        board.exit.unwrap_or_default()
    }

    /// Does a call, and serves no vCPU meanwhile.
    ///
    /// # Errors
    /// The host refused: its status and sentence.
    pub fn call(&mut self, call: &Call) -> Result<Reply, (Status, String)> {
        let sequence = self.begin(call);
        let mut wait = Wait::new();
        loop {
            if let Some(reply) = self.reply(sequence) {
                return reply;
            }
            wait.a_little("a reply");
        }
    }

    /// A call that the host must not refuse.
    pub fn ok(&mut self, call: &Call) -> Reply {
        self.call(call).unwrap_or_else(|(status, why)| panic!("{call:?}: {status:?}: {why}"))
    }

    /// Sends a call and gives its number, for [`Soc::reply`].
    pub fn begin(&mut self, call: &Call) -> u32 {
        let sequence = self.client.send(call, 0).expect("room for a request");
        self.function.raise(CHANNEL_VECTOR);
        sequence
    }

    /// Sends a call that is not answered.
    pub fn order(&mut self, call: &Call) {
        self.client.order(call).expect("room for an order");
        self.function.raise(CHANNEL_VECTOR);
    }

    /// The reply to the call of that number, if it is there.
    pub fn reply(&mut self, wanted: u32) -> Option<Result<Reply, (Status, String)>> {
        self.beat();
        while let Some(incoming) = self.client.poll().expect("a lawful message") {
            match incoming {
                Incoming::Event(event) => self.events.push(event),
                Incoming::Reply { sequence, status, payload, bulk } => {
                    assert_eq!(sequence, wanted, "a reply that nobody waits for");
                    return Some(match status {
                        Status::OK => Ok((payload, bulk)),
                        status => Err((status, String::from_utf8_lossy(&payload).into_owned())),
                    });
                }
            }
        }
        None
    }

    /// Takes in events without waiting.
    pub fn take_events(&mut self) -> Vec<Event> {
        while let Some(incoming) = self.client.poll().expect("a lawful message") {
            match incoming {
                Incoming::Event(event) => self.events.push(event),
                Incoming::Reply { sequence, .. } => panic!("reply {sequence}, and nobody waits for it"),
            }
        }
        std::mem::take(&mut self.events)
    }

    /// Lets every vCPU run.
    pub fn run(&mut self) {
        self.ok(&Call::Run(VCPU_ALL));
    }

    /// Takes every vCPU out of the guest, and serves with `serve` what that takes.
    pub fn pause(&mut self, mut serve: impl FnMut(&Seen) -> Answer) {
        let sequence = self.begin(&Call::Pause(VCPU_ALL));
        let mut wait = Wait::new();
        loop {
            if let Some(reply) = self.reply(sequence) {
                reply.expect("a pause");
                return;
            }
            while let Some(seen) = self.try_take() {
                let answer = serve(&seen);
                self.answer(&seen, answer);
            }
            wait.a_little("the pause");
        }
    }

    /// Says that this side polls its lanes: the host need not ring.
    pub fn polls(&self) {
        self.idle.awake();
    }

    /// Says that this side sleeps: the host rings.
    pub fn sleeps(&self) {
        self.idle.about_to_sleep().expect("the function carries");
    }

    /// How often the lanes' doorbell rang since this was asked last.
    pub fn rings(&self) -> u64 {
        let mut count = [0; 8];
        nix::unistd::read(self.function.doorbell(Doorbell::Lanes), &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    }

    /// A counter of the host by name, of all targets together.
    pub fn counter(&mut self, name: &str) -> u64 {
        let (_, bulk) = self.ok(&Call::Statistics);
        let all: Vec<Statistic> = Reader::new(&bulk).list(1 << 16).expect("statistics");
        let named: Vec<_> = all.iter().filter(|s| s.name.split(|&b| b == 0).next() == Some(name.as_bytes())).collect();
        assert!(!named.is_empty(), "the host counts no {name}");
        named.iter().map(|s| s.value).sum()
    }

    /// The host's heartbeats so far: each is a posted write.
    pub fn host_beats(&self) -> u64 {
        self.client.host_beat()
    }

    /// A window of card memory's region `kind` for `lane`.
    pub fn lane_window(&self, kind: Type, lane: usize) -> F::Card {
        let region = regions::find(&self.regions, kind, 0, self.vcpus).expect("a region of the lanes");
        let all = regions::window(&self.function.card_memory(), &region).expect("a region of card memory");
        all.cut(lane * region.stride as usize, region.stride as usize).expect("a lane")
    }

    /// Process id of the shim.
    ///
    /// # Panics
    /// It runs elsewhere.
    pub fn pid(&self) -> u32 {
        self.shim.pid()
    }

    /// Ends the VM, and with it the shim: its exit status, where it is a process.
    pub fn shut_down(mut self) -> Option<ExitStatus> {
        self.ok(&Call::DestroyVm);
        self.shim.end()
    }

    fn created(&self) -> &VmCreated {
        self.created.as_ref().expect("a VM was created")
    }

    fn beat(&mut self) {
        if self.last_beat.elapsed() > Duration::from_secs(1) {
            self.client.beat();
            self.beats += 1;
            self.last_beat = Instant::now();
        }
    }
}

/// The vector that wakes the host's channel.
const CHANNEL_VECTOR: u32 = 0;

/// A bounded wait that spins at first, then lets others run.
struct Wait {
    rounds: u32,
    since: Instant,
}

impl Wait {
    fn new() -> Self {
        Self { rounds: 0, since: Instant::now() }
    }

    fn a_little(&mut self, what: &str) {
        const SPINS: u32 = 2000;
        self.rounds = self.rounds.wrapping_add(1);
        if self.rounds < SPINS {
            std::hint::spin_loop();
            return;
        }
        assert!(self.since.elapsed() < PATIENCE, "{what} does not come");
        std::thread::yield_now();
    }
}

fn socket_pair() -> (OwnedFd, OwnedFd) {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("a pair of sockets")
}
