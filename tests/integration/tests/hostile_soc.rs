//! A SoC that lies, against the real shim: calls are refused or the connection ends, and the shim serves the next one. A VM on
//! another shim of the same host computes on, exactly.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use api_channel::Status;
use api_channel::lines::soc as words;
use api_channel::message::{Class, Header};
use integration::hostile::{Dice, HostileSoc, Running, Stage, Trial, free_of_trouble, random_call};
use integration::soc::{Answer, Board, Shape, Soc};
use integration::{kvm, test_name};
use ioreq_ring::{BusMemory, Completion};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, send, socket};
use payloads::counter::{self, Each, Model};
use payloads::{EXIT_PASS, PASSED, Privilege, ports};

const MOST: Duration = Duration::from_secs(120);

/// A shim without a lease: the VM of a SoC that broke the rules ends, and the next may come.
struct Victim {
    trial: Trial,
    shim: Running,
    /// What it holds while it waits for a SoC.
    at_rest: (usize, u64),
}

impl Victim {
    fn new() -> Self {
        let trial = Trial::default();
        let shim = trial.listening_shim("function", &["--lease", "0"]);
        let at_rest = shim.holds_at_rest();
        Self { trial, shim, at_rest }
    }

    fn dial(&self) -> HostileSoc {
        HostileSoc::dial(&self.trial.path("function"))
    }

    /// # Panics
    /// The shim is worse off than it was.
    fn check(mut self) {
        self.shim.holds_again(self.at_rest);
        let function = format!("unix:{}", self.trial.at("function"));
        let payload = payloads::pio::pio(Privilege::Cpl0).expect("the payload assembles");
        let ended = self.trial.vm("vm", &payload, &["--function", &function]).wait(MOST);
        free_of_trouble("an honest soc-vmm after hostile ones", &ended);
        assert_eq!(ended.status.code(), Some(PASSED), "{}", ended.stderr);
        assert!(self.shim.runs());
        let memory = self.shim.proc_status("VmHWM");
        assert!(memory < 64 << 10, "the shim took {memory} KiB");
        let said = self.shim.stderr();
        assert!(!said.contains("panicked"), "{said}");
        assert!(said.lines().all(|line| line.starts_with("host-kvm-shim: ")), "{said}");
    }
}

#[test]
fn every_call_in_every_state_of_a_vm() {
    if !kvm(&test_name()) {
        return;
    }
    let victim = Victim::new();
    for (stage, seed) in Stage::ALL.into_iter().flat_map(|stage| (0..4u64).map(move |seed| (stage, seed))) {
        let what = format!("calls at {stage:?}, seed {seed}");
        let mut dice = Dice::new(seed << 8 | stage as u64);
        let mut soc = victim.dial();
        soc.reach(stage);
        for _ in 0..150 {
            let (opcode, payload) = random_call(&mut dice);
            let class = if dice.below(5) == 0 { Class::Order } else { Class::Request };
            soc.send(class, opcode, &payload);
            if dice.below(8) == 0 {
                soc.discard();
            }
            if soc.is_over() {
                break;
            }
        }
        soc.is_answered(&what);
    }
    victim.check();
}

#[test]
fn lanes_answered_with_anything() {
    if !kvm(&test_name()) {
        return;
    }
    let victim = Victim::new();
    let mut ended = 0;
    for seed in 0..24u64 {
        let mut dice = Dice::new(seed);
        let mut soc = victim.dial();
        soc.reach(if seed % 4 == 0 { Stage::Pausing } else { Stage::Running });
        let created = soc.created.expect("a VM");
        let lines = [created.completions, created.credits, created.ins].map(|iova| soc.remote(iova, 128));
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(300) && !soc.is_over() {
            let line = dice.one(&lines);
            let word = dice.nasty();
            match dice.below(4) {
                // A sequence that is the next one, so that the rest is looked at.
                0 => line.store(56 + 64 * dice.below(2) as usize, word & !0xffff_ffff | (1 + dice.below(3))),
                1 => line.store_line(32, &[word, dice.nasty(), dice.nasty(), 1 + dice.below(3)]),
                2 => soc.lines.store(words::LANES_IDLE, word),
                _ => line.store(dice.below(16) as usize * 8, word),
            }
            soc.raise(dice.below(8) as u32);
        }
        // What the shim hasn't looked at until now it has then.
        soc.is_answered(&format!("lanes, seed {seed}"));
        ended += u32::from(soc.is_over());
        if let Some(mut again) = soc.again_if_over() {
            // The same process may take the function up again.
            again.reach(Stage::Ready);
        }
    }
    assert!(ended > 12, "only {ended} of 24 ended: the attack does not bite");
    assert!(victim.shim.stderr().contains("the lane of vCPU"), "{}", victim.shim.stderr());
    victim.check();
}

