//! What a shared file system's requests are when nobody serves them (virtio 1.2 §5.11; the messages are those of Linux's fuse.h).
//!
//! A back end keeps what its guest has open, and the names of its inodes, in its own memory: one that was started anew would take a number
//! of the old one's for a file of its own. So nothing of the old session is ever sent to the new one. It is answered with ENOTCONN, as a
//! kernel answers for a FUSE daemon that has gone, until the guest mounts again, which begins with FUSE_INIT.

use nix::errno::Errno;

use crate::virtio::{Chain, Lease, QueueError};

const FUSE_INIT: u32 = 26;
/// Messages that have no answer: FUSE_FORGET, FUSE_INTERRUPT, FUSE_BATCH_FORGET.
const SILENT: [u32; 3] = [2, 36, 42];
/// FUSE_DESTROY: the guest has unmounted it; there is nothing left to do.
const FUSE_DESTROY: u32 = 38;
/// Bytes of a request's header that are looked at: length, opcode, unique.
pub(super) const LOOKED_AT: usize = 16;
/// Bytes of an answer's header.
const ANSWER: usize = 16;

/// What is known of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FuseRequest {
    opcode: u32,
    unique: u64,
}

impl FuseRequest {
    /// From its first bytes.
    pub(super) fn parse(header: &[u8]) -> Self {
        let Some(header) = header.first_chunk::<LOOKED_AT>() else { return Self::default() };
        let [_, _, _, _, a, b, c, d, unique @ ..] = *header;
        Self { opcode: u32::from_le_bytes([a, b, c, d]), unique: u64::from_le_bytes(unique) }
    }

    /// Looks at one that nobody has read yet.
    pub(super) fn peek(chain: &Chain, lease: &Lease) -> Result<Self, QueueError> {
        let mut header = [0; LOOKED_AT];
        if chain.readable() < LOOKED_AT as u64 {
            return Ok(Self::default());
        }
        chain.peek(lease, &mut header)?;
        Ok(Self::parse(&header))
    }

    /// Whether it begins a session.
    pub(super) fn is_init(self) -> bool {
        self.opcode == FUSE_INIT
    }

    /// Answers it in place of the back end; bytes of the answer.
    pub(super) fn answer(self, chain: &mut Chain, lease: &Lease) -> Result<u32, QueueError> {
        if SILENT.contains(&self.opcode) || chain.writable() < ANSWER as u64 {
            return Ok(0);
        }
        let error = if self.opcode == FUSE_DESTROY { 0 } else { -(Errno::ENOTCONN as i32) };
        let mut answer = [0; ANSWER];
        answer[..4].copy_from_slice(&(ANSWER as u32).to_le_bytes());
        answer[4..8].copy_from_slice(&error.to_le_bytes());
        answer[8..].copy_from_slice(&self.unique.to_le_bytes());
        chain.write(lease, &answer)?;
        Ok(ANSWER as u32)
    }
}
