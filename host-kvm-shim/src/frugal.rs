//! Little memory: a host runs a shim for each of a thousand VMs.
//!
//! `unsafe`: mallopt, malloc_trim, and madvise on this program's own code.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use nix::sys::mman::{MmapAdvise, madvise};

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

/// This program's code and constants, as the kernel maps them from its file.
///
/// What only the start and the rare calls need stays mapped once it was used. [`Program::forget`] unmaps it; what is used again is
/// mapped again from the page cache.
#[derive(Debug)]
pub(crate) struct Program(Vec<(usize, usize)>);

impl Program {
    /// Looks the mappings up, while files may still be opened. Without /proc there are none.
    pub(crate) fn new() -> Self {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let exe = std::fs::read_link("/proc/self/exe").unwrap_or_default();
        Self(exe.to_str().map_or_else(Vec::new, |exe| maps.lines().filter_map(|line| unwritten(line, exe)).collect()))
    }

    /// Unmaps all that the next second may not need, and gives free memory back.
    pub(crate) fn forget(&self) {
        for &(start, len) in &self.0 {
            let Some(start) = NonNull::new(std::ptr::without_provenance_mut(start)) else { continue };
            // SAFETY: a private mapping of this program's file that nothing ever wrote to: its pages come back as they are.
            let _ = unsafe { madvise(start, len, MmapAdvise::MADV_DONTNEED) };
        }
        #[cfg(target_env = "gnu")]
        // SAFETY: it gives back what is free.
        unsafe {
            nix::libc::malloc_trim(0);
        }
    }
}

/// Start and length of a mapping of `exe` that can't have been written to: code, and constants without relocations, which lie before it at
/// the file's start.
fn unwritten(line: &str, exe: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_whitespace();
    let (range, access, offset) = (fields.next()?, fields.next()?, fields.next()?);
    let path = fields.nth(2)?;
    let constant = access == "r-xp" || (access == "r--p" && u64::from_str_radix(offset, 16) == Ok(0));
    if path != exe || !constant {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let address = |digits| usize::from_str_radix(digits, 16).ok();
    Some((address(start)?, address(end)?.checked_sub(address(start)?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_and_constants_are_forgotten_and_what_was_relocated_is_not() {
        let exe = "/usr/bin/host-kvm-shim";
        let line = |access, offset, path| format!("7f00-9f00 {access} {offset} fe:00 540 {path}");
        assert_eq!(unwritten(&line("r-xp", "00058000", exe), exe), Some((0x7f00, 0x2000)));
        assert_eq!(unwritten(&line("r--p", "00000000", exe), exe), Some((0x7f00, 0x2000)));
        assert_eq!(unwritten(&line("r--p", "0019a000", exe), exe), None);
        assert_eq!(unwritten(&line("rw-p", "00000000", exe), exe), None);
        assert_eq!(unwritten(&line("r-xp", "00000000", "/lib/libc.so.6"), exe), None);
        assert_eq!(unwritten("7f00-9f00 rw-p 00000000 00:00 0", exe), None);
    }

    #[test]
    fn this_program_runs_on_after_it_forgot_itself() {
        let program = Program::new();
        assert!(!program.0.is_empty());
        program.forget();
        assert_eq!(unwritten("", ""), None);
    }
}
