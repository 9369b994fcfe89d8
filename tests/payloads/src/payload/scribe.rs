//! vCPUs that write memory without end, and notice what was lost: for guests that move.
//!
//! | touches | how |
//! | --- | --- |
//! | RAM from [`FREE`] | each vCPU has a part of its own and goes over it pass by pass: of each page it reads the pass that it wrote last, at an offset that is the page's own, and writes the next one; a page that has another is the end, by `fail:` |
//! | ACPI's status register at [`POWER`] | looked at after each pass: the power button is the end |
//! | TSC | read at each page: the longest gap between two reads of one vCPU is told at the end |
//!
//! At the end it says `passes N`, `gap T` (ticks of the TSC, from the second pass on), both in 16 hexadecimal digits, as vCPU 0 has seen them.

use iced_x86::code_asm::*;

use crate::kit::LongMode;
use crate::kit::layout::{self, FREE};
use crate::{Ends, IcedError, Payload, Privilege};

/// PM1 status: bit 8 is the power button's.
pub const POWER: u16 = 0x600;
const BUTTON: u32 = 1 << 8;

const PAGE: u32 = 4096;

/// How a scribe writes.
#[derive(Debug, Clone, Copy)]
pub struct Scribe {
    /// vCPUs.
    pub vcpus: u8,
    /// Pages of each.
    pub pages: u32,
    /// Ticks of the TSC from page to page, at least.
    pub pace: u32,
}

impl Scribe {
    /// Bytes of guest memory that it needs, from address 0.
    pub fn memory(&self) -> u64 {
        u64::from(FREE) + u64::from(self.pages) * u64::from(PAGE) * u64::from(self.vcpus)
    }

    /// The payload.
    pub fn payload(&self) -> Result<Payload, IcedError> {
        let [stop, stopped] = [0, 1].map(layout::word);
        let mut p = LongMode::new()?;
        p.print("scribe\n")?;
        if self.vcpus > 1 {
            p.start_other_vcpus(self.vcpus)?;
        }
        p.enter(Privilege::Cpl3)?;
        self.write(&mut p, stop)?;
        p.asm.mov(dword_ptr(stop), 1)?;
        if self.vcpus > 1 {
            p.spin_until(stopped, u32::from(self.vcpus) - 1)?;
        }
        p.print("passes ")?;
        p.print_hex(rbp)?;
        p.print("\ngap ")?;
        p.print_hex(r13)?;
        p.print("\n")?;
        p.pass()?;

        p.other_vcpus()?;
        p.online()?;
        p.enter(Privilege::Cpl3)?;
        self.write(&mut p, stop)?;
        p.asm.lock().inc(dword_ptr(stopped))?;
        let mut rest = p.asm.create_label();
        p.asm.set_label(&mut rest)?;
        p.asm.pause()?;
        p.asm.jmp(rest)?;
        Ok(Payload::kernel("scribe", self.vcpus, p.finish()?).that_ends(Ends::Driven))
    }

    /// Registers only: r15 the vCPU, r14 its part, rbp passes done, rdi a page, ecx pages left, r12 when the last page was, r13 the longest gap.
    fn write(&self, p: &mut LongMode, stop: u32) -> Result<(), IcedError> {
        let bytes = self.pages * PAGE;
        let [mut pass, mut page, mut early, mut short, mut done] = [0; 5].map(|_| p.asm.create_label());
        p.asm.mov(eax, bytes)?;
        p.asm.mov(r14d, r15d)?;
        p.asm.imul_2(r14, rax)?;
        p.asm.add(r14, FREE as i32)?;
        p.asm.xor(ebp, ebp)?;
        p.asm.xor(r13d, r13d)?;
        p.read_clock()?;
        p.asm.mov(r12, rax)?;

        p.place(&mut pass)?;
        p.asm.mov(rdi, r14)?;
        p.asm.mov(ecx, self.pages)?;

        p.place(&mut page)?;
        p.asm.set_label(&mut early)?;
        p.read_clock()?;
        p.asm.mov(rbx, rax)?;
        p.asm.sub(rbx, r12)?;
        if self.pace > 0 {
            p.asm.cmp(rbx, self.pace as i32)?;
            p.asm.jb(early)?;
        }
        // What came before the first pass is the machine's start.
        p.asm.test(rbp, rbp)?;
        p.asm.je(short)?;
        p.asm.cmp(rbx, r13)?;
        p.asm.jbe(short)?;
        p.asm.mov(r13, rbx)?;
        p.asm.set_label(&mut short)?;
        p.asm.mov(r12, rax)?;
        // Within the page: 8 bytes by its number.
        p.asm.mov(rsi, rdi)?;
        p.asm.shr(rsi, 9)?;
        p.asm.and(esi, 0xff8)?;
        p.asm.mov(rbx, qword_ptr(rdi + rsi))?;
        p.expect(rbx, rbp, "a page without its last pass")?;
        p.asm.inc(rbx)?;
        p.asm.mov(qword_ptr(rdi + rsi), rbx)?;
        p.asm.add(rdi, PAGE as i32)?;
        p.asm.dec(ecx)?;
        p.asm.jne(page)?;

        p.asm.inc(rbp)?;
        p.asm.mov(edx, u32::from(POWER))?;
        p.asm.in_(ax, dx)?;
        p.asm.test(eax, BUTTON)?;
        p.asm.jne(done)?;
        p.asm.cmp(dword_ptr(stop), 0)?;
        p.asm.je(pass)?;
        p.place(&mut done)
    }
}

/// The number behind `word` in what a scribe said.
pub fn told(said: &str, word: &str) -> Option<u64> {
    let line = said.lines().find_map(|line| line.strip_prefix(word)?.strip_prefix(' '))?;
    u64::from_str_radix(line, 16).ok()
}
