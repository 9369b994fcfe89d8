//! The host's log of what vCPUs write, for all who need it: on as long as one does.

use std::collections::BTreeSet;
use std::sync::Arc;

use api_channel::call::Call;
use pcie_function::SocFunction;
use tokio::sync::Mutex;

use crate::link::{CallError, Channel};

/// The log.
#[derive(Debug)]
pub(super) struct HostLog<F: SocFunction> {
    channel: Channel<F>,
    users: Arc<Mutex<BTreeSet<User>>>,
}

/// Who needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum User {
    /// Who reads what is dirty, and clears it: one at a time.
    Reader,
    /// vCPUs' limits.
    Limits,
    /// Who counts what each vCPU writes.
    Counter,
}

impl<F: SocFunction> Clone for HostLog<F> {
    fn clone(&self) -> Self {
        Self { channel: self.channel.clone(), users: self.users.clone() }
    }
}

impl<F: SocFunction> HostLog<F> {
    pub(super) fn new(channel: Channel<F>) -> Self {
        Self { channel, users: Arc::default() }
    }

    /// Somebody needs it from now on.
    ///
    /// # Errors
    /// It can't be had.
    pub(super) async fn begin(&self, user: User) -> Result<(), CallError> {
        let mut users = self.users.lock().await;
        users.insert(user);
        let begun = self.channel.call(&Call::DirtyLog(true)).await.map(drop);
        if begun.is_err() {
            self.leaves(&mut users, user).await;
        }
        begun
    }

    /// Somebody needs it no longer.
    pub(super) async fn end(&self, user: User) {
        self.leaves(&mut *self.users.lock().await, user).await;
    }

    async fn leaves(&self, users: &mut BTreeSet<User>, user: User) {
        if users.remove(&user) && users.is_empty() {
            // A lost host is reported on its own.
            let _ = self.channel.call(&Call::DirtyLog(false)).await;
        }
    }
}
