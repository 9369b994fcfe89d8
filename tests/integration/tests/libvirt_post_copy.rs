//! Debian's unmodified libvirtd has a domain's guest run at another libvirtd's before its pages are there.

use std::fs;

use integration::libvirt::{Boot, Domain, Pair};
use integration::test_name;
use payloads::scribe::Scribe;
use serde_json::json;

/// A guest that writes faster than its pages move.
const BUSY: &str = "busy";
/// What libvirt's packages set where they are installed: its emulators have no privileges, and hear of the kernel's faults all the same.
const UNPRIVILEGED: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// That setting, until this is dropped.
struct Allowed(String);

impl Allowed {
    fn new() -> Self {
        let before = fs::read_to_string(UNPRIVILEGED).unwrap();
        fs::write(UNPRIVILEGED, "1").unwrap();
        Self(before)
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        let _ = fs::write(UNPRIVILEGED, &self.0);
    }
}

/// Two hosts, of which the first has the domain.
fn two() -> Option<Pair> {
    let pair = Pair::start()?;
    let scribe = Scribe { vcpus: 1, pages: 2048, pace: 0 };
    let kernel = pair.give("scribe", scribe.payload().unwrap().file().1);
    pair.here.define(&Domain::new(BUSY, Boot::Kernel { kernel, initrd: None, cmdline: None }));
    Some(pair)
}

#[test]
fn a_domain_runs_there_before_its_pages_do_where_the_host_lets_it() {
    let Some(pair) = two() else { return };
    let here = &pair.here;
    let by = |more: &[&'static str]| [&Pair::TCP[..], &["--postcopy"], more].concat();
    here.virsh(&["start", BUSY]);
    // The setting is the machine's: both are looked at by one test.
    if fs::read_to_string(UNPRIVILEGED).unwrap().trim() == "0" {
        let refused = pair.refuses_to_move(BUSY, &by(&[]));
        assert!(refused.contains("post-copy is not possible here"), "{refused}");
        here.becomes(BUSY, "running");
    } else {
        testbed::skip(&test_name(), "the refusal: this machine lets everybody have userfaultfd");
    }
    let _allowed = Allowed::new();
    // Of itself once its first round is over, and when somebody says so.
    pair.move_by(BUSY, &by(&["--postcopy-after-precopy", "--bandwidth", "16"]));
    pair.there.virsh(&["destroy", BUSY]);

    here.virsh(&["start", BUSY]);
    let mover = pair.begin_to_move(BUSY, &by(&["--bandwidth", "1"]));
    pair.moves_memory(BUSY);
    here.virsh(&["migrate-postcopy", BUSY]);
    assert!(pair.ends_to_move(mover));
    pair.has_moved(BUSY);
    pair.there.virsh(&["destroy", BUSY]);

    // The connection is lost, and found again.
    here.virsh(&["start", BUSY]);
    let slow = by(&["--bandwidth", "1", "--postcopy-bandwidth", "1"]);
    let mover = pair.begin_to_move(BUSY, &slow);
    pair.moves_memory(BUSY);
    here.virsh(&["migrate-postcopy", BUSY]);
    pair.there.becomes(BUSY, "running (post-copy)");
    here.qmp(BUSY, "migrate-pause", json!({}));
    assert!(!pair.ends_to_move(mover));
    here.becomes(BUSY, "paused (post-copy failed)");
    pair.there.becomes(BUSY, "running (post-copy failed)");
    pair.move_by(BUSY, &by(&["--postcopy-resume"]));
    pair.check_messages();
}
