//! The emulated DPU server: QEMU machines that stand for a host server and for a DPU's Arm SoC.
//!
//! What they are made of is fetched by [`fetch`], all from Debian's archive, without root.

pub mod bed;
pub mod build;
mod busy;
pub mod card;
pub mod certificates;
pub mod clock;
pub mod console;
pub mod control;
pub mod debian;
pub mod fetch;
pub mod guest;
pub mod initramfs;
pub mod libvirt;
pub mod machine;
pub mod modules;
pub mod network;
pub mod paths;
pub mod process;
pub mod qmp_client;
pub mod scratch;
pub mod server;
pub mod soc;
pub mod switch;
pub mod vmm;

pub use testbed_init as protocol;

use std::fs::OpenOptions;
use std::io::Write;

/// Names the file to which [`skip`] adds a line.
pub const SKIPS_VARIABLE: &str = "OUTBOARD_SKIPS";
/// Set where emulated machines are to be left out.
pub const QUICK_VARIABLE: &str = "OUTBOARD_QUICK";

/// Whether a test may start emulated machines. If not, it has said why and the test is to return.
///
/// # Panics
/// The machines' parts are there or could be had, but are not as they should be.
#[must_use]
pub fn machines_or_skip(test: &str) -> bool {
    if std::env::var_os(QUICK_VARIABLE).is_some() {
        skip(test, "emulated machines are left out (--quick)");
        return false;
    }
    match fetch::everything() {
        Ok(()) => true,
        Err(error @ fetch::Error::Unreachable(_)) => {
            skip(test, &error.to_string());
            false
        }
        Err(error) => panic!("{error:?}"),
    }
}

/// Says that the test `name` can't run here, and why. `cargo xtask test` counts and shows it; Rust's test harness would call
/// the test passed.
pub fn skip(name: &str, reason: &str) {
    eprintln!("SKIPPED {name}: {reason}");
    let Some(path) = std::env::var_os(SKIPS_VARIABLE) else {
        return;
    };
    // One write of one line: tests of several processes add to the file at once.
    let file = OpenOptions::new().append(true).create(true).open(path);
    if let Ok(mut file) = file {
        let _ = file.write_all(format!("{name}: {reason}\n").as_bytes());
    }
}
