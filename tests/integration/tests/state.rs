//! A guest that is stopped anywhere goes on exactly in a new VM of another shim, whoever carried its state.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use api_channel::call::{Call, VCPU_ALL};
use integration::soc::{Answer, Board, Seen, Shape, Soc};
use integration::{kvm, test_name};
use ioreq_ring::{Completion, Direction, Kind};
use payloads::counter::{self, Each, Model};
use payloads::{EXIT_PASS, Payload, Privilege, ports};
use testbed::build;
use testbed::fetch::{self, Arch};

/// Requests before each stop: somewhere in the computation, or in the report that follows it.
const STOPS: [u32; 3] = [61, 700, 333];

/// The records of a VM, by target.
type State = Vec<(u32, Vec<u8>)>;

/// A running counter.
struct Counter {
    soc: Soc,
    board: Board,
    command: u32,
    /// Parts of accesses, or elements of strings, that the guest asked for: each once.
    asked: u64,
}

impl Counter {
    fn new(payload: &Payload) -> Self {
        let mut soc = Soc::start(&[]);
        soc.create(&Shape { memory: 4 << 20, ..Shape::of(payload) });
        Self { soc, board: Board::default(), command: counter::REPORT, asked: 0 }
    }

    fn start(payload: &Payload) -> Self {
        let mut counter = Self::new(payload);
        counter.soc.load(payload);
        counter.soc.run();
        counter
    }

    fn serve(&mut self, seen: &Seen) {
        self.asked += parts(seen);
        let answer = serve(&mut self.board, self.command, seen);
        self.soc.answer(seen, answer);
    }

    /// Serves `count` requests, then on until one that `here` picks, which is left unanswered.
    fn serve_until(&mut self, count: u32, here: impl Fn(&Seen) -> bool) -> Seen {
        for _ in 0..count {
            let seen = self.soc.take();
            self.serve(&seen);
        }
        loop {
            let seen = self.soc.take();
            if here(&seen) {
                return seen;
            }
            self.serve(&seen);
        }
    }

    /// Pauses while `held` waits for its answer; what was asked until the vCPU was out.
    fn pause_inside(&mut self, held: &Seen) -> Vec<Seen> {
        let pause = self.soc.begin(&Call::Pause(VCPU_ALL));
        // Calls are taken in their order: after this one the vCPU knows of the pause.
        self.soc.ok(&Call::Ping);
        self.serve(held);
        let mut asked = Vec::new();
        loop {
            if let Some(reply) = self.soc.reply(pause) {
                reply.unwrap();
                assert_eq!(self.soc.try_take(), None, "a paused vCPU asks nothing");
                return asked;
            }
            while let Some(seen) = self.soc.try_take() {
                self.serve(&seen);
                asked.push(seen);
            }
        }
    }

    /// Pauses wherever the vCPU is.
    fn pause(&mut self) {
        let Self { soc, board, command, asked } = self;
        soc.pause(|seen| {
            *asked += parts(seen);
            serve(board, *command, seen)
        });
    }

    /// Goes on in a VM of another shim.
    fn moved(mut self, payload: &Payload, carry: &dyn Fn(State) -> State) -> Self {
        let mut next = Self::new(payload);
        self.soc.copy_memory_to(&next.soc);
        next.soc.set_records(carry(self.soc.records()));
        (next.board, next.asked) = (self.board.clone(), self.asked);
        assert!(self.soc.shut_down().unwrap().success());
        next.soc.run();
        next
    }

    /// Lets it report a few times more, end, and compares all that it said.
    fn check(mut self, payload: &Payload, privilege: Privilege, each: Each) {
        for _ in 0..3 {
            let seen = self.serve_until(0, |seen| seen.reads(ports::COMMAND));
            self.serve(&seen);
        }
        self.command = counter::STOP;
        while self.board.exit.is_none() {
            let seen = self.soc.take();
            self.serve(&seen);
        }
        let console = &self.board.console;
        assert_eq!(self.board.exit, Some(EXIT_PASS), "{}: {console}", payload.name);
        let mut model = Model::new(privilege, each);
        let (mut reports, mut last) = (0, 0);
        for line in console.lines().filter(|line| *line != "pass") {
            let (step, digest) = counter::parse_report(line).unwrap_or_else(|| panic!("{line:?} of {console}"));
            assert!(step > last, "{}: step {step} after {last}", payload.name);
            assert_eq!(digest, model.digest_at(step), "{}: step {step}", payload.name);
            (reports, last) = (reports + 1, step);
        }
        assert!(reports > 3, "{}: {console}", payload.name);
        // Nothing was done twice, nothing left out.
        let each_step = match each {
            Each::Nothing => 0,
            Each::PageSplit => 4,
            Each::String => 16,
        };
        if each_step != 0 {
            assert_eq!(self.asked, each_step * (last + u64::from(counter::STRIDE)), "{}", payload.name);
        }
        assert!(self.soc.shut_down().unwrap().success());
    }
}

