//! Real firmware: SeaBIOS comes up, and looks for something to boot from.

use integration::{Vm, seabios};

#[test]
fn seabios_finds_no_bootable_device() {
    let Some(firmware) = seabios() else { return };
    let mut vm = Vm::run(&["--firmware", &firmware, "--memory", "512M"]);
    vm.debugcon_has("No bootable device");
    let said = std::fs::read_to_string(vm.file("debugcon")).unwrap();
    assert!(said.starts_with("SeaBIOS (version "), "{said}");
    // It found the memory that it was given: 512 MiB, all below 4 GiB.
    assert!(said.contains("addr 0x0000000000000000 len 0x0000000020000000 [RAM]"), "{said}");
    vm.command(&["quit"]);
    let ended = vm.wait();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
}
