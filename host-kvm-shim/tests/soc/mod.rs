//! A small SoC side over a `local` function: enough to run a VM, in one thread, with every answer in the test's hands.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

pub mod listening;

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use api_channel::call::{
    Call, CpuidEntry, CreateVm, Extent, Irqchip, Memslot, Name, RamRequest, StateRequest, Statistic, VCPU_ALL,
    VmCreated,
};
use api_channel::codec::Reader;
use api_channel::event::Event;
use api_channel::state::{MpState, Records, Regs, Segment, Sregs, Table, Type};
use api_channel::{Client, ClientWindows, Incoming, Status};
use ioreq_ring::wire::{LINE, POSTED_RING, STRING_PAGE};
use ioreq_ring::{BusMemory, Completion, Request, SocLane, SocWindows, drain};
use pcie_function::header::{HostHeader, SocHeader, VERSION, epoch};
use pcie_function::local::{LocalRemote, LocalSoc};
use pcie_function::regions::{self, Region, Spaces, Type as RegionType};
use pcie_function::{Mapping, Reach, SocFunction, Window, Windowed};

/// What is waited for at most, anywhere. Making a VM and ending it take the kernel a dozen grace periods, one after the other, and each
/// takes half a second where others have the CPUs.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub type Lane = SocLane<Window, LocalRemote, Window>;

/// One request as the SoC saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub lane: usize,
    pub request: Request,
    pub posted: bool,
    /// The bytes of a string write.
    pub string: Vec<u8>,
}

/// How a call ended: payload and bulk, or why not.
pub type Reply = Result<(Vec<u8>, Vec<u8>), (Status, String)>;

/// Answers a request; `None` leaves it unanswered for now.
pub type Handler = Box<dyn FnMut(&Seen, &Lane) -> Option<Completion>>;

/// The SoC: a function, a channel, lanes.
pub struct Soc {
    pub function: std::rc::Rc<LocalSoc>,
    pub client: Client<Window, LocalRemote>,
    pub header: HostHeader,
    pub regions: Vec<Region>,
    pub lanes: Vec<Lane>,
    pub seen: Vec<Seen>,
    pub events: Vec<Event>,
    pub handler: Handler,
    pub created: Option<VmCreated>,
    pub child: Option<Child>,
    /// Says in the inbox that it polls, so that nothing need ring.
    idle: LocalRemote,
    last_beat: Instant,
    /// Lets the heartbeat stand still.
    pub mute: bool,
    /// Transfers may fault: the test does so itself.
    pub faulty: bool,
}

/// Whether KVM can be used; a test that can't run says why.
pub fn has_kvm() -> bool {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            eprintln!("skipped: can't open /dev/kvm: {error}");
            false
        }
    }
}

