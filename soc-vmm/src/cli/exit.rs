//! How soc-vmm ends: a status for scripts, one line for people.

use std::error::Error;
use std::process::ExitCode;

use nix::errno::Errno;

use crate::say::say;

/// soc-vmm's exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// 0: the guest powered off or was told to quit; the command was done.
    Done,
    /// 2: the command line or an input file is wrong.
    Usage,
    /// 4: the function, the host, KVM, or the VM that was named can't be used.
    Unavailable,
    /// 6: the guest failed or was lost, or it refused the command.
    Failed,
    /// `(value << 1) | 1`, of which a process has 8 bits: the guest's write to the debug-exit port.
    DebugExit(u8),
    /// Whatever the process in the background ended with, which this one has started.
    Daemon(u8),
}

impl ExitStatus {
    /// The number.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Usage => 2,
            Self::Unavailable => 4,
            Self::Failed => 6,
            Self::DebugExit(value) => (value << 1) | 1,
            Self::Daemon(status) => status,
        }
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        status.code().into()
    }
}

/// Why soc-vmm ends early: its status, and the line that says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    status: ExitStatus,
    line: String,
    /// The function's other end went away.
    loss: bool,
    /// The VM can't be had as it was asked for. Another VM could be on the same function.
    wish: bool,
    /// Standard error has the line.
    told: bool,
}

impl Failure {
    /// A failure in words. Whatever is in `text` becomes one printable line.
    pub fn new(status: ExitStatus, text: impl AsRef<str>) -> Self {
        Self { status, line: with_advice(one_line(text.as_ref())), loss: false, wish: false, told: false }
    }

    /// The same, where its cause is that the function's other end went away.
    pub(crate) fn by_loss(self, loss: bool) -> Self {
        Self { loss, ..self }
    }

    /// Whether its cause is that the function's other end went away.
    pub(crate) fn is_loss(&self) -> bool {
        self.loss
    }

    /// The same, where its cause is how the VM was asked for.
    pub(crate) fn by_wish(self, wish: bool) -> Self {
        Self { wish, ..self }
    }

    /// Whether its cause is how the VM was asked for, and not the function.
    pub(crate) fn is_wish(&self) -> bool {
        self.wish
    }

    /// Says it on standard error, if that has not been done.
    #[must_use]
    pub fn tell(self) -> Self {
        if !self.told {
            say(format_args!("soc-vmm: {self}"));
        }
        Self { told: true, ..self }
    }

    /// The same, with something more to say.
    pub(crate) fn with(self, more: &str) -> Self {
        Self { line: with_advice(format!("{} ({})", self.line, one_line(more))), ..self }
    }

    /// An error with all its sources, behind what was being done (`""`: the error says it).
    pub fn of(status: ExitStatus, doing: &str, error: &dyn Error) -> Self {
        let all = with_causes(error);
        Self::new(status, if doing.is_empty() { all } else { format!("{doing}: {all}") })
    }

    /// The exit status.
    pub fn status(&self) -> ExitStatus {
        self.status
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.line)
    }
}

impl Error for Failure {}

/// Limits that anything may meet, in this process or in a shim whose words are passed on: what to do is the same wherever it was.
fn with_advice(line: String) -> String {
    let met = [
        (Errno::EMFILE, "ulimit -n", ""),
        (Errno::EFBIG, "ulimit -f", ", unless it is more than a file of its file system can have"),
    ];
    match met.iter().find(|(errno, limit, _)| line.contains(errno.desc()) && !line.contains(limit)) {
        Some((_, limit, unless)) => format!("{line}; raise {limit}{unless}"),
        None => line,
    }
}

/// An error and all its sources.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Line ends become spaces; other control characters, which could confuse a terminal, are shown escaped.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for word in text.split(['\n', '\r']).map(str::trim).filter(|word| !word.is_empty()) {
        if !line.is_empty() {
            line.push(' ');
        }
        for c in word.chars() {
            if c.is_control() || is_format(c) { line.extend(c.escape_default()) } else { line.push(c) }
        }
    }
    line
}

/// Whether it ends a line or turns the direction of what follows (Unicode's LS, PS, and bidirectional controls, UAX #9 §2).
fn is_format(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{061c}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_promised_ones() {
        let codes =
            [ExitStatus::Done, ExitStatus::Usage, ExitStatus::Unavailable, ExitStatus::Failed].map(ExitStatus::code);
        assert_eq!(codes, [0, 2, 4, 6]);
        assert_eq!([0, 1, 0x2a, 0x80, 0xff].map(|v| ExitStatus::DebugExit(v).code()), [1, 3, 0x55, 1, 0xff]);
    }

    #[test]
    fn a_lack_of_descriptors_comes_with_what_to_do() {
        let lack = std::io::Error::from_raw_os_error(Errno::EMFILE as i32);
        let failure = Failure::of(ExitStatus::Unavailable, "can't serve QMP", &lack);
        assert_eq!(failure.to_string(), "can't serve QMP: Too many open files (os error 24); raise ulimit -n");
        let lost = Failure::new(ExitStatus::Failed, "the VM is lost").with("can't map it: Too many open files");
        assert!(lost.to_string().ends_with("files); raise ulimit -n"), "{lost}");
    }

    #[test]
    fn a_failure_is_one_line_with_every_cause() {
        let inner = std::io::Error::other("no\nway\x1b[2J");
        let outer = crate::control::ListenError::Io("/x".into(), inner);
        let failure = Failure::of(ExitStatus::Usage, "--qmp", &outer);
        assert_eq!(failure.to_string(), "--qmp: can't listen on /x: no way\\u{1b}[2J");
    }
}
