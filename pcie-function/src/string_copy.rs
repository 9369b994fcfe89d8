//! Many words at once between this process's own memory and memory that another side writes too.
//!
//! A loop over atomics is 8 bytes at a time, which no compiler makes more of. x86's string instructions copy as fast as memcpy(3), which may not
//! be used: to a compiler another side's writes meanwhile are undefined behaviour. An instruction copies whole words, as the loop does, in any
//! order: it is atomic in its native elements where these don't cross a cache line (Intel SDM 1, "Fast-String Operation"; those of `movsb` are bytes).
//!
//! `unsafe`: one instruction.
#![allow(unsafe_code)]

use std::sync::atomic::AtomicU64;

/// Words from which on an instruction's start is worth it.
const MANY: usize = 64;

/// Copies in, or nothing: whether it has.
pub(crate) fn copy_in(to: &[AtomicU64], from: &[[u8; 8]]) -> bool {
    assert_eq!(to.len(), from.len(), "words");
    // SAFETY: both are so many words; those of `to` are atomics, which may be written through a shared reference.
    from.len() >= MANY && unsafe { copy(to.as_ptr().cast_mut().cast(), from.as_ptr().cast(), from.len()) }
}

/// Copies out, or nothing: whether it has.
pub(crate) fn copy_out(to: &mut [[u8; 8]], from: &[AtomicU64]) -> bool {
    assert_eq!(to.len(), from.len(), "words");
    // SAFETY: both are so many words; those of `to` are nobody else's, and those of `from` atomics.
    to.len() >= MANY && unsafe { copy(to.as_mut_ptr().cast(), from.as_ptr().cast(), to.len()) }
}

/// # Safety
/// `from` may be read and `to` be written, `words` words each that don't overlap. Whoever else writes either meanwhile, or reads `to`, does so by
/// atomics, or isn't of this program.
#[cfg(target_arch = "x86_64")]
unsafe fn copy(to: *mut u64, from: *const u64, words: usize) -> bool {
    // SAFETY: it reads and writes so many words from here on upwards (a function is entered with the direction flag clear), as the caller
    // allows. The compiler keeps what it knows nothing of in its place, and to all before and after it the processor keeps its accesses in the
    // order that it keeps plain ones in: only among themselves its stores have none (Intel SDM 3A, "Memory-Ordering Model for String
    // Operations on Write-Back (WB) Memory").
    unsafe {
        std::arch::asm!(
            "rep movsq",
            inout("rcx") words => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
    true
}

/// # Safety
/// None: it does nothing.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy(_: *mut u64, _: *const u64, _: usize) -> bool {
    false
}
