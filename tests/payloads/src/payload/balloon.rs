//! A guest that gives memory back by its balloon, and tells how much it has.

use iced_x86::code_asm::*;

use crate::kit::speech::Speech;
use crate::kit::virtio::{BEHIND, DEVICE, QueueAt, Wanted};
use crate::kit::{LongMode, layout};
use crate::{Ends, IcedError, Payload};

/// What it says three times a second while it has all its memory: who listens later than it starts hears that it is there.
pub const UP: &str = "balloon guest is up";
/// Begins the line of how many pages of 4 KiB its balloon has, in 16 hexadecimal digits, after each change.
pub const GIVEN: &str = "given ";
/// Memory that it gives at once: what it is asked for is a multiple of this, and [`MOST`] at most.
pub const PART: u64 = 1 << 20;
/// See [`PART`].
pub const MOST: u64 = 16 << 20;
/// The memory of its VM, at least.
pub const MEMORY: u64 = 64 << 20;

const PAGES: u32 = (PART / 4096) as u32;
/// The first page that it gives.
const FIRST: u32 = (MEMORY - 2 * MOST) as u32 / 4096;
const INFLATE: QueueAt = QueueAt { number: 0, at: BEHIND };
const DEFLATE: QueueAt = QueueAt { number: 1, at: BEHIND + QueueAt::SIZE };
const STATISTICS: QueueAt = QueueAt { number: 2, at: BEHIND + 2 * QueueAt::SIZE };
/// Numbers of pages; statistics.
const LIST: u32 = BEHIND + 3 * QueueAt::SIZE;
const TOLD: u32 = LIST + 0x1000;
const TIMER_VECTOR: u8 = 0x42;
/// Of the local APIC's clock: 20 ms.
const PERIOD: u32 = 20_000_000;

/// Does what its balloon asks for; in between it is halted.
///
/// | touches | how |
/// | --- | --- |
/// | the first virtio-balloon function on PCI | three queues of 128 entries: what it gives, what it takes back, statistics |
/// | local APIC | its timer interrupts |
/// | the serial port at 0x3f8 | lines end with CR LF |
///
/// It has written to all that it gives, and to all that it took back. Of its memory it says that [`MEMORY`] is there, and that what it has not
/// given is free.
pub fn balloon() -> Result<Payload, IcedError> {
    const STATS_VQ: u64 = 1 << 1;
    let ticks = layout::word(0);
    let mut p = LongMode::new()?;
    let mut speech = Speech::new(&mut p);
    let [mut wait, mut untold, mut inflate, mut changed, mut sleep, mut silent] = [0; 6].map(|_| p.asm.create_label());

    let queues = [INFLATE, DEFLATE, STATISTICS];
    p.start_virtio(&Wanted { kind: 5, features: STATS_VQ, queues: &queues, vector: None })?;
    p.enable_apic()?;
    p.start_timer(TIMER_VECTOR, PERIOD)?;
    // ebx: pages given.
    p.asm.xor(ebx, ebx)?;
    p.asm.mov(dword_ptr(ticks), ebx)?;
    for part in 0..(MOST / PART) as u32 {
        touch(&mut p, FIRST + part * PAGES)?;
    }
    // From now on it touches nothing that it hasn't before.
    list(&mut p)?;
    for (queue, at, len) in [(INFLATE, LIST, 4 * PAGES), (DEFLATE, LIST, 4 * PAGES), (STATISTICS, TOLD, 20)] {
        p.asm.mov(edi, queue.descriptors())?;
        p.asm.mov(rax, u64::from(at))?;
        p.asm.mov(qword_ptr(rdi), rax)?;
        p.asm.mov(rax, u64::from(len))?;
        p.asm.mov(qword_ptr(rdi + 8), rax)?;
    }
    p.asm.mov(r12, qword_ptr(DEVICE))?;

    p.place(&mut wait)?;
    // The buffer of statistics is here: it was given back, or not given yet.
    p.asm.mov(ax, word_ptr(STATISTICS.used() + 2))?;
    p.asm.cmp(ax, word_ptr(STATISTICS.available() + 2))?;
    p.asm.jne(untold)?;
    tell(&mut p)?;
    p.place(&mut untold)?;
    p.asm.mov(eax, dword_ptr(r12))?;
    p.asm.and(eax, !(PAGES as i32 - 1))?;
    p.asm.cmp(eax, ebx)?;
    p.asm.je(sleep)?;
    p.asm.ja(inflate)?;
    p.asm.sub(ebx, PAGES as i32)?;
    list(&mut p)?;
    submit(&mut p, DEFLATE, r14)?;
    p.asm.lea(edx, ptr(rbx + FIRST))?;
    touch_at_edx(&mut p)?;
    p.asm.jmp(changed)?;
    p.place(&mut inflate)?;
    list(&mut p)?;
    submit(&mut p, INFLATE, r13)?;
    p.asm.add(ebx, PAGES as i32)?;
    p.place(&mut changed)?;
    p.asm.mov(dword_ptr(r12 + 4), ebx)?;
    speech.say_number(&mut p, GIVEN, rbx)?;
    p.asm.jmp(wait)?;

    p.place(&mut sleep)?;
    p.asm.mov(eax, dword_ptr(ticks))?;
    p.asm.and(eax, 0xf)?;
    p.asm.or(eax, ebx)?;
    p.asm.jne(silent)?;
    speech.say(&mut p, &format!("{UP}\r\n"))?;
    p.place(&mut silent)?;
    p.asm.mov(ecx, dword_ptr(ticks))?;
    p.asm.inc(ecx)?;
    p.sleep_until(ticks, ecx)?;
    p.asm.jmp(wait)?;

    speech.emit(&mut p)?;
    p.handler(TIMER_VECTOR, |p| p.asm.inc(dword_ptr(ticks)))?;
    Ok(Payload::kernel("balloon", 1, p.finish()?).that_ends(Ends::Never))
}

