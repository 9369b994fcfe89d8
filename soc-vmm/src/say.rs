//! Lines for people, on a standard error that may be full, closed or on a full disk.

use std::fmt::Display;
use std::io::Write;

/// Writes a line to standard error, in one piece. Where it can't be written nobody listens, and nothing else depends on it.
pub fn say(line: impl Display) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}
