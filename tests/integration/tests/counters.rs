//! What the shim counts of a guest's exits is what arrived, and what KVM counts.

use integration::soc::{Board, Shape, Soc};
use integration::{Vm, kvm, test_name};
use ioreq_ring::Kind;
use payloads::counter::{self, Each};
use payloads::{Privilege, hot, ports};
use serde_json::Value;

#[test]
fn exits_are_counted_as_they_arrive_and_as_kvm_counts_them() {
    if !kvm(&test_name()) {
        return;
    }
    let payload = counter::counter(Privilege::Cpl0, Each::PageSplit).unwrap();
    let mut soc = Soc::start(&[]);
    soc.create(&Shape::of(&payload));
    soc.load(&payload);
    soc.run();
    let mut board = Board::default();
    let [mut ports, mut memory, mut second_halves] = [0; 3];
    let mut count = |seen: &integration::soc::Seen| match seen.request.kind {
        Kind::PIO => ports += 1,
        Kind::MMIO => {
            memory += 1;
            second_halves += u64::from(seen.request.length == 5);
        }
        other => panic!("{other:?}"),
    };
    for _ in 0..2000 {
        let seen = soc.take();
        count(&seen);
        let answer = board.serve(&seen);
        soc.answer(&seen, answer);
    }
    soc.pause(|seen| {
        count(seen);
        board.serve(seen)
    });
    assert!(ports > 0 && second_halves > 0);
    assert_eq!((soc.counter("shim.pio"), soc.counter("shim.mmio")), (ports, memory));
    assert_eq!(
        soc.counter("mmio_exits"),
        memory - second_halves,
        "KVM counts an access once, whatever it is split into"
    );
    assert_eq!(soc.counter("shim.posted"), 0);
    assert!(soc.shut_down().unwrap().success());
}

#[test]
fn soc_vmm_and_its_host_count_the_same() {
    if !kvm(&test_name()) {
        return;
    }
    let mut vm = Vm::payload(&hot::read_port(Privilege::Cpl0, ports::ECHO, 500, u32::MAX).unwrap(), &[]);
    vm.debugcon_has("count ");
    vm.command(&["pause"]);
    let status: Value = serde_json::from_str(&vm.command(&["status", "--json"])).unwrap();
    let counter = |name: &str| status["counters"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {status}"));
    assert!(counter("exits.pio") > 500);
    assert_eq!(counter("exits.pio") + counter("exits.posted"), counter("host.shim.pio"));
    assert_eq!(counter("exits.posted"), counter("host.shim.posted"));
    assert_eq!(counter("exits.mmio"), counter("host.shim.mmio"));
    assert_eq!(counter("exits.unclaimed"), counter("host.shim.unclaimed"));
    vm.command(&["quit"]);
    assert_eq!(vm.wait().status.code(), Some(0));
}
