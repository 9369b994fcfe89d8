//! What the tests of the whole path share: the programs, as cargo builds them, and VMs run by them as a user would.

mod programs;
mod vm;

pub use programs::program;
pub use vm::{Ended, Vm};

/// Whether VMs can run on this machine: `/dev/kvm` can be opened. If not, says on standard error that `test` is skipped and why.
pub fn kvm(test: &str) -> bool {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(e) => {
            eprintln!("SKIP {test}: /dev/kvm can't be opened: {e}");
            false
        }
    }
}