/// How many parts of the computation's accesses a request is.
fn parts(seen: &Seen) -> u64 {
    let request = &seen.request;
    match request.kind {
        Kind::MMIO => 1,
        Kind::PIO if request.address != u64::from(ports::ECHO) => 0,
        _ if request.string => u64::from(request.length) / request.data,
        _ => 1,
    }
}

fn serve(board: &mut Board, command: u32, seen: &Seen) -> Answer {
    if seen.reads(ports::COMMAND) {
        return Answer::Plain(Completion::ok(command.into()));
    }
    board.serve(seen)
}

fn same(state: State) -> State {
    state
}

/// Stops at no particular place.
fn stopped_anywhere(privilege: Privilege, carry: &dyn Fn(State) -> State) {
    let payload = counter::counter(privilege, Each::Nothing).unwrap();
    let mut counter = Counter::start(&payload);
    for stop in STOPS {
        let seen = counter.serve_until(stop, |seen| seen.reads(ports::COMMAND));
        counter.command = 0;
        counter.serve(&seen);
        // Quiet: it computes, and each stop finds it farther from its last exit.
        std::thread::sleep(std::time::Duration::from_micros(stop.into()));
        counter.pause();
        counter.command = counter::REPORT;
        counter = counter.moved(&payload, carry);
    }
    counter.check(&payload, privilege, Each::Nothing);
}

/// Stops while the first half of an access across a page's end waits for its answer.
fn stopped_inside_a_page_split(privilege: Privilege, carry: &dyn Fn(State) -> State) {
    let payload = counter::counter(privilege, Each::PageSplit).unwrap();
    let mut counter = Counter::start(&payload);
    for (stop, direction) in STOPS.into_iter().zip([Direction::Write, Direction::Read, Direction::Write]) {
        let first_half = |seen: &Seen| {
            seen.request.kind == Kind::MMIO && seen.request.direction == direction && seen.request.length == 3
        };
        let held = counter.serve_until(stop, first_half);
        let asked = counter.pause_inside(&held);
        let halves: Vec<_> = asked.iter().map(|s| (s.request.address, s.request.length, s.request.direction)).collect();
        assert_eq!(halves, [(held.request.address + 3, 5, direction)], "the other half is part of the stop");
        counter = counter.moved(&payload, carry);
    }
    counter.check(&payload, privilege, Each::PageSplit);
}

/// Stops while part of a string waits for its answer.
fn stopped_inside_a_string(privilege: Privilege, carry: &dyn Fn(State) -> State) {
    let payload = counter::counter(privilege, Each::String).unwrap();
    let mut counter = Counter::start(&payload);
    for (stop, direction) in STOPS.into_iter().zip([Direction::Write, Direction::Read, Direction::Write]) {
        let part = |seen: &Seen| {
            let request = &seen.request;
            (request.kind, request.address, request.direction) == (Kind::PIO, ports::ECHO.into(), direction)
        };
        let held = counter.serve_until(stop, part);
        counter.pause_inside(&held);
        counter = counter.moved(&payload, carry);
    }
    counter.check(&payload, privilege, Each::String);
}

#[test]
fn goes_on_from_anywhere() {
    if kvm(&test_name()) {
        stopped_anywhere(Privilege::Cpl0, &same);
        stopped_anywhere(Privilege::Cpl3, &same);
    }
}

#[test]
fn goes_on_from_inside_a_page_split_access() {
    if kvm(&test_name()) {
        stopped_inside_a_page_split(Privilege::Cpl0, &same);
        stopped_inside_a_page_split(Privilege::Cpl3, &same);
    }
}

#[test]
fn goes_on_from_inside_a_string() {
    if kvm(&test_name()) {
        stopped_inside_a_string(Privilege::Cpl0, &same);
        stopped_inside_a_string(Privilege::Cpl3, &same);
    }
}

#[test]
fn goes_on_after_its_state_went_through_an_arm_build() {
    if !kvm(&test_name()) {
        return;
    }
    let cross = match fetch::cross() {
        Ok(cross) => cross,
        Err(error @ fetch::Error::Unreachable(_)) => {
            testbed::skip(&test_name(), &error.to_string());
            return;
        }
        Err(error) => panic!("{error:?}"),
    };
    let programs = build::programs(Arch::Arm64, &["pass-records"]).unwrap();
    let carry = |state: State| -> State {
        let pass = |(target, records): (u32, Vec<u8>)| (target, through(&cross.qemu_user, &programs[0], &records));
        state.into_iter().map(pass).collect()
    };
    stopped_anywhere(Privilege::Cpl3, &carry);
    stopped_inside_a_page_split(Privilege::Cpl0, &carry);
    stopped_inside_a_string(Privilege::Cpl3, &carry);
}

/// What an Arm program makes of records.
fn through(emulator: &Path, program: &Path, records: &[u8]) -> Vec<u8> {
    let mut command = Command::new(emulator);
    let mut child = command.arg(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(records).unwrap();
    let mut passed = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut passed).unwrap();
    assert!(child.wait().unwrap().success());
    passed
}
