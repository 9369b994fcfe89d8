//! Whether the guest runs here, may still, or never will: decided once, under one lock.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::ending::lock;

/// Whether the guest runs here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Standing {
    /// It may, once the source says so.
    #[default]
    Open,
    /// It is being started.
    Starts,
    /// It does.
    Runs,
    /// It never will: the source may have been told so.
    Never,
}

/// The guest's fate.
#[derive(Default)]
pub(super) struct Fate {
    standing: Mutex<Standing>,
    changed: Condvar,
}

impl Fate {
    /// Whether the guest may be started: then nobody but [`Self::started`] decides.
    pub(super) fn begin(&self) -> bool {
        let mut standing = lock(&self.standing);
        let may = *standing == Standing::Open;
        if may {
            *standing = Standing::Starts;
        }
        may
    }

    /// It was started, or was not and never will be.
    pub(super) fn started(&self, runs: bool) {
        *lock(&self.standing) = if runs { Standing::Runs } else { Standing::Never };
        self.changed.notify_all();
    }

    /// Decides that it never runs here, if nothing is decided yet; whether that is so.
    pub(super) fn never(&self) -> bool {
        let mut standing = lock(&self.standing);
        if *standing == Standing::Open {
            *standing = Standing::Never;
        }
        *standing == Standing::Never
    }

    /// Whether it runs, for somebody who acts on it: what isn't decided is decided now. None: it is being started, for longer than `limit`.
    pub(super) fn runs(&self, limit: Duration) -> Option<bool> {
        if self.never() {
            return Some(false);
        }
        let standing = lock(&self.standing);
        let waited = self.changed.wait_timeout_while(standing, limit, |standing| *standing == Standing::Starts);
        match *waited.unwrap_or_else(PoisonError::into_inner).0 {
            Standing::Runs => Some(true),
            Standing::Never => Some(false),
            Standing::Open | Standing::Starts => None,
        }
    }
}
