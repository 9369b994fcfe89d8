//! The host's processor, as monitors ask for it: once the host was asked.

use std::sync::{Arc, OnceLock};

use crate::cpuid::HostCpu;

/// Where it is found then.
#[derive(Clone, Debug, Default)]
pub(super) struct HostPlace(Arc<OnceLock<Option<HostCpu>>>);

impl HostPlace {
    pub(super) fn get(&self) -> Option<&HostCpu> {
        self.0.get().and_then(Option::as_ref)
    }

    /// Whether it was asked for, and there is none.
    pub(super) fn is_missing(&self) -> bool {
        self.0.get().is_some_and(Option::is_none)
    }

    pub(super) fn fill(&self, host: Option<HostCpu>) {
        // A process has one host.
        let _ = self.0.set(host);
    }
}
