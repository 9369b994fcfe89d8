//! A socket device's state on its way to another process: that there was one. Connections are sockets of the process that is left, so they end,
//! and the driver is told that all of them have (virtio 1.2 §5.10.6.7).

use serde::{Deserialize, Serialize};

use super::VsockEngine;
use crate::persist::{RestoreError, StateError, States};
use crate::virtio::{Config, Session};

pub(super) const NAME: &str = "virtio-vsock";
pub(super) const VERSION: u32 = 1;

/// Saved state of a [`VsockEngine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct VsockState {}

impl VsockEngine {
    pub(super) fn save(&self, at: &str, states: &mut States) {
        states.put(NAME, at, VERSION, &VsockState {});
    }

    pub(super) fn restore(
        &mut self,
        at: &str,
        states: &mut States,
        config: &Config,
        session: Option<&Session>,
    ) -> Result<(), StateError> {
        let VsockState {} = states.take(NAME, at, VERSION)?;
        let mut cid = [0; 8];
        config.read(0, &mut cid);
        if u64::from_le_bytes(cid) != u64::from(self.vsock.cid) {
            let what = "its guest has another CID than here: start this machine with the source's options";
            return Err(RestoreError::new(NAME, what).into());
        }
        if let Some(session) = session {
            self.meet(session);
            self.moved = true;
        }
        Ok(())
    }
}
