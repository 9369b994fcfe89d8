//! What the tests of the whole path share: the programs, as cargo builds them, and VMs: run by soc-vmm as a user would, or by a
//! small SoC side of the test's own that sees every request.

pub mod hostile;
pub mod libvirt;
pub mod machines;
pub mod monitor;
pub mod moving;
mod programs;
pub mod qapi_schema;
pub mod soc;
pub mod trace;
mod vm;

use testbed::fetch;

pub use programs::{optimized_program, program, vhost_backend};
pub use vm::{Ended, Vm};

/// Whether VMs can run on this machine: `/dev/kvm` can be opened. If not, says that `test` is skipped and why.
pub fn kvm(test: &str) -> bool {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(e) => {
            testbed::skip(test, &format!("/dev/kvm can't be opened: {e}"));
            false
        }
    }
}

/// SeaBIOS, where VMs can run on this machine. If they can't, or it can't be fetched, says that the running test is skipped and why.
///
/// # Panics
/// What was fetched is not what it should be.
pub fn seabios() -> Option<String> {
    let test = test_name();
    if !kvm(&test) {
        return None;
    }
    match fetch::qemu() {
        Ok(root) => Some(root.seabios().to_str().expect("a UTF-8 path").to_owned()),
        Err(error @ fetch::Error::Unreachable(_)) => {
            testbed::skip(&test, &error.to_string());
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

/// The name of the running test: its thread has it.
pub fn test_name() -> String {
    std::thread::current().name().unwrap_or("a test").to_owned()
}
