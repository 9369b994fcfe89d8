//! An eventfd under tokio.
//!
//! `unsafe`: tokio asks for a promise that a registered descriptor stays open.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd};

use tokio::io::unix::AsyncFd;

/// A doorbell, or another event of a function, that tasks wait for.
#[derive(Debug)]
pub(super) struct Bell(AsyncFd<OwnedFd>);

impl Bell {
    /// Watches `event`, by a descriptor of its own.
    ///
    /// # Errors
    /// No descriptor left, or it can't be watched.
    pub(super) fn new(event: BorrowedFd<'_>) -> std::io::Result<Self> {
        let event = event.try_clone_to_owned()?;
        // SAFETY: the descriptor is owned by the registration, which closes it after it has deregistered it.
        unsafe { AsyncFd::register(event) }.map(Self).map_err(Into::into)
    }

    /// Waits for its next ring, and leaves it rung for others who watch.
    pub(super) async fn raised(&self) {
        match self.0.readable().await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Waits until it was rung, and takes it. Safe to cancel.
    pub(super) async fn rung(&self) {
        loop {
            let Ok(mut ready) = self.0.readable().await else { return std::future::pending().await };
            let mut count = [0; 8];
            match nix::unistd::read(self.0.get_ref(), &mut count) {
                Err(nix::errno::Errno::EAGAIN) => ready.clear_ready(),
                _ => return,
            }
        }
    }
}
