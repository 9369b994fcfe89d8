//! An interface's state on its way to another process: what its driver has said by the control queue, and whether its cable is in. Frames that are
//! on their way are the network's, which may lose them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_GUEST_ANNOUNCE};

use super::control::Said;
use super::features::Features;
use super::filter::{Filter, FilterState};
use super::{NetEngine, STATUS};
use crate::persist::{RestoreError, StateError, States};
use crate::virtio::{Config, Session};

pub(super) const NAME: &str = "virtio-net";
pub(super) const VERSION: u32 = 1;

/// Saved state of a [`NetEngine`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct NetState {
    /// The cable is in.
    up: bool,
    /// None without a driver.
    said: Option<SaidState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SaidState {
    /// Pairs of queues that it uses.
    active: usize,
    /// What it finishes of frames, as the bits of VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET (virtio 1.2 §5.1.6.5.6.1).
    guest: u64,
    filter: FilterState,
    /// It is asked to announce itself.
    announcing: bool,
}

impl NetEngine {
    pub(super) fn save(&self, at: &str, states: &mut States, in_session: bool) {
        let Said { active, guest, filter, announcing, .. } = &self.said;
        let said = in_session.then(|| SaidState {
            active: *active,
            guest: Features::of_guest(*guest).0,
            filter: filter.save(),
            announcing: *announcing,
        });
        states.put(NAME, at, VERSION, &NetState { up: self.link.is_up(), said });
    }

    pub(super) fn restore(
        &mut self,
        at: &str,
        states: &mut States,
        config: &Config,
        session: Option<&Session>,
    ) -> Result<(), StateError> {
        let NetState { up, said } = states.take(NAME, at, VERSION)?;
        let refused = |what: &'static str| StateError::from(RestoreError::new(NAME, what));
        let said = match (said, session) {
            (None, None) => None,
            (Some(said), Some(session)) => {
                let said = self.restored(said, Features(session.features)).map_err(refused)?;
                Some((said, Arc::downgrade(&session.control)))
            }
            _ => return Err(refused("what its driver has said is missing, or there is no driver")),
        };
        // A driver that begins anew has the address that the guest knows.
        config.read(0, &mut self.mac);
        let mut shown = [0; 2];
        config.read(STATUS, &mut shown);
        self.shown = u16::from_le_bytes(shown);
        self.link.set_up(up);
        if let Some((said, session)) = said {
            (self.said, self.session, self.moved) = (said, session, true);
        }
        Ok(())
    }

    /// What a driver with those features has said.
    fn restored(&self, said: SaidState, features: Features) -> Result<Said, &'static str> {
        let SaidState { active, guest, filter, announcing } = said;
        let pairs = self.pairs.len();
        if !(1..=pairs).contains(&active) {
            return Err("its driver uses more pairs of queues than there are");
        }
        if guest & !features.guest_bits() != 0 {
            return Err("its driver finishes what it doesn't know");
        }
        let filter = Filter::restored(filter, features.controls(VIRTIO_NET_F_CTRL_VLAN));
        let filter = filter.ok_or("its filter of frames is none that a driver can set")?;
        // It is in another place of the network now.
        let announcing = announcing || features.controls(VIRTIO_NET_F_GUEST_ANNOUNCE);
        let guest = Features(guest).guest_offloads();
        Ok(Said { features, pairs, active, guest, filter, announcing })
    }
}
