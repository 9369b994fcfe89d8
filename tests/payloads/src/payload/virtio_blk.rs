//! A disk's requests, many at a time.

use iced_x86::code_asm::*;

use crate::kit::virtio::{BEHIND, QUEUE_SIZE, QueueAt, Wanted};
use crate::kit::{LongMode, layout};
use crate::{IcedError, Payload, Privilege};

/// What [`virtio_blk`] does.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Writes, or else reads.
    pub write: bool,
    /// Requests under way: 1 to [`MOST_DEPTH`].
    pub depth: u32,
    /// Requests of a round.
    pub count: u32,
    /// Rounds, one after the other.
    pub rounds: u32,
    /// Sleeps until the device interrupts, at CPL0; polls at CPL3 otherwise.
    pub sleeps: bool,
}

/// Most requests under way.
pub const MOST_DEPTH: u32 = 32;
/// Bytes of a request. Request n of those under way is always about the n-th such piece of the disk.
pub const PIECE: u32 = 4096;
/// In all of a piece's bytes that a payload writes: its number, and this.
pub const WRITTEN: u8 = 0x80;

/// The interrupt of the queue.
const VECTOR: u8 = 0x61;
/// The queue.
const QUEUE: QueueAt = QueueAt { number: 0, at: BEHIND };
const DESCRIPTORS: u32 = QUEUE.descriptors();
const AVAILABLE: u32 = QUEUE.available();
const USED: u32 = QUEUE.used();
/// Headers of 16 bytes, status bytes 16 apart, data.
const HEADERS: u32 = BEHIND + QueueAt::SIZE;
const STATUSES: u32 = HEADERS + 0x1000;
const DATA: u32 = HEADERS + 0x2000;

/// Keeps a virtio disk busy: each request that is finished is made again, until `count` are.
///
/// | touches | how |
/// | --- | --- |
/// | the first virtio-blk function on PCI | one queue of 128 entries, neither event index nor indirect descriptors, flushes accepted |
/// | [`crate::ports::DEBUG_CONSOLE`] | a line a round: `requests N ticks T kicks K interrupts I`, 16 hexadecimal digits each |
///
/// It fails where a request does, or where a piece that was read doesn't begin with its number, in 8 bytes.
pub fn virtio_blk(load: Load) -> Result<Payload, IcedError> {
    const FLUSH: u64 = 1 << 9;
    let Load { write, depth, count, rounds, sleeps } = load;
    assert!((1..=MOST_DEPTH).contains(&depth) && count >= depth, "{depth} of {count} requests under way");
    let interrupts = layout::word(0);
    let mut p = LongMode::new()?;
    if sleeps {
        p.enable_apic()?;
    }
    let vector = sleeps.then_some(VECTOR);
    p.start_virtio(&Wanted { kind: 2, features: FLUSH, queues: &[QUEUE], vector })?;
    for slot in 0..depth {
        describe(&mut p, slot, write)?;
    }
    if !sleeps {
        // NO_INTERRUPT.
        p.asm.mov(word_ptr(AVAILABLE), 1)?;
        p.enter(Privilege::Cpl3)?;
    }

    let [mut round, mut wait, mut woken, mut take, mut taken, mut kick, mut done] =
        [0; 7].map(|_| p.asm.create_label());
    // bx: the available index, si: the used index that is waited past, r9d: rounds.
    p.asm.xor(ebx, ebx)?;
    p.asm.xor(esi, esi)?;
    p.asm.mov(r9d, rounds)?;
    p.place(&mut round)?;
    p.asm.mov(dword_ptr(interrupts), 0)?;
    // ebp: requests to finish, edi: to make, r10d: kicks.
    p.asm.mov(ebp, count)?;
    p.asm.mov(edi, count - depth)?;
    p.asm.xor(r10d, r10d)?;
    for slot in 0..depth {
        make(&mut p, 3 * slot)?;
    }
    p.read_clock()?;
    p.asm.mov(r11, rax)?;
    p.asm.jmp(kick)?;

    p.place(&mut wait)?;
    if sleeps {
        p.asm.cli()?;
        p.asm.movzx(eax, word_ptr(USED + 2))?;
        p.asm.cmp(ax, si)?;
        p.asm.jne(woken)?;
        p.asm.sti()?;
        p.asm.hlt()?;
        p.asm.jmp(wait)?;
    } else {
        p.asm.movzx(eax, word_ptr(USED + 2))?;
        p.asm.cmp(ax, si)?;
        p.asm.jne(woken)?;
        p.asm.pause()?;
        p.asm.jmp(wait)?;
    }
    p.place(&mut woken)?;
    if sleeps {
        p.asm.sti()?;
    }
    p.asm.set_label(&mut take)?;
    p.asm.cmp(ax, si)?;
    p.asm.je(taken)?;
    p.asm.movzx(ecx, si)?;
    p.asm.and(ecx, QUEUE_SIZE as i32 - 1)?;
    p.asm.mov(edx, dword_ptr(rcx * 8 + (USED + 4)))?;
    p.asm.inc(esi)?;
    p.asm.dec(ebp)?;
    p.asm.test(edi, edi)?;
    p.asm.je(take)?;
    p.asm.dec(edi)?;
    p.asm.movzx(ecx, bx)?;
    p.asm.and(ecx, QUEUE_SIZE as i32 - 1)?;
    p.asm.mov(word_ptr(rcx * 2 + (AVAILABLE + 4)), dx)?;
    p.asm.inc(ebx)?;
    p.asm.jmp(take)?;
    p.asm.set_label(&mut taken)?;
    p.asm.test(ebp, ebp)?;
    p.asm.je(done)?;
    p.asm.cmp(bx, word_ptr(AVAILABLE + 2))?;
    p.asm.je(wait)?;
    p.asm.set_label(&mut kick)?;
    p.asm.mov(word_ptr(AVAILABLE + 2), bx)?;
    // What was made available before whether the device wants a kick.
    p.asm.mfence()?;
    p.asm.test(word_ptr(USED), 1)?;
    p.asm.jne(wait)?;
    p.asm.xor(eax, eax)?;
    p.asm.mov(word_ptr(r13), ax)?;
    p.asm.inc(r10d)?;
    p.asm.jmp(wait)?;

    p.place(&mut done)?;
    if sleeps {
        p.asm.cli()?;
    }
    p.read_clock()?;
    p.asm.sub(rax, r11)?;
    p.asm.mov(r11, rax)?;
    p.asm.mov(ecx, count)?;
    p.asm.mov(r8d, dword_ptr(interrupts))?;
    for (name, value) in [("requests ", rcx), (" ticks ", r11), (" kicks ", r10), (" interrupts ", r8)] {
        p.print(name)?;
        p.print_hex(value)?;
    }
    p.print("\n")?;
    for slot in 0..depth {
        check(&mut p, slot, write)?;
    }
    p.asm.dec(r9d)?;
    p.asm.jne(round)?;
    p.pass()?;

    p.handler(VECTOR, |p| p.asm.inc(dword_ptr(interrupts)))?;
    Ok(Payload::kernel("virtio-blk", 1, p.finish()?))
}

