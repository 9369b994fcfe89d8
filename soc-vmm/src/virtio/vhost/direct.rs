//! The guest's own queues, handed to the back end: it maps guest memory and takes the guest's kicks itself. Nothing of a request passes here
//! but the call at its end, which becomes the interrupt that the guest has set for the queue.
//!
//! It is so where guest memory is in files that both can map, which only a function without a bus between has, and few enough. A back end
//! gets all of guest memory then: it is trusted as a device without an IOMMU is. A disk's must keep a record of what it has in flight, or
//! nobody would know what its successor has to do again, and a file system's never gets it, since what becomes of its requests when it goes
//! takes somebody who has seen each of them ([`super::fuse`]). All others have shadow queues ([`super::shadow`]).

use std::fmt;
use std::sync::Arc;

use super::kind::VhostKind;
use super::running::Place;
use super::terms::NO_RECORD;
use crate::memory::{Borrower, GuestMemory, MemoryError, RamFile, RamFiles};
use crate::vhost_user::wire::MAX_REGIONS;
use crate::vhost_user::{Frontend, Region};
use crate::virtio::{Lease, QueueError, RingLayout, Session};

/// From a guest-physical address to that by which the back end is told of rings: not 0, which some take for none.
const USER: u64 = 1 << 44;
/// Offset of the index in a used ring, and bytes with it.
pub(super) const INDEX: u64 = 2;
const USED_HEAD: usize = 4;

/// Whose rings a back end works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// soc-vmm's, with copies of what the guest gives.
    Shadow,
    /// The guest's.
    Direct,
}

impl Way {
    /// The way for the device `name` of that kind with that back end over that memory. The log has it.
    pub(super) fn choose(
        kind: &VhostKind,
        name: &str,
        borrower: &Arc<Borrower>,
        frontend: &Frontend,
        memory: &dyn GuestMemory,
    ) -> Self {
        match Self::try_direct(kind, borrower, frontend, memory) {
            Ok(()) => {
                tracing::info!("{name}: the back end works on the guest's own queues");
                Self::Direct
            }
            Err(why) => {
                tracing::info!("{name}: the back end gets shadow queues: {why}");
                Self::Shadow
            }
        }
    }

    fn try_direct(
        kind: &VhostKind,
        borrower: &Arc<Borrower>,
        frontend: &Frontend,
        memory: &dyn GuestMemory,
    ) -> Result<(), NotDirect> {
        if matches!(kind, VhostKind::Fs { .. }) {
            return Err(NotDirect::Session);
        }
        let files = memory.files(borrower).ok_or(NotDirect::NoFiles)?;
        if files.pieces.len() > MAX_REGIONS {
            return Err(NotDirect::Pieces(files.pieces.len()));
        }
        if kind.needs_record() && !frontend.records() {
            return Err(NotDirect::NoRecord);
        }
        Ok(())
    }
}

/// Why a back end gets shadow queues.
enum NotDirect {
    NoFiles,
    Pieces(usize),
    NoRecord,
    Session,
}

impl fmt::Display for NotDirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFiles => f.write_str("guest memory is behind the function"),
            Self::Pieces(count) => write!(f, "guest memory is {count} pieces, vhost-user takes {MAX_REGIONS}"),
            Self::NoRecord => write!(f, "the back end has no {NO_RECORD}"),
            Self::Session => f.write_str("a file system's requests are answered here when its back end goes"),
        }
    }
}

/// Guest memory as the back end is told of it.
pub(super) fn regions(files: &RamFiles) -> Vec<Region<'_>> {
    let region = |piece| {
        let &RamFile { base, len, ref file } = piece;
        Region { file: piece.fd(), offset: file.offset, size: len, guest: base, user: base + USER }
    };
    files.pieces.iter().map(region).collect()
}

/// Guest memory, lent by `borrower` to its back end, and where in it these queues are. `fresh`: nobody has used them in this session.
///
/// # Errors
/// A queue is not in RAM, or the session is over: the back end is told nothing.
pub(super) fn places(
    session: &Session,
    borrower: &Arc<Borrower>,
    queues: &[usize],
    fresh: bool,
) -> Result<(RamFiles, Vec<Place>), QueueError> {
    let lost = QueueError::Memory(MemoryError::Lost { addr: 0, len: 0 });
    let files = session.control.lend(borrower)?.ok_or(lost)?;
    let mut places = Vec::with_capacity(queues.len());
    for &queue in queues {
        let Some(Some(its)) = session.queues.get(queue) else { continue };
        let Some(kick) = its.bypass().cloned() else { continue };
        let at = its.layout();
        check(&at, &files, &session.control.lease)?;
        if fresh {
            session.control.lease.write(at.used, &[0; USED_HEAD])?;
        }
        places.push(Place {
            queue,
            size: at.size,
            // What was used counts; what comes behind it is the next back end's, or what its record says of it.
            base: session.control.lease.read_u16(at.used + INDEX)?,
            descriptors: at.descriptors + USER,
            available: at.available + USER,
            used: at.used + USER,
            used_guest: at.used,
            kick,
        });
    }
    Ok((files, places))
}

/// Refuses a queue of which a part is not in one piece of RAM that the guest sees.
fn check(at: &RingLayout, files: &RamFiles, lease: &Lease) -> Result<(), QueueError> {
    let size = u64::from(at.size);
    for (addr, len) in [(at.descriptors, 16 * size), (at.available, 6 + 2 * size), (at.used, 6 + 8 * size)] {
        if !files.pieces.iter().any(|piece| piece.has(addr, len)) {
            return Err(QueueError::Broken("a queue that is not in one piece of RAM"));
        }
        // What the chipset hides of a piece is in it too.
        lease.read(addr, &mut vec![0; len as usize])?;
    }
    Ok(())
}
