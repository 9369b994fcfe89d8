//! A disk's state on its way to another process: requests that were taken and wait, by their chains, which are still in guest memory.
//!
//! Those that the image was at work on have been finished. The ones that wait, for their limit or because the VM was stopped for an error, are
//! begun anew where they come to: none of their parts was acknowledged, and to write one twice is to write it once. Buckets of limits start full.

use serde::{Deserialize, Serialize};

use super::engine::{BlockEngine, DEPTH, queue_of};
use super::{SECTOR, Trouble};
use crate::persist::{RestoreError, StateError, States};
use crate::virtio::{Config, QueueError, Session};

pub(super) const NAME: &str = "virtio-blk";
pub(super) const VERSION: u32 = 1;

/// Saved state of a [`BlockEngine`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct BlockState {
    /// Requests that wait: the queue of each, and its chain's head.
    taken: Vec<(u16, u16)>,
    /// Why the VM was stopped, if it was.
    trouble: Option<Trouble>,
}

impl BlockEngine {
    pub(super) fn save(&self, at: &str, states: &mut States, in_session: bool) {
        let chain = |index: usize| (self.requests[index].queue as u16, self.requests[index].chain.head());
        let waiting = self.stopped.iter().copied().chain(self.gate.held()).map(chain);
        let taken = self.taken.iter().copied().chain(waiting).filter(|_| in_session).collect();
        states.put(NAME, at, VERSION, &BlockState { taken, trouble: self.shared.trouble().filter(|_| in_session) });
    }

    pub(super) fn restore(
        &mut self,
        at: &str,
        states: &mut States,
        config: &Config,
        session: Option<&mut Session>,
    ) -> Result<(), StateError> {
        let BlockState { taken, trouble } = states.take(NAME, at, VERSION)?;
        let refused = |what: &'static str| StateError::from(RestoreError::new(NAME, what));
        if self.under_way > 0 {
            return Err(refused("the image is still at work on what an earlier driver asked for"));
        }
        let mut sectors = [0; 8];
        config.read(0, &mut sectors);
        let size = self.size();
        let told = u64::from_le_bytes(sectors);
        if told > size / SECTOR {
            return Err(refused("its image is smaller here than its driver was told"));
        }
        self.told_size = (told == size / SECTOR).then_some(size);
        let Some(session) = session else {
            return if taken.is_empty() { Ok(()) } else { Err(refused("requests of a driver that isn't there")) };
        };
        if taken.len() > DEPTH {
            return Err(refused("more requests than a disk takes"));
        }
        let is_chain = |&(queue, head): &(u16, u16)| {
            queue_of(session, queue.into()).is_some_and(|queue| head < queue.layout().size)
        };
        if !taken.iter().all(is_chain) {
            return Err(refused("a request of a queue that isn't in use"));
        }
        self.adopt(session);
        self.shared.set_trouble(trouble);
        self.taken = taken;
        Ok(())
    }

    /// Begins with the requests that came from elsewhere.
    pub(super) fn take_up(&mut self, session: &mut Session) -> Result<(), QueueError> {
        if self.taken.is_empty() {
            return Ok(());
        }
        // Those that fail again say so again.
        self.shared.set_trouble(None);
        for (number, head) in std::mem::take(&mut self.taken) {
            let (Some(index), Some(queue)) = (self.free.pop(), queue_of(session, number.into())) else { continue };
            queue.retake(head, &mut self.requests[index].chain)?;
            self.requests[index].queue = number.into();
            self.begin(index, session)?;
        }
        Ok(())
    }
}
