//! Processors put in and taken out by a user's commands, while a guest runs that starts them.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use integration::monitor::Monitor;
use integration::moving::unique;
use integration::{Vm, kvm, test_name};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use payloads::cpu_hotplug::come_and_go;
use payloads::{PASSED, Payload};
use serde_json::{Value, json};

/// A VM with a name, for the commands that want one.
struct Named {
    vm: Vm,
    name: String,
}

impl Named {
    fn run(payload: &Payload, cpus: &str) -> Self {
        let name = unique("cpus");
        let mut vm = Vm::payload(payload, &["--cpus", cpus, "--name", &name]);
        vm.debugcon_has("alone\n");
        Self { vm, name }
    }

    fn add(&self) -> Result<String, String> {
        self.vm.soc_vmm(&["add-cpu", &self.name]).map(|id| id.trim().to_owned())
    }

    fn remove(&self, id: &str) -> Result<String, String> {
        self.vm.soc_vmm(&["remove", &self.name, id])
    }

    fn cpus(&self) -> u64 {
        let status = self.vm.soc_vmm(&["status", &self.name, "--json"]).unwrap();
        serde_json::from_str::<Value>(&status).unwrap()["cpus"].as_u64().unwrap()
    }

    fn passes(self) -> String {
        let ended = self.vm.wait();
        let said = format!("{}{}", ended.debugcon, ended.stderr);
        assert_eq!(ended.status.code(), Some(PASSED), "{said}");
        ended.debugcon
    }
}

#[test]
fn processors_come_and_go_and_none_runs_that_is_not_there() {
    const ROUNDS: usize = 20;
    if !kvm(&test_name()) {
        return;
    }
    let mut vm = Named::run(&come_and_go(2 * ROUNDS as u32).unwrap(), "1,maxcpus=4,sockets=2");
    for round in 0..ROUNDS {
        assert_eq!((vm.add().unwrap(), vm.add().unwrap()), ("cpu1".into(), "cpu2".into()));
        assert_eq!(vm.cpus(), 3);
        let has_come = |id: u32| {
            let line = format!("vcpu {id:016x}\n");
            move |vm: &Vm| std::fs::read_to_string(vm.file("debugcon")).unwrap().matches(&line).count() == round + 1
        };
        // The second socket's first.
        vm.vm.wait_until("both run", |vm| has_come(1)(vm) && has_come(2)(vm));
        for id in ["cpu1", "cpu2"] {
            // The last one ends the payload, and with it the VM.
            let removed = vm.remove(id);
            assert!(removed.is_ok() || (round, id) == (ROUNDS - 1, "cpu2"), "{removed:?}");
        }
    }
    let said = vm.passes();
    assert_eq!(said.matches("gone ").count(), 2 * ROUNDS, "{said}");
}

#[test]
fn what_can_t_be_done_is_refused() {
    if !kvm(&test_name()) {
        return;
    }
    let vm = Named::run(&come_and_go(1).unwrap(), "1,maxcpus=2");
    let refused = |outcome: Result<String, String>, words: &str| {
        let why = outcome.unwrap_err();
        assert!(why.lines().count() == 1 && why.contains(words), "{why}");
    };
    refused(vm.remove("cpu0"), "it stays");
    refused(vm.remove("cpu1"), "'cpu1'");
    assert_eq!(vm.add().unwrap(), "cpu1");
    refused(vm.add(), "all 2 processors that this VM can have are there: --cpus N,maxcpus=M");
    let _ = vm.remove("cpu1");
    vm.passes();
}

#[test]
fn a_vm_whose_shim_dies_while_a_processor_is_put_in_is_lost() {
    if !kvm(&test_name()) {
        return;
    }
    let vm = Named::run(&come_and_go(1).unwrap(), "1,maxcpus=2");
    let task = format!("/proc/{0}/task/{0}/children", vm.vm.pid());
    let shim: i32 = std::fs::read_to_string(task).unwrap().trim().parse().unwrap();
    let signal = |signal| kill(Pid::from_raw(shim), signal).unwrap();
    signal(Signal::SIGSTOP);
    std::thread::scope(|scope| {
        let adds = scope.spawn(|| vm.add());
        // Until the shim is asked. Where that takes longer, the VM is lost all the same.
        std::thread::sleep(Duration::from_millis(300));
        signal(Signal::SIGKILL);
        let why = adds.join().unwrap().unwrap_err();
        assert_eq!(why.lines().count(), 1, "{why}");
    });
    let ended = vm.vm.wait();
    assert_eq!(ended.status.code(), Some(6), "{}", ended.stderr);
    assert!(ended.stderr.contains("the VM is lost") && ended.stderr.lines().count() == 1, "{}", ended.stderr);
}

