//! A function through VFIO inside the emulated machines, without a VM: everything that a function does, and what is refused.

use std::time::Duration;

use pcie_function::SocFunction;
use testbed::build;
use testbed::card::{Card, HOST_VM, SOC_VM};
use testbed::fetch::Arch;
use testbed::machine::Machine;
use testbed::protocol::{PciId, Status};
use testbed::server::ServerConfig;
use testbed::soc::SocConfig;

const LIMIT: Duration = Duration::from_secs(60);
const PROBE: &str = "/bin/function-probe";

/// A server with the card's vm functions in slots of their own, and the probe.
fn server(name: &str, card: &Card, plugged: u32) -> ServerConfig {
    let mut server = ServerConfig::new(name);
    server.basics.cards = (0..plugged).map(|function| card.host_socket(function)).collect();
    server.basics.bind = vec![HOST_VM];
    let probe = build::programs(Arch::Amd64, &["function-probe"]).unwrap().remove(0);
    server.basics.files.push((PROBE.to_owned(), probe));
    server
}

/// Addresses of the functions of one kind, in the order of their slots.
fn addresses(machine: &Machine, id: PciId) -> Vec<String> {
    let pci = machine.inventory().unwrap().pci;
    pci.into_iter().filter(|function| function.id == id).map(|function| function.address).collect()
}

#[test]
fn the_host_side_does_all_that_a_function_does() {
    if !testbed::machines_or_skip("the_host_side_does_all_that_a_function_does") {
        return;
    }
    let card = Card::start(1).unwrap();
    let server = server("test-vfio-host", &card, 1).start().unwrap();
    let address = addresses(&server, HOST_VM).remove(0);

    let probe = server.run(PROBE, &["host", &address], None).unwrap();
    assert!(server.control().wait_for_output(probe, "offered", LIMIT).is_some());
    let function = pcie_function_card::open(&card.soc_socket(0)).unwrap();
    let report = function_probe::soc::check(&function).unwrap();
    println!("{report:?}");
    assert_eq!(report.vectors, 128);
    let guest_end = 1 << 37;
    assert!(
        report.header.inbox > guest_end && report.header.outbox > guest_end,
        "the mailbox is among guest addresses"
    );
    assert_eq!(server.wait_for_exit(probe, LIMIT).unwrap(), Status::Code(0));

    // Whoever opens it next finds a function that was reset: the generation of before is stale.
    let next = server.run(PROBE, &["watch", &address], None).unwrap();
    assert!(server.control().wait_for_output(next, "watching", LIMIT).is_some());
    assert!(function.check().is_err());
    let busy = server.exec(PROBE, &["host", &address], LIMIT).unwrap();
    assert_eq!(busy.status, Status::Code(1));
    assert_eq!(busy.stderr, format!("PCI {address} is in use: another program has its IOMMU group open\n"));
    server.power_off(LIMIT).unwrap();
}

#[test]
fn both_sides_are_reached_through_vfio() {
    if !testbed::machines_or_skip("both_sides_are_reached_through_vfio") {
        return;
    }
    let card = Card::start(1).unwrap();
    let server = server("test-vfio-both", &card, 1).start().unwrap();
    let mut soc = SocConfig::new("test-vfio-soc");
    soc.basics.cards = vec![card.soc_socket(0)];
    soc.basics.bind = vec![SOC_VM];
    let probe = build::programs(Arch::Arm64, &["function-probe"]).unwrap().remove(0);
    soc.basics.files.push((PROBE.to_owned(), probe));
    let soc = soc.start().unwrap();

    let host = server.run(PROBE, &["host", &addresses(&server, HOST_VM)[0]], None).unwrap();
    let ended = soc.exec(PROBE, &["soc", &addresses(&soc, SOC_VM)[0]], LIMIT).unwrap();
    println!("{}", ended.stdout);
    assert_eq!((ended.status, &*ended.stderr), (Status::Code(0), ""));
    assert_eq!(server.wait_for_exit(host, LIMIT).unwrap(), Status::Code(0));
    soc.power_off(LIMIT).unwrap();
    server.power_off(LIMIT).unwrap();
}

#[test]
fn a_function_that_is_reset_cut_off_removed_or_recalled_says_so() {
    if !testbed::machines_or_skip("a_function_that_is_reset_cut_off_removed_or_recalled_says_so") {
        return;
    }
    let card = Card::start(4).unwrap();
    let server = server("test-vfio-lost", &card, 4).start().unwrap();
    let addresses = addresses(&server, HOST_VM);
    let watch = |address: &String| {
        let probe = server.run(PROBE, &["watch", address], None).unwrap();
        assert!(server.control().wait_for_output(probe, "watching", LIMIT).is_some());
        probe
    };
    let probes: Vec<i32> = addresses.iter().map(watch).collect();
    for order in ["reset 0", "link 1 down", "remove 2"] {
        assert_eq!(card.control(order).unwrap(), "ok");
    }
    // Returns once the function was given back.
    server.write(&format!("/sys/bus/pci/devices/{}/driver/unbind", addresses[3]), &addresses[3]).unwrap();
    for (probe, says) in probes.iter().zip(["was reset", "is gone", "is gone", "as was told"]) {
        assert!(
            server.control().wait_for_output(*probe, says, LIMIT).is_some(),
            "{:?}",
            server.control().output(*probe)
        );
    }
    // Not those behind a dead link: the kernel resets a function when it is closed, and waits a minute and more for its answer.
    for probe in [probes[0], probes[3]] {
        assert_eq!(server.wait_for_exit(probe, LIMIT).unwrap(), Status::Code(0));
    }
}

#[test]
fn a_shared_group_an_unbound_and_an_absent_function_are_refused() {
    if !testbed::machines_or_skip("a_shared_group_an_unbound_and_an_absent_function_are_refused") {
        return;
    }
    let card = Card::start(3).unwrap();
    let mut config = server("test-vfio-refused", &card, 1);
    // Two functions in one slot.
    config.basics.qemu_args = vec!["-device".into(), "pcie-root-port,id=both,bus=pcie.0,chassis=20,slot=20".into()];
    for (place, function) in [("0.0", 1), ("0.1", 2)] {
        let device = format!(
            r#"{{"driver":"vfio-user-pci","bus":"both","addr":"{place}","multifunction":true,"socket":{{"type":"unix","path":"{}"}}}}"#,
            card.host_socket(function).display()
        );
        config.basics.qemu_args.extend(["-device".into(), device]);
    }
    let server = config.start().unwrap();
    let found = addresses(&server, HOST_VM);
    let [alone, first, second] = &found[..] else { panic!("{found:?}") };
    let refused = |address: &str| {
        let ended = server.exec(PROBE, &["host", address], LIMIT).unwrap();
        assert_eq!(ended.status, Status::Code(1), "{ended:?}");
        ended.stderr
    };
    let shared = refused(first);
    assert!(shared.contains("shares IOMMU group") && shared.contains(&format!("with {second}; put it")), "{shared}");
    server.write(&format!("/sys/bus/pci/devices/{alone}/driver/unbind"), alone).unwrap();
    let unbound = refused(alone);
    assert!(unbound.contains("is not bound to vfio-pci (no driver holds it)"), "{unbound}");
    assert!(refused("0000:7f:00.0").contains("isn't there"));
    server.power_off(LIMIT).unwrap();
}
