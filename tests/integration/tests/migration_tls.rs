//! A guest goes on in another VM over TLS, and stays where it is when the sides don't trust each other.

use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};

use integration::monitor::Monitor;
use integration::moving::unique;
use integration::{Vm, kvm, test_name};
use payloads::scribe::Scribe;
use serde_json::json;
use tempfile::TempDir;
use testbed::certificates::{Authority, Role, of_localhost};

fn scribe() -> Scribe {
    Scribe { vcpus: 2, pages: 2048, pace: 1_000_000 }
}

/// A port that nobody has, and that no connection gets as its own.
fn port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + (std::process::id() as u16).wrapping_mul(61).wrapping_add(number) % 20_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A VM with a guest that writes, and its name.
fn here() -> (Vm, String) {
    let name = unique("here");
    let mut vm = Vm::payload(&scribe().payload().unwrap(), &["--name", &name]);
    vm.debugcon_has("scribe");
    (vm, name)
}

/// One that waits for it.
fn there(incoming: &[&str]) -> Vm {
    let name = unique("there");
    let mut vm = Vm::payload(&scribe().payload().unwrap(), &[&["--name", &name], incoming].concat());
    vm.wait_until("it waits", |vm| migration(vm) == "setup");
    vm
}

fn migration(vm: &Vm) -> String {
    let told = vm.file("qmp").exists().then(|| Monitor::connect(&vm.file("qmp")).does("query-migrate", json!({})));
    told.and_then(|told| told["status"].as_str().map(str::to_owned)).unwrap_or_default()
}

fn left(vm: Vm) {
    let ended = vm.wait();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "{}", ended.debugcon);
}

#[test]
fn a_guest_moves_over_tls() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    of_localhost(dir.path()).unwrap();
    let certificates = dir.path().to_str().unwrap();
    for (connections, host) in [("1", "localhost"), ("4", "127.0.0.1")] {
        let (vm, name) = here();
        let port = port();
        let next = there(&["--incoming", &format!("tls:127.0.0.1:{port}"), "--tls-dir", certificates]);
        let uri = format!("tls:{host}:{port}");
        let said = vm.soc_vmm(&["migrate", &uri, &name, "--tls-dir", certificates, "--connections", connections]);
        assert!(said.as_ref().is_ok_and(|said| said.contains("completed in")), "{said:?}");
        left(vm);
        next.passes("");
    }
}

#[test]
fn sides_that_do_not_trust_each_other_leave_the_guest_where_it_is_and_the_wait_goes_on() {
    if !kvm(&test_name()) {
        return;
    }
    let dirs = TempDir::new().unwrap();
    let at = |name: &str| dirs.path().join(name).to_str().unwrap().to_owned();
    let ours = Authority::new("ours").unwrap();
    for name in ["sound", "nameless", "expired", "foreign"] {
        ours.is_believed_in(Path::new(&at(name))).unwrap();
    }
    ours.signs(Path::new(&at("sound")), Role::Server, &["there.example"]).unwrap();
    ours.signs(Path::new(&at("sound")), Role::Client, &[]).unwrap();
    ours.signed_long_ago(Path::new(&at("expired")), Role::Client, &[]).unwrap();
    Authority::new("others'").unwrap().signs(Path::new(&at("foreign")), Role::Client, &[]).unwrap();

    let (here, name) = here();
    let port = port();
    let next = there(&["--incoming", &format!("tls:127.0.0.1:{port}"), "--tls-dir", &at("sound")]);
    let uri = format!("tls:127.0.0.1:{port}");
    let named = ["--tls-hostname", "there.example"];
    for (certificates, more, why) in [
        ("nameless", &named[..], "demands a certificate: put client-cert.pem and client-key.pem into"),
        ("expired", &named, "says that this side's certificate"),
        ("foreign", &named, "knows no authority that signed this side's certificate"),
        ("sound", &[], "is not for 127.0.0.1 but for"),
        ("nowhere", &named, "nowhere/ca-cert.pem: it can't be read"),
    ] {
        let certificates = at(certificates);
        let words = [&["migrate", &uri, &name, "--tls-dir", &certificates], more].concat();
        let refused = here.soc_vmm(&words).unwrap_err();
        assert!(refused.contains(why) && refused.lines().count() == 1, "{words:?}: {refused}");
        assert!(here.command(&["status"]).contains("running"));
    }
    // Without TLS to one with it.
    let refused = here.soc_vmm(&["migrate", &format!("tcp:127.0.0.1:{port}"), &name]).unwrap_err();
    assert!(refused.contains("the other side speaks TLS and this one doesn't"), "{refused}");
    // With TLS to one without.
    let other = self::port();
    let plain = there(&["--incoming", &format!("tcp:127.0.0.1:{other}")]);
    let words = ["migrate", &format!("tls:127.0.0.1:{other}"), &name, "--tls-dir", &at("sound")];
    let refused = here.soc_vmm(&words).unwrap_err();
    assert!(refused.contains("hung up in the middle of the TLS handshake"), "{refused}");
    plain.command(&["quit"]);
    let ended = plain.wait();
    assert_eq!(ended.status.code(), Some(0));
    assert!(ended.stderr.contains("the other side speaks TLS and this one doesn't"), "{}", ended.stderr);
    // And then it goes, to the one that has waited all the time.
    here.soc_vmm(&[&["migrate", &uri, &name, "--tls-dir", &at("sound")], &named[..]].concat()).unwrap();
    let ended = here.wait();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    next.passes("");
}

#[test]
fn a_monitor_says_which_certificates_and_whom_they_are_for() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    of_localhost(dir.path()).unwrap();
    let certificates = dir.path().to_str().unwrap();
    let (here, _) = here();
    let name = unique("there");
    let mut next = Vm::payload(&scribe().payload().unwrap(), &["--name", &name, "--incoming", "defer"]);
    next.wait_until("it is built", |vm| {
        let built = |mut monitor: Monitor| monitor.replies("qom-list", json!({ "path": "/machine/peripheral" }));
        vm.file("qmp").exists() && built(Monitor::connect(&vm.file("qmp"))).get("return").is_some()
    });
    let uri = format!("unix:{}", dir.path().join("door").display());
    let (mut source, mut destination) = (Monitor::connect(&here.file("qmp")), Monitor::connect(&next.file("qmp")));
    let capabilities = ["return-path", "multifd"].map(|name| json!({ "capability": name, "state": true }));
    for (monitor, endpoint) in [(&mut source, "client"), (&mut destination, "server")] {
        let object = json!({ "qom-type": "tls-creds-x509", "id": "tls0", "dir": certificates, "endpoint": endpoint, "verify-peer": true });
        monitor.does("object-add", object);
        monitor.does("migrate-set-parameters", json!({ "tls-creds": "tls0", "tls-hostname": "" }));
        assert_eq!(monitor.does("query-migrate-parameters", json!({}))["tls-creds"], "tls0");
        monitor.does("migrate-set-capabilities", json!({ "capabilities": capabilities }));
    }
    destination.does("migrate-incoming", json!({ "uri": uri }));
    let refused = source.refuses("migrate", json!({ "uri": uri }));
    assert!(refused.contains("tls-hostname"), "{refused}");
    source.does("migrate-set-parameters", json!({ "tls-hostname": "localhost" }));
    source.does("migrate", json!({ "uri": uri }));
    // What was read is there as long as it is needed.
    source.does("object-del", json!({ "id": "tls0" }));
    left(here);
    next.passes("");
}
