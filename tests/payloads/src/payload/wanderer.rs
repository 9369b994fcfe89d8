//! Memory that is to be moved: random pages, and a vCPU that writes them at a rate and beats.
//!
//! | touches | how |
//! | --- | --- |
//! | RAM from [`FREE`] | filled with random words first; then `ready` is told |
//! | debug console | from then on [`BEAT`] whenever so many ticks of the TSC have passed, and [`WORK`] after each 256 pages written |
//!
//! One that doesn't beat halts for good when it is ready. None comes to an end.

use iced_x86::code_asm::*;

use crate::kit::LongMode;
use crate::kit::layout::FREE;
use crate::{Ends, IcedError, Payload, Privilege, ports};

/// A beat.
pub const BEAT: u8 = b'.';
/// 1 MiB of pages was written.
pub const WORK: u8 = b'+';
/// Pages of a [`WORK`].
const CHUNK: u32 = 256;
const PAGE: u32 = 4096;
/// The invalid opcode's exception: CPL3's way to CPL0, where HLT is allowed. A KVM in software knows no INT there.
const INVALID_OPCODE: u8 = 6;

/// How it lives.
#[derive(Debug, Clone, Copy)]
pub struct Wanderer {
    /// Pages of random words.
    pub pages: u32,
    /// How it goes on; none: it halts.
    pub pace: Option<Pace>,
}

/// In ticks of the TSC.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// From beat to beat.
    pub beat: u32,
    /// From page to page; 0: it writes none.
    pub page: u32,
}

impl Wanderer {
    /// The payload.
    pub fn payload(&self) -> Result<Payload, IcedError> {
        let mut p = LongMode::new()?;
        // Where a KVM in software runs a loop as fast as the processor does.
        p.enter(Privilege::Cpl3)?;
        self.fill(&mut p)?;
        p.print("ready\n")?;
        match self.pace {
            Some(pace) => self.beat(&mut p, pace)?,
            None => {
                p.asm.ud2()?;
                p.handler(INVALID_OPCODE, |p| {
                    p.asm.cli()?;
                    p.halt()
                })?;
            }
        }
        Ok(Payload::kernel("wanderer", 1, p.finish()?).that_ends(Ends::Never))
    }

    /// Random words (Marsaglia's xorshift64) from [`FREE`] on.
    fn fill(&self, p: &mut LongMode) -> Result<(), IcedError> {
        let mut word = p.asm.create_label();
        p.asm.mov(rax, 0x9e37_79b9_7f4a_7c15u64)?;
        p.asm.mov(edi, FREE)?;
        p.asm.mov(ecx, self.pages * (PAGE / 8))?;
        p.asm.set_label(&mut word)?;
        for (left, shift) in [(true, 13), (false, 7), (true, 17)] {
            p.asm.mov(rdx, rax)?;
            if left {
                p.asm.shl(rdx, shift)?;
            } else {
                p.asm.shr(rdx, shift)?;
            }
            p.asm.xor(rax, rdx)?;
        }
        p.asm.mov(qword_ptr(rdi), rax)?;
        p.asm.add(rdi, 8)?;
        p.asm.dec(ecx)?;
        p.asm.jne(word)
    }

    /// r12 the last beat, r13 when the next page's turn is, rdi that page, ecx pages left in the pass, ebp in the chunk.
    fn beat(&self, p: &mut LongMode, pace: Pace) -> Result<(), IcedError> {
        let [mut look, mut no_beat, mut in_time, mut same_pass] = [0; 4].map(|_| p.asm.create_label());
        p.read_clock()?;
        p.asm.mov(r12, rax)?;
        p.asm.mov(r13, rax)?;
        p.asm.mov(edi, FREE)?;
        p.asm.mov(ecx, self.pages)?;
        p.asm.mov(ebp, CHUNK)?;

        p.place(&mut look)?;
        p.read_clock()?;
        p.asm.mov(rbx, rax)?;
        p.asm.sub(rbx, r12)?;
        p.asm.cmp(rbx, pace.beat as i32)?;
        p.asm.jb(no_beat)?;
        p.asm.mov(r12, rax)?;
        p.asm.mov(r8, rax)?;
        tell(p, BEAT)?;
        p.asm.mov(rax, r8)?;
        p.place(&mut no_beat)?;
        if pace.page == 0 {
            return p.asm.jmp(look);
        }
        p.asm.mov(rbx, rax)?;
        p.asm.sub(rbx, r13)?;
        p.asm.jl(look)?;
        // What it was kept from for longer than a beat it doesn't make up for.
        p.asm.cmp(rbx, pace.beat as i32)?;
        p.asm.jb(in_time)?;
        p.asm.mov(r13, rax)?;
        p.place(&mut in_time)?;
        p.asm.add(r13, pace.page as i32)?;
        p.asm.inc(qword_ptr(rdi))?;
        p.asm.add(rdi, PAGE as i32)?;
        p.asm.dec(ecx)?;
        p.asm.jne(same_pass)?;
        p.asm.mov(edi, FREE)?;
        p.asm.mov(ecx, self.pages)?;
        p.place(&mut same_pass)?;
        p.asm.dec(ebp)?;
        p.asm.jne(look)?;
        p.asm.mov(ebp, CHUNK)?;
        tell(p, WORK)?;
        p.asm.jmp(look)
    }
}

/// A byte to the debug console. Uses rax, rdx.
fn tell(p: &mut LongMode, byte: u8) -> Result<(), IcedError> {
    p.asm.mov(edx, u32::from(ports::DEBUG_CONSOLE))?;
    p.asm.mov(eax, u32::from(byte))?;
    p.asm.out(dx, al)
}
