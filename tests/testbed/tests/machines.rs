//! The emulated machines come up, have what Outboard needs of them, and do what they are asked.

use std::time::{Duration, Instant};

use nix::sys::signal::kill;
use nix::unistd::Pid;
use testbed::card::{Card, HOST_HOST, HOST_VM, SOC_HOST, SOC_VM};
use testbed::fetch;
use testbed::machine::Machine;
use testbed::protocol::{PciId, Status};
use testbed::server::ServerConfig;
use testbed::soc::SocConfig;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn the_server_has_kvm_and_nothing_but_us() {
    if !testbed::machines_or_skip("the_server_has_kvm_and_nothing_but_us") {
        return;
    }
    let began = Instant::now();
    let mut config = ServerConfig::new("test-server");
    config.basics.files.push(("/bin/busybox".to_owned(), fetch::qemu().unwrap().busybox()));
    let server = config.start().unwrap();
    println!("up after {:.1} s", began.elapsed().as_secs_f64());

    let inventory = server.inventory().unwrap();
    assert!(inventory.kvm && inventory.nested_paging, "{inventory:?}");
    assert_eq!(inventory.cpu.count, 2);
    assert_eq!(inventory.hugepages, 512);
    assert!(inventory.memory_kib > 2_800_000, "{}", inventory.memory_kib);
    assert_eq!(inventory.nodes.len(), 1);
    assert!(inventory.pci.iter().all(|f| f.iommu_group.is_some()));
    let programs = server.programs().unwrap();
    assert_eq!(programs.len(), 1, "{programs:?}");

    programs_are_driven(&server);
    a_person_is_served(&server);
    leaves_nothing_behind_when_dropped(server);
}

fn leaves_nothing_behind_when_dropped(server: Machine) {
    let qemu = Pid::from_raw(i32::try_from(server.id()).unwrap());
    let socket = server.console().socket().to_path_buf();
    assert!(socket.exists());
    drop(server);
    assert!(kill(qemu, None).is_err());
    assert!(!socket.exists());
}

fn programs_are_driven(machine: &Machine) {
    let shell = |script: &str| machine.exec("/bin/busybox", &["sh", "-c", script], LIMIT).unwrap();
    let ended = shell("echo out; echo err >&2; exit 3");
    assert_eq!(ended.status, Status::Code(3));
    assert_eq!((&*ended.stdout, &*ended.stderr), ("out\n", "err\n"));

    let pid = machine.run("/bin/busybox", &["sh", "-c", "echo up; read x </dev/tty9"], None).unwrap();
    let line = machine.control().wait_for_output(pid, "up", LIMIT);
    assert_eq!(line.as_deref(), Some("up"));
}

fn a_person_is_served(machine: &Machine) {
    machine.console().send("busybox expr 6 + 36\n").unwrap();
    machine.wait_for_line("42", LIMIT).unwrap();
    machine.wait_for_line("Code(0)", LIMIT).unwrap();
    machine.console().send("no-such-word\n").unwrap();
    machine.wait_for_line("neither a word", LIMIT).unwrap();
}

fn ends_when_told(machine: Machine) {
    machine.power_off(LIMIT).unwrap();
}

#[test]
fn the_cards_functions_reach_vfio_on_both_sides() {
    if !testbed::machines_or_skip("the_cards_functions_reach_vfio_on_both_sides") {
        return;
    }
    const FUNCTIONS: u32 = 4;
    let card = Card::start(FUNCTIONS).unwrap();

    let mut server = ServerConfig::new("test-card-server");
    server.basics.cards = card.host_sockets();
    server.basics.bind = vec![HOST_VM, HOST_HOST];
    let server = server.start().unwrap();
    functions_are_isolated(&server, &[HOST_VM; FUNCTIONS as usize], HOST_HOST);
    ends_when_told(server);

    let mut soc = SocConfig::new("test-card-soc");
    soc.basics.cards = card.soc_sockets();
    soc.basics.bind = vec![SOC_VM, SOC_HOST];
    let soc = soc.start().unwrap();
    let inventory = soc.inventory().unwrap();
    assert_eq!(inventory.cpu.count, 2);
    assert!(inventory.cpu.flags.iter().any(|flag| flag == "asimd"));
    functions_are_isolated(&soc, &[SOC_VM; FUNCTIONS as usize], SOC_HOST);
    ends_when_told(soc);
}

/// The card's functions are there in the order of their slots, held by vfio-pci, each in an IOMMU group of its own.
fn functions_are_isolated(machine: &Machine, vms: &[PciId], host: PciId) {
    let pci = machine.inventory().unwrap().pci;
    let functions: Vec<_> = pci.iter().filter(|function| function.id.vendor == host.vendor).collect();
    let ids: Vec<PciId> = functions.iter().map(|function| function.id).collect();
    assert_eq!(ids, [vms, &[host]].concat());
    for function in functions {
        assert_eq!(function.driver.as_deref(), Some("vfio-pci"), "{function:?}");
        let group = function.iommu_group;
        assert!(group.is_some(), "{function:?}");
        let members = pci.iter().filter(|other| other.iommu_group == group);
        assert_eq!(members.count(), 1, "{pci:?}");
    }
}
