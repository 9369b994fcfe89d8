//! Interrupt lines as devices see them.

use std::sync::{Arc, Mutex, PoisonError};

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

/// A GSI that several devices share: high while any of them holds it high.
pub struct WiredOr(Arc<Shared>);

struct Shared {
    line: InterruptLine,
    /// How many inputs are high; locked while the line changes, so that changes leave in order.
    high: Mutex<usize>,
}

impl WiredOr {
    /// Inputs for `gsi`.
    pub fn new(gsi: u32, sink: Arc<dyn LineSink>) -> Self {
        Self(Arc::new(Shared { line: InterruptLine::new(gsi, sink), high: Mutex::new(0) }))
    }

    /// One more device's wire, low.
    pub fn input(&self) -> InterruptLine {
        InterruptLine::new(self.0.line.gsi, Arc::new(Input { shared: self.0.clone(), level: Mutex::new(false) }))
    }
}

struct Input {
    shared: Arc<Shared>,
    level: Mutex<bool>,
}

impl LineSink for Input {
    fn set_level(&self, _: u32, high: bool) {
        let mut level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = self.shared.high.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = match (std::mem::replace(&mut *level, high), high) {
            (false, true) => {
                *count += 1;
                *count == 1
            }
            (true, false) => {
                *count -= 1;
                *count == 0
            }
            // A device that was restored says its level again: so does the line.
            _ => true,
        };
        if changes {
            self.shared.line.set(*count > 0);
        }
    }
}
