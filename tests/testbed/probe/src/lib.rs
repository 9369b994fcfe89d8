//! Both ends of a function without a VM: [`host`] offers memory and obeys, [`soc`] reaches it and looks whether all is as it must be.
//!
//! Only what every function has is used: header lines, card memory, mailbox, doorbells, vectors, DMA. So it shows an implementation of
//! `HostFunction` or `SocFunction` to work where nothing else runs yet.

pub mod host;
pub mod order;
pub mod soc;

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long either end waits for the other. An emulated machine on a busy one is slow.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Something that went another way than it must.
pub type Failure = String;

/// Waits until `event` is readable; false when that took longer than `limit`.
pub fn readable(event: BorrowedFd<'_>, limit: Duration) -> bool {
    let mut ready = [PollFd::new(event, PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    poll(&mut ready, limit).is_ok_and(|n| n == 1)
}

/// Waits for `event`, then empties it; false when that took longer than `limit`.
pub fn wait(event: BorrowedFd<'_>, limit: Duration) -> bool {
    if !readable(event, limit) {
        return false;
    }
    let _ = nix::unistd::read(event, &mut [0; 8]);
    true
}

/// Waits until `look` finds something. It looks when `event` comes, and now and then.
///
/// # Errors
/// It found nothing in time, or failed.
pub fn eventually<T>(
    what: &str,
    event: BorrowedFd<'_>,
    mut look: impl FnMut() -> Result<Option<T>, Failure>,
) -> Result<T, Failure> {
    let since = Instant::now();
    while since.elapsed() < PATIENCE {
        if let Some(found) = look()? {
            return Ok(found);
        }
        wait(event, Duration::from_millis(100));
    }
    Err(format!("{what}: not within {PATIENCE:?}"))
}

/// Bytes that depend on a seed and on their place.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A checksum of bytes.
pub fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}
