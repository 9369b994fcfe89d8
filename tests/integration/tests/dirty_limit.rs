//! vCPUs with dirty rings: how fast each writes is measured, and limited, also so that a guest can move that writes faster than its pages do.

use std::time::Duration;

use integration::hostile::is_listened_on;
use integration::monitor::Monitor;
use integration::{Vm, kvm, test_name};
use payloads::scribe::Scribe;
use serde_json::{Value, json};
use tempfile::TempDir;

const RINGS: &[&str] = &["--dirty-ring", "1024"];
const SCRIBE: Scribe = Scribe { vcpus: 2, pages: 4096, pace: 0 };

/// A guest that writes 32 MiB again and again, and its monitor.
fn writing(more: &[&str]) -> (Vm, Monitor) {
    let mut vm = Vm::payload(&SCRIBE.payload().unwrap(), more);
    vm.debugcon_has("scribe");
    let qmp = Monitor::connect(&vm.file("qmp"));
    (vm, qmp)
}

/// A VM that waits for the guest of `here`, and where.
fn waiting(here: &mut Vm, dir: &TempDir, more: &[&str]) -> (Vm, String) {
    let door = dir.path().join("there");
    let uri = format!("unix:{}", door.display());
    let there = Vm::payload(&SCRIBE.payload().unwrap(), &[more, &["--incoming", &uri]].concat());
    here.wait_until("it waits", |_| is_listened_on(&door));
    (there, uri)
}

/// Asks until it is so.
fn until(qmp: &mut Monitor, query: &str, mut is_so: impl FnMut(&Value) -> bool) -> Value {
    loop {
        let told = qmp.does(query, json!({}));
        if is_so(&told) {
            return told;
        }
        std::thread::sleep(Duration::from_millis(120));
    }
}

/// The guest looks whether its memory is what it wrote.
fn passes(vm: Vm) {
    vm.command(&["powerdown"]);
    let ended = vm.wait();
    assert!(ended.debugcon.contains("passes"), "{} {}", ended.debugcon, ended.stderr);
}

#[test]
fn a_vcpu_writes_as_fast_as_it_may_and_the_others_as_fast_as_they_can() {
    if !kvm(&test_name()) {
        return;
    }
    let (vm, mut qmp) = writing(RINGS);
    assert_eq!(qmp.does("query-vcpu-dirty-limit", json!({})), json!([]));
    qmp.does("set-vcpu-dirty-limit", json!({ "cpu-index": 1, "dirty-rate": 2 }));
    let told = until(&mut qmp, "query-vcpu-dirty-limit", |told| told[0]["current-rate"] == 2);
    assert_eq!(told, json!([{ "cpu-index": 1, "limit-rate": 2, "current-rate": 2 }]));
    // What each writes, while the limit is in force.
    qmp.does("calc-dirty-rate", json!({ "calc-time": 1, "mode": "dirty-ring" }));
    let rate = until(&mut qmp, "query-dirty-rate", |rate| rate["status"] == "measured");
    let of = |vcpu: usize| rate["vcpu-dirty-rate"][vcpu]["dirty-rate"].as_u64().unwrap();
    assert_eq!((&rate["mode"], &rate["vcpu-dirty-rate"][1]["id"]), (&"dirty-ring".into(), &1.into()));
    assert!(rate["dirty-rate"].as_u64().unwrap().abs_diff(of(0) + of(1)) <= 1, "{rate}");
    // Beside its 2 MiB a ring, 4 MiB, at each of the two looks.
    assert!(of(1) <= 2 + 2 * 4, "{rate}");

    for (bad, why) in [
        (json!({ "cpu-index": 2, "dirty-rate": 1 }), "'cpu-index' 2 is no vCPU's: they are 0 to 1"),
        (json!({ "cpu-index": -1, "dirty-rate": 1 }), "'cpu-index' -1"),
        (json!({ "dirty-rate": u64::MAX }), "'dirty-rate' is out of its range"),
    ] {
        let refused = qmp.refuses("set-vcpu-dirty-limit", bad);
        assert!(refused.contains(why), "{refused}");
    }
    qmp.does("set-vcpu-dirty-limit", json!({ "dirty-rate": 5 }));
    let told = qmp.does("query-vcpu-dirty-limit", json!({}));
    assert_eq!((&told[0]["limit-rate"], &told[1]["limit-rate"]), (&5.into(), &5.into()));
    qmp.does("cancel-vcpu-dirty-limit", json!({ "cpu-index": 1 }));
    let told = qmp.does("query-vcpu-dirty-limit", json!({}));
    assert_eq!((told.as_array().unwrap().len(), &told[0]["cpu-index"]), (1, &0.into()));
    qmp.does("cancel-vcpu-dirty-limit", json!({}));
    assert_eq!(qmp.does("query-vcpu-dirty-limit", json!({})), json!([]));
    passes(vm);
}

