//! A card that misbehaves, and sides that are killed, under guests of an emulated server.

use std::process::Command;

use api_channel::call::{Call, Irqfd, VCPU_ALL, VmCreated};
use integration::hostile::{Running, is_listened_on, one_line};
use integration::machines::{MOST, Server, Watched, but_for_the_emulator};
use integration::soc::{Shape, resampled};
use integration::{program, test_name};
use nix::sys::signal::Signal;
use payloads::interrupts::{self, LEVEL_ENTRIES, LEVEL_LINE, LEVEL_ROUNDS};
use payloads::{EXIT_PASS, PASSED, Payload, Privilege, watch};
use testbed::protocol::Status;

/// The shim's, when its function is lost.
const UNUSABLE: Status = Status::Code(4);

/// Each trial takes a function of its own.
mod function {
    pub(crate) const SLOWED: u32 = 0;
    pub(crate) const UNLINKED: u32 = 1;
    pub(crate) const REMOVED: u32 = 2;
    pub(crate) const KILLED: u32 = 3;
    pub(crate) const INTERRUPTED: u32 = 4;
    pub(crate) const COUNT: u32 = 5;
}

#[test]
fn faults_of_the_card_and_killed_sides() {
    but_for_the_emulator(faults);
}

fn faults() {
    if !testbed::machines_or_skip(&test_name()) {
        return;
    }
    let mut server = Server::start("machine-faults", function::COUNT);
    let free = free_huge_pages(&server);
    // First: the host's kernel waits for a minute for a function that is gone before it lets the shim's process end.
    a_removed_function_ends_both_sides(&server);
    level_lines_end_when_they_are_low(&server);
    signals_that_are_lost_late_or_doubled_end_nothing(&mut server);
    a_lost_link_ends_both_sides(&mut server);
    a_killed_soc_vmm_leaves_its_vm_held(&mut server);
    a_killed_shim_ends_its_vm(&mut server);
    a_pool_gives_a_function_to_one_vm_after_the_other(&mut server);
    assert_eq!(server.shim_ends(function::REMOVED), UNUSABLE);
    server.wait_until("every VM's memory is given back", || free_huge_pages(&server) == free);
    assert!(server.trial.processes().is_empty());
}

fn watched(function: u32) -> Payload {
    watch::watch(Watched::seed(function)).unwrap()
}

/// A VM that has shown that it runs.
fn running(server: &Server, function: u32) -> Running {
    let vm = server.vm(function, &watched(function), &[]);
    server.becomes(function, "running");
    Watched::new(function).goes_on(server);
    vm
}

/// A VM runs to its end on the function.
fn serves(server: &Server, function: u32) {
    let ended = server.vm(function, &payloads::pio::pio(Privilege::Cpl0).unwrap(), &[]).wait(MOST);
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(PASSED), ""), "{}", server.console(function));
}

fn ends(server: &Server, mut vm: Running) {
    vm.signal(Signal::SIGTERM);
    let ended = vm.wait(MOST);
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
    drop(vm);
    assert!(server.trial.processes().is_empty());
}

fn free_huge_pages(server: &Server) -> u64 {
    let meminfo = server.bed.server.read("/proc/meminfo").unwrap();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("HugePages_Free:")).expect("a count");
    line.trim().parse().unwrap()
}

/// On a processor's own APIC no interrupt comes for a line that fell: by soc-vmm's line changes, and by a vector with resample.
fn level_lines_end_when_they_are_low(server: &Server) {
    let payload = interrupts::level().unwrap();
    let ended = server.vm(function::INTERRUPTED, &payload, &[]).wait(MOST);
    let console = server.console(function::INTERRUPTED);
    assert_eq!(ended.status.code(), Some(PASSED), "{console}{}", ended.stderr);
    assert_eq!(interrupts::parse_surplus(&console), Some(0));

    let mut soc = server.soc(function::INTERRUPTED);
    let created = soc.create(&Shape { memory: 4 << 20, ..Shape::of(&payload) });
    assert_ne!(created.features & VmCreated::RESAMPLE, 0, "this KVM has no irqfd with resample");
    soc.load(&payload);
    let (vector, gsi) = (created.free_vector, u32::from(LEVEL_LINE));
    soc.ok(&Call::Irqfd(Irqfd { vector, gsi, on: 1, resample: 1 }));
    soc.ok(&Call::Run(VCPU_ALL));
    let (board, notices) = resampled(&mut soc, vector);
    assert_eq!(board.exit, Some(EXIT_PASS), "{}", board.console);
    assert_eq!(interrupts::parse_surplus(&board.console), Some(0));
    // The very last one's may have come too late.
    let ends = LEVEL_ROUNDS * LEVEL_ENTRIES;
    assert!((ends - 1..=ends).contains(&notices), "{notices} notices of {ends} ends");
    soc.ok(&Call::DestroyVm);
}

