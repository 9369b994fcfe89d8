//! What is said to whoever started the shim.

use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Says a sentence on standard error, as one line. A disk that is full, a reader that has gone, or one that reads no more, is no reason to
/// end a VM or to hold it up: it misses the line.
pub fn say(sentence: impl Display) {
    let mut stderr = io::stderr();
    let room = poll(&mut [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO);
    if room != Ok(0) {
        let _ = stderr.write_all(line(&sentence.to_string()).as_bytes());
    }
}

/// One write's worth, so that shims that share a journal don't mix their lines. What was typed or sent may have line ends in it, or worse.
fn line(sentence: &str) -> String {
    let mut line = String::from("host-kvm-shim: ");
    line.extend(sentence.chars().map(|c| if c.is_control() { ' ' } else { c }));
    line.push('\n');
    line
}

/// Prints what was asked for. A reader that takes no more of it has what it wants.
///
/// # Errors
/// Standard output can't be written, and why.
pub fn print(text: &str) -> Result<(), String> {
    let mut out = io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(format!("standard output: {error}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_one_line_and_steers_no_terminal() {
        assert_eq!(line("VM a\n\u{1b}[2J\u{9b}b is lost"), "host-kvm-shim: VM a  [2J b is lost\n");
    }
}