#[test]
fn a_guest_that_writes_too_fast_moves_once_its_vcpus_are_limited() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (mut here, mut qmp) = writing(RINGS);
    let (there, uri) = waiting(&mut here, &dir, &["--dirty-ring", "4096"]);

    let set = |capability: &str, state: bool| json!({ "capability": capability, "state": state });
    let both = json!({ "capabilities": [set("dirty-limit", true), set("auto-converge", true)] });
    let refused = qmp.refuses("migrate-set-capabilities", both);
    assert!(refused.contains("auto_converge slows the guest as well"), "{refused}");
    let on = json!({ "capabilities": [set("dirty-limit", true), set("return-path", true)] });
    qmp.does("migrate-set-capabilities", on);
    assert!(qmp.refuses("migrate-set-parameters", json!({ "vcpu-dirty-limit": 0 })).contains("vcpu-dirty-limit"));
    // All that it writes in a round takes two seconds, and what its vCPUs may write less than one.
    let slow = json!({ "max-bandwidth": 16 << 20, "avail-switchover-bandwidth": 16 << 20, "downtime-limit": 1 });
    qmp.does("migrate-set-parameters", slow);
    qmp.does("migrate", json!({ "uri": uri }));
    let is_slowed = |told: &Value| told["dirty-limit-throttle-time-per-round"].as_u64().is_some_and(|time| time > 0);
    let told = until(&mut qmp, "query-migrate", is_slowed);
    assert!(told["dirty-limit-ring-full-time"].as_u64() > Some(0), "{told}");
    assert!(told["cpu-throttle-percentage"].is_null(), "{told}");
    let refused = qmp.refuses("set-vcpu-dirty-limit", json!({ "dirty-rate": 100 }));
    assert!(refused.contains("a migration limits the guest's vCPUs"), "{refused}");
    assert_eq!(qmp.does("query-vcpu-dirty-limit", json!({}))[1]["limit-rate"], 1);

    qmp.does("migrate-set-parameters", json!({ "downtime-limit": 900 }));
    assert_eq!(here.wait().status.code(), Some(0));
    // Nobody limits it here.
    let mut theirs = Monitor::connect(&there.file("qmp"));
    assert_eq!(theirs.does("query-vcpu-dirty-limit", json!({})), json!([]));
    passes(there);
}

#[test]
fn the_command_limits_them_too() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (mut here, _qmp) = writing(RINGS);
    let (there, uri) = waiting(&mut here, &dir, &[]);
    let slow = ["--bandwidth", "16M", "--connections", "1", "--downtime", "900", "--dirty-limit", "1"];
    let told = here.command(&[&["migrate"], &slow[..], &[&uri]].concat());
    assert!(told.contains("vCPUs limited"), "{told}");
    assert_eq!(here.wait().status.code(), Some(0));
    passes(there);
}

#[test]
fn a_move_that_is_cancelled_leaves_limits_as_they_were() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (mut here, mut qmp) = writing(RINGS);
    let (_there, uri) = waiting(&mut here, &dir, &[]);
    let on = json!([{ "capability": "dirty-limit", "state": true }, { "capability": "return-path", "state": true }]);
    qmp.does("migrate-set-capabilities", json!({ "capabilities": on }));
    qmp.does("migrate-set-parameters", json!({ "max-bandwidth": 16 << 20, "downtime-limit": 1 }));
    qmp.does("set-vcpu-dirty-limit", json!({ "cpu-index": 1, "dirty-rate": 300 }));
    qmp.does("migrate", json!({ "uri": uri }));
    until(&mut qmp, "query-vcpu-dirty-limit", |told| told.as_array().is_some_and(|told| told.len() == 2));
    qmp.does("migrate_cancel", json!({}));
    until(&mut qmp, "query-migrate", |told| told["status"] == "cancelled");
    let told = qmp.does("query-vcpu-dirty-limit", json!({}));
    assert_eq!(
        (told.as_array().unwrap().len(), &told[0]["cpu-index"], &told[0]["limit-rate"]),
        (1, &1.into(), &300.into())
    );
    passes(here);
}

#[test]
fn a_guest_that_is_kept_in_a_file_gets_no_limit_by_that() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (here, mut qmp) = writing(RINGS);
    let on = json!([{ "capability": "dirty-limit", "state": true }]);
    qmp.does("migrate-set-capabilities", json!({ "capabilities": on }));
    qmp.does("x-outboard-save", json!({ "file": dir.path().join("kept"), "then": "run" }));
    // What is said of moves is said of the next one.
    let said = json!({ "throttle-trigger-threshold": 1, "downtime-limit": 0, "max-bandwidth": 10 << 20 });
    qmp.does("migrate-set-parameters", said);
    until(&mut qmp, "query-migrate", |told| told["status"] == "completed");
    assert_eq!(qmp.does("query-vcpu-dirty-limit", json!({})), json!([]));
    passes(here);
}

#[test]
fn without_rings_limits_are_refused_by_name() {
    if !kvm(&test_name()) {
        return;
    }
    let (vm, mut qmp) = writing(&[]);
    let limit = json!([{ "capability": "dirty-limit", "state": true }]);
    for refused in [
        qmp.refuses("migrate-set-capabilities", json!({ "capabilities": limit })),
        qmp.refuses("set-vcpu-dirty-limit", json!({ "dirty-rate": 1 })),
        qmp.refuses("query-vcpu-dirty-limit", json!({})),
    ] {
        assert!(refused.contains("--dirty-ring 4096"), "{refused}");
    }
    passes(vm);
}
