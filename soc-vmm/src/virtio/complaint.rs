//! What a guest can make the log say.

use std::fmt::Display;

/// Lines that a device writes as warnings; a guest can cause any number of them.
const LOUD: u32 = 10;

/// A device's complaints: the first ones as warnings, the rest for whoever looks for them.
#[derive(Debug, Default)]
pub(super) struct Complaints(u32);

impl Complaints {
    pub(super) fn say(&mut self, device: &str, what: impl Display) {
        self.0 = self.0.saturating_add(1);
        match self.0 {
            ..LOUD => tracing::warn!("{device}: {what}"),
            LOUD => tracing::warn!("{device}: {what} (further ones are logged at level debug)"),
            _ => tracing::debug!("{device}: {what}"),
        }
    }
}
