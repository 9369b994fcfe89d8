//! A balloon's state on its way to another process: what the guest shall give, and the buffer by which it is asked for statistics. What it
//! gave is in the function's registers; the host's statistics and how often they are asked for stay where they are.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{BalloonEngine, NUM_PAGES, STATISTICS};
use crate::persist::{RestoreError, StateError, States};
use crate::virtio::{Config, Session};

pub(super) const NAME: &str = "virtio-balloon";
pub(super) const VERSION: u32 = 1;

/// Saved state of a [`BalloonEngine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct BalloonState {
    /// Pages that the guest shall give.
    wanted: u32,
    /// The head of the buffer that is held of the queue of statistics.
    statistics: Option<u16>,
}

impl BalloonEngine {
    pub(super) fn save(&self, at: &str, states: &mut States, in_session: bool) {
        let statistics = self.statistics.filter(|_| in_session).map(|(head, _)| head);
        states.put(NAME, at, VERSION, &BalloonState { wanted: self.handle.state().wanted, statistics });
    }

    pub(super) fn restore(
        &mut self,
        at: &str,
        states: &mut States,
        config: &Config,
        session: Option<&Session>,
    ) -> Result<(), StateError> {
        let BalloonState { wanted, statistics } = states.take(NAME, at, VERSION)?;
        let refused = |what: &'static str| StateError::from(RestoreError::new(NAME, what));
        if u64::from(wanted) > self.handle.pages() {
            return Err(refused("its guest is to give more memory than there is"));
        }
        let queue = session.and_then(|session| session.queues.get(STATISTICS)?.as_ref());
        let size = queue.map_or(0, |queue| queue.layout().size);
        if statistics.is_some_and(|head| head >= size) {
            return Err(refused("a buffer of a queue that isn't in use"));
        }
        let mut told = [0; 4];
        config.read(NUM_PAGES, &mut told);
        self.told = u32::from_le_bytes(told);
        self.handle.state().wanted = wanted;
        self.control = session.map(|session| session.control.clone());
        self.statistics = statistics.map(|head| (head, Instant::now()));
        Ok(())
    }
}
