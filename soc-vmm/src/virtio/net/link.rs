//! The handle by which others than the guest change an interface while it runs.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::EventFd;

use crate::virtio::session::{eventfd, ring_bell};

/// An interface's cable, from any thread.
#[derive(Debug)]
pub struct NetLink {
    pulled: AtomicBool,
    announce: AtomicBool,
    /// Something has changed; and what wakes the device for that. The bell is rung first, so that whoever sees the flag can silence it.
    changed: AtomicBool,
    bell: EventFd,
}

impl NetLink {
    /// A cable that is plugged in.
    ///
    /// # Errors
    /// There is no more room for descriptors in this process.
    pub fn new() -> nix::Result<Arc<Self>> {
        let off = || AtomicBool::new(false);
        Ok(Arc::new(Self { pulled: off(), announce: off(), changed: off(), bell: eventfd()? }))
    }

    /// Plugs the cable in or pulls it (QMP `set_link`). While it is out no frame passes; the guest is told.
    pub fn set_up(&self, up: bool) {
        self.pulled.store(!up, Ordering::SeqCst);
        self.tell();
    }

    /// Whether the cable is in. Whether there is a network at its other end is another question.
    pub fn is_up(&self) -> bool {
        !self.pulled.load(Ordering::SeqCst)
    }

    /// Has the guest tell the network where it is now (virtio 1.2 §5.1.6.5.4): after a migration. A driver that doesn't know how is not
    /// asked.
    pub fn announce(&self) {
        self.announce.store(true, Ordering::SeqCst);
        self.tell();
    }

    fn tell(&self) {
        ring_bell(&self.bell);
        self.changed.store(true, Ordering::SeqCst);
    }

    /// What wakes the device.
    pub(in crate::virtio) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Silences the bell, before what it rang for is looked at.
    pub(in crate::virtio) fn silence(&self) {
        if self.changed.swap(false, Ordering::SeqCst) {
            // It doesn't block, and what it counts doesn't matter.
            let _ = self.bell.read();
        }
    }

    /// Whether the guest is to be asked for an announcement, which it then is.
    pub(super) fn take_announcement(&self) -> bool {
        self.announce.swap(false, Ordering::SeqCst)
    }
}
