//! A VM's counters, as `soc-vmm status --json` prints them.

use serde_json::{Map, Value};

/// The counters at one moment.
#[derive(Clone, Debug)]
pub struct Counters(Map<String, Value>);

impl Counters {
    /// Out of what `soc-vmm status --json` printed.
    ///
    /// # Panics
    /// It holds no counters.
    pub fn of_status(status: &str) -> Self {
        let status: Value = serde_json::from_str(status).expect("a status in JSON");
        Self(status["counters"].as_object().expect("counters").clone())
    }

    /// A counter.
    ///
    /// # Panics
    /// There is none of that name.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).and_then(Value::as_u64).unwrap_or_else(|| panic!("no counter {name} in {self:?}"))
    }

    /// Exits that the SoC served, exits that the shim sent, and what KVM counts, are the same ones. The VM is paused, and
    /// accesses no memory across the end of a page.
    ///
    /// # Panics
    /// They aren't.
    pub fn agree(&self) {
        assert_eq!(self.get("exits.posted"), self.get("host.shim.posted"), "{self:?}");
        // The shim counts posted writes by their kind too.
        let served = ["exits.pio", "exits.mmio", "exits.posted"].map(|name| self.get(name)).iter().sum::<u64>();
        assert_eq!(served, self.get("host.shim.pio") + self.get("host.shim.mmio"), "{self:?}");
        assert!(self.get("exits.pio") <= self.get("host.shim.pio"), "{self:?}");
        assert!(self.get("host.shim.pio") <= self.get("host.io_exits"), "{self:?}");
        assert_eq!(self.get("host.shim.mmio"), self.get("host.mmio_exits"), "{self:?}");
    }
}