/// Lists the next pages to give, or the last that were given. Uses rcx, rdx, rdi.
fn list(p: &mut LongMode) -> Result<(), IcedError> {
    let mut next = p.asm.create_label();
    p.asm.mov(edi, LIST)?;
    p.asm.lea(edx, ptr(rbx + FIRST))?;
    p.asm.mov(ecx, PAGES)?;
    p.asm.set_label(&mut next)?;
    p.asm.mov(dword_ptr(rdi), edx)?;
    p.asm.add(edi, 4)?;
    p.asm.inc(edx)?;
    p.asm.dec(ecx)?;
    p.asm.jne(next)
}

/// Shows the device the one descriptor of a queue, and waits until it has used it. Uses rax.
fn submit(p: &mut LongMode, queue: QueueAt, kicks: AsmRegister64) -> Result<(), IcedError> {
    let mut again = p.asm.create_label();
    show(p, queue, kicks)?;
    p.asm.set_label(&mut again)?;
    p.asm.pause()?;
    p.asm.mov(ax, word_ptr(queue.used() + 2))?;
    p.asm.cmp(ax, word_ptr(queue.available() + 2))?;
    p.asm.jne(again)
}

fn show(p: &mut LongMode, queue: QueueAt, kicks: AsmRegister64) -> Result<(), IcedError> {
    p.asm.inc(word_ptr(queue.available() + 2))?;
    p.asm.mfence()?;
    p.asm.mov(eax, queue.number)?;
    p.asm.mov(word_ptr(kicks), ax)
}

/// Gives the device statistics (virtio 1.2 §5.5.6.4). Uses rax, rcx.
fn tell(p: &mut LongMode) -> Result<(), IcedError> {
    const FREE: i32 = 4;
    const TOTAL: i32 = 5;
    p.asm.mov(ecx, (MEMORY / 4096) as u32)?;
    p.asm.sub(ecx, ebx)?;
    p.asm.shl(rcx, 12)?;
    p.asm.mov(word_ptr(TOLD), FREE)?;
    p.asm.mov(qword_ptr(TOLD + 2), rcx)?;
    p.asm.mov(ecx, MEMORY as u32)?;
    p.asm.mov(word_ptr(TOLD + 10), TOTAL)?;
    p.asm.mov(qword_ptr(TOLD + 12), rcx)?;
    show(p, STATISTICS, r11)
}

/// Writes to the pages of a part. Uses rcx, rdx.
fn touch(p: &mut LongMode, page: u32) -> Result<(), IcedError> {
    p.asm.mov(edx, page)?;
    touch_at_edx(p)
}

fn touch_at_edx(p: &mut LongMode) -> Result<(), IcedError> {
    let mut next = p.asm.create_label();
    p.asm.shl(edx, 12)?;
    p.asm.mov(ecx, PAGES)?;
    p.asm.set_label(&mut next)?;
    p.asm.mov(dword_ptr(rdx), edx)?;
    p.asm.add(edx, 4096)?;
    p.asm.dec(ecx)?;
    p.asm.jne(next)
}
