//! Every command of QMP, meant and not, in every state of a VM: an error is of a class that there is and says why, and the guest hears of nothing.

use integration::monitor::Monitor;
use integration::{Vm, kvm, test_name};
use payloads::watch;
use serde_json::{Map, Value, json};

/// Commands that do what they are for without arguments, and more than to answer.
const MEANT: [&str; 6] = ["quit", "stop", "cont", "system_reset", "system_powerdown", "x-outboard-add-cpu"];
const SEED: u64 = 7;

#[test]
fn no_command_hurts_a_guest_in_any_state() {
    if !kvm(&test_name()) {
        return;
    }
    let payload = watch::watch(SEED).unwrap();
    let mut vm = Vm::payload(&payload, &["--paused"]);
    vm.wait_until("it listens", |vm| vm.file("qmp").exists());
    let mut monitor = Monitor::connect(&vm.file("qmp"));
    // From then on everything is there.
    while monitor.replies("qom-list", json!({ "path": "/machine/peripheral" })).get("return").is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let schema = monitor.does("query-qmp-schema", json!({}));
    let status = |monitor: &mut Monitor| monitor.does("query-status", json!({}))["status"].clone();
    for (state, enter) in [("prelaunch", "query-status"), ("running", "cont"), ("paused", "stop")] {
        monitor.does(enter, json!({}));
        assert_eq!(status(&mut monitor), state);
        let said = everything(&mut monitor, &schema);
        assert!(said > 300, "{said} commands");
        assert_eq!(status(&mut monitor), state);
    }
    monitor.does("cont", json!({}));
    let before = rounds(&vm);
    vm.wait_until("the guest goes on", |vm| rounds(vm) > before + 3);
    monitor.does("quit", json!({}));
    let ended = vm.wait();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
}

/// The guest's rounds, each lawful.
fn rounds(vm: &Vm) -> u64 {
    let console = std::fs::read_to_string(vm.file("debugcon")).unwrap_or_default();
    let (whole, _) = console.rsplit_once('\n').unwrap_or_default();
    for (round, line) in (1..).zip(whole.lines()) {
        assert_eq!(watch::parse_round(line), Some((round, watch::sum(SEED))), "{line}");
    }
    whole.lines().count() as u64
}

/// Says every command without arguments, with one that there isn't, and with every one of its own as everything that it isn't; how many that were.
fn everything(monitor: &mut Monitor, schema: &Value) -> usize {
    let find = |name: &Value| schema.as_array().unwrap().iter().find(|info| info["name"] == *name).unwrap();
    let commands: Vec<&Value> = schema.as_array().unwrap().iter().filter(|it| it["meta-type"] == "command").collect();
    let mut said = 0;
    for command in commands {
        let name = command["name"].as_str().unwrap();
        let mut say = |arguments: Value| {
            said += 1;
            let reply = monitor.replies(name, arguments.clone());
            let desc = reply["error"]["desc"].as_str();
            assert!(desc.is_none_or(|desc| !desc.is_empty() && !desc.contains('\n')), "{name} {arguments}: {reply}");
            reply
        };
        if name == "qmp_capabilities" {
            assert_eq!(say(json!({}))["error"]["class"], "CommandNotFound");
            continue;
        }
        if !MEANT.contains(&name) {
            say(json!({}));
        }
        let unknown = say(json!({ "there-is-no-such-member": 1 }));
        assert_eq!(unknown["error"]["class"], "GenericError", "{name}: {unknown}");
        let members = find(&command["arg-type"])["members"].as_array().unwrap();
        for member in members {
            let member = member["name"].as_str().unwrap();
            for value in [json!([{}]), json!(-1), json!("\u{0}\n, ="), json!(u64::MAX)] {
                say(Value::Object(Map::from_iter([(member.to_owned(), value)])));
            }
        }
    }
    said
}
