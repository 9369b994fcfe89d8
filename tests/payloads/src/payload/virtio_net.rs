//! Frames there and back, many at a time.

use iced_x86::code_asm::*;

use super::virtio_blk::Round;
use crate::kit::virtio::{BEHIND, QUEUE_SIZE, QueueAt, Wanted};
use crate::kit::{LongMode, layout};
use crate::{IcedError, Payload, Privilege};

/// What [`virtio_net`] does.
#[derive(Clone, Copy, Debug)]
pub struct Echoes {
    /// Frames on their way: 1 to [`MOST_DEPTH`].
    pub depth: u32,
    /// Frames of a round.
    pub count: u32,
    /// Rounds, one after the other.
    pub rounds: u32,
    /// Sleeps until the device interrupts, at CPL0; polls at CPL3 otherwise.
    pub sleeps: bool,
}

/// Most frames on their way.
pub const MOST_DEPTH: u32 = 32;
/// Bytes of a frame: the longest of an Ethernet without jumbo frames.
pub const FRAME: u32 = 1514;

/// The interrupt of both queues.
const VECTOR: u8 = 0x61;
/// Bytes of the header before a frame (virtio 1.2 §5.1.6).
const HEADER: u32 = 12;
/// The queue of frames that come, and that of frames that go.
const RECEIVE: QueueAt = QueueAt { number: 0, at: BEHIND };
const TRANSMIT: QueueAt = QueueAt { number: 1, at: BEHIND + QueueAt::SIZE };
/// Frames that go, and behind them those that come; how many bytes apart.
const FRAMES: u32 = BEHIND + 2 * QueueAt::SIZE;
const STRIDE: u32 = 2048;
const BUFFERS: u32 = FRAMES + MOST_DEPTH * STRIDE;
/// In every byte of a frame behind its header of Ethernet.
const FILLING: u64 = 0x5a5a_5a5a_5a5a_5a5a;

