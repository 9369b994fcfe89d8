//! A computation without end whose state is known at every step: for stopping, saving, restoring, going on.
//!
//! | touches | how |
//! | --- | --- |
//! | [`ports::COMMAND`] | reads it after every [`STRIDE`] steps: [`REPORT`] has a line written, [`STOP`] ends the payload |
//! | [`ports::DEBUG_CONSOLE`] | by command: `step N digest D`, both in 16 hexadecimal digits |
//! | [`TEST_MEMORY`], [`ports::ECHO`] | as [`Each`] says |
//!
//! [`Model`] computes the same. A digest depends on all registers, on memory, on SSE registers (at CPL3), and on what
//! the devices answered, from the first step on: a single wrong bit stays visible for good. At CPL0 the payload keeps
//! words in CR2, DR0, DR3, LSTAR and KERNEL_GS_BASE too, and looks at them after every [`STRIDE`] steps.

use iced_x86::code_asm::*;

use crate::kit::LongMode;
use crate::kit::layout::FREE;
use crate::{Ends, IcedError, Payload, Privilege, TEST_MEMORY, ports};

/// Steps between two reads of the command port.
pub const STRIDE: u32 = 64;
/// The command that has a line written.
pub const REPORT: u32 = 1;
/// The command that ends the payload.
pub const STOP: u32 = 2;

const FACTOR: u64 = 0x5851_f42d_4c95_7f2d;
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
const WORDS: usize = 64;
const MEMORY: u32 = FREE;
const BUFFER: u32 = FREE + 0x1000;
const STRING_OUT: usize = 4;
const STRING_IN: u32 = 8;
/// Three bytes before the end of a page.
const ACROSS: u64 = TEST_MEMORY + 0x1000 - 3;

/// What each step does besides computing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Each {
    /// Nothing: no exit but for the command port.
    Nothing,
    /// Writes 8 bytes of [`TEST_MEMORY`] across the end of a page, and reads them: four exits.
    PageSplit,
    /// `rep outsd` to [`ports::ECHO`], and `rep insd` from it.
    String,
}

/// The payload.
pub fn counter(privilege: Privilege, each: Each) -> Result<Payload, IcedError> {
    let name = match each {
        Each::Nothing => privilege.name("counter", "counter-cpl3"),
        Each::PageSplit => privilege.name("counter-page-split", "counter-page-split-cpl3"),
        Each::String => privilege.name("counter-string", "counter-string-cpl3"),
    };
    let mut p = LongMode::new()?;
    p.enter(privilege)?;
    let [mut step, mut on, mut quiet] = [0; 3].map(|_| p.asm.create_label());
    // rbx the step, r8 to r13 the state, r14 the factor; rax, rcx, rdx, rsi, rdi, rbp are free within a step.
    p.asm.xor(ebx, ebx)?;
    p.asm.mov(r14, FACTOR)?;
    for (seed, register) in (1..).zip([r8, r9, r10, r11, r12, r13]) {
        p.asm.mov(register, SEED.wrapping_mul(seed))?;
    }
    if privilege == Privilege::Cpl3 {
        p.asm.pxor(xmm0, xmm0)?;
    } else {
        keep_in_system_registers(&mut p)?;
    }

    p.place(&mut step)?;
    p.asm.inc(rbx)?;
    compute(&mut p, privilege)?;
    match each {
        Each::Nothing => {}
        Each::PageSplit => touch_page_split(&mut p)?,
        Each::String => touch_string(&mut p)?,
    }
    p.asm.test(ebx, STRIDE - 1)?;
    p.asm.jne(step)?;

    if privilege == Privilege::Cpl0 {
        expect_in_system_registers(&mut p)?;
        keep_in_system_registers(&mut p)?;
    }
    p.asm.mov(edx, u32::from(ports::COMMAND))?;
    p.asm.in_(eax, dx)?;
    p.asm.cmp(eax, STOP)?;
    p.asm.jne(on)?;
    p.pass()?;
    p.asm.set_label(&mut on)?;
    p.asm.cmp(eax, REPORT)?;
    p.asm.jne(quiet)?;
    digest(&mut p, privilege)?;
    p.print("step ")?;
    p.print_hex(rbx)?;
    p.print(" digest ")?;
    p.print_hex(rdi)?;
    p.print("\n")?;
    p.asm.set_label(&mut quiet)?;
    p.asm.jmp(step)?;
    Ok(Payload::kernel(name, 1, p.finish()?).that_ends(Ends::Driven))
}

/// A line of the debug console: step and digest.
pub fn parse_report(line: &str) -> Option<(u64, u64)> {
    let mut words = line.strip_prefix("step ")?.split(" digest ");
    let mut number = || u64::from_str_radix(words.next()?, 16).ok();
    Some((number()?, number()?))
}

/// The same computation, outside.
#[derive(Debug, Clone)]
pub struct Model {
    privilege: Privilege,
    each: Each,
    step: u64,
    state: [u64; 6],
    memory: [u64; WORDS],
    sse: [u64; 2],
}

impl Model {
    /// Before the first step.
    pub fn new(privilege: Privilege, each: Each) -> Self {
        let state = std::array::from_fn(|at| SEED.wrapping_mul(at as u64 + 1));
        Model { privilege, each, step: 0, state, memory: [0; WORDS], sse: [0; 2] }
    }

    /// Goes on to `step`, and tells its digest.
    ///
    /// # Panics
    /// If it is beyond that step.
    pub fn digest_at(&mut self, step: u64) -> u64 {
        assert!(self.step <= step);
        while self.step < step {
            self.step += 1;
            self.compute();
        }
        let sse: &[u64] = if self.privilege == Privilege::Cpl3 { &self.sse } else { &[] };
        self.state[1..].iter().chain(sse).fold(self.state[0], |digest, word| digest.rotate_left(9) ^ word)
    }

