//! Little memory: a host runs a shim for each of a thousand VMs.
//!
//! `unsafe`: mallopt.
#![allow(unsafe_code)]

/// Has the C library's allocator share one arena among all threads, grow it in small steps and give memory back early. Call it before
/// any thread is started.
pub fn frugal() {
    #[cfg(target_env = "gnu")]
    {
        use nix::libc;
        for (option, value) in [(libc::M_ARENA_MAX, 1), (libc::M_TRIM_THRESHOLD, 64 << 10), (libc::M_TOP_PAD, 16 << 10)]
        {
            // SAFETY: numbers alone; an option that the library doesn't know is ignored.
            unsafe { libc::mallopt(option, value) };
        }
    }
}