/// A connected pair of sockets.
pub fn socket_pair() -> (OwnedFd, OwnedFd) {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

/// The program: `OUTBOARD_SHIM` names another build of it.
pub fn program() -> std::ffi::OsString {
    std::env::var_os("OUTBOARD_SHIM").unwrap_or_else(|| env!("CARGO_BIN_EXE_host-kvm-shim").into())
}

/// Starts the program on one end of a socket pair, with more arguments; gives the other end.
pub fn start_shim(args: &[&str]) -> (Child, OwnedFd) {
    let (ours, theirs) = socket_pair();
    nix::fcntl::fcntl(&theirs, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let child = Command::new(program())
        .arg("--function")
        .arg(format!("fd:{}", theirs.as_raw_fd()))
        .args(args)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    (child, ours)
}

impl Soc {
    /// Starts a shim and connects to it.
    pub fn start(args: &[&str]) -> Self {
        let (child, socket) = start_shim(args);
        let mut soc = Self::connect(socket);
        soc.child = Some(child);
        soc
    }

    /// Connects to the shim at the other end of `socket`.
    pub fn connect(socket: OwnedFd) -> Self {
        let function = LocalSoc::new(socket).unwrap();
        let card = function.card_memory();
        let deadline = Instant::now() + PATIENCE;
        let header = loop {
            if let Some(header) = HostHeader::load(&card).unwrap() {
                break header;
            }
            assert!(Instant::now() < deadline, "no host header");
            std::thread::sleep(Duration::from_micros(200));
        };
        Self::answer(function, header, 0x5eed)
    }

    /// Answers the host's header.
    pub fn answer(function: LocalSoc, header: HostHeader, nonce: u64) -> Self {
        let card = function.card_memory();
        let spaces =
            Spaces { card: card.len() as u64, inbox: header.inbox_len.into(), outbox: header.outbox_len.into() };
        let regions = regions::load(&card, header.table, header.regions, &spaces).unwrap();
        let inbox = function.remote(header.inbox, header.inbox_len as usize);
        let outbox = function.remote(header.outbox, header.outbox_len as usize);
        let find = |kind| regions::find(&regions, kind, 0, 0).unwrap();
        let windows = ClientWindows {
            host_lines: regions::window(&card, &find(RegionType::HOST_LINES)).unwrap(),
            replies: regions::window(&card, &find(RegionType::REPLIES)).unwrap(),
            events: regions::window(&card, &find(RegionType::EVENTS)).unwrap(),
            soc_lines: regions::window(&inbox, &find(RegionType::SOC_LINES)).unwrap(),
            requests: regions::window(&inbox, &find(RegionType::REQUESTS)).unwrap(),
            bulk: regions::window(&outbox, &find(RegionType::BULK)).unwrap(),
        };
        let idle = windows.soc_lines.cut(api_channel::lines::soc::LANES_IDLE, 8).unwrap();
        let client = Client::new(windows, epoch(header.nonce, nonce));
        SocHeader { version: VERSION, features: header.features, host_nonce: header.nonce, nonce }.store(&inbox);
        function.raise(0);
        Self {
            function: std::rc::Rc::new(function),
            client,
            header,
            regions,
            lanes: Vec::new(),
            seen: Vec::new(),
            events: Vec::new(),
            handler: Box::new(|_, _| Some(Completion::ok(0))),
            created: None,
            child: None,
            idle,
            last_beat: Instant::now(),
            mute: false,
            faulty: false,
        }
    }

    /// Does a call, and serves exits meanwhile.
    pub fn call(&mut self, call: &Call) -> Reply {
        self.call_within(call, 0)
    }

    /// [`Soc::call`] with a deadline for the host.
    pub fn call_within(&mut self, call: &Call, deadline_ms: u32) -> Reply {
        let wanted = self.client.send(call, deadline_ms).unwrap();
        self.function.raise(0);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(reply) = self.pump(Some(wanted)) {
                return reply;
            }
            assert!(Instant::now() < deadline, "no reply to {call:?}");
        }
    }

    /// A call that must succeed.
    pub fn ok(&mut self, call: &Call) -> (Vec<u8>, Vec<u8>) {
        self.call(call).unwrap_or_else(|why| panic!("{call:?}: {why:?}"))
    }

    /// A call that must be refused.
    pub fn refused(&mut self, call: &Call) -> (Status, String) {
        let (status, why) = self.call(call).expect_err("the call should be refused");
        assert!(!why.is_empty() && !why.contains('\n'), "{why}");
        (status, why)
    }

    /// One look at everything: serves what waits; gives the reply that is waited for.
    pub fn pump(&mut self, wanted: Option<u32>) -> Option<Reply> {
        if !self.mute && self.last_beat.elapsed() > Duration::from_secs(1) {
            self.client.beat();
            self.last_beat = Instant::now();
        }
        self.serve();
        while let Some(incoming) = self.client.poll().unwrap() {
            match incoming {
                Incoming::Event(event) => self.events.push(event),
                Incoming::Reply { sequence, status, payload, bulk } => {
                    assert_eq!(Some(sequence), wanted, "a reply that nobody waits for");
                    return Some(match status {
                        Status::OK => Ok((payload, bulk)),
                        status => Err((status, String::from_utf8(payload).unwrap())),
                    });
                }
            }
        }
        None
    }

    /// Serves what the lanes hold.
    pub fn serve(&mut self) {
        for i in 0..self.lanes.len() {
            let request =
                if self.lanes[i].phase() == ioreq_ring::Phase::Free { self.lanes[i].poll().unwrap() } else { None };
            self.drain();
            if let Some(request) = request {
                let mut string = Vec::new();
                if request.string && request.direction == ioreq_ring::Direction::Write {
                    string.resize(request.length.into(), 0);
                    self.lanes[i].outs().copy_out(0, &mut string);
                }
                let seen = Seen { lane: i, request, posted: false, string };
                let answer = (self.handler)(&seen, &self.lanes[i]);
                self.seen.push(seen);
                if let Some(answer) = answer {
                    self.complete(i, &answer);
                }
            }
        }
        self.drain();
    }

    /// Finishes the request of a lane.
    pub fn complete(&mut self, lane: usize, answer: &Completion) {
        self.lanes[lane].complete(answer).unwrap();
        let sleeps = self.lanes[lane].host_sleeps();
        if sleeps.unwrap_or_else(|error| if self.faulty { true } else { panic!("{error}") }) {
            self.function.raise(self.created.unwrap().vector_of(lane as u32));
        }
    }

    fn drain(&mut self) {
        let (seen, handler) = (&mut self.seen, &mut self.handler);
        let mut posted = Vec::new();
        drain(&mut self.lanes, |lane, write| {
            posted.push(Seen { lane, request: write.request, posted: true, string: Vec::new() });
        })
        .unwrap();
        for write in posted {
            if !self.lanes.is_empty() {
                let _ = handler(&write, &self.lanes[write.lane]);
            }
            seen.push(write);
        }
    }

    /// Pumps until `done` says so.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(self.pump(None).is_none());
            assert!(Instant::now() < deadline, "never {what}; seen {:?}", self.seen);
        }
    }

    /// Says whether this side polls its lanes.
    pub fn say_polling(&self, polling: bool) {
        self.idle.store(0, polling.into());
    }

    /// Creates a VM and its lanes' ends.
    pub fn create_vm(&mut self, vcpus: u32, irqchip: Irqchip) -> VmCreated {
        let create = CreateVm {
            vcpus,
            irqchip: irqchip as u32,
            flags: 0,
            dirty_ring: 0,
            spin_ns: 0,
            name: Name::new("test-vm"),
        };
        let (payload, _) = self.ok(&Call::CreateVm(create));
        let created: VmCreated = Reader::new(&payload).take().unwrap();
        let card = self.function.card_memory();
        let region = |kind| regions::window(&card, &regions::find(&self.regions, kind, 0, vcpus).unwrap()).unwrap();
        let (requests, controls, posted) =
            (region(RegionType::LANE_REQUESTS), region(RegionType::LANE_CONTROLS), region(RegionType::LANE_POSTED));
        let private = pcie_function::local::sealed_memfd("private", 64 * u64::from(vcpus)).unwrap();
        let private =
            Mapping::new(std::os::fd::AsFd::as_fd(&private), 0, 64 * vcpus as usize, Reach::Local).unwrap().window();
        self.lanes = (0..vcpus as usize)
            .map(|i| {
                let remote = |base: u64, stride: usize| self.function.remote(base + (i * stride) as u64, stride);
                SocLane::new(SocWindows {
                    request: requests.cut(i * LINE, LINE).unwrap(),
                    control: controls.cut(i * LINE, LINE).unwrap(),
                    posted: posted.cut(i * POSTED_RING, POSTED_RING).unwrap(),
                    completion: remote(created.completions, LINE),
                    credit: remote(created.credits, LINE),
                    outs: remote(created.outs, STRING_PAGE),
                    ins: remote(created.ins, STRING_PAGE),
                    private: private.cut(i * 64, 64).unwrap(),
                })
            })
            .collect();
        self.created = Some(created);
        self.say_polling(true);
        created
    }

    /// Allocates RAM 0 of `len` bytes and shows it at guest-physical 0.
    pub fn add_ram(&mut self, len: u64) -> u64 {
        let request = RamRequest { id: 0, node: -1, len, iova: 0, huge: 0 };
        let (payload, _) = self.ok(&Call::AddRam(request));
        let extents: Vec<Extent> = Reader::new(&payload).list(64).unwrap();
        assert_eq!(extents.len(), 1);
        assert_eq!((extents[0].offset, extents[0].len), (0, len));
        self.ok(&Call::SetMemslots(vec![Memslot { base: 0, len, offset: 0, ram: 0, flags: 0 }]));
        extents[0].iova
    }

    /// A VM whose vCPUs will run `code` in real mode from 0x1000, in 1 MiB of RAM.
    pub fn real_mode(&mut self, vcpus: u32, irqchip: Irqchip, code: &[u8]) {
        self.create_vm(vcpus, irqchip);
        let iova = self.add_ram(1 << 20);
        self.function.write(iova + 0x1000, code).unwrap();
        for vcpu in 0..vcpus {
            self.set_cpuid(vcpu);
            self.set_real_mode(vcpu, 0x1000);
        }
    }

    /// Sets a vCPU's CPUID to what KVM supports, with its own APIC id.
    pub fn set_cpuid(&mut self, vcpu: u32) {
        let (_, bulk) = self.ok(&Call::SupportedCpuid);
        let mut entries: Vec<CpuidEntry> = Reader::new(&bulk).list(4096).unwrap();
        for entry in entries.iter_mut().filter(|e| e.function == 1) {
            entry.ebx = entry.ebx & 0x00ff_ffff | vcpu << 24;
        }
        self.ok(&Call::SetCpuid { vcpu, entries });
    }

    /// Sets a vCPU to real mode, flat, at `ip`, its stack below 0x8000, its number in BX.
    pub fn set_real_mode(&mut self, vcpu: u32, ip: u64) {
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
            apic_base: 0xfee0_0800 | u64::from(vcpu == 0) << 8,
            ..Sregs::default()
        };
        let regs = Regs { rip: ip, rsp: 0x8000, rbx: vcpu.into(), rflags: 2, ..Regs::default() };
        let records = Records::default()
            .put(Type::SREGS, &sregs)
            .put(Type::REGS, &regs)
            .put(Type::MP_STATE, &MpState { state: 0 })
            .done();
        self.ok(&Call::SetState { target: vcpu, records });
    }

    pub fn run(&mut self) {
        self.ok(&Call::Run(VCPU_ALL));
    }

    pub fn pause(&mut self) {
        self.ok(&Call::Pause(VCPU_ALL));
    }

    /// The records of a target.
    pub fn state(&mut self, target: u32, groups: u64) -> Vec<u8> {
        self.ok(&Call::GetState(StateRequest { target, reserved: 0, groups })).1
    }

    /// A vCPU's general registers.
    pub fn regs(&mut self, vcpu: u32) -> Regs {
        let list = self.state(vcpu, Type::REGS.group());
        api_channel::state::records(&list).unwrap()[0].get().unwrap()
    }

    /// A counter, summed up over its targets.
    pub fn counter(&mut self, name: &str) -> u64 {
        let (_, bulk) = self.ok(&Call::Statistics);
        let list: Vec<Statistic> = Reader::new(&bulk).list(4096).unwrap();
        let named = |s: &&Statistic| s.name.iter().take_while(|b| **b != 0).copied().eq(name.bytes());
        assert!(list.iter().any(|s| named(&s)), "no counter {name}");
        list.iter().filter(named).map(|s| s.value).sum()
    }

    /// Leaves the connection as it is; the function alone stays open.
    pub fn into_function(self) -> LocalSoc {
        let function = self.function.clone();
        drop(self);
        std::rc::Rc::into_inner(function).unwrap()
    }

    /// Ends the shim in order; its exit status.
    pub fn shut_down(mut self) -> ExitStatus {
        if self.created.is_some() {
            // What the guest still asks is nobody's business any more.
            self.lanes.clear();
            self.ok(&Call::DestroyVm);
        }
        self.ok(&Call::Shutdown);
        wait(self.child.take().unwrap())
    }
}

impl Drop for Soc {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits for a program to end, not for ever.
pub fn wait(mut child: Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("the shim does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
