//! States of version 1, as streams have them: what was saved once is taken for ever, or the version is another one.

use serde_json::{Value, json};
use soc_vmm::persist::{Saved, States};

use super::damage::{KINDS, busy, guest};
use super::{PLACE, halt, load, save};
use crate::rig::eventually;

/// The own state of each kind of device, with a driver that has queues of 16 entries.
fn golden(kind: usize) -> (&'static str, Value) {
    let driver = json!({"asked": true, "added": true, "ready": true, "named": true, "told_open": false, "open": true});
    match kind {
        0 => ("virtio-blk", json!({"taken": [[0, 3], [1, 15]], "trouble": "NoSpace"})),
        1 => {
            let filter = json!({
                "promiscuous": false, "all_groups": true, "all_stations": false,
                "no_groups": false, "no_stations": true, "no_broadcast": false,
                "own": [2, 0, 0, 0, 0, 9], "stations": [[2, 0, 0, 0, 0, 1]], "groups": null, "vlans": [1, 4095],
            });
            (
                "virtio-net",
                json!({"up": false, "said": {"active": 2, "guest": 0, "filter": filter, "announcing": true}}),
            )
        }
        2 => {
            let here = json!({"number": 1, "name": "port", "leaving": false, "driver": driver,
                "sending": {"head": 7, "sent": 100}});
            let gone = json!({"number": 2, "name": "gone", "leaving": true, "driver": driver, "sending": null});
            ("virtio-console", json!({"asked": true, "ports": [here, gone]}))
        }
        3 => ("virtio-vsock", json!({})),
        4 => ("virtio-balloon", json!({"wanted": 128, "statistics": 3})),
        _ => ("virtio-rng", json!({})),
    }
}

#[test]
fn states_of_version_1_are_taken_and_given() {
    for kind in 0..KINDS {
        let (mut source, _dir) = busy(kind);
        halt(&mut source);
        let (name, state) = golden(kind);
        let name = format!("{name}@{PLACE}");
        let mut states = States::default();
        for (other, saved) in save(&source) {
            if other != name {
                states.add(&other, saved).unwrap();
            }
        }
        states.add(&name, Saved { version: 1, state: serde_json::to_vec(&state).unwrap() }).unwrap();
        let (mut guest, _dir) = guest(kind, Some(&source));
        load(&mut guest, states).unwrap();
        let saved = save(&guest).into_iter().find(|(other, _)| *other == name).unwrap().1;
        assert_eq!((saved.version, serde_json::from_slice::<Value>(&saved.state).unwrap()), (1, state), "{name}");
    }
}

#[test]
fn a_functions_state_of_version_1_has_these_parts() {
    let (mut source, _dir) = busy(5);
    eventually(|| (source.board.ram.u16(0x1_0142) == 4).then_some(()));
    halt(&mut source);
    let saved = save(&source).into_iter().find(|(name, _)| name.starts_with("virtio-pci@")).unwrap().1;
    let mut state: Value = serde_json::from_slice(&saved.state).unwrap();
    let parts = state.as_object_mut().unwrap();
    // Hexadecimal, without the zeros behind it: vendor and device first.
    assert!(parts.remove("config").unwrap().as_str().unwrap().starts_with("f41a"));
    assert_eq!(
        parts.remove("msix").unwrap(),
        json!([[0xfee0_0000u32, 0x40, 0, false], [0xfee0_0000u32, 0x41, 0, false]])
    );
    let layout = json!({"size": 16, "descriptors": 0x1_0000, "available": 0x1_0100, "used": 0x1_0140});
    let registers = json!({
        "offered_select": 0, "accepted_select": 1, "accepted": 0x11_3000_0000u64, "status": 15,
        "config_vector": 65535, "queue_select": 5,
        "queues": [{"layout": layout, "vector": 65535, "enabled": true}],
    });
    let session = json!({"needs_reset": false, "queues": [{"available": 4, "used": 4}]});
    let expected = json!({
        "registers": registers, "isr": 0, "device": [], "generation": 0, "words": [], "session": session,
    });
    assert_eq!((saved.version, state), (1, expected));
}
