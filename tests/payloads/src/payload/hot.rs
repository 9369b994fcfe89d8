//! Loops to measure with.

use iced_x86::code_asm::*;

use crate::kit::LongMode;
use crate::kit::layout::FREE;
use crate::{IcedError, Payload, Privilege};

/// Reads one byte of a port in a loop, and says how long that took: each round ends with the line
/// `reads N ticks T`, both in 16 hexadecimal digits, T by RDTSC around N reads.
pub fn read_port(privilege: Privilege, port: u16, reads: u32, rounds: u32) -> Result<Payload, IcedError> {
    let mut p = LongMode::new()?;
    p.enter(privilege)?;
    let mut round = p.asm.create_label();
    let mut read = p.asm.create_label();
    p.asm.mov(ebp, rounds)?;
    p.place(&mut round)?;
    p.asm.mov(ecx, reads)?;
    p.asm.mov(ebx, ecx)?;
    read_clock(&mut p)?;
    p.asm.mov(rdi, rax)?;
    p.asm.mov(edx, u32::from(port))?;
    p.asm.set_label(&mut read)?;
    p.asm.in_(al, dx)?;
    p.asm.dec(ecx)?;
    p.asm.jne(read)?;
    read_clock(&mut p)?;
    p.asm.sub(rax, rdi)?;
    p.asm.mov(rdi, rax)?;
    p.print("reads ")?;
    p.print_hex(rbx)?;
    p.print(" ticks ")?;
    p.print_hex(rdi)?;
    p.print("\n")?;
    p.asm.dec(ebp)?;
    p.asm.jne(round)?;
    p.pass()?;
    Ok(Payload::kernel(privilege.name("read-port", "read-port-cpl3"), 1, p.finish()?))
}

/// One round of [`read_port`], out of a line of the debug console: reads and ticks.
pub fn parse_round(line: &str) -> Option<(u64, u64)> {
    let mut words = line.strip_prefix("reads ")?.split(" ticks ");
    let mut number = || u64::from_str_radix(words.next()?, 16).ok();
    Some((number()?, number()?))
}

/// Counts up the 8 bytes at [`BUSY_COUNT`] without any exit. Runs until it is stopped.
pub fn busy(privilege: Privilege) -> Result<Payload, IcedError> {
    let mut p = LongMode::new()?;
    p.print("busy\n")?;
    p.enter(privilege)?;
    let mut next = p.asm.create_label();
    p.asm.mov(edi, BUSY_COUNT as u32)?;
    p.asm.set_label(&mut next)?;
    p.asm.inc(qword_ptr(rdi))?;
    p.asm.jmp(next)?;
    Ok(Payload::kernel(privilege.name("busy", "busy-cpl3"), 1, p.finish()?))
}

/// Guest-physical address of [`busy`]'s count.
pub const BUSY_COUNT: u64 = FREE as u64;

/// rax = the time-stamp counter. Uses rdx.
fn read_clock(p: &mut LongMode) -> Result<(), IcedError> {
    p.asm.rdtsc()?;
    p.asm.shl(rdx, 32)?;
    p.asm.or(rax, rdx)
}
