//! Interrupts from outside: messages and irqfds, and a level-triggered line of the IOAPIC.

use iced_x86::code_asm::*;

use crate::kit::{LongMode, layout};
use crate::{Ends, IcedError, Payload, ports};

/// Counts messages.
///
/// | touches | how |
/// | --- | --- |
/// | local APIC | takes interrupts of [`MSI_VECTOR`] |
/// | [`ports::COMMAND`] | writes 0 when it is ready, then the running count after each interrupt |
///
/// The driver sends the next message ([`MSI_ADDRESS`], [`MSI_DATA`]) or signals its irqfd after each write: messages
/// of one vector merge while one is pending. It passes after [`MSI_COUNT`]; between them the vCPU is halted.
pub fn msi() -> Result<Payload, IcedError> {
    let count = layout::word(0);
    let mut p = LongMode::new()?;
    p.enable_apic()?;
    p.asm.mov(edx, u32::from(ports::COMMAND))?;
    p.asm.xor(eax, eax)?;
    p.asm.out(dx, eax)?;
    p.asm.mov(ecx, MSI_COUNT)?;
    p.sleep_until(count, ecx)?;
    p.pass()?;

    p.handler(MSI_VECTOR, |p| {
        p.asm.push(rdx)?;
        p.asm.mov(edx, u32::from(ports::COMMAND))?;
        p.asm.mov(eax, dword_ptr(count))?;
        p.asm.inc(eax)?;
        p.asm.mov(dword_ptr(count), eax)?;
        p.asm.out(dx, eax)?;
        p.asm.pop(rdx)
    })?;
    Ok(Payload::kernel("msi", 1, p.finish()?).that_ends(Ends::Driven))
}

/// Vector of [`msi`]'s messages.
pub const MSI_VECTOR: u8 = 0x41;
/// Where they are written: APIC id 0, physical.
pub const MSI_ADDRESS: u64 = 0xfee0_0000;
/// What is written: fixed delivery, edge.
pub const MSI_DATA: u32 = MSI_VECTOR as u32;
/// How many it waits for.
pub const MSI_COUNT: u32 = 100;

/// A level-triggered line that the payload itself raises and lowers by pc-testdev.
///
/// | touches | how |
/// | --- | --- |
/// | IOAPIC | pin [`LEVEL_LINE`] to [`LEVEL_VECTOR`], level-triggered |
/// | [`ports::IRQ_LINES`] | raises the line [`LEVEL_ROUNDS`] times; the handler lowers it at its [`LEVEL_ENTRIES`]th entry |
/// | [`ports::DEBUG_CONSOLE`] | reads it while it waits; at the end `surplus ` and 16 hexadecimal digits |
///
/// While the line is high each end of interrupt brings the next; a lost notice of one ends the payload by a failure.
/// Once the line is low none comes: the surplus counts those that do. It is [`LEVEL_ROUNDS`] where lines fall after the
/// end of interrupt instead of before, and 0 on hardware. A software KVM backend ends a level interrupt when it
/// delivers it: always with KVM's own IOAPIC, once in a thousand with a split irqchip. There the notice of an end of
/// interrupt also waits for the next exit, and HLT is none: so the payload does not halt.
pub fn level() -> Result<Payload, IcedError> {
    let [entries, surplus] = [0, 1].map(layout::word);
    let line_port = u32::from(ports::IRQ_LINES) + u32::from(LEVEL_LINE);
    let mut p = LongMode::new()?;
    p.enable_apic()?;
    write_ioapic(&mut p, 0x11 + 2 * u32::from(LEVEL_LINE), 0)?;
    write_ioapic(&mut p, 0x10 + 2 * u32::from(LEVEL_LINE), IOAPIC_LEVEL | u32::from(LEVEL_VECTOR))?;

    let [mut round, mut wait, mut lowered] = [0; 3].map(|_| p.asm.create_label());
    p.asm.mov(ebp, LEVEL_ROUNDS)?;
    p.asm.sti()?;
    p.asm.set_label(&mut round)?;
    p.asm.mov(dword_ptr(entries), 0)?;
    p.asm.mov(edx, line_port)?;
    p.asm.mov(eax, 1)?;
    p.asm.out(dx, al)?;
    p.asm.mov(edx, u32::from(ports::DEBUG_CONSOLE))?;
    p.asm.mov(ecx, LEVEL_READS)?;
    p.asm.set_label(&mut wait)?;
    p.asm.in_(al, dx)?;
    p.asm.cmp(dword_ptr(entries), LEVEL_ENTRIES)?;
    p.asm.jae(lowered)?;
    p.asm.dec(ecx)?;
    p.asm.jne(wait)?;
    p.fail("the line is high, and no interrupt comes")?;
    p.asm.set_label(&mut lowered)?;
    p.asm.in_(al, dx)?; // time for a surplus one
    p.asm.in_(al, dx)?;
    p.asm.dec(ebp)?;
    p.asm.jne(round)?;
    p.asm.cli()?;
    p.asm.mov(ecx, dword_ptr(surplus))?;
    p.print("surplus ")?;
    p.print_hex(rcx)?;
    p.print("\n")?;
    p.pass()?;

    p.handler(LEVEL_VECTOR, |p| {
        let [mut wanted, mut end] = [0; 2].map(|_| p.asm.create_label());
        p.asm.cmp(dword_ptr(entries), LEVEL_ENTRIES)?;
        p.asm.jb(wanted)?;
        p.asm.inc(dword_ptr(surplus))?;
        p.asm.jmp(end)?;
        p.asm.set_label(&mut wanted)?;
        p.asm.inc(dword_ptr(entries))?;
        p.asm.cmp(dword_ptr(entries), LEVEL_ENTRIES)?;
        p.asm.jne(end)?;
        p.asm.push(rdx)?;
        p.asm.mov(edx, line_port)?;
        p.asm.xor(eax, eax)?;
        p.asm.out(dx, al)?;
        p.asm.pop(rdx)?;
        p.place(&mut end)
    })?;
    Ok(Payload::kernel("level", 1, p.finish()?))
}

/// The surplus interrupts that [`level`] reports on the debug console.
pub fn parse_surplus(console: &str) -> Option<u32> {
    let digits = console.lines().find_map(|line| line.strip_prefix("surplus "))?;
    u32::from_str_radix(digits, 16).ok()
}

/// The ISA interrupt and IOAPIC pin of [`level`].
pub const LEVEL_LINE: u8 = 10;
/// Its vector.
pub const LEVEL_VECTOR: u8 = 0x51;
/// How often the line is raised.
pub const LEVEL_ROUNDS: u32 = 50;
/// Entries of the handler while the line is high.
pub const LEVEL_ENTRIES: u32 = 3;

/// How many reads it waits for them.
const LEVEL_READS: u32 = 100_000;

const IOAPIC: u32 = 0xfec0_0000;
const IOAPIC_LEVEL: u32 = 1 << 15;

fn write_ioapic(p: &mut LongMode, register: u32, value: u32) -> Result<(), IcedError> {
    p.asm.mov(eax, IOAPIC)?;
    p.asm.mov(dword_ptr(rax), register)?;
    p.asm.mov(dword_ptr(rax + 0x10), value)
}
