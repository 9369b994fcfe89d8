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
        let directory = own_directory();
        build(&["soc-vmm", "host-kvm-shim"], directory.ends_with("release"));
        directory
    });
    directory.join(name)
}

/// The path of the test program that is a back end of devices over vhost-user.
///
/// # Panics
/// It can't be built.
pub fn vhost_backend() -> PathBuf {
    let directory = own_directory();
    build(&["vhost-backend"], directory.ends_with("release"));
    directory.join("vhost-backend")
}

/// The path of a program of this workspace, optimized.
///
/// # Panics
/// It can't be built.
pub fn optimized_program(name: &str) -> PathBuf {
    build(&[name], true);
    own_directory().with_file_name("release").join(name)
}

/// `target/PROFILE`: the test runs from `target/PROFILE/deps`.
fn own_directory() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    test.parent().and_then(|deps| deps.parent()).expect("target/PROFILE/deps/TEST").to_owned()
}

fn build(packages: &[&str], optimized: bool) {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet"]);
    for package in packages {
        cargo.args(["--package", package]);
    }
    if optimized {
        cargo.arg("--release");
    }
    testbed::build::without_package(&mut cargo);
    let status = cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).status();
    assert!(status.expect("cargo runs").success(), "{packages:?} don't build");
}