#[test]
fn words_of_the_channel_that_are_none() {
    if !kvm(&test_name()) {
        return;
    }
    let victim = Victim::new();
    for seed in 0..24u64 {
        let mut dice = Dice::new(seed);
        let mut soc = victim.dial();
        soc.reach(*dice.one(&Stage::ALL));
        for _ in 0..60 {
            match seed % 4 {
                0 => {
                    let word = dice.one(&[
                        words::HEARTBEAT,
                        words::REQUESTS_TAIL,
                        words::REPLIES_HEAD,
                        words::EVENTS_HEAD,
                        words::BULK_FETCHED,
                        words::LANES_IDLE,
                    ]);
                    soc.lines.store(*word, dice.nasty());
                }
                1 => soc.lines.store(dice.below(8) as usize * 8, dice.nasty()),
                2 => {
                    let header = Header {
                        opcode: dice.nasty() as u16,
                        class: *dice.one(&[Class::Request, Class::Order, Class::Reply, Class::Event]),
                        length: dice.nasty() as u32,
                        sequence: dice.nasty() as u32,
                        status: Status(dice.nasty() as u32),
                        epoch: dice.nasty(),
                        extra: dice.nasty() as u32,
                    };
                    let payload = dice.bytes(40);
                    soc.put(&header, &payload);
                }
                _ => {
                    let at = dice.below(soc.inbox.len() as u64 / 8) as usize * 8;
                    soc.inbox.store(at, dice.nasty());
                }
            }
            soc.raise(0);
            if soc.is_over() {
                break;
            }
            std::thread::yield_now();
        }
        // Its own words may keep it from being answered: the shim is well if it serves the next.
        drop(soc);
    }
    victim.check();
}

/// Connects to the shim's socket without a SoC's end behind it.
fn raw_client(victim: &Victim) -> OwnedFd {
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    let path = victim.trial.path("function");
    connect(socket.as_raw_fd(), &UnixAddr::new(&path).expect("a short path")).expect("the shim listens");
    socket
}

#[test]
fn clients_that_are_no_soc() {
    if !kvm(&test_name()) {
        return;
    }
    let mut victim = Victim::new();
    let mut dice = Dice::new(5);
    for round in 0..20 {
        let client = raw_client(&victim);
        for _ in 0..dice.below(4) {
            let len = *dice.one(&[0, 1, 8, 47, 48, 49, 4096]);
            let mut packet = dice.bytes(len);
            if round % 2 == 0 && len >= 16 {
                packet[..8].copy_from_slice(b"OUTBLOC1");
                packet[8..16].copy_from_slice(&(1 + dice.below(6)).to_le_bytes());
            }
            // The shim may have hung up already.
            let _ = send(client.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT);
        }
    }
    // One that says nothing keeps the others waiting, but not for ever.
    let mute = raw_client(&victim);
    victim.shim.says("did not do what it was told within 30 s", MOST);
    drop(mute);
    victim.check();
}

#[test]
fn a_vm_on_another_shim_computes_on() {
    if !kvm(&test_name()) {
        return;
    }
    let (stop, asked) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        let neighbour = scope.spawn(|| computes_exactly(&stop, &asked));
        let victim = Victim::new();
        let mut dice = Dice::new(77);
        let start = Instant::now();
        // At least for a while, and on a busy machine until the neighbour has got somewhere under attack.
        let enough = || start.elapsed() > Duration::from_secs(4) && asked.load(Ordering::Relaxed) > 5 * REPORT_EVERY;
        while !enough() && start.elapsed() < Duration::from_secs(60) {
            let mut soc = victim.dial();
            soc.reach(*dice.one(&Stage::ALL));
            for _ in 0..40 {
                let (opcode, payload) = random_call(&mut dice);
                soc.send(Class::Request, opcode, &payload);
                let at = dice.below(soc.inbox.len() as u64 / 8 - 128) as usize * 8 + 1024;
                soc.inbox.store(at, dice.nasty());
                // DMA to anywhere, its own memory too.
                let iova = *dice.one(&[0, 4096, 1 << 20, 1 << 32, 1 << 56, u64::MAX - 4095]);
                soc.remote(iova, 4096).store(dice.below(512) as usize * 8, dice.nasty());
            }
        }
        stop.store(true, Ordering::Relaxed);
        let reports = neighbour.join().expect("the neighbour computes on");
        assert!(reports > 3, "{reports}");
        victim.check();
    });
}

/// The neighbour reports each time it has asked so often what to do.
const REPORT_EVERY: u32 = 500;

/// Runs a counter until it is told to stop; every digest that it reported must be right, and none of its exits lost.
fn computes_exactly(stop: &AtomicBool, asked: &AtomicU32) -> u32 {
    let payload = counter::counter(Privilege::Cpl0, Each::Nothing).expect("the payload assembles");
    let mut soc = Soc::start(&[]);
    soc.create(&Shape { memory: 4 << 20, ..Shape::of(&payload) });
    soc.load(&payload);
    soc.run();
    let mut board = Board::default();
    while board.exit.is_none() {
        let seen = soc.take();
        let answer = if seen.reads(ports::COMMAND) {
            let report = (asked.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(REPORT_EVERY);
            let command = match (stop.load(Ordering::Relaxed), report) {
                (true, _) => counter::STOP,
                (false, true) => counter::REPORT,
                (false, false) => 0,
            };
            Answer::Plain(Completion::ok(command.into()))
        } else {
            board.serve(&seen)
        };
        soc.answer(&seen, answer);
    }
    assert_eq!(board.exit, Some(EXIT_PASS), "{}", board.console);
    let mut model = Model::new(Privilege::Cpl0, Each::Nothing);
    let mut reports = 0;
    for line in board.console.lines().filter(|line| *line != "pass") {
        let (step, digest) = counter::parse_report(line).expect("a report");
        assert_eq!(digest, model.digest_at(step), "step {step}");
        reports += 1;
    }
    assert!(soc.shut_down().expect("a process").success());
    reports
}
