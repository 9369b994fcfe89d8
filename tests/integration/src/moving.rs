//! What tests of migrations share: VMs with names, what their monitors say of a move, and that a guest came through one whole.

use std::sync::atomic::{AtomicU32, Ordering};

use payloads::PASSED;
use payloads::scribe::told;
use serde_json::{Value, json};

use crate::Vm;
use crate::monitor::Monitor;

/// A name that no VM of another test has.
pub fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Vm {
    /// What `query-migrate` answers.
    pub fn migration(&self) -> Value {
        Monitor::connect(&self.file("qmp")).does("query-migrate", json!({}))
    }

    /// The guest, a [`payloads::scribe`], runs here and has lost nothing of what it wrote.
    ///
    /// # Panics
    /// It doesn't, or it has.
    pub fn passes(self, what: &str) {
        assert!(self.command(&["status"]).contains("running"), "{what}");
        self.command(&["powerdown"]);
        let ended = self.wait();
        assert_eq!(ended.status.code(), Some(PASSED), "{what}: {} {}", ended.debugcon, ended.stderr);
        assert!(told(&ended.debugcon, "passes").is_some_and(|passes| passes > 0), "{what}: {}", ended.debugcon);
    }
}
