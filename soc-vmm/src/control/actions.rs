//! What resets, powering off and panics come to (QMP `set-action`), which may change while the VM runs.

use std::sync::{Arc, Mutex, PoisonError};

use crate::qemu::small::{ActionOption, PanicAction, RebootAction, ShutdownAction};

/// What was chosen. Cheap to clone: all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Actions(Arc<Mutex<Chosen>>);

/// What each comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// A reset.
    pub reboot: RebootAction,
    /// Powering off.
    pub shutdown: ShutdownAction,
    /// The guest's panic.
    pub panic: PanicAction,
}

impl Actions {
    /// Chooses what is said; the rest stays.
    pub fn set(&self, said: ActionOption) {
        let mut chosen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Chosen { reboot, shutdown, panic } = *chosen;
        *chosen = Chosen {
            reboot: said.reboot.unwrap_or(reboot),
            shutdown: said.shutdown.unwrap_or(shutdown),
            panic: said.panic.unwrap_or(panic),
        };
    }

    /// What is chosen now.
    pub fn chosen(&self) -> Chosen {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
