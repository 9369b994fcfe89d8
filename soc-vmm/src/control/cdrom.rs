//! The CD-ROM drive of a VM, as its monitors reach it: once the machine is built, from any thread.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tokio::sync::broadcast::WeakSender;

use super::event::{Event, EventKind};
use crate::ahci::{CdHandle, TrayListener};

/// What the drive is called.
pub const CDROM_ID: &str = "cdrom0";
/// What the balloon is called.
pub const BALLOON_ID: &str = "balloon0";

/// A drive.
#[derive(Clone, Debug)]
pub struct CdromDrive {
    /// Its name.
    pub id: String,
    /// By what it is reached.
    pub handle: CdHandle,
    /// The block node that is in it, if that has a name.
    node: Arc<Mutex<Option<String>>>,
}

impl CdromDrive {
    /// A drive, and the block node that is in it at the start.
    pub fn new(id: String, handle: CdHandle, node: Option<String>) -> Self {
        Self { id, handle, node: Arc::new(Mutex::new(node)) }
    }

    /// The block node that is in it, if that has a name.
    pub fn node(&self) -> Option<String> {
        self.node.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Another one is in it now.
    pub fn set_node(&self, node: Option<String>) {
        *self.node.lock().unwrap_or_else(PoisonError::into_inner) = node;
    }
}

/// Where the drives are found once there are any.
#[derive(Clone, Debug, Default)]
pub struct CdromSlot(Arc<OnceLock<Vec<CdromDrive>>>);

impl CdromSlot {
    /// The drives; none: the machine has none, or is still being built.
    pub fn get(&self) -> &[CdromDrive] {
        self.0.get().map_or(&[], Vec::as_slice)
    }

    pub(super) fn fill(&self, drives: Vec<CdromDrive>) {
        // A machine is built once.
        let _ = self.0.set(drives);
    }
}

/// Tells monitors of the tray of the drive with that name.
pub(super) struct Tray(pub(super) WeakSender<Event>, pub(super) String);

impl TrayListener for Tray {
    fn tray_moved(&self, open: bool) {
        let kind = EventKind::DeviceTrayMoved { device: "", id: self.1.clone(), tray_open: open };
        if let Some(events) = self.0.upgrade() {
            // An error says that no monitor listens.
            let _ = events.send(Event::now(kind));
        }
    }
}
