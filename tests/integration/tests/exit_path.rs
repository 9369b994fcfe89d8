//! What a vCPU's thread does between two entries of the guest, seen from outside: its system calls, and every instruction.

use std::thread::JoinHandle;

use api_channel::call::Irqchip;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use integration::soc::{Answer, Shape, Soc};
use integration::trace::{Syscall, Traced};
use integration::{kvm, test_name};
use ioreq_ring::{Completion, LineChange};

/// Reads a port for ever: mov dx, 0x300; again: in al, dx; jmp again.
const READS: [u8; 6] = [0xba, 0x00, 0x03, 0xec, 0xeb, 0xfd];

/// A vCPU that does so, on a host that spins as long as it may.
fn vm() -> Soc {
    let mut soc = Soc::start_optimized();
    soc.create(&Shape { vcpus: 1, memory: 1 << 20, irqchip: Irqchip::Full, spin_ns: 10_000_000, dirty_ring: 0 });
    soc.load_real_mode(&READS);
    soc.run();
    serve(&mut soc, 100, || Completion::ok(0));
    soc
}

fn serve(soc: &mut Soc, count: u32, mut answer: impl FnMut() -> Completion) {
    for _ in 0..count {
        let seen = soc.take();
        soc.answer(&seen, Answer::Plain(answer()));
    }
}

/// Serves for as long as `tracer` traces.
fn serve_while<T>(soc: &mut Soc, tracer: JoinHandle<T>, mut answer: impl FnMut() -> Completion) -> T {
    while !tracer.is_finished() {
        if let Some(seen) = soc.try_take() {
            soc.answer(&seen, Answer::Plain(answer()));
        }
    }
    tracer.join().unwrap()
}

/// Between each two entries of the guest: the other system calls.
fn between_entries(calls: &[Syscall]) -> Vec<&[Syscall]> {
    let mut gaps: Vec<_> = calls.split(Syscall::runs_guest).collect();
    // What came before the first entry, and after the last, is not all of a gap.
    gaps.pop();
    gaps.drain(..1);
    gaps
}

/// The exits in which the thread made no call but the one that runs the guest. Every other one must be a sleep: the SoC's thread did
/// not run for longer than a vCPU spins.
fn quiet(gaps: &[&[Syscall]], sleeps: u64) -> usize {
    let mut quiet = 0;
    for gap in gaps {
        assert!(gap.iter().all(Syscall::sleeps), "{gap:?}");
        quiet += usize::from(gap.is_empty());
    }
    assert!((gaps.len() - quiet) as u64 <= sleeps, "{} exits of {} with calls", gaps.len() - quiet, gaps.len());
    quiet
}

#[test]
fn a_polled_exit_makes_no_system_call_but_the_one_that_runs_the_guest() {
    if !kvm(&test_name()) {
        return;
    }
    const EXITS: usize = 3000;
    let mut soc = vm();
    let (pid, before) = (soc.pid(), soc.counter("shim.sleep"));
    let tracer = std::thread::spawn(move || {
        let mut traced = Traced::thread(pid, "vcpu0");
        let mut calls = Vec::new();
        while calls.iter().filter(|call: &&Syscall| call.runs_guest()).count() <= EXITS {
            calls.push(traced.syscall());
        }
        calls
    });
    let calls = serve_while(&mut soc, tracer, || Completion::ok(0));
    let sleeps = soc.counter("shim.sleep") - before;
    let gaps = between_entries(&calls);
    assert_eq!(gaps.len(), EXITS);
    let quiet = quiet(&gaps, sleeps);
    assert!(quiet >= 1000, "{quiet} of {EXITS} exits were polled, {sleeps} slept");
}

/// What the thread executed that matters here, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Call(Syscall),
    /// A read-modify-write that locks the bus or a cache line: no lock is taken without one.
    Locked(u64),
}

/// Steps through `exits` exits; what mattered, and how many instructions there were.
fn step_through(pid: u32, exits: usize) -> (Vec<Step>, u64) {
    let mut traced = Traced::thread(pid, "vcpu0");
    let (mut steps, mut entries, mut count) = (Vec::new(), 0, 0);
    while entries <= exits {
        let at = traced.instruction();
        count += 1;
        let instruction = Decoder::new(64, &at.bytes, DecoderOptions::NONE).decode();
        if instruction.mnemonic() == Mnemonic::Syscall {
            let call = Syscall { number: at.registers.rax, second: at.registers.rsi };
            entries += usize::from(call.runs_guest());
            steps.push(Step::Call(call));
        } else if locks(&instruction) {
            steps.push(Step::Locked(at.registers.rip));
        }
    }
    (steps, count)
}

fn locks(instruction: &Instruction) -> bool {
    let memory = (0..instruction.op_count()).any(|i| instruction.op_kind(i) == OpKind::Memory);
    // A full barrier may be written so: nothing is changed, and the stack is nobody else's.
    let barrier = instruction.mnemonic() == Mnemonic::Or && instruction.memory_base() == Register::RSP;
    memory && !barrier && (instruction.has_lock_prefix() || instruction.mnemonic() == Mnemonic::Xchg)
}

/// Of each exit without a call: how many locked instructions it took.
fn locked_of_quiet(steps: &[Step]) -> Vec<usize> {
    let run = |step: &Step| matches!(step, Step::Call(call) if call.runs_guest());
    let mut exits: Vec<_> = steps.split(run).collect();
    exits.pop();
    exits.drain(..1);
    let quiet = exits.iter().filter(|exit| !exit.iter().any(|step| matches!(step, Step::Call(_))));
    quiet.map(|exit| exit.len()).collect()
}

#[test]
fn an_exit_takes_no_lock_unless_it_changes_a_line() {
    if !kvm(&test_name()) {
        return;
    }
    const EXITS: usize = 150;
    let mut soc = vm();
    let pid = soc.pid();
    let tracer = std::thread::spawn(move || step_through(pid, EXITS));
    let (steps, count) = serve_while(&mut soc, tracer, || Completion::ok(0));
    let locked = locked_of_quiet(&steps);
    println!("{count} instructions in {EXITS} exits, waiting for answers included");
    assert!(locked.len() >= EXITS / 2, "{} of {EXITS} exits were polled", locked.len());
    assert!(locked.iter().all(|&n| n == 0), "{locked:?}: {steps:x?}");

    // What this looks for is there to be found: a line change takes its GSI's lock, and tells KVM.
    let mut sequence = 0;
    let change = || {
        sequence += 1;
        let change = LineChange { gsi: 5, high: sequence % 2 == 1, sequence };
        Completion { lines: [Some(change), None], ..Completion::ok(0) }
    };
    let tracer = std::thread::spawn(move || step_through(pid, 10));
    let (steps, _) = serve_while(&mut soc, tracer, change);
    let ioctls = steps.iter().filter(|step| matches!(step, Step::Call(c) if c.is_ioctl() && !c.runs_guest())).count();
    let locks = steps.iter().filter(|step| matches!(step, Step::Locked(_))).count();
    assert!(ioctls >= 9 && locks >= 9, "{ioctls} ioctls, {locks} locked instructions: {steps:x?}");
}
