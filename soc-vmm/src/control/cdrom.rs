//! The CD-ROM drive of a VM, as its monitors reach it: once the machine is built, from any thread.

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use tokio::sync::broadcast::WeakSender;

use super::event::{Event, EventKind};
use crate::ahci::{CdHandle, TrayListener};

/// What the drive is called.
pub const CDROM_ID: &str = "cdrom0";
/// What the balloon is called.
pub const BALLOON_ID: &str = "balloon0";

/// Where the drive is found once there is one.
#[derive(Clone, Debug, Default)]
pub struct CdromSlot(Arc<OnceLock<CdHandle>>);

impl CdromSlot {
    /// The drive; none: the machine has none, or is still being built.
    pub fn get(&self) -> Option<&CdHandle> {
        self.0.get()
    }

    pub(super) fn fill(&self, drive: CdHandle) {
        // A machine is built once.
        let _ = self.0.set(drive);
    }
}

/// Tells monitors of the tray.
pub(super) struct Tray(pub(super) WeakSender<Event>);

impl TrayListener for Tray {
    fn tray_moved(&self, open: bool) {
        let kind = EventKind::DeviceTrayMoved { device: "", id: CDROM_ID, tray_open: open };
        if let Some(events) = self.0.upgrade() {
            // An error says that no monitor listens.
            let _ = events.send(Event { kind, at: SystemTime::now() });
        }
    }
}