/// The exchange of virsh setvcpus --live (libvirt 9.0), down and up.
#[test]
fn libvirt_puts_a_processor_in_and_takes_it_out() {
    if !kvm(&test_name()) {
        return;
    }
    let vm = Named::run(&come_and_go(3).unwrap(), "1,maxcpus=2,sockets=2");
    let mut monitor = Monitor::connect(&vm.vm.file("qmp"));
    let props = |socket: u32| json!({ "socket-id": socket, "core-id": 0, "thread-id": 0 });
    let first = "/machine/unattached/device[0]";
    let info = |index: u32, path: &str| json!({ "cpu-index": index, "qom-path": path, "props": props(index), "target": "x86_64" });
    let kind = "host-x86_64-cpu";
    // The threads that stand for vCPUs are told apart from the rest, and are soc-vmm's.
    let cpus = |monitor: &mut Monitor| {
        let mut all = monitor.does("query-cpus-fast", json!({}));
        let threads = all.as_array_mut().unwrap().iter_mut();
        let threads: BTreeSet<i64> =
            threads.map(|cpu| cpu.as_object_mut().unwrap().remove("thread-id").unwrap().as_i64().unwrap()).collect();
        assert_eq!(threads.len(), all.as_array().unwrap().len());
        let tasks = format!("/proc/{}/task", vm.vm.pid());
        assert!(threads.iter().all(|thread| Path::new(&format!("{tasks}/{thread}")).exists()));
        all
    };
    for _ in 0..2 {
        let place = |socket| json!({ "type": kind, "vcpus-count": 1, "props": props(socket) });
        let with = |mut place: Value, path: &str| {
            place["qom-path"] = path.into();
            place
        };
        let all = monitor.does("query-hotpluggable-cpus", json!({}));
        assert_eq!(all, json!([with(place(0), first), place(1)]));
        assert_eq!(cpus(&mut monitor), json!([info(0, first)]));

        let mut arguments = props(1);
        arguments["driver"] = kind.into();
        arguments["id"] = "vcpu1".into();
        assert_eq!(monitor.does("device_add", arguments.clone()), json!({}));
        let again = monitor.refuses("device_add", arguments);
        assert!(again.contains("socket 1"), "{again}");
        let added = "/machine/peripheral/vcpu1";
        let all = monitor.does("query-hotpluggable-cpus", json!({}));
        assert_eq!(all, json!([with(place(0), first), with(place(1), added)]));
        assert_eq!(cpus(&mut monitor), json!([info(0, first), info(1, added)]));
        let devices = monitor.does("qom-list", json!({ "path": "/machine/peripheral" }));
        let child = json!({ "name": "vcpu1", "type": format!("child<{kind}>") });
        assert!(devices.as_array().unwrap().contains(&child), "{devices}");

        assert_eq!(monitor.does("device_del", json!({ "id": "vcpu1" })), json!({}));
        assert_eq!(monitor.event("DEVICE_DELETED"), json!({ "device": "vcpu1", "path": added }));
    }
    assert_eq!(monitor.does("quit", json!({})), json!({}));
    assert_eq!(vm.vm.wait().status.code(), Some(0));
}

/// With vCPUs paused they are put in and taken out too: what the guest does about it, it does when it goes on.
#[test]
fn a_paused_guest_hears_of_it_when_it_goes_on() {
    if !kvm(&test_name()) {
        return;
    }
    let mut vm = Named::run(&come_and_go(1).unwrap(), "1,maxcpus=2");
    vm.vm.command(&["pause"]);
    assert_eq!(vm.add().unwrap(), "cpu1");
    vm.vm.command(&["resume"]);
    vm.vm.debugcon_has("vcpu 0000000000000001\n");
    let _ = vm.remove("cpu1");
    vm.passes();
}

/// A reset takes what the guest was asked for, and starts with what is there.
#[test]
fn a_reset_starts_with_the_processors_that_are_there_by_then() {
    if !kvm(&test_name()) {
        return;
    }
    let mut vm = Named::run(&come_and_go(1).unwrap(), "1,maxcpus=3");
    let mut monitor = Monitor::connect(&vm.vm.file("qmp"));
    assert_eq!((vm.add().unwrap(), vm.add().unwrap()), ("cpu1".into(), "cpu2".into()));
    vm.vm.debugcon_has("vcpu 0000000000000002\n");
    vm.vm.command(&["pause"]);
    assert_eq!(monitor.does("device_del", json!({ "id": "cpu1" })), json!({}));
    assert_eq!(vm.cpus(), 3);
    vm.vm.command(&["reset"]);
    assert_eq!(monitor.event("DEVICE_DELETED")["device"], "cpu1");
    assert_eq!(vm.cpus(), 2);
    vm.vm.command(&["quit"]);
    assert_eq!(vm.vm.wait().status.code(), Some(0));
}
