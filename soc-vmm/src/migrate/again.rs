//! Ways that a migration goes on by whose connection broke after the guest was started.

use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use migration::Connection;

use super::connect::{Dialer, Door};

/// A place for a way that takes the turn of the one before.
pub(super) struct Next<T>(Arc<Mutex<Option<T>>>);

impl<T> Next<T> {
    /// From the next connection on that one is used.
    pub(super) fn put(&self, way: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(way);
    }

    fn take(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<T> Default for Next<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Clone for Next<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// A source's dialer, and its next one.
pub(super) fn dialing(mut dialer: Dialer, next: Next<Dialer>) -> impl FnMut(u16) -> io::Result<Connection> {
    move |connection| {
        if let Some(next) = next.take() {
            dialer = next;
        }
        dialer.dial(connection)
    }
}

/// A destination's door, and its next one. Where there may be one, a door by which nobody comes any more is no end.
pub(super) fn standing(
    mut door: Door,
    next: Next<Door>,
    may_be_next: impl Fn() -> bool + Send,
) -> impl FnMut(Duration) -> io::Result<Option<Connection>> + Send {
    move |patience| {
        if let Some(next) = next.take() {
            door = next;
        }
        match door.accept(patience) {
            Err(e) if e.kind() == ErrorKind::NotConnected && may_be_next() => {
                thread::sleep(patience);
                Ok(None)
            }
            accepted => accepted,
        }
    }
}
