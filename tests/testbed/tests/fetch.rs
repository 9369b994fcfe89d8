//! What is fetched is usable.
use std::process::Command;
use testbed::fetch::{self, Arch};

#[test]
fn parts_run() {
    let root = fetch::qemu().unwrap();
    for p in ["qemu-system-x86_64", "qemu-system-aarch64"] {
        let v = testbed::process::run(root.command(p).arg("--version")).unwrap();
        assert!(v.contains("version 11."), "{v}");
    }
    for arch in [Arch::Amd64, Arch::Arm64] {
        let k = fetch::kernel(arch).unwrap();
        println!("{k:?}");
        assert!(k.image.is_file());
    }
    let cross = fetch::cross().unwrap();
    println!("{}", testbed::process::run(Command::new(&cross.rustc).arg("-vV")).unwrap());
}
