//! How fast a guest writes its memory is measured while it runs.

use std::time::Duration;

use integration::hostile::is_listened_on;
use integration::monitor::Monitor;
use integration::{Vm, kvm, test_name};
use payloads::scribe::Scribe;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A guest that writes some ten megabytes again and again, and its monitor.
fn writing(more: &[&str]) -> (Vm, Monitor) {
    let scribe = Scribe { vcpus: 2, pages: 2048, pace: 0 };
    let mut vm = Vm::payload(&scribe.payload().unwrap(), more);
    vm.debugcon_has("scribe");
    let qmp = Monitor::connect(&vm.file("qmp"));
    (vm, qmp)
}

fn calc(milliseconds: u64, mode: &str) -> Value {
    json!({ "calc-time": milliseconds, "calc-time-unit": "millisecond", "mode": mode })
}

fn rate(qmp: &mut Monitor) -> Value {
    qmp.does("query-dirty-rate", json!({ "calc-time-unit": "millisecond" }))
}

/// What it comes to.
fn measured(qmp: &mut Monitor) -> Value {
    loop {
        let rate = rate(qmp);
        if rate["status"] != "measuring" {
            assert_eq!(rate["status"], "measured", "{rate}");
            return rate;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn both_ways_find_what_a_guest_writes() {
    if !kvm(&test_name()) {
        return;
    }
    let (_vm, mut qmp) = writing(&[]);
    assert_eq!(qmp.does("query-dirty-rate", json!({}))["status"], "unstarted");
    for (mode, most) in [("dirty-bitmap", 17.0), ("page-sampling", 24.0)] {
        // Long enough to be asked meanwhile, and for the guest to write, on a busy machine too.
        qmp.does("calc-dirty-rate", calc(3000, mode));
        let refused = qmp.refuses("calc-dirty-rate", calc(3000, mode));
        assert!(refused.contains("just being measured"), "{refused}");
        let rate = measured(&mut qmp);
        assert_eq!(rate["mode"], mode);
        // In that time each of its 16 MiB is written at least once if it writes at all fast, and counts once.
        let (seconds, of_second) = (rate["calc-time"].as_f64().unwrap() / 1000.0, rate["dirty-rate"].as_f64().unwrap());
        let mib = seconds * of_second;
        assert!(seconds >= 3.0 && (1.0..most + seconds).contains(&mib), "{mib} MiB: {rate}");
    }
    // One that stands still writes nothing.
    qmp.does("stop", json!({}));
    for mode in ["dirty-bitmap", "page-sampling"] {
        qmp.does("calc-dirty-rate", calc(100, mode));
        assert_eq!(measured(&mut qmp)["dirty-rate"], 0, "{mode}");
    }
    let refused = qmp.refuses("calc-dirty-rate", calc(100, "dirty-ring"));
    assert!(refused.contains("logs dirty pages by bitmap") && refused.contains("--dirty-ring"), "{refused}");
}

#[test]
fn a_move_takes_the_log_and_a_measurement_by_samples_goes_on_beside_it() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (mut here, mut qmp) = writing(&[]);
    let uri = format!("unix:{}", dir.path().join("there").display());
    let there = Vm::payload(&Scribe { vcpus: 2, pages: 2048, pace: 0 }.payload().unwrap(), &["--incoming", &uri]);
    here.wait_until("it waits", |_| is_listened_on(&dir.path().join("there")));
    let mut theirs = Monitor::connect(&there.file("qmp"));
    assert!(theirs.refuses("calc-dirty-rate", calc(100, "page-sampling")).contains("waiting for an incoming"));

    // The move doesn't wait for that minute, and nor does what has been seen get lost.
    qmp.does("calc-dirty-rate", calc(60_000, "dirty-bitmap"));
    qmp.does("migrate-set-parameters", json!({ "max-bandwidth": 8 << 20, "downtime-limit": 1 }));
    let on = json!({ "capability": "return-path", "state": true });
    qmp.does("migrate-set-capabilities", json!({ "capabilities": [on] }));
    qmp.does("migrate", json!({ "uri": uri }));
    let cut_short = rate(&mut qmp);
    assert_eq!((&cut_short["status"], &cut_short["mode"]), (&"measured".into(), &"dirty-bitmap".into()));
    assert!(cut_short["calc-time"].as_u64().unwrap() < 60_000, "{cut_short}");
    let refused = qmp.refuses("calc-dirty-rate", calc(100, "dirty-bitmap"));
    assert!(refused.contains("which needs the dirty log: use mode=page-sampling"), "{refused}");
    qmp.does("calc-dirty-rate", calc(300, "page-sampling"));
    measured(&mut qmp);
    // None of its pages got lost on the way: the guest looks itself.
    qmp.does("migrate-set-parameters", json!({ "max-bandwidth": 0, "downtime-limit": 1000 }));
    assert_eq!(here.wait().status.code(), Some(0));
    there.command(&["powerdown"]);
    let ended = there.wait();
    assert!(ended.debugcon.contains("passes"), "{} {}", ended.debugcon, ended.stderr);
}
