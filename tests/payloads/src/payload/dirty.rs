//! vCPUs that write frames of a known pattern, a round at a time.
//!
//! | touches | how |
//! | --- | --- |
//! | [`ports::COMMAND`] | each vCPU reads it until it gives a number other than the last round's: that is the next round ([`STOP`]: the end). After its writes it writes the round's number back |
//! | RAM from [`FREE`], [`REGION`] bytes a vCPU | exactly the frames of [`frames`], between the read that began the round and the write that ended it |
//!
//! From its first read on, a vCPU writes nothing else: once all have read, the log holds what they write by command.

use std::collections::BTreeSet;

use iced_x86::code_asm::*;

use crate::kit::LongMode;
use crate::kit::layout::{self, FREE};
use crate::{Ends, IcedError, Payload, Privilege, ports};

/// Bytes of RAM that belong to one vCPU.
pub const REGION: u32 = 16 << 20;
/// Writes of one vCPU in one round.
pub const WRITES: u32 = 200;
/// The command that ends the payload.
pub const STOP: u32 = 0x8000_0000;

const FRAME: u32 = 4096;
const FRAMES: u32 = 2048;
const FRAME_STEP: u32 = 7;
const ROUND_STEP: u32 = 13;
/// Of each so many writes the last lies across the end of its frame.
const ACROSS: u32 = 16;

/// Bytes of guest memory that it needs, from address 0.
pub fn memory(vcpus: u8) -> u64 {
    u64::from(FREE) + u64::from(REGION) * u64::from(vcpus)
}

/// The numbers of the frames (address / 4096) that a vCPU writes in a round.
pub fn frames(vcpu: u8, round: u32) -> BTreeSet<u64> {
    let region = u64::from(FREE + u32::from(vcpu) * REGION) / u64::from(FRAME);
    (0..WRITES)
        .flat_map(|write| {
            let frame = region + u64::from((write * FRAME_STEP + round * ROUND_STEP) % FRAMES);
            let last = if write % ACROSS == ACROSS - 1 { frame + 1 } else { frame };
            frame..=last
        })
        .collect()
}

/// The payload.
pub fn dirty(vcpus: u8, privilege: Privilege) -> Result<Payload, IcedError> {
    let name = privilege.name("dirty", "dirty-cpl3");
    let mut p = LongMode::new()?;
    if vcpus > 1 {
        p.start_other_vcpus(vcpus)?;
    }
    p.enter(privilege)?;
    rounds(&mut p)?;
    p.pass()?;

    p.other_vcpus()?;
    p.online()?;
    p.enter(privilege)?;
    rounds(&mut p)?;
    let mut rest = p.asm.create_label();
    p.asm.set_label(&mut rest)?;
    p.asm.pause()?;
    p.asm.jmp(rest)?;
    Ok(Payload::kernel(name, vcpus, p.finish()?).that_ends(Ends::Driven))
}

/// Registers only: r15 the vCPU, ebp the round, edi its region, ecx the write.
fn rounds(p: &mut LongMode) -> Result<(), IcedError> {
    const _: () = assert!(FRAMES.is_power_of_two() && ACROSS.is_power_of_two());
    let a = &mut p.asm;
    let [mut wait, mut write, mut inside, mut done] = [0; 4].map(|_| a.create_label());
    a.mov(edi, r15d)?;
    a.imul_3(edi, edi, REGION as i32)?;
    a.add(edi, FREE)?;
    a.mov(ebp, u32::MAX)?;
    a.mov(ebx, u32::MAX)?;

    a.set_label(&mut wait)?;
    a.pause()?;
    a.mov(edx, u32::from(ports::COMMAND))?;
    a.in_(eax, dx)?;
    a.cmp(eax, ebx)?; // all ones
    a.je(wait)?;
    a.cmp(eax, ebp)?;
    a.je(wait)?;
    a.cmp(eax, STOP)?;
    a.je(done)?;
    a.mov(ebp, eax)?;
    a.xor(ecx, ecx)?;

    a.set_label(&mut write)?;
    a.imul_3(eax, ecx, FRAME_STEP as i32)?;
    a.imul_3(esi, ebp, ROUND_STEP as i32)?;
    a.add(eax, esi)?;
    a.and(eax, FRAMES - 1)?;
    a.shl(eax, FRAME.trailing_zeros())?;
    a.add(eax, edi)?;
    a.mov(esi, ecx)?;
    a.and(esi, ACROSS - 1)?;
    a.cmp(esi, ACROSS - 1)?;
    a.jne(inside)?;
    a.add(eax, FRAME - 8 - 4)?;
    a.set_label(&mut inside)?;
    a.mov(qword_ptr(rax + 8), rbp)?;
    a.inc(ecx)?;
    a.cmp(ecx, WRITES)?;
    a.jb(write)?;

    a.mov(edx, u32::from(ports::COMMAND))?;
    a.mov(eax, ebp)?;
    a.out(dx, eax)?;
    a.jmp(wait)?;
    p.place(&mut done)
}

const _: () = assert!(layout::MAX_VCPUS as u64 * REGION as u64 + (FREE as u64) < 1 << 31);
