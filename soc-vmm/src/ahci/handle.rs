//! A drive as the rest of soc-vmm sees it: `eject`, `blockdev-change-medium` and their kin.

use std::sync::{Arc, MutexGuard};

use super::Shared;
use super::cdrom::{Drive, Medium};
use super::hba::Hba;

/// How a tray is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tray {
    /// It is open.
    pub open: bool,
    /// The guest keeps it from being opened.
    pub locked: bool,
    /// There is a medium in it.
    pub medium: bool,
}

/// The guest has locked the tray; it was asked to open it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest has locked the tray: it was asked to let the medium go; try again, or force it")]
pub struct TrayLocked;

/// One drive of an [`super::Ahci`]. Any thread may use it; nothing blocks.
#[derive(Clone)]
pub struct CdHandle {
    shared: Arc<Shared>,
    port: usize,
}

/// The tray is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tray is closed: open it first")]
pub struct TrayClosed;

/// Why a medium can't be laid into a tray.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InsertError {
    /// It is closed.
    #[error(transparent)]
    Closed(#[from] TrayClosed),
    /// There is one.
    #[error("there is a medium in it: remove that first")]
    Full,
}

impl CdHandle {
    pub(super) fn new(shared: Arc<Shared>, port: usize) -> Self {
        Self { shared, port }
    }

    /// How the tray is.
    pub fn tray(&self) -> Tray {
        self.with(|drive| Tray { open: drive.state.open, locked: drive.state.locked, medium: drive.has_medium() })
    }

    /// QMP `blockdev-open-tray`.
    ///
    /// # Errors
    /// It is locked, and `force` is not set: the guest is asked for it.
    pub fn open_tray(&self, force: bool) -> Result<(), TrayLocked> {
        self.with(|drive| open(drive, force))
    }

    /// QMP `blockdev-close-tray`.
    pub fn close_tray(&self) {
        self.with(|drive| drive.move_tray(false));
    }

    /// QMP `eject`: opens the tray and takes the medium out.
    ///
    /// # Errors
    /// As [`CdHandle::open_tray`].
    pub fn eject(&self, force: bool) -> Result<Option<Medium>, TrayLocked> {
        self.with(|drive| {
            open(drive, force)?;
            Ok(drive.replace_medium(None))
        })
    }

    /// QMP `blockdev-change-medium`: opens the tray, puts `medium` in place of what was there, and closes it.
    ///
    /// # Errors
    /// As [`CdHandle::open_tray`].
    pub fn change(&self, medium: Medium, force: bool) -> Result<Option<Medium>, TrayLocked> {
        let old = self.with(|drive| {
            open(drive, force)?;
            Ok(drive.replace_medium(Some(medium)))
        })?;
        self.close_tray();
        Ok(old)
    }

    /// QMP `blockdev-remove-medium`: takes the medium out of the open tray.
    ///
    /// # Errors
    /// The tray is closed.
    pub fn remove_medium(&self) -> Result<Option<Medium>, TrayClosed> {
        self.with(|drive| if drive.state.open { Ok(drive.replace_medium(None)) } else { Err(TrayClosed) })
    }

    /// QMP `blockdev-insert-medium`: lays a medium into the open tray.
    ///
    /// # Errors
    /// The tray is closed, or has a medium.
    pub fn insert_medium(&self, medium: Medium) -> Result<(), InsertError> {
        self.with(|drive| {
            if !drive.state.open {
                return Err(TrayClosed.into());
            }
            if drive.has_medium() {
                return Err(InsertError::Full);
            }
            drive.replace_medium(Some(medium));
            Ok(())
        })
    }

    fn with<T>(&self, change: impl FnOnce(&mut Drive) -> T) -> T {
        let mut hba = self.shared.hba();
        let result = change(self.drive(&mut hba));
        let news = self.drive(&mut hba).take_news();
        drop(hba);
        if let Some((listener, open)) = news {
            listener.tray_moved(open);
        }
        result
    }

    fn drive<'a>(&self, hba: &'a mut MutexGuard<'_, Hba>) -> &'a mut Drive {
        hba.ports[self.port].drive.as_mut().expect("a handle is made for a port with a drive, which stays")
    }
}

fn open(drive: &mut Drive, force: bool) -> Result<(), TrayLocked> {
    if drive.state.locked && !drive.state.open && !force {
        drive.request_eject();
        return Err(TrayLocked);
    }
    drive.move_tray(true);
    Ok(())
}

impl std::fmt::Debug for CdHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CdHandle").field("port", &self.port).field("tray", &self.tray()).finish_non_exhaustive()
    }
}