/// The VM goes on, if only slowly, and no exit is lost or served twice. A transfer that arrives in part is the end, typed.
fn signals_that_are_lost_late_or_doubled_end_nothing(server: &mut Server) {
    const F: u32 = function::SLOWED;
    let mut vm = running(server, F);
    let name = Server::name(F);
    let late = |server: &Server| server.counters(F).get("host.shim.sleep_late");
    let before_all = late(server);
    for (order, counted) in [
        ("doorbell 0 drop", Some("doorbells_dropped")),
        ("doorbell 0 delay 200", None),
        ("doorbell 0 double", None),
        ("doorbell 0 normal", None),
        ("vector 0 drop", Some("vectors_lost")),
        ("vector 0 normal", None),
        ("dma 0 slow 2000", None),
        ("dma 0 split 5", None),
        ("dma 0 normal", None),
    ] {
        let count = |name| server.stat(F, name);
        let before = counted.map(count);
        server.card(order);
        let exits = server.trial.exits(&name);
        server.wait_until(&format!("the guest goes on with {order:?}"), || server.trial.exits(&name) >= exits + 10);
        if let Some(name) = counted {
            server.wait_until(&format!("{order:?} shows"), || Some(count(name)) > before);
        }
    }
    Watched::new(F).goes_on(server);
    server.counters(F).agree();
    assert!(late(server) > before_all, "no sleep ended without its vector");

    server.card("dma 0 torn");
    one_line("torn transfers", &vm.wait(MOST), 6, &["the VM is lost"]);
    server.card("dma 0 normal");
    frees_what_is_held(server, F);
    let mut vm = running(server, F);
    server.card("dma 0 fault");
    one_line("faults of DMA", &vm.wait(MOST), 6, &["the VM is lost"]);
    server.card("dma 0 normal");
    frees_what_is_held(server, F);
}

/// A link that comes back carries VMs again, by a new shim.
fn a_lost_link_ends_both_sides(server: &mut Server) {
    const F: u32 = function::UNLINKED;
    for lose in ["link 1 down", "reset 1"] {
        let mut vm = running(server, F);
        server.card(lose);
        one_line(lose, &vm.wait(MOST), 6, &["the VM is lost"]);
        server.shim_says(F, "ends with it");
        if lose.starts_with("link") {
            let refused = server.vm(F, &watched(F), &[]).wait(MOST);
            one_line("a function without a link", &refused, 4, &["the function is gone"]);
            server.card("link 1 up");
        }
        assert_eq!(server.shim_ends(F), UNUSABLE);
        server.shim_says(F, "the function");
        server.start_shim(F, &[]);
        serves(server, F);
    }
}

fn a_removed_function_ends_both_sides(server: &Server) {
    const F: u32 = function::REMOVED;
    let mut vm = running(server, F);
    server.card("remove 2");
    one_line("a removed function", &vm.wait(MOST), 6, &["the VM is lost"]);
    server.shim_says(F, "ends with it");
    let refused = server.vm(F, &watched(F), &[]).wait(MOST);
    one_line("a function that is gone", &refused, 4, &[]);
}

fn a_killed_soc_vmm_leaves_its_vm_held(server: &mut Server) {
    const F: u32 = function::KILLED;
    let mut vm = running(server, F);
    vm.signal(Signal::SIGKILL);
    vm.wait(MOST);
    frees_what_is_held(server, F);
    let vm = running(server, F);
    ends(server, vm);
}

