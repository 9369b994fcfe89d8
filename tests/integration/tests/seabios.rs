//! Real firmware: SeaBIOS comes up, and looks for something to boot from.

use integration::{Vm, kvm, test_name};
use testbed::fetch;

#[test]
fn seabios_finds_no_bootable_device() {
    if !kvm(&test_name()) {
        return;
    }
    let root = match fetch::qemu() {
        Ok(root) => root,
        Err(error @ fetch::Error::Unreachable(_)) => {
            testbed::skip(&test_name(), &error.to_string());
            return;
        }
        Err(error) => panic!("{error:?}"),
    };
    let firmware = root.seabios();
    let mut vm = Vm::run(&["--firmware", firmware.to_str().unwrap(), "--memory", "512M"]);
    vm.debugcon_has("No bootable device");
    let said = std::fs::read_to_string(vm.file("debugcon")).unwrap();
    assert!(said.starts_with("SeaBIOS (version "), "{said}");
    // It found the memory that it was given: 512 MiB, all below 4 GiB.
    assert!(said.contains("addr 0x0000000000000000 len 0x0000000020000000 [RAM]"), "{said}");
    vm.command(&["quit"]);
    let ended = vm.wait();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
}