/// One round, out of a line of the debug console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Finished requests.
    pub requests: u64,
    /// Of the time-stamp counter.
    pub ticks: u64,
    /// Writes to the queue's notification address.
    pub kicks: u64,
    /// Interrupts of the queue.
    pub interrupts: u64,
}

/// Reads a line of [`virtio_blk`].
pub fn parse(line: &str) -> Option<Round> {
    let mut words = line.split(' ');
    let mut number = |name| {
        let digits = (words.next()? == name).then(|| words.next())??;
        u64::from_str_radix(digits, 16).ok()
    };
    let [requests, ticks, kicks, interrupts] = ["requests", "ticks", "kicks", "interrupts"].map(&mut number);
    Some(Round { requests: requests?, ticks: ticks?, kicks: kicks?, interrupts: interrupts? })
}

/// Writes a request's descriptors, header and data.
fn describe(p: &mut LongMode, slot: u32, write: bool) -> Result<(), IcedError> {
    const NEXT: u32 = 1;
    const WRITABLE: u32 = 2;
    let first = 3 * slot;
    let data = if write { NEXT } else { NEXT | WRITABLE };
    let descriptors = [
        (HEADERS + 16 * slot, 16, NEXT, first + 1),
        (DATA + PIECE * slot, PIECE, data, first + 2),
        (STATUSES + 16 * slot, 1, WRITABLE, 0),
    ];
    p.asm.mov(rdi, u64::from(DESCRIPTORS + 16 * first))?;
    for (at, len, flags, next) in descriptors {
        for word in [u64::from(at), u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48] {
            p.asm.mov(rax, word)?;
            p.asm.mov(qword_ptr(rdi), rax)?;
            p.asm.add(rdi, 8)?;
        }
    }
    // Type 0 or 1; the sector.
    for (at, word) in [(0, u64::from(write)), (8, u64::from(slot * PIECE / 512))] {
        p.asm.mov(rax, word)?;
        p.asm.mov(edi, HEADERS + 16 * slot + at)?;
        p.asm.mov(qword_ptr(rdi), rax)?;
    }
    if write {
        p.asm.mov(edi, DATA + PIECE * slot)?;
        p.asm.mov(rax, u64::from_le_bytes([slot as u8 | WRITTEN; 8]))?;
        p.asm.mov(ecx, PIECE / 8)?;
        p.asm.rep().stosq()?;
    }
    Ok(())
}

/// Puts a head into the available ring, whose index in bx is not shown yet. Uses rcx.
fn make(p: &mut LongMode, head: u32) -> Result<(), IcedError> {
    p.asm.movzx(ecx, bx)?;
    p.asm.and(ecx, QUEUE_SIZE as i32 - 1)?;
    p.asm.mov(word_ptr(rcx * 2 + (AVAILABLE + 4)), head)?;
    p.asm.inc(ebx)
}

/// Fails unless the request succeeded and read what it should.
fn check(p: &mut LongMode, slot: u32, write: bool) -> Result<(), IcedError> {
    p.asm.xor(edx, edx)?;
    p.asm.movzx(eax, byte_ptr(STATUSES + 16 * slot))?;
    p.expect(rax, rdx, "a request's status")?;
    if !write {
        p.asm.mov(edx, slot)?;
        p.asm.mov(eax, DATA + PIECE * slot)?;
        p.asm.mov(rax, qword_ptr(rax))?;
        p.expect(rax, rdx, "what was read")?;
    }
    // The next round's must be written anew.
    p.asm.mov(byte_ptr(STATUSES + 16 * slot), 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_read_from_its_line() {
        let line =
            "requests 0000000000000010 ticks 00000000000000ff kicks 0000000000000001 interrupts 0000000000000002";
        assert_eq!(parse(line), Some(Round { requests: 16, ticks: 255, kicks: 1, interrupts: 2 }));
        assert_eq!(parse("pass"), None);
    }
}
