//! A CD-ROM drive as packet commands see it (MMC-6, SPC-4): tray, lock, medium, and what it has to report.

mod configuration;
mod disc;
mod inquiry;
mod mode;
mod packet;
mod sense;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::block::BlockBackend;

pub(super) use packet::Reply;
pub use sense::Sense;

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 2048;

/// A medium as it is shared with reads that are under way.
pub(super) type Medium = Arc<dyn BlockBackend>;

/// Hears of a tray that moves, whoever moves it: QMP's `DEVICE_TRAY_MOVED`. Called from any thread, without a lock.
pub trait TrayListener: Send + Sync {
    /// The tray is open now, or closed.
    fn tray_moved(&self, open: bool);
}

/// What a guest can tell of a drive, but for the medium.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveState {
    /// The tray is open.
    pub open: bool,
    /// The guest keeps the medium from being removed.
    pub locked: bool,
    /// What the latest command that failed had to say.
    sense: Option<Sense>,
    /// What changed since the guest's last command: it is told once.
    attention: Option<Sense>,
    /// The latest event of the medium that was not asked for yet.
    event: MediaEvent,
}

/// Events of a medium (MMC-6 §6.6.2.8), by their codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum MediaEvent {
    #[default]
    None = 0,
    /// Someone wants the medium out.
    EjectRequest = 1,
    /// There is another one.
    New = 2,
    /// It was taken out.
    Removal = 3,
}

/// A drive.
pub(super) struct Drive {
    /// What messages call it.
    pub(super) name: String,
    pub(super) state: DriveState,
    /// In the tray, be it open or closed.
    medium: Option<Medium>,
    /// Serial number, at most 20 characters.
    pub(super) serial: String,
    pub(super) listener: Option<Arc<dyn TrayListener>>,
    /// Where the tray moved to, while nobody was told.
    moved: Option<bool>,
}

impl Drive {
    pub(super) fn new(
        name: String,
        medium: Option<Medium>,
        serial: String,
        listener: Option<Arc<dyn TrayListener>>,
    ) -> Self {
        Self { name, state: DriveState::default(), medium, serial, listener, moved: None }
    }

    /// Reset of the device, by whatever way: the medium stays where it is, and nothing holds it.
    pub(super) fn reset(&mut self) {
        self.state = DriveState { open: self.state.open, ..DriveState::default() };
    }

    /// The medium, if it can be read.
    fn readable(&self) -> Option<&Medium> {
        self.medium.as_ref().filter(|_| !self.state.open)
    }

    pub(super) fn has_medium(&self) -> bool {
        self.medium.is_some()
    }

    /// Bytes of the medium.
    pub(super) fn medium_len(&self) -> Option<u64> {
        self.medium.as_ref().map(|medium| medium.size())
    }

    /// Opens or closes the tray.
    pub(super) fn move_tray(&mut self, open: bool) {
        if self.state.open == open {
            return;
        }
        self.state.open = open;
        self.moved = Some(open);
        if self.medium.is_some() {
            self.state.event = if open { MediaEvent::Removal } else { MediaEvent::New };
            self.state.attention = (!open).then_some(Sense::MEDIUM_CHANGED);
        }
    }

    /// Asks the guest for the medium.
    pub(super) fn request_eject(&mut self) {
        self.state.event = MediaEvent::EjectRequest;
    }

    /// Puts another medium into the tray, or none, and gives the one that was there. The tray is open.
    pub(super) fn replace_medium(&mut self, medium: Option<Medium>) -> Option<Medium> {
        std::mem::replace(&mut self.medium, medium)
    }

    /// Sectors of a medium: whatever of the last one is missing reads as zeros. A READ can't name more.
    fn sectors(medium: &dyn BlockBackend) -> u32 {
        u32::try_from(medium.size().div_ceil(SECTOR)).unwrap_or(u32::MAX)
    }

    /// The command failed.
    pub(super) fn fail(&mut self, sense: Sense) {
        self.state.sense = Some(sense);
    }

    /// Whom to tell that the tray moved, if it did.
    pub(super) fn take_news(&mut self) -> Option<(Arc<dyn TrayListener>, bool)> {
        let open = self.moved.take()?;
        Some((self.listener.clone()?, open))
    }
}

impl std::fmt::Debug for Drive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Drive").field("state", &self.state).field("medium", &self.has_medium()).finish_non_exhaustive()
    }
}
