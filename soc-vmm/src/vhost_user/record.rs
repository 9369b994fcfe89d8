//! A record of what is in flight, which a back end keeps for the next one (`VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`).
//!
//! It is memory that nobody here looks into: the back end says how much it needs, and gets a file of that size. The one that it would make
//! itself is not taken.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use pcie_function::local::sealed_memfd;

use super::VhostUserError;
use super::wire::Inflight;

/// Bytes of a descriptor's entry, and of what is before the entries of a queue: more than any version of the record has.
const ENTRY: u64 = 64;
const HEAD: u64 = 4096;

/// A record.
#[derive(Debug)]
pub struct Record {
    file: OwnedFd,
    what: Inflight,
}

impl Record {
    /// An empty one, of as much memory as the back end says in answer to `asked`.
    pub(super) fn new(asked: &Inflight, said: &Inflight) -> Result<Self, VhostUserError> {
        let most = u64::from(asked.queues) * (HEAD + ENTRY * u64::from(asked.entries));
        if !(1..=most).contains(&said.size) {
            return Err(VhostUserError::Protocol("a record of requests in flight of a size that none has"));
        }
        let file = sealed_memfd("vhost-user-inflight", said.size)
            .map_err(|error| VhostUserError::system("no memory for its record", std::io::Error::other(error)))?;
        Ok(Self { file, what: Inflight { size: said.size, ..*asked } })
    }

    /// What the back end is told of it.
    pub(super) fn what(&self) -> Inflight {
        self.what
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
