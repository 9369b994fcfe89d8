//! Lines for people, on a standard error that may be full, closed or on a full disk.

use std::fmt::Display;
use std::io::Write;
use std::time::Duration;

use nix::libc::{self, c_int};
use nix::sys::stat::{SFlag, fstat};

/// Writes a line to standard error, in one piece. Where it can't be written nobody listens, and nothing else depends on it.
pub fn say(line: impl Display) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Waits, for half a second at most, until what was said is read, where standard error is a pipe. Who started this process may look at what was
/// collected from that as soon as it sees a monitor closed, which takes another way (libvirtd and virtlogd).
///
/// `unsafe`: ioctl(2) is.
#[allow(unsafe_code)]
pub(crate) fn until_read() {
    const STEPS: u32 = 100;
    const STEP: Duration = Duration::from_millis(5);
    let is_pipe =
        fstat(std::io::stderr()).is_ok_and(|is| SFlag::from_bits_truncate(is.st_mode).contains(SFlag::S_IFIFO));
    for _ in 0..if is_pipe { STEPS } else { 0 } {
        let mut unread: c_int = 0;
        // SAFETY: it stores an int there, of what standard error is open on, or fails.
        let asked = unsafe { libc::ioctl(libc::STDERR_FILENO, libc::FIONREAD, &raw mut unread) };
        if asked != 0 || unread == 0 {
            return;
        }
        std::thread::sleep(STEP);
    }
}
