//! Watches its own memory and its own exits: what anybody else does to either is seen.
//!
//! | touches | how |
//! | --- | --- |
//! | [`WATCHED`] bytes of RAM | fills them with words that follow from the seed, and sums them up in each round |
//! | the word after them | marks that they are filled: a reset loads the image anew, and leaves them as they are |
//! | [`ports::ECHO`], [`TEST_MEMORY`] | writes the number of the round, and must read it back |
//! | [`ports::DEBUG_CONSOLE`] | a line a round: `round N sum S`, both in 16 hexadecimal digits; before the first one after a reset, on a line of its own, `reset sum S` of what was found |
//!
//! It runs until it is stopped, or until something is not as it was: then it fails.

use iced_x86::code_asm::*;

use crate::kit::LongMode;
use crate::kit::layout::FREE;
use crate::{Ends, IcedError, Payload, TEST_MEMORY, ports};

/// Bytes of RAM that are watched, from guest-physical [`FREE`] on.
pub const WATCHED: usize = 1 << 20;

/// Where the mark is.
const MARK: u32 = FREE + WATCHED as u32;

const FACTOR: u64 = 0x5851_f42d_4c95_7f2d;
const STEP: u64 = 0x1405_7b7e_f767_814f;

/// The payload.
pub fn watch(seed: u64) -> Result<Payload, IcedError> {
    let mut p = LongMode::new()?;
    let [mut fresh, mut fill, mut round] = [0; 3].map(|_| p.asm.create_label());
    p.asm.mov(edx, MARK)?;
    p.asm.mov(rax, qword_ptr(rdx))?;
    p.asm.mov(rbx, !seed)?;
    p.asm.cmp(rax, rbx)?;
    p.asm.jne(fresh)?;
    sum_up(&mut p)?;
    p.print("\nreset sum ")?;
    p.print_hex(rdi)?;
    p.print("\n")?;
    p.place(&mut fresh)?;
    p.asm.mov(r8, FACTOR)?;
    p.asm.mov(r9, STEP)?;
    p.asm.mov(rax, seed)?;
    p.asm.mov(edi, FREE)?;
    p.asm.mov(ecx, WATCHED as u32 / 8)?;
    p.asm.set_label(&mut fill)?;
    p.asm.imul_2(rax, r8)?;
    p.asm.add(rax, r9)?;
    p.asm.mov(qword_ptr(rdi), rax)?;
    p.asm.add(rdi, 8)?;
    p.asm.dec(ecx)?;
    p.asm.jne(fill)?;
    p.asm.mov(rbx, !seed)?;
    p.asm.mov(qword_ptr(rdi), rbx)?;
    // rbx the round, r10 the sum that must stay.
    sum_up(&mut p)?;
    p.asm.mov(r10, rdi)?;
    p.asm.xor(ebx, ebx)?;

    p.place(&mut round)?;
    p.asm.inc(rbx)?;
    p.asm.mov(edx, u32::from(ports::ECHO))?;
    p.asm.mov(eax, ebx)?;
    p.asm.out(dx, eax)?;
    p.asm.xor(eax, eax)?;
    p.asm.in_(eax, dx)?;
    p.expect(rax, rbx, "the port's register")?;
    p.asm.mov(rdx, TEST_MEMORY)?;
    p.asm.mov(qword_ptr(rdx), rbx)?;
    p.asm.mov(rax, qword_ptr(rdx))?;
    p.expect(rax, rbx, "the memory's register")?;
    sum_up(&mut p)?;
    p.expect(rdi, r10, "the sum of memory")?;
    p.print("round ")?;
    p.print_hex(rbx)?;
    p.print(" sum ")?;
    p.print_hex(rdi)?;
    p.print("\n")?;
    p.asm.jmp(round)?;
    Ok(Payload::kernel("watch", 1, p.finish()?).that_ends(Ends::Never))
}

/// A line of the debug console: round and sum.
pub fn parse_round(line: &str) -> Option<(u64, u64)> {
    let mut words = line.strip_prefix("round ")?.split(" sum ");
    let mut number = || u64::from_str_radix(words.next()?, 16).ok();
    Some((number()?, number()?))
}

/// The sum that is in every line of a payload with this seed.
pub fn sum(seed: u64) -> u64 {
    let words = std::iter::successors(Some(seed), |word| Some(word.wrapping_mul(FACTOR).wrapping_add(STEP)));
    words.skip(1).take(WATCHED / 8).fold(0, |sum, word| sum.rotate_left(9) ^ word)
}

/// rdi = the sum of what is watched. Uses rcx, rsi.
fn sum_up(p: &mut LongMode) -> Result<(), IcedError> {
    let mut next = p.asm.create_label();
    p.asm.mov(esi, FREE)?;
    p.asm.mov(ecx, WATCHED as u32 / 8)?;
    p.asm.xor(edi, edi)?;
    p.asm.set_label(&mut next)?;
    p.asm.rol(rdi, 9)?;
    p.asm.xor(rdi, qword_ptr(rsi))?;
    p.asm.add(rsi, 8)?;
    p.asm.dec(ecx)?;
    p.asm.jne(next)
}
