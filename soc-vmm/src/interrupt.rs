//! Interrupt lines as devices see them.

use std::sync::Arc;

/// Takes level changes of GSIs. Called from any thread; must not block on the guest.
pub trait LineSink: Send + Sync {
    /// Sets the level of `gsi`. A change made while a vCPU's access is served reaches that vCPU before it re-enters the guest.
    fn set_level(&self, gsi: u32, high: bool);
}

/// One device's wire to one GSI.
#[derive(Clone)]
pub struct InterruptLine {
    gsi: u32,
    sink: Arc<dyn LineSink>,
}

impl InterruptLine {
    /// A wire to `gsi`.
    pub fn new(gsi: u32, sink: Arc<dyn LineSink>) -> Self {
        Self { gsi, sink }
    }

    /// Sets the wire's level.
    pub fn set(&self, high: bool) {
        self.sink.set_level(self.gsi, high);
    }
}

impl std::fmt::Debug for InterruptLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "InterruptLine(gsi {})", self.gsi)
    }
}
