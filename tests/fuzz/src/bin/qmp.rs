//! A QMP monitor that is sent any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use soc_vmm::control::{self, VmInfo};
use soc_vmm::qmp::{Session, Step};

fuzz_target!(|data: &[u8]| {
    let info = VmInfo { name: "t".into(), cpus: 2, memory: 1 << 29, function: "local".into() };
    let (vm, _control) = control::channel(info);
    let mut session = Session::new(vm);
    if !all(&mut session, data) {
        return;
    }
    // Whatever was begun is over with a byte that no JSON has; then a command is understood again.
    let negotiated = session.is_negotiated();
    assert!(all(&mut session, b"\xff\n"));
    let command: &[u8] =
        if negotiated { b"{\"execute\":\"query-name\"}" } else { b"{\"execute\":\"qmp_capabilities\"}" };
    match session.next(&mut &command[..]) {
        Some(Step::Run(_)) => assert!(negotiated),
        Some(Step::Reply(reply)) => assert!(!negotiated && reply.error_class().is_none(), "{reply:?}"),
        step => panic!("{step:?}"),
    }
});

/// Takes all of `input`; whether the monitor goes on.
fn all(session: &mut Session, mut input: &[u8]) -> bool {
    while let Some(step) = session.next(&mut input) {
        match step {
            Step::Reply(reply) => assert!(!line(&reply).contains('\n')),
            Step::Close(reply) => {
                line(&reply);
                return false;
            }
            Step::Run(_) => {}
        }
    }
    assert!(input.is_empty());
    true
}

fn line(reply: &soc_vmm::qmp::types::Response) -> String {
    serde_json::to_string(reply).expect("a reply is JSON")
}
