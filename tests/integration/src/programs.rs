//! The programs under test.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// The path of a program of this workspace, built as the running test was.
///
/// # Panics
/// It can't be built.
pub fn program(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let directory = BUILT.get_or_init(|| {
        // The test runs from target/PROFILE/deps.
        let test = std::env::current_exe().expect("a test knows its own path");
        let directory = test.parent().and_then(|deps| deps.parent()).expect("target/PROFILE/deps/TEST").to_owned();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--package", "soc-vmm", "--package", "host-kvm-shim"]);
        if directory.ends_with("release") {
            cargo.arg("--release");
        }
        let status = cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).status();
        assert!(status.expect("cargo runs").success(), "soc-vmm and host-kvm-shim don't build");
        directory
    });
    directory.join(name)
}