    fn compute(&mut self) {
        let [s0, s1, s2, s3, s4, s5] = &mut self.state;
        *s0 = s0.wrapping_add(self.step).rotate_left(7) ^ *s1;
        *s1 = s1.wrapping_mul(FACTOR).wrapping_add(*s2);
        let (sum, carry) = s2.overflowing_add(*s0);
        *s2 = sum;
        *s3 = s3.wrapping_add(*s1).wrapping_add(carry.into());
        let word = &mut self.memory[self.step as usize % WORDS];
        *word = word.wrapping_add(*s3);
        *s4 ^= self.memory[(self.step as usize).wrapping_mul(5) % WORDS];
        self.sse = self.sse.map(|lane| lane.wrapping_add(*s0)); // looked at only where the payload has it
        let answer = match self.each {
            Each::Nothing => 0,
            Each::PageSplit => *s0,
            // The register keeps the last four bytes of the string; each element that is read is the same.
            Each::String => (self.memory[STRING_OUT - 1] >> 32) * 0x1_0000_0001,
        };
        *s5 = s5.wrapping_add(answer);
    }
}

fn compute(p: &mut LongMode, privilege: Privilege) -> Result<(), IcedError> {
    let a = &mut p.asm;
    a.add(r8, rbx)?;
    a.rol(r8, 7)?;
    a.xor(r8, r9)?;
    a.imul_2(r9, r14)?;
    a.add(r9, r10)?;
    a.add(r10, r8)?;
    a.adc(r11, r9)?;
    a.mov(eax, ebx)?;
    a.and(eax, WORDS as u32 - 1)?;
    a.add(qword_ptr(rax * 8 + MEMORY), r11)?;
    a.lea(eax, ptr(rbx + rbx * 4))?;
    a.and(eax, WORDS as u32 - 1)?;
    a.xor(r12, qword_ptr(rax * 8 + MEMORY))?;
    if privilege == Privilege::Cpl3 {
        a.movq(xmm1, r8)?;
        a.punpcklqdq(xmm1, xmm1)?;
        a.paddq(xmm0, xmm1)?;
    }
    Ok(())
}

fn touch_page_split(p: &mut LongMode) -> Result<(), IcedError> {
    p.asm.mov(rbp, ACROSS)?;
    p.asm.mov(qword_ptr(rbp), r8)?;
    p.asm.mov(rax, qword_ptr(rbp))?;
    p.asm.add(r13, rax)
}

fn touch_string(p: &mut LongMode) -> Result<(), IcedError> {
    p.asm.mov(edx, u32::from(ports::ECHO))?;
    p.asm.mov(esi, MEMORY)?;
    p.asm.mov(ecx, 2 * STRING_OUT as u32)?;
    p.asm.rep().outsd()?;
    p.asm.mov(edi, BUFFER)?;
    p.asm.mov(ecx, STRING_IN)?;
    p.asm.rep().insd()?;
    p.asm.add(r13, qword_ptr(rdi - 8))
}

/// rdi = the digest. Uses rax.
fn digest(p: &mut LongMode, privilege: Privilege) -> Result<(), IcedError> {
    p.asm.mov(rdi, r8)?;
    for register in [r9, r10, r11, r12, r13] {
        p.asm.rol(rdi, 9)?;
        p.asm.xor(rdi, register)?;
    }
    if privilege == Privilege::Cpl3 {
        p.asm.movq(rax, xmm0)?;
        p.asm.rol(rdi, 9)?;
        p.asm.xor(rdi, rax)?;
        p.asm.movhlps(xmm1, xmm0)?;
        p.asm.movq(rax, xmm1)?;
        p.asm.rol(rdi, 9)?;
        p.asm.xor(rdi, rax)?;
    }
    Ok(())
}

/// The MSRs that hold the step; the other system registers hold it too, shifted by bits that they all have.
const MSRS: [(u32, &str); 2] = [(0xc000_0082, "LSTAR"), (0xc000_0102, "KERNEL_GS_BASE")];

fn keep_in_system_registers(p: &mut LongMode) -> Result<(), IcedError> {
    p.asm.mov(cr2, rbx)?;
    p.asm.mov(dr0, rbx)?;
    p.asm.mov(dr3, rbx)?;
    for (msr, _) in MSRS {
        p.asm.mov(ecx, msr)?;
        p.asm.mov(eax, ebx)?;
        p.asm.xor(edx, edx)?;
        p.asm.wrmsr()?;
    }
    Ok(())
}

/// They hold the step of [`STRIDE`] steps ago (its low half, which is canonical).
fn expect_in_system_registers(p: &mut LongMode) -> Result<(), IcedError> {
    p.asm.mov(rsi, rbx)?;
    p.asm.sub(rsi, STRIDE as i32)?;
    p.asm.mov(rax, cr2)?;
    p.expect(rax, rsi, "CR2")?;
    p.asm.mov(rax, dr0)?;
    p.expect(rax, rsi, "DR0")?;
    p.asm.mov(rax, dr3)?;
    p.expect(rax, rsi, "DR3")?;
    p.asm.mov(esi, esi)?;
    for (msr, name) in MSRS {
        p.asm.mov(ecx, msr)?;
        p.asm.rdmsr()?;
        p.asm.shl(rdx, 32)?;
        p.asm.or(rax, rdx)?;
        p.expect(rax, rsi, name)?;
    }
    Ok(())
}
