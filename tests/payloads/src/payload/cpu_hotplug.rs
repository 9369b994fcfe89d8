//! Processors that come and go: found by ACPI's registers, started, let go.
//!
//! | ports | what |
//! | --- | --- |
//! | 0x620 | GPE0 status; bit 2 tells of processors |
//! | 0xcd8–0xce3 | the registers of CPU hot-plug |

use iced_x86::code_asm::*;

use crate::kit::{LongMode, layout};
use crate::{Ends, IcedError, Payload};

const GPE_STATUS: u32 = 0x620;
const GPE: i32 = 1 << 2;
const SELECT: u32 = 0xcd8;
const FLAGS: u32 = 0xcdc;
const COMMAND: u32 = 0xcdd;
const DATA: u32 = 0xce0;

const PRESENT: i32 = 1 << 0;
const INSERTED: i32 = 1 << 1;
const LEAVING: i32 = 1 << 2;
const EJECT: i32 = 1 << 3;
const NEXT: i32 = 0;
const APIC_ID: i32 = 3;

/// Starts each processor that is put in, and lets each go that it is asked for, until `gone` were let go.
///
/// It says `alone` first: all others were told to start, and none may. A processor that starts says `vcpu ` and its APIC id in 16
/// hexadecimal digits; one that is let go has its number said behind `gone `. Each that comes must have been still until it is
/// started, whatever it was told while it was away.
pub fn come_and_go(gone: u32) -> Result<Payload, IcedError> {
    let mut p = LongMode::new()?;
    let mut wait = p.asm.create_label();
    let mut next = p.asm.create_label();
    let mut leaving = p.asm.create_label();

    p.ready_for_others()?;
    p.tell_all_others_to_start()?;
    p.print("alone\n")?;
    // ebx: how many have come; ebp: how many are gone.
    p.asm.xor(ebx, ebx)?;
    p.asm.xor(ebp, ebp)?;

    p.place(&mut wait)?;
    p.asm.mov(edx, GPE_STATUS)?;
    p.asm.in_(al, dx)?;
    p.asm.test(al, GPE)?;
    p.asm.je(wait)?;
    p.asm.mov(al, GPE)?;
    p.asm.out(dx, al)?;

    p.place(&mut next)?;
    p.asm.mov(edx, SELECT)?;
    p.asm.xor(eax, eax)?;
    p.asm.out(dx, eax)?;
    command(&mut p, NEXT)?;
    p.asm.mov(edi, eax)?;
    p.asm.mov(edx, FLAGS)?;
    p.asm.in_(al, dx)?;
    p.asm.test(al, LEAVING)?;
    p.asm.jne(leaving)?;
    p.asm.test(al, INSERTED)?;
    p.asm.je(wait)?;

    p.asm.mov(al, INSERTED)?;
    p.asm.out(dx, al)?;
    p.asm.mov(ecx, dword_ptr(layout::ONLINE))?;
    p.expect(rcx, rbx, "processors that have started, before another is")?;
    command(&mut p, APIC_ID)?;
    p.start(eax)?;
    p.asm.inc(ebx)?;
    let mut comes = p.asm.create_label();
    p.place(&mut comes)?;
    p.asm.pause()?;
    p.asm.cmp(dword_ptr(layout::ONLINE), ebx)?;
    p.asm.jb(comes)?;
    p.asm.jmp(next)?;

    p.place(&mut leaving)?;
    for flag in [LEAVING, EJECT] {
        p.asm.mov(al, flag)?;
        p.asm.out(dx, al)?;
    }
    p.asm.in_(al, dx)?;
    // Another may have been put in by now.
    p.asm.mov(ecx, eax)?;
    p.asm.shr(ecx, INSERTED.trailing_zeros())?;
    p.asm.not(ecx)?;
    p.asm.and(ecx, eax)?;
    p.asm.and(ecx, PRESENT)?;
    p.asm.xor(eax, eax)?;
    p.expect(rcx, rax, "the flag that an ejected processor is there")?;
    p.lock(layout::CONSOLE_LOCK)?;
    p.print("gone ")?;
    p.print_hex(rdi)?;
    p.print("\n")?;
    p.unlock(layout::CONSOLE_LOCK)?;
    p.asm.inc(ebp)?;
    p.asm.cmp(ebp, gone)?;
    p.asm.jb(next)?;
    p.asm.mov(ecx, dword_ptr(layout::ONLINE))?;
    p.expect(rcx, rbx, "processors that have started")?;
    p.pass()?;

    p.other_vcpus()?;
    p.lock(layout::CONSOLE_LOCK)?;
    p.print("vcpu ")?;
    p.print_hex(r15)?;
    p.print("\n")?;
    p.unlock(layout::CONSOLE_LOCK)?;
    p.online()?;
    p.halt()?;
    Ok(Payload::kernel("cpu-hotplug", 1, p.finish()?).that_ends(Ends::Driven))
}

/// Gives the registers a command, and reads what it leaves as data into eax. Uses edx.
fn command(p: &mut LongMode, command: i32) -> Result<(), IcedError> {
    p.asm.mov(edx, COMMAND)?;
    p.asm.mov(al, command)?;
    p.asm.out(dx, al)?;
    p.asm.mov(edx, DATA)?;
    p.asm.in_(eax, dx)
}
