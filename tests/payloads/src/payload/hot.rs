//! Loops to measure with.

use iced_x86::code_asm::*;

use crate::kit::LongMode;
use crate::kit::layout::FREE;
use crate::{Ends, IcedError, Payload, Privilege};

/// Reads one byte of a port `count` times, and says how long that took, `rounds` times.
///
/// Each round ends with the line `count N ticks T` on the debug console, both in 16 hexadecimal digits, T by RDTSC
/// before the first and after the last.
pub fn read_port(privilege: Privilege, port: u16, count: u32, rounds: u32) -> Result<Payload, IcedError> {
    let name = privilege.name("read-port", "read-port-cpl3");
    timed(name, privilege, count, rounds, |p| p.asm.mov(edx, u32::from(port)), |p| p.asm.in_(al, dx))
}

/// Counts down from `count` without any exit, and says how long that took, as [`read_port`] does. It tells whether
/// KVM runs a privilege level on the processor or emulates it.
pub fn count_down(privilege: Privilege, count: u32, rounds: u32) -> Result<Payload, IcedError> {
    timed(privilege.name("count-down", "count-down-cpl3"), privilege, count, rounds, |_| Ok(()), |_| Ok(()))
}

/// One round, out of a line of the debug console: count and ticks.
pub fn parse_round(line: &str) -> Option<(u64, u64)> {
    let mut words = line.strip_prefix("count ")?.split(" ticks ");
    let mut number = || u64::from_str_radix(words.next()?, 16).ok();
    Some((number()?, number()?))
}

fn timed(
    name: &'static str,
    privilege: Privilege,
    count: u32,
    rounds: u32,
    prepare: impl FnOnce(&mut LongMode) -> Result<(), IcedError>,
    step: impl FnOnce(&mut LongMode) -> Result<(), IcedError>,
) -> Result<Payload, IcedError> {
    let mut p = LongMode::new()?;
    p.enter(privilege)?;
    let mut round = p.asm.create_label();
    let mut next = p.asm.create_label();
    p.asm.mov(ebp, rounds)?;
    p.place(&mut round)?;
    p.asm.mov(ecx, count)?;
    p.asm.mov(ebx, ecx)?;
    p.read_clock()?;
    p.asm.mov(rdi, rax)?;
    prepare(&mut p)?;
    p.asm.set_label(&mut next)?;
    step(&mut p)?;
    p.asm.dec(ecx)?;
    p.asm.jne(next)?;
    p.read_clock()?;
    p.asm.sub(rax, rdi)?;
    p.asm.mov(rdi, rax)?;
    p.print("count ")?;
    p.print_hex(rbx)?;
    p.print(" ticks ")?;
    p.print_hex(rdi)?;
    p.print("\n")?;
    p.asm.dec(ebp)?;
    p.asm.jne(round)?;
    p.pass()?;
    Ok(Payload::kernel(name, 1, p.finish()?))
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
    Ok(Payload::kernel(privilege.name("busy", "busy-cpl3"), 1, p.finish()?).that_ends(Ends::Never))
}

/// Guest-physical address of [`busy`]'s count.
pub const BUSY_COUNT: u64 = FREE as u64;
