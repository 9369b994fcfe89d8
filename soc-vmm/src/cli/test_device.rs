//! `--test-device`: devices that are there for tests to drive.

use clap::ValueEnum;

/// A test device.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum TestDevice {
    /// Hyper-V connections and interrupt sources on demand; it needs --cpu …,hv-synic
    Hyperv,
}