/// Sends frames to somebody who sends them back, and each that came back once more, until `count` did.
///
/// | touches | how |
/// | --- | --- |
/// | the first virtio-net function on PCI | one pair of queues of 128 entries, no features of the device |
/// | [`crate::ports::DEBUG_CONSOLE`] | a line a round, as of [`super::virtio_blk::virtio_blk`]: requests are frames that came back |
///
/// It fails where what came back is not as long as what went, or begins or ends with other bytes.
pub fn virtio_net(echoes: Echoes) -> Result<Payload, IcedError> {
    let Echoes { depth, count, rounds, sleeps } = echoes;
    assert!((1..=MOST_DEPTH).contains(&depth) && count >= depth, "{depth} of {count} frames on their way");
    let interrupts = layout::word(0);
    // What is to be sent, and what may be: frames that came back, and frames that the device has sent.
    let (owed, idle) = (layout::word(1), layout::word(2));
    let mut p = LongMode::new()?;
    if sleeps {
        p.enable_apic()?;
    }
    let vector = sleeps.then_some(VECTOR);
    p.start_virtio(&Wanted { kind: 1, features: 0, queues: &[RECEIVE, TRANSMIT], vector })?;
    for slot in 0..depth {
        describe(&mut p, slot)?;
    }
    // Nobody waits for what was sent.
    p.asm.mov(word_ptr(TRANSMIT.available()), 1)?;
    if !sleeps {
        p.asm.mov(word_ptr(RECEIVE.available()), 1)?;
        p.enter(Privilege::Cpl3)?;
    }

    let [mut round, mut wait, mut come, mut came, mut go, mut gone, mut send, mut sent, mut refilled, mut done] =
        [0; 10].map(|_| p.asm.create_label());
    // bx, si: of frames that come, the available index and the used one that was seen; r8w, r9w: of those that go; r15d: rounds.
    for register in [ebx, esi, r8d, r9d] {
        p.asm.xor(register, register)?;
    }
    p.asm.mov(r15d, rounds)?;
    for slot in 0..depth {
        p.asm.mov(edx, slot)?;
        offer(&mut p, RECEIVE, ebx)?;
    }
    p.asm.mov(word_ptr(RECEIVE.available() + 2), bx)?;
    p.place(&mut round)?;
    p.asm.mov(dword_ptr(interrupts), 0)?;
    p.asm.mov(dword_ptr(owed), depth)?;
    p.asm.mov(ebp, count)?;
    p.asm.mov(edi, count - depth)?;
    p.asm.xor(r10d, r10d)?;
    p.read_clock()?;
    p.asm.mov(r11, rax)?;
    // In the first round every frame is sent for the first time.
    p.asm.cmp(r15d, rounds as i32)?;
    p.asm.jne(come)?;
    p.asm.mov(dword_ptr(idle), 0)?;
    for slot in 0..depth {
        p.asm.mov(edx, slot)?;
        offer(&mut p, TRANSMIT, r8d)?;
    }
    p.asm.mov(dword_ptr(owed), 0)?;
    p.asm.jmp(send)?;

    p.place(&mut wait)?;
    if sleeps {
        p.asm.cli()?;
        p.asm.movzx(eax, word_ptr(RECEIVE.used() + 2))?;
        p.asm.cmp(ax, si)?;
        let mut awake = p.asm.create_label();
        p.asm.jne(awake)?;
        // What waits for a frame to be gone looks for it, as it isn't told.
        p.asm.cmp(dword_ptr(owed), 0)?;
        p.asm.jne(awake)?;
        p.asm.sti()?;
        p.asm.hlt()?;
        p.asm.jmp(wait)?;
        p.place(&mut awake)?;
        p.asm.sti()?;
    } else {
        p.asm.pause()?;
    }
    // Frames that came: each is looked at, its buffer offered again, and another one owed.
    p.asm.set_label(&mut come)?;
    p.asm.movzx(eax, word_ptr(RECEIVE.used() + 2))?;
    p.asm.cmp(ax, si)?;
    p.asm.je(came)?;
    p.asm.movzx(ecx, si)?;
    p.asm.and(ecx, QUEUE_SIZE as i32 - 1)?;
    p.asm.mov(edx, dword_ptr(rcx * 8 + (RECEIVE.used() + 4)))?;
    p.asm.mov(ecx, dword_ptr(rcx * 8 + (RECEIVE.used() + 8)))?;
    check(&mut p)?;
    offer(&mut p, RECEIVE, ebx)?;
    p.asm.inc(esi)?;
    p.asm.dec(ebp)?;
    p.asm.test(edi, edi)?;
    p.asm.je(come)?;
    p.asm.dec(edi)?;
    p.asm.inc(dword_ptr(owed))?;
    p.asm.jmp(come)?;
    p.place(&mut came)?;
    p.asm.cmp(bx, word_ptr(RECEIVE.available() + 2))?;
    p.asm.je(refilled)?;
    p.asm.mov(word_ptr(RECEIVE.available() + 2), bx)?;
    kick(&mut p, RECEIVE, r13, refilled)?;
    p.place(&mut refilled)?;
    p.asm.test(ebp, ebp)?;
    p.asm.je(done)?;
    // Frames that are gone are sent again, as many as are owed.
    p.asm.set_label(&mut go)?;
    p.asm.cmp(dword_ptr(owed), 0)?;
    p.asm.je(gone)?;
    p.asm.movzx(eax, word_ptr(TRANSMIT.used() + 2))?;
    p.asm.cmp(ax, r9w)?;
    p.asm.je(gone)?;
    p.asm.movzx(ecx, r9w)?;
    p.asm.and(ecx, QUEUE_SIZE as i32 - 1)?;
    p.asm.mov(edx, dword_ptr(rcx * 8 + (TRANSMIT.used() + 4)))?;
    p.asm.inc(r9d)?;
    offer(&mut p, TRANSMIT, r8d)?;
    p.asm.dec(dword_ptr(owed))?;
    p.asm.jmp(go)?;
    p.place(&mut gone)?;
    p.asm.cmp(r8w, word_ptr(TRANSMIT.available() + 2))?;
    p.asm.je(wait)?;
    p.place(&mut send)?;
    p.asm.mov(word_ptr(TRANSMIT.available() + 2), r8w)?;
    kick(&mut p, TRANSMIT, r14, sent)?;
    p.place(&mut sent)?;
    p.asm.jmp(wait)?;

    p.place(&mut done)?;
    if sleeps {
        p.asm.cli()?;
    }
    p.read_clock()?;
    p.asm.sub(rax, r11)?;
    p.asm.mov(r11, rax)?;
    p.asm.mov(ecx, count)?;
    p.asm.mov(ebp, dword_ptr(interrupts))?;
    for (name, value) in [("requests ", rcx), (" ticks ", r11), (" kicks ", r10), (" interrupts ", rbp)] {
        p.print(name)?;
        p.print_hex(value)?;
    }
    p.print("\n")?;
    p.asm.dec(r15d)?;
    p.asm.jne(round)?;
    p.pass()?;

    p.handler(VECTOR, |p| p.asm.inc(dword_ptr(interrupts)))?;
    Ok(Payload::kernel("virtio-net", 1, p.finish()?))
}

