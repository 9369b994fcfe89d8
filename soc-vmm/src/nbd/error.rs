//! What goes wrong between an NBD client and its server.

use std::io;

use super::wire::{answer, error};

/// Why a connection came to nothing, or ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NbdError {
    /// Nobody is there, or no longer.
    #[error("{0}: see that its server runs")]
    Unreachable(String),
    /// The peer speaks something else, or wrong.
    #[error("its peer breaks the protocol: {0}")]
    Protocol(&'static str),
    /// The server wants no such option.
    #[error("its server refuses: {}", refusal(*kind))]
    Refused {
        /// One of [`answer`].
        kind: u32,
    },
    /// A request failed there.
    #[error("its server says {}", of_request(*.0))]
    Failed(u32),
    /// The export is of no use as a disk.
    #[error("it has {0} bytes: a disk has a multiple of 512, below 8 EiB")]
    OddSize(u64),
    /// Somebody here wants nothing more of it.
    #[error("its connection was given up")]
    GivenUp,
}

impl From<io::Error> for NbdError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                Self::Unreachable("its peer closed the connection".into())
            }
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::Unreachable("its peer doesn't answer".into()),
            _ => Self::Unreachable(error.to_string()),
        }
    }
}

fn refusal(kind: u32) -> &'static str {
    match kind {
        answer::UNSUPPORTED => "it doesn't know the option",
        answer::POLICY => "its policy doesn't allow that",
        answer::INVALID => "it takes the option for damaged",
        answer::UNKNOWN => "it has no such export (say which by its name)",
        answer::TOO_BIG => "the option is too long for it",
        0x8000_0005 => "it wants TLS, which is not spoken here",
        0x8000_0007 => "it is shutting down",
        _ => "for a reason that has no name here",
    }
}

fn of_request(number: u32) -> String {
    match number {
        error::PERM => "that it may not be written".into(),
        error::IO => "that its disk failed".into(),
        error::INVAL => "that the request makes no sense".into(),
        error::NOSPC => "that there is no room".into(),
        error::OVERFLOW => "that the request is too large".into(),
        error::NOTSUP => "that it can't do that".into(),
        error::SHUTDOWN => "that it is shutting down".into(),
        other => format!("error {other}"),
    }
}
