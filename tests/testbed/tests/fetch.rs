//! What is fetched is of the right version and runs on this machine.

use std::process::{Command, Stdio};

use testbed::fetch::{self, Arch};
use testbed::process::run;

#[test]
fn every_part_is_what_it_should_be() {
    if !testbed::machines_or_skip("every_part_is_what_it_should_be") {
        return;
    }
    let root = fetch::qemu().unwrap();
    for program in ["qemu-system-x86_64", "qemu-system-aarch64"] {
        let version = run(root.command(program).arg("--version")).unwrap();
        assert!(version.contains("version 11."), "{version}");
    }
    assert_eq!(root.seabios().metadata().unwrap().len(), 256 * 1024);
    for arch in [Arch::Amd64, Arch::Arm64] {
        let kernel = fetch::kernel(arch).unwrap();
        assert!(kernel.image.is_file(), "{kernel:?}");
        assert!(kernel.version.starts_with("6.12."), "{kernel:?}");
    }

    let cross = fetch::cross().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("a.rs"), dir.path().join("a"));
    std::fs::write(&source, "fn main() { print!(\"{}\", std::env::consts::ARCH) }").unwrap();
    run(Command::new(&cross.rustc)
        .args(["--target=aarch64-unknown-linux-gnu", "-Ctarget-feature=+crt-static"])
        .arg(format!("-Clinker={}", cross.gcc.display()))
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .stdin(Stdio::null()))
    .unwrap();
    let arch = run(Command::new(&cross.qemu_user).arg(&program)).unwrap();
    assert_eq!(arch, "aarch64");
}