/// A VM whose soc-vmm is gone is held: its function runs no other until its shim was started anew.
fn frees_what_is_held(server: &mut Server, function: u32) {
    let refused = server.vm(function, &watched(function), &[]).wait(MOST);
    one_line("a held function", &refused, 4, &["is held here", "restart this function's host-kvm-shim"]);
    assert!(server.shim_runs(function));
    server.kill_shim(function);
    server.start_shim(function, &[]);
    serves(server, function);
}

fn a_killed_shim_ends_its_vm(server: &mut Server) {
    const F: u32 = function::KILLED;
    let mut vm = running(server, F);
    server.kill_shim(F);
    one_line("a killed shim", &vm.wait(MOST), 6, &["the VM is lost"]);
    server.wait_until("its mappings are gone", || server.stat(F, "host_mapped_bytes") == 0);
    server.start_shim(F, &[]);
    serves(server, F);
}

/// Functions of a card by the pool. What a killed VM left on one keeps that one from the next VM, which gets the other.
fn a_pool_gives_a_function_to_one_vm_after_the_other(server: &mut Server) {
    let functions = [function::KILLED, function::INTERRUPTED];
    for function in functions {
        server.kill_shim(function);
        let lease: &[&str] = if function == functions[0] { &[] } else { &["--lease", "0"] };
        server.start_shim(function, lease);
    }
    let specs = functions.map(|function| format!("{:?}", server.spec(function))).join(", ");
    let text = format!("[pool]\nsocket = {:?}\nfunctions = [{specs}]\n", server.trial.at("pool/socket"));
    let configuration = server.trial.file("soc-vmm.toml", text.as_bytes());
    let soc_vmm = |server: &Server, args: &[&str]| {
        let mut command = Command::new(program("soc-vmm"));
        server.trial.start(command.env("OUTBOARD_CONFIG", &configuration).args(args))
    };
    let vm = |server: &Server, name: &str, payload: &Payload| {
        let (option, bytes) = payload.file();
        let image = server.trial.file(&format!("{name}.image"), &bytes);
        let [qmp, debugcon] = [("unix", "qmp"), ("file", "debugcon")]
            .map(|(kind, end)| format!("{kind}:{}", server.trial.at(&format!("{name}.{end}"))));
        let machine = ["run", option, &image, "--memory", "64M,hugepages=2M", "--serial", "null", "--debug-exit"];
        let ends = ["--function", "pool", "--name", &server.trial.name(name), "--qmp", &qmp, "--debugcon", &debugcon];
        soc_vmm(server, &[&machine[..], &ends].concat())
    };
    let short = payloads::pio::pio(Privilege::Cpl0).unwrap();
    let serves = |server: &Server| {
        let ended = vm(server, "short", &short).wait(MOST);
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(PASSED), ""));
    };
    let mut pool = soc_vmm(server, &["pool", "serve"]);
    server.wait_until("the pool listens", || is_listened_on(&server.trial.path("pool/socket")));
    // The first one by its place in the list, and again once the pool has seen that it is free.
    (0..2).for_each(|_| serves(server));

    let [mut first, mut second] = ["first", "second"].map(|name| {
        let running = vm(server, name, &watched(0));
        server.trial.becomes(name, "running");
        running
    });
    let refused = vm(server, "third", &short).wait(MOST);
    one_line("a pool with nothing left", &refused, 4, &["none of 2 functions is free", &server.trial.name("second")]);
    first.signal(Signal::SIGKILL);
    first.wait(MOST);
    let held = vm(server, "fourth", &short).wait(MOST);
    one_line("a function that holds a VM", &held, 4, &["is held here", "restart this function's host-kvm-shim"]);
    second.signal(Signal::SIGKILL);
    second.wait(MOST);
    serves(server);
    pool.signal(Signal::SIGTERM);
    assert_eq!(pool.wait(MOST).status.code(), Some(0));
    server.kill_shim(functions[0]);
    server.start_shim(functions[0], &[]);
}
