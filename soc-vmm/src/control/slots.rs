//! The devices in a VM's slots, as its monitors reach them: once the machine is built, from any thread.

use std::sync::{Arc, OnceLock};

use tokio::sync::broadcast::WeakSender;

use super::event::{Event, EventKind};
use crate::chardev::Chardevs;
use crate::jobs::Jobs;
use crate::slots::{SlotListener, SlotsHandle};

/// Where the slots are found once there are any.
#[derive(Clone, Debug, Default)]
pub(super) struct SlotsPlace(Arc<OnceLock<SlotsHandle>>);

impl SlotsPlace {
    pub(super) fn get(&self) -> Option<&SlotsHandle> {
        self.0.get()
    }

    pub(super) fn fill(&self, slots: SlotsHandle) {
        // A machine is built once.
        let _ = self.0.set(slots);
    }
}

/// Tells monitors of devices that are gone, whose character devices nobody uses any more, and whose jobs are over.
pub(super) struct Gone {
    pub(super) events: WeakSender<Event>,
    pub(super) chardevs: Arc<Chardevs>,
    pub(super) jobs: Arc<Jobs>,
}

impl SlotListener for Gone {
    fn deleted(&self, id: &str) {
        self.chardevs.release(id);
        self.jobs.disk_gone(id);
        let Some(events) = self.events.upgrade() else { return };
        // As QEMU does: what drives the device first, then the device.
        let path = format!("/machine/peripheral/{id}");
        let driver = EventKind::DeviceDeleted { device: None, path: format!("{path}/virtio-backend") };
        for kind in [driver, EventKind::DeviceDeleted { device: Some(id.to_owned()), path }] {
            // An error says that no monitor listens.
            let _ = events.send(Event::now(kind));
        }
    }
}
