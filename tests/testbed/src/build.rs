//! Programs of this workspace built for the emulated machines: static, optimized, in a target directory of their own.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::fetch::{self, Arch};
use crate::paths;
use crate::process::{CommandError, run};

/// Why a build failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The toolchain isn't there.
    #[error(transparent)]
    Fetch(#[from] fetch::Error),
    /// cargo failed.
    #[error(transparent)]
    Cargo(#[from] CommandError),
}

/// Builds the programs of `packages` for `arch`; the answer's paths are in the packages' order. A process builds each once:
/// what it starts later is what it started before.
///
/// # Errors
/// [`Error`].
pub fn programs(arch: Arch, packages: &[&str]) -> Result<Vec<PathBuf>, Error> {
    static BUILT: Mutex<BTreeSet<(Arch, String)>> = Mutex::new(BTreeSet::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let of = |package: &str| (arch, package.to_owned());
    let missing: Vec<&str> = packages.iter().copied().filter(|package| !built.contains(&of(package))).collect();
    if !missing.is_empty() {
        // Built alone, a program would have its dependencies compiled again with the few features that it needs itself.
        let all = missing.iter().all(|package| together(arch).contains(package));
        let packages = if all { together(arch).to_vec() } else { missing };
        let mut cargo = build(arch, &packages)?;
        // What it compiles, and what is wrong with that, is for a person to see.
        run(cargo.stderr(Stdio::inherit()))?;
        built.extend(packages.into_iter().map(of));
    }
    let out = target_dir().join(triple(arch)).join("release");
    Ok(packages.iter().map(|package| out.join(package)).collect())
}

/// The cargo that builds what emulated machines are made of: [`programs`] then finds it there, and no test waits for it.
///
/// # Errors
/// The cross toolchain can't be fetched.
pub fn beforehand(arch: Arch) -> Result<Command, fetch::Error> {
    build(arch, together(arch))
}

/// What is built together.
fn together(arch: Arch) -> &'static [&'static str] {
    match arch {
        Arch::Amd64 => &["testbed-init", "card", "function-probe", "host-kvm-shim", "soc-vmm"],
        Arch::Arm64 => &["testbed-init", "function-probe", "soc-vmm"],
    }
}

fn build(arch: Arch, packages: &[&str]) -> Result<Command, fetch::Error> {
    let mut cargo = cargo(arch)?;
    cargo.args(["build", "--release", "--bins"]);
    for package in packages {
        cargo.args(["--package", package]);
    }
    Ok(cargo)
}

/// A cargo that builds static programs for `arch` and, where `arch` isn't this machine's, runs them under emulation. The
/// caller adds the subcommand.
///
/// # Errors
/// The cross toolchain can't be fetched.
pub fn cargo(arch: Arch) -> Result<Command, fetch::Error> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(paths::workspace())
        .env("CARGO_TARGET_DIR", target_dir())
        .env("CARGO_BUILD_TARGET", triple(arch))
        // Under emulation the last percents don't show; without whole-program optimization a build takes a third of the time.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        // What the outer cargo was told is not meant for this one.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    without_package(&mut cargo);
    let flags = |name: &str| format!("CARGO_TARGET_{name}_UNKNOWN_LINUX_GNU_RUSTFLAGS");
    match arch {
        Arch::Amd64 => {
            cargo.env(flags("X86_64"), "-Ctarget-feature=+crt-static");
        }
        Arch::Arm64 => {
            let cross = fetch::cross()?;
            cargo
                .env("RUSTC", &cross.rustc)
                .env(flags("AARCH64"), "-Ctarget-feature=+crt-static")
                .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", &cross.gcc)
                .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", &cross.qemu_user)
                // The cc crate's names, for dependencies with C in them.
                .env("CC_aarch64_unknown_linux_gnu", &cross.gcc)
                .env("AR_aarch64_unknown_linux_gnu", &cross.ar);
        }
    }
    Ok(cargo)
}

/// What a test's own cargo says of its package is not meant for a cargo that it starts: build scripts that look at it (ring's does) would run
/// anew, and what needs them, soc-vmm, would be compiled again.
pub fn without_package(cargo: &mut Command) {
    let of_package =
        |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") || name == "OUT_DIR";
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    names.filter(|name| of_package(name)).for_each(|name| {
        cargo.env_remove(name);
    });
}

fn target_dir() -> PathBuf {
    paths::cache().join("build")
}

fn triple(arch: Arch) -> &'static str {
    match arch {
        Arch::Amd64 => "x86_64-unknown-linux-gnu",
        Arch::Arm64 => "aarch64-unknown-linux-gnu",
    }
}
