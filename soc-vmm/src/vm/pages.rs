//! Guest memory that goes back to the host: taken from the devices here first, then freed there.

use std::sync::Arc;

use api_channel::call::{Call, Discard, VmCreated};
use pcie_function::SocFunction;
use tokio::runtime::Handle;

use super::ram::GuestRam;
use crate::cli::RunConfig;
use crate::link::Channel;
use crate::virtio::balloon::{PageRun, Pages, PagesError};

/// Pieces of one call: a message holds them.
const OF_CALL: usize = 64;

/// The RAM of a VM, for its balloon.
pub(super) struct RamPages<F: SocFunction> {
    ram: Arc<GuestRam<F>>,
    channel: Channel<F>,
    runtime: Handle,
    pinned: Option<&'static str>,
    /// What is revoked, as the host knows it.
    revoked: Vec<Discard>,
}

impl<F: SocFunction> RamPages<F> {
    /// Of a VM that the host has made like that.
    ///
    /// # Panics
    /// Outside of a runtime, which waits for the host.
    pub(super) fn new(ram: Arc<GuestRam<F>>, channel: Channel<F>, created: &VmCreated, config: &RunConfig) -> Self {
        let pinned = if created.features & VmCreated::DISCARD == 0 {
            Some("the function's DMA pins all guest memory on the host")
        } else if config.memory.hugepages.is_some() {
            Some("huge pages are the VM's until its end")
        } else {
            None
        };
        Self { ram, channel, runtime: Handle::current(), pinned, revoked: Vec::new() }
    }
}

impl<F: SocFunction> Pages for RamPages<F> {
    fn pinned(&self) -> Option<String> {
        self.pinned.map(str::to_owned)
    }

    fn revoke(&mut self, runs: &[PageRun]) -> Result<(), PagesError> {
        self.revoked = self.ram.revoke(runs)?;
        Ok(())
    }

    fn free(&mut self, _: &[PageRun]) -> Result<u64, PagesError> {
        let revoked = std::mem::take(&mut self.revoked);
        let mut freed = 0;
        let outcome = revoked.chunks(OF_CALL).try_for_each(|runs| {
            // The device's own thread: it may wait.
            let called = self.runtime.block_on(self.channel.call(&Call::Discard(runs.to_vec())));
            called.map_err(|e| PagesError::Refused(e.to_string()))?;
            freed += runs.iter().map(|run| run.len).sum::<u64>();
            Ok(())
        });
        self.ram.give_back();
        outcome.map(|()| freed)
    }
}
