//! A guest that somebody operates by its serial port and its power button.

use iced_x86::code_asm::*;

use crate::kit::speech::{DATA, LINE_STATUS, Speech};
use crate::kit::{LongMode, layout};
use crate::{Ends, IcedError, Payload};

/// What it says first. It says so again after each reset.
pub const UP: &str = "operated guest is up";
/// Begins the line of a tick; its number follows in 16 hexadecimal digits, from 1.
pub const TICK: &str = "tick ";
/// Begins the answer to a key that means nothing; its code follows in 16 hexadecimal digits.
pub const KEY: &str = "key ";
/// What it says when its power button is pressed, before it switches itself off.
pub const BUTTON: &str = "power button";

/// Keys, and what it does by them.
pub mod keys {
    /// Switches itself off (ACPI S5).
    pub const OFF: char = 'o';
    /// Resets the machine (port 0xcf9).
    pub const RESET: char = 'r';
    /// Says that its kernel panicked (pvpanic).
    pub const PANIC: char = 'p';
}

const RECEIVED: i32 = 1;
const PM1_STATUS: u32 = 0x600;
const PM1_ENABLE: u32 = 0x602;
const PM1_CONTROL: u32 = 0x604;
const POWER_BUTTON: i32 = 1 << 8;
/// SLP_EN; SLP_TYP of S5 is 0.
const SLEEP: i32 = 1 << 13;
const RESET_CONTROL: u32 = 0xcf9;
const PVPANIC: u32 = 0x505;
/// Of the local APIC's clock, from tick to tick: 0.1 s by KVM's, which has 1 GHz.
const PERIOD: u32 = 100_000_000;
const TIMER_VECTOR: u8 = 0x42;

/// Ticks, says which keys it gets, and does what it is told. In between it is halted.
///
/// | touches | how |
/// | --- | --- |
/// | local APIC | its timer interrupts, at each tick |
/// | the serial port at 0x3f8 | looked at by tick; lines end with CR LF |
/// | PM1 at 0x600 | the power button, looked at by tick; S5 |
/// | 0xcf9, 0x505 | by [`keys`] |
pub fn operated() -> Result<Payload, IcedError> {
    let ticks = layout::word(0);
    let mut p = LongMode::new()?;
    let [mut wait, mut no_key, mut due, mut not_off, mut not_reset, mut not_panic, mut off, mut pressed] =
        [0; 8].map(|_| p.asm.create_label());
    let mut speech = Speech::new(&mut p);

    speech.say(&mut p, &format!("{UP}\r\n"))?;
    p.asm.mov(edx, PM1_ENABLE)?;
    p.asm.mov(eax, POWER_BUTTON)?;
    p.asm.out(dx, ax)?;
    // Ticks that were said, and that came: memory is what it was before a reset.
    p.asm.xor(ebx, ebx)?;
    p.asm.mov(dword_ptr(ticks), ebx)?;
    p.enable_apic()?;
    p.start_timer(TIMER_VECTOR, PERIOD)?;

    p.place(&mut wait)?;
    p.asm.mov(edx, PM1_STATUS)?;
    p.asm.in_(ax, dx)?;
    p.asm.test(eax, POWER_BUTTON)?;
    p.asm.jne(pressed)?;
    p.asm.mov(edx, LINE_STATUS)?;
    p.asm.in_(al, dx)?;
    p.asm.test(al, RECEIVED)?;
    p.asm.je(no_key)?;

    p.asm.mov(edx, DATA)?;
    p.asm.in_(al, dx)?;
    p.asm.movzx(ebp, al)?;
    p.asm.cmp(ebp, keys::OFF as i32)?;
    p.asm.jne(not_off)?;
    p.asm.jmp(off)?;
    p.place(&mut not_off)?;
    p.asm.cmp(ebp, keys::RESET as i32)?;
    p.asm.jne(not_reset)?;
    p.asm.mov(edx, RESET_CONTROL)?;
    p.asm.mov(al, 6)?;
    p.asm.out(dx, al)?;
    p.place(&mut not_reset)?;
    p.asm.cmp(ebp, keys::PANIC as i32)?;
    p.asm.jne(not_panic)?;
    p.asm.mov(edx, PVPANIC)?;
    p.asm.mov(al, 1)?;
    p.asm.out(dx, al)?;
    p.asm.jmp(wait)?;
    p.place(&mut not_panic)?;
    speech.say_number(&mut p, KEY, rbp)?;
    p.asm.jmp(wait)?;

    p.place(&mut no_key)?;
    p.asm.cmp(dword_ptr(ticks), ebx)?;
    p.asm.jne(due)?;
    p.asm.lea(ecx, ptr(rbx + 1))?;
    p.sleep_until(ticks, ecx)?;
    p.asm.jmp(wait)?;
    p.place(&mut due)?;
    p.asm.inc(rbx)?;
    speech.say_number(&mut p, TICK, rbx)?;
    p.asm.jmp(wait)?;

    p.place(&mut pressed)?;
    speech.say(&mut p, &format!("{BUTTON}\r\n"))?;
    p.place(&mut off)?;
    p.asm.mov(edx, PM1_CONTROL)?;
    p.asm.mov(eax, SLEEP)?;
    p.asm.out(dx, ax)?;
    p.asm.jmp(wait)?;

    speech.emit(&mut p)?;
    p.handler(TIMER_VECTOR, |p| p.asm.inc(dword_ptr(ticks)))?;
    Ok(Payload::kernel("operated", 1, p.finish()?).that_ends(Ends::Never))
}
