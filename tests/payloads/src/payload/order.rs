//! vCPUs that write under a lock: the order of arrival is the order of the lock.
//!
//! | touches | how |
//! | --- | --- |
//! | [`POSTED`] | 4-byte writes of the counter; reads, which must give what was written last, by whomever |
//! | [`SYNCHRONOUS`] | 4-byte writes of the counter |
//!
//! Each vCPU takes the lock [`ROUNDS`] times, counts one up, and does what [`step`] says for that count. Whatever the
//! interleaving, the writes arrive as [`writes`] lists them. A VMM may declare [`POSTED`] safe to finish at once.

use iced_x86::code_asm::*;

use crate::kit::{LongMode, layout};
use crate::{IcedError, Payload, TEST_MEMORY, ports};

/// Guest-physical address of the register that may be posted.
pub const POSTED: u64 = TEST_MEMORY + 0x40;
/// Port of the register that may not.
pub const SYNCHRONOUS: u16 = ports::ECHO;
/// How often each vCPU takes the lock.
pub const ROUNDS: u32 = 1000;

/// What a vCPU does under the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Writes the count to [`POSTED`].
    Posted,
    /// Writes the count to [`SYNCHRONOUS`].
    Synchronous,
    /// Reads [`POSTED`] and compares.
    Read,
}

/// What belongs to a count.
pub fn step(count: u32) -> Step {
    match count % 8 {
        0 => Step::Read,
        5 => Step::Synchronous,
        _ => Step::Posted,
    }
}

/// All writes in the order of their arrival.
pub fn writes(vcpus: u8) -> impl Iterator<Item = (Step, u32)> {
    (1..=ROUNDS * u32::from(vcpus)).map(|count| (step(count), count)).filter(|(step, _)| *step != Step::Read)
}

/// The payload.
pub fn order(vcpus: u8) -> Result<Payload, IcedError> {
    let finished = layout::word(3);
    let mut p = LongMode::new()?;
    p.start_other_vcpus(vcpus)?;
    rounds(&mut p)?;
    p.spin_until(finished, vcpus.into())?;
    p.pass()?;

    p.other_vcpus()?;
    p.online()?;
    rounds(&mut p)?;
    p.halt()?;
    Ok(Payload::kernel("order", vcpus, p.finish()?))
}

fn rounds(p: &mut LongMode) -> Result<(), IcedError> {
    let [lock, count, last, finished] = [0, 1, 2, 3].map(layout::word);
    let mut round = p.asm.create_label();
    let mut read = p.asm.create_label();
    let mut posted = p.asm.create_label();
    let mut unlock = p.asm.create_label();

    p.asm.mov(ebp, ROUNDS)?;
    p.asm.mov(rdi, POSTED)?;
    p.asm.mov(edx, u32::from(SYNCHRONOUS))?;
    p.place(&mut round)?;
    p.lock(lock)?;
    p.asm.mov(eax, dword_ptr(count))?;
    p.asm.inc(eax)?;
    p.asm.mov(dword_ptr(count), eax)?;
    p.asm.mov(ecx, eax)?;
    p.asm.and(ecx, 7)?;
    p.asm.je(read)?;
    p.asm.cmp(ecx, 5)?;
    p.asm.jne(posted)?;
    p.asm.out(dx, eax)?;
    p.asm.jmp(unlock)?;

    p.asm.set_label(&mut read)?;
    p.asm.mov(ecx, dword_ptr(rdi))?;
    p.asm.mov(ebx, dword_ptr(last))?;
    p.expect(rcx, rbx, "what the other vCPU wrote")?;
    p.asm.jmp(unlock)?;

    p.asm.set_label(&mut posted)?;
    p.asm.mov(dword_ptr(last), eax)?;
    p.asm.mov(dword_ptr(rdi), eax)?;

    p.asm.set_label(&mut unlock)?;
    p.unlock(lock)?;
    p.asm.dec(ebp)?;
    p.asm.jne(round)?;
    p.asm.lock().inc(dword_ptr(finished))
}
