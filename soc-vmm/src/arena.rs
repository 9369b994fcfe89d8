//! The memory allocator's arena: one for all threads, and no address space beside it.
//!
//! glibc would take 128 MiB of address space for each thread that allocates, of which half stays. Where that is limited (`ulimit -v`), a
//! thread that starts just then finds no room for the stack of its signal handlers, over which Rust's library panics. The price:
//! threads that allocate at the same time wait for each other.
//!
//! `unsafe`: mallopt.
#![allow(unsafe_code)]

/// Has all threads share it. Call it before any is started.
pub fn share() {
    #[cfg(target_env = "gnu")]
    // SAFETY: numbers alone.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, 1);
    }
}
