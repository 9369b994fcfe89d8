//! Debian's unmodified libvirtd drives soc-vmm on this machine's KVM.

use integration::test_name;
use testbed::libvirt::{Config, Libvirt};

#[test]
fn the_daemons_start_come_back_and_leave_nothing() {
    if let Some(why) = Libvirt::lacks().unwrap() {
        testbed::skip(&test_name(), &why);
        return;
    }
    let libvirt = Libvirt::start(&Config { stock: true, ..Config::default() }).unwrap();
    let says = |args: &[&str]| {
        let output = libvirt.virsh(args).unwrap();
        assert_eq!(output.status, 0, "virsh {args:?}: {}", output.stderr);
        output.stdout
    };
    let version = libvirt.output("libvirtd", &["--version"]).unwrap();
    assert_eq!(version.stdout, "libvirtd (libvirt) 9.0.0\n");
    assert_eq!(says(&["list", "--all", "--name"]).trim(), "");
    assert!(says(&["nodeinfo"]).contains("x86_64"));
    assert!(says(&["capabilities"]).contains("<arch>x86_64</arch>"));

    let before = libvirt.running("libvirtd");
    libvirt.restart_libvirtd().unwrap();
    let after = libvirt.running("libvirtd");
    assert!(before.len() == 1 && after.len() == 1 && before[0].pid != after[0].pid, "{before:?}, {after:?}");
    assert_eq!(libvirt.running("virtlogd").len(), 1);

    let everybody = libvirt.processes();
    drop(libvirt);
    let alive = |pid: i32| std::path::Path::new(&format!("/proc/{pid}")).exists();
    assert!(!everybody.iter().any(|process| alive(process.pid)), "{everybody:?}");
}
