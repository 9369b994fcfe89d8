//! What was agreed on with a device's first back end; every later one must be as good.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::direct::Way;
use super::kind::VhostKind;
use super::ring::Manners;
use crate::vhost_user::{Frontend, VhostUserError};

/// What a back end lacks.
pub(super) const NO_RECORD: &str = "record of requests in flight (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD)";

/// The terms of a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// Queues as its kind counts them.
    pub(super) queues: u16,
    /// The device's features that are the back end's.
    pub(super) features: u64,
    pub(super) manners: Manners,
    /// Whose rings it works on.
    pub(super) way: Way,
}

impl Terms {
    /// Those of the first back end, which has enough.
    pub(super) fn new(kind: &VhostKind, queues: u16, frontend: &Frontend, way: Way) -> Self {
        let has = |bit: u32| frontend.features() >> bit & 1 != 0;
        let manners = Manners { indirect: has(VIRTIO_RING_F_INDIRECT_DESC), event_index: has(VIRTIO_RING_F_EVENT_IDX) };
        Self { queues, features: frontend.features() & kind.passed(queues, way), manners, way }
    }

    /// Refuses a later back end that has less than the first one.
    ///
    /// # Errors
    /// It has.
    pub(super) fn check(&self, kind: &VhostKind, frontend: &Frontend) -> Result<(), VhostUserError> {
        kind.check(self.queues, frontend.features(), frontend.queues())?;
        if self.way == Way::Direct && kind.needs_record() && !frontend.records() {
            return Err(VhostUserError::Lacks(NO_RECORD));
        }
        let missing = (self.features | self.ring_features()) & !frontend.features();
        if missing == 0 { Ok(()) } else { Err(VhostUserError::Changed(missing)) }
    }

    /// What it is told of a driver with those features.
    pub(super) fn accepted(&self, features: u64) -> u64 {
        let rings = match self.way {
            Way::Shadow => self.ring_features(),
            Way::Direct => self.ring_features() & features,
        };
        features & self.features | rings
    }

    /// Whether what is written to guest memory for the device is logged when that is asked for: this process's own writes are.
    pub(super) fn logs(&self, frontend: &Frontend) -> bool {
        self.way == Way::Shadow || frontend.logs()
    }

    /// Features of rings that the guest's can't have.
    pub(super) fn withheld(&self) -> u64 {
        match self.way {
            Way::Shadow => 0,
            Way::Direct => (1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX) & !self.ring_features(),
        }
    }

    /// The features of the rings: the guest's own rings have nothing to do with those of shadows.
    pub(super) fn ring_features(&self) -> u64 {
        let Manners { indirect, event_index } = self.manners;
        1 << VIRTIO_F_VERSION_1
            | u64::from(indirect) << VIRTIO_RING_F_INDIRECT_DESC
            | u64::from(event_index) << VIRTIO_RING_F_EVENT_IDX
    }
}
