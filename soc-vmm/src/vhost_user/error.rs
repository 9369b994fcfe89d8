//! Why a back end can't be used.

use std::io;
use std::time::Duration;

use super::wire::Request;

/// Why a back end can't be used, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Nobody listens, or nobody accepts.
    #[error("can't connect: {0} (start the back end that listens there)")]
    Connect(io::Error),
    /// It ended the connection.
    #[error("the back end has closed the connection (look at what it says itself)")]
    Closed,
    /// It took too long.
    #[error("the back end has not done {request:?} within {patience:?}")]
    Silent {
        /// What it was asked.
        request: Request,
        /// How long it had for that and what came with it.
        patience: Duration,
    },
    /// It sent what the protocol doesn't have at this place.
    #[error("the back end breaks the protocol: {0}")]
    Protocol(&'static str),
    /// It says no.
    #[error("the back end refuses {request:?} with error {code}")]
    Refused {
        /// What it was asked.
        request: Request,
        /// What it says.
        code: u64,
    },
    /// It can't do what the device needs.
    #[error("the back end has no {0}")]
    Lacks(&'static str),
    /// It was restarted as another device.
    #[error("the back end lacks features that the guest uses: {0:#x}")]
    Changed(u64),
    /// It has too few queues.
    #[error("the back end has {has} queues, where {wanted} are needed: give it more, or ask for fewer (queues=)")]
    Queues {
        /// How many it has.
        has: u64,
        /// How many it should.
        wanted: usize,
    },
    /// It broke the rules of a queue.
    #[error("the back end breaks the rules of queue {queue}: {what}")]
    Queue {
        /// Which one.
        queue: usize,
        /// How.
        what: &'static str,
    },
    /// The system gives no descriptor, no memory, or an error of the socket.
    #[error("{what}: {source}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl VhostUserError {
    /// The system has no room for something.
    pub(crate) fn system(what: &'static str, source: io::Error) -> Self {
        Self::System { what, source }
    }

    /// The system gives nothing to wait with.
    pub(crate) fn waiting(errno: nix::errno::Errno) -> Self {
        Self::system("no descriptors to wait with", errno.into())
    }
}
