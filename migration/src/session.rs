//! What lasts as long as one set of connections: a migration has one, and one more each time that it recovers.

use std::sync::Arc;
use std::thread::{Builder, Scope};
use std::time::Duration;

use crate::MigrationError;
use crate::ending::Ending;
use crate::watch::Watchman;

/// Connections that fail together.
#[derive(Clone)]
pub(crate) struct Session {
    pub(crate) ending: Arc<Ending>,
    pub(crate) watchman: Arc<Watchman>,
}

impl Session {
    /// Begins to watch; `tick` is called a few times a second with what a failure is said to.
    ///
    /// # Errors
    /// [`MigrationError::NoThread`].
    pub(crate) fn begin<'s>(
        scope: &'s Scope<'s, '_>,
        ending: Arc<Ending>,
        limit: Duration,
        tick: impl Fn(&Ending) + Send + 's,
    ) -> Result<Self, MigrationError> {
        let session = Self { ending, watchman: Arc::new(Watchman::new(limit)) };
        let (watches, pulses) = (session.clone(), session.clone());
        spawned(scope, move || {
            let Self { ending, watchman } = watches;
            ending.guards(|| {
                watchman.watch(&ending, || tick(&ending));
                Ok(())
            });
        })?;
        let pulses = spawned(scope, move || {
            pulses.ending.guards(|| {
                pulses.watchman.pulse();
                Ok(())
            });
        });
        // The first one has nothing to watch either.
        pulses.inspect_err(|_| session.watchman.stop())?;
        Ok(session)
    }

    /// Cuts the connections, and ends the watch.
    pub(crate) fn end(&self) {
        self.ending.close();
        self.watchman.stop();
    }
}

/// Has a thread do it.
///
/// # Errors
/// [`MigrationError::NoThread`].
pub(crate) fn spawned<'s>(scope: &'s Scope<'s, '_>, act: impl FnOnce() + Send + 's) -> Result<(), MigrationError> {
    Builder::new().spawn_scoped(scope, act).map(drop).map_err(MigrationError::NoThread)
}
