//! The value of `--test-device`: devices that only tests want.

use std::str::FromStr;

use super::values::{ValueError, wrong};

/// A device for tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TestDevice {
    /// QEMU's `edu`: DMA and interrupts of a PCI function.
    Edu,
    /// QEMU's `hyperv-testdev`: connections and interrupts of Hyper-V's on demand; it needs `--cpu …,hv-synic`.
    Hyperv,
}

impl TestDevice {
    /// All of them.
    const ALL: [Self; 2] = [Self::Edu, Self::Hyperv];

    fn name(self) -> &'static str {
        match self {
            Self::Edu => "edu",
            Self::Hyperv => "hyperv",
        }
    }
}

impl std::fmt::Display for TestDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for TestDevice {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let found = Self::ALL.into_iter().find(|device| device.name() == s);
        found.map_or_else(
            || wrong(format!("'{s}' is no test device; there are {}", Self::ALL.map(Self::name).join(", "))),
            Ok,
        )
    }
}