/// Writes a frame that goes, its descriptor, and that of a buffer for one that comes.
fn describe(p: &mut LongMode, slot: u32) -> Result<(), IcedError> {
    const WRITABLE: u64 = 2;
    let (frame, buffer) = (FRAMES + STRIDE * slot, BUFFERS + STRIDE * slot);
    let descriptors =
        [(TRANSMIT, frame, u64::from(HEADER + FRAME)), (RECEIVE, buffer, u64::from(STRIDE) | WRITABLE << 32)];
    for (queue, at, word) in descriptors {
        p.asm.mov(edi, queue.descriptors() + 16 * slot)?;
        p.asm.mov(eax, at)?;
        p.asm.mov(qword_ptr(rdi), rax)?;
        p.asm.mov(rax, word)?;
        p.asm.mov(qword_ptr(rdi + 8), rax)?;
    }
    p.asm.mov(edi, frame + HEADER)?;
    p.asm.mov(rax, FILLING)?;
    p.asm.mov(ecx, FRAME.div_ceil(8))?;
    p.asm.rep().stosq()?;
    // To everybody, from a station of nobody's, of a type that is left to experiments (IEEE 802 §9.2.4).
    for (at, word) in [(0, 0x5452_ffff_ffff_ffffu64), (8, 0x5a5a_b588_0100_0000)] {
        p.asm.mov(rax, word)?;
        p.asm.mov(edi, frame + HEADER + at)?;
        p.asm.mov(qword_ptr(rdi), rax)?;
    }
    Ok(())
}

/// Puts the descriptor edx into a queue's available ring, whose index is not shown yet. Uses rcx.
fn offer(p: &mut LongMode, queue: QueueAt, index: AsmRegister32) -> Result<(), IcedError> {
    p.asm.mov(ecx, index)?;
    p.asm.and(ecx, QUEUE_SIZE as i32 - 1)?;
    p.asm.mov(word_ptr(rcx * 2 + (queue.available() + 4)), dx)?;
    p.asm.inc(index)
}

/// Kicks the device for a queue, and counts it in r10, unless it wants none: then goes to `quiet`. Uses rax.
fn kick(p: &mut LongMode, queue: QueueAt, place: AsmRegister64, quiet: CodeLabel) -> Result<(), IcedError> {
    // What was made available before whether the device wants a kick.
    p.asm.mfence()?;
    p.asm.test(word_ptr(queue.used()), 1)?;
    p.asm.jne(quiet)?;
    p.asm.mov(eax, queue.number)?;
    p.asm.mov(word_ptr(place), ax)?;
    p.asm.inc(r10d)
}

/// Fails unless the frame of ecx bytes, header included, in buffer edx is what was sent. Uses rax, r12.
fn check(p: &mut LongMode) -> Result<(), IcedError> {
    let [mut wrong, mut right] = [0; 2].map(|_| p.asm.create_label());
    p.asm.cmp(ecx, (HEADER + FRAME) as i32)?;
    p.asm.jne(wrong)?;
    p.asm.mov(eax, edx)?;
    p.asm.shl(eax, STRIDE.trailing_zeros())?;
    p.asm.mov(ecx, dword_ptr(rax + (BUFFERS + HEADER)))?;
    p.asm.cmp(ecx, -1)?;
    p.asm.jne(wrong)?;
    p.asm.mov(r12, FILLING)?;
    p.asm.cmp(r12, qword_ptr(rax + (BUFFERS + HEADER + FRAME - 8)))?;
    p.asm.je(right)?;
    p.place(&mut wrong)?;
    p.fail("what came back is another frame")?;
    p.place(&mut right)
}

/// Reads a line of [`virtio_net`].
pub fn parse(line: &str) -> Option<Round> {
    super::virtio_blk::parse(line)
}
