//! One monitor's side of the protocol, without its I/O: bytes in, replies and calls out.

use std::os::fd::OwnedFd;

use serde_json::{Map, Value};

use super::command::{self, Execution, QmpCapabilities};
use super::types::Response;
use super::{FrameError, Framer, Passed, QmpError, json};
use crate::control::VmHandle;

/// What a monitor is to do next.
#[derive(Debug)]
pub enum Step {
    /// Send this.
    Reply(Response),
    /// Send this and close the connection: the stream can't be followed any further.
    Close(Response),
    /// Carry this out and send its reply; then go on.
    Run(Call),
}

/// A command whose name and arguments are good.
pub struct Call {
    id: Option<Value>,
    execution: Execution,
}

impl Call {
    /// Carries it out and gives the reply.
    pub async fn run(self) -> Response {
        Response::to(self.id, self.execution.await)
    }
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Call").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The protocol's state on one monitor.
#[derive(Debug)]
pub struct Session {
    vm: VmHandle,
    framer: Framer,
    passed: Passed,
    negotiated: bool,
}

impl Session {
    /// A monitor that was just greeted.
    pub fn new(vm: VmHandle) -> Self {
        Self { vm, framer: Framer::default(), passed: Passed::default(), negotiated: false }
    }

    /// Whether the client ended the negotiation; before that it hears no events.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// Descriptors came with the bytes that come next.
    pub fn passed(&mut self, fds: Vec<OwnedFd>) {
        self.passed.replace(fds);
    }

    /// Takes bytes off the front of `input` until there is something to do; `None`: all taken.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Step> {
        Some(match self.framer.next(input)? {
            Ok(value) => self.command(&value),
            Err(e) => {
                let reply = Response::to(None, Err(QmpError::generic(e.to_string())));
                if e == FrameError::TooLong { Step::Close(reply) } else { Step::Reply(reply) }
            }
        })
    }

    fn command(&mut self, text: &[u8]) -> Step {
        let mut object = match json::object(text) {
            Ok(object) => object,
            Err(e) => return Step::Reply(Response::to(None, Err(QmpError::generic(format!("JSON parse error, {e}"))))),
        };
        let id = object.remove("id");
        if id.as_ref().is_some_and(is_rounded) {
            let why = "QMP input member 'id' has a number of more than 64 bits: send it as a string";
            return Step::Reply(Response::to(None, Err(QmpError::generic(why))));
        }
        match self.dispatch(object) {
            Ok(Some(execution)) => Step::Run(Call { id, execution }),
            Ok(None) => Step::Reply(Response::to(id, Ok(Value::Object(Map::new())))),
            Err(e) => Step::Reply(Response::to(id, Err(e))),
        }
    }

    /// `None`: done already.
    fn dispatch(&mut self, object: Map<String, Value>) -> Result<Option<Execution>, QmpError> {
        let (name, arguments) = members(object)?;
        match (name == QmpCapabilities::NAME, self.negotiated) {
            (true, false) => {
                negotiate(arguments)?;
                self.negotiated = true;
                Ok(None)
            }
            (true, true) => Err(QmpError::not_found("Capabilities negotiation is already complete, command ignored")),
            (false, false) => Err(QmpError::not_found("Expecting capabilities negotiation with 'qmp_capabilities'")),
            (false, true) => command::find(&name)?.prepare(arguments, &mut self.passed, &self.vm).map(Some),
        }
    }
}

/// Whether an id has a number in it that may not be the one that was sent: an integer of more than 64 bits was read as the nearest floating-point
/// number, and a client would wait for its own.
fn is_rounded(id: &Value) -> bool {
    /// 2^63: below it, integers are what they are.
    const INTEGERS_END: f64 = 9_223_372_036_854_775_808.0;
    match id {
        Value::Number(number) => number.is_f64() && number.as_f64().is_some_and(|f| f.abs() >= INTEGERS_END),
        Value::Array(items) => items.iter().any(is_rounded),
        Value::Object(members) => members.values().any(is_rounded),
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}

/// Name and arguments of a command object (without its id).
fn members(object: Map<String, Value>) -> Result<(String, Map<String, Value>), QmpError> {
    let mut name = None;
    let mut arguments = Map::new();
    for (member, value) in object {
        match (member.as_str(), value) {
            ("execute", Value::String(command)) => name = Some(command),
            ("execute", _) => return Err(QmpError::generic("QMP input member 'execute' must be a string")),
            ("arguments", Value::Object(given)) => arguments = given,
            ("arguments", _) => return Err(QmpError::generic("QMP input member 'arguments' must be an object")),
            _ => return Err(QmpError::generic(format!("QMP input member '{member}' is unexpected"))),
        }
    }
    let name = name.ok_or_else(|| QmpError::generic("QMP input lacks member 'execute'"))?;
    Ok((name, arguments))
}

fn negotiate(arguments: Map<String, Value>) -> Result<(), QmpError> {
    let capabilities: QmpCapabilities = serde_json::from_value(Value::Object(arguments))
        .map_err(|e| QmpError::generic(format!("Invalid arguments of '{}': {e}", QmpCapabilities::NAME)))?;
    match capabilities.enable.first() {
        None => Ok(()),
        Some(one) => Err(QmpError::generic(format!("Capability '{one}' is not offered by this monitor"))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::control::{VmControl, VmInfo, channel};
    use crate::qmp::ErrorClass;
    use crate::qmp::command::COMMANDS;

    fn session() -> (Session, VmControl) {
        let (vm, control) = channel(VmInfo { name: "t".into(), cpus: 2, memory: 1 << 29, function: "local".into() });
        (Session::new(vm), control)
    }

    fn all(session: &mut Session, mut input: &[u8]) -> Vec<Step> {
        std::iter::from_fn(|| session.next(&mut input)).collect()
    }

    /// The one reply to one command that is answered without the VM's loop.
    fn answer(session: &mut Session, command: &Value) -> Value {
        serde_json::from_str(&answer_text(session, &command.to_string())).unwrap()
    }

    fn answer_text(session: &mut Session, command: &str) -> String {
        let mut steps = all(session, command.as_bytes());
        assert_eq!(steps.len(), 1, "{steps:?}");
        let response = match steps.remove(0) {
            Step::Reply(response) | Step::Close(response) => response,
            Step::Run(call) => tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(call.run()),
        };
        serde_json::to_string(&response).unwrap()
    }

    fn negotiated() -> (Session, VmControl) {
        let (mut session, control) = session();
        assert_eq!(answer(&mut session, &json!({"execute": "qmp_capabilities"})), json!({"return": {}}));
        (session, control)
    }

    #[test]
    fn negotiation_comes_first_and_once() {
        let (mut session, _control) = session();
        let early = answer(&mut session, &json!({"execute": "query-status", "id": 7}));
        assert_eq!(early["error"]["class"], "CommandNotFound");
        assert_eq!(early["id"], 7);
        let oob = answer(&mut session, &json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}));
        assert_eq!(oob["error"]["class"], "GenericError");
        assert!(!session.is_negotiated());
        answer(&mut session, &json!({"execute": "qmp_capabilities", "arguments": {"enable": []}}));
        assert!(session.is_negotiated());
        let late = answer(&mut session, &json!({"execute": "qmp_capabilities"}));
        assert_eq!(late["error"]["class"], "CommandNotFound");
    }

    #[test]
    fn queries_answer_in_qapis_shapes_and_echo_any_id() {
        let (mut session, _control) = negotiated();
        for id in [json!("libvirt-3"), json!(null), json!([1, {"a": 2}]), json!(-1.5)] {
            let reply = answer(&mut session, &json!({"execute": "query-status", "id": id}));
            assert_eq!(reply, json!({"return": {"running": false, "status": "prelaunch"}, "id": id}));
        }
        assert_eq!(answer(&mut session, &json!({"execute": "query-name"})), json!({"return": {"name": "t"}}));
        assert_eq!(
            answer(&mut session, &json!({"execute": "query-kvm"})),
            json!({"return": {"enabled": true, "present": true}})
        );
        let version = answer(&mut session, &json!({"execute": "query-version"}));
        assert!(version["return"]["qemu"]["major"].as_u64().unwrap() >= 5 && version["return"]["package"].is_string());
        let vm = answer(&mut session, &json!({"execute": "x-query-outboard-vm"}));
        assert_eq!(
            vm["return"],
            json!({"name": "t", "status": "prelaunch", "cpus": 2, "memory": 1 << 29, "function": "local",
                   "pid": std::process::id()})
        );
    }

    #[test]
    fn an_id_is_echoed_as_it_was_sent_or_refused() {
        let (mut session, _control) = negotiated();
        for id in ["18446744073709551615", "-9223372036854775808", "0.5"] {
            let reply = answer_text(&mut session, &format!("{{\"execute\":\"query-name\",\"id\":{id}}}"));
            assert_eq!(reply, format!("{{\"return\":{{\"name\":\"t\"}},\"id\":{id}}}"));
        }
        for id in ["18446744073709551616", "-9223372036854775809", "[{\"a\":123456789012345678901234567890}]"] {
            let reply = answer_text(&mut session, &format!("{{\"execute\":\"query-name\",\"id\":{id}}}"));
            assert!(reply.contains("GenericError") && reply.contains("more than 64 bits"), "{reply}");
            assert!(!reply.contains("\"id\""), "{reply}");
        }
    }

    #[test]
    fn what_a_drive_is_asked_for_makes_sense() {
        let (mut session, _control) = negotiated();
        let mut refusal = |command: Value| {
            let reply = answer(&mut session, &command);
            (reply["error"]["class"].clone(), reply["error"]["desc"].as_str().unwrap().to_owned())
        };
        for command in ["eject", "blockdev-change-medium"] {
            let (class, why) = refusal(json!({"execute": command, "arguments": match command {
                "eject" => json!({"id": "cdrom0", "device": "cdrom1"}),
                _ => json!({"id": "cdrom0", "device": "cdrom1", "filename": "/absent"}),
            }}));
            assert_eq!(class, "GenericError", "{why}");
            assert!(why.contains("'id' and 'device'"), "{why}");
        }
        for mode in ["bogus", "", "Retain", "read-write"] {
            let (class, why) = refusal(json!({"execute": "blockdev-change-medium",
                "arguments": {"id": "cdrom0", "filename": "/absent", "read-only-mode": mode}}));
            assert_eq!(class, "GenericError", "{mode}: {why}");
        }
        // This VM has none.
        for same in [json!({"id": "cdrom0", "device": "cdrom0"}), json!({"device": "cdrom0"})] {
            assert_eq!(refusal(json!({"execute": "eject", "arguments": same})).0, "DeviceNotFound");
        }
    }

    #[test]
    fn query_commands_lists_what_dispatch_finds() {
        let (mut session, _control) = negotiated();
        let reply = answer(&mut session, &json!({"execute": "query-commands"}));
        let names: Vec<&str> =
            reply["return"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
        assert_eq!(names.len(), COMMANDS.len() + 1);
        for name in names.iter().filter(|name| **name != QmpCapabilities::NAME) {
            assert!(command::find(name).is_ok(), "{name}");
        }
        assert!(names.contains(&QmpCapabilities::NAME));
    }

    #[test]
    fn wrong_commands_get_qemus_class_and_their_id() {
        let (mut session, _control) = negotiated();
        let cases = [
            (json!({"execute": "device_eat", "id": 1}), ErrorClass::CommandNotFound, "device_eat"),
            (json!({"id": 1}), ErrorClass::GenericError, "lacks member 'execute'"),
            (json!({"execute": 5, "id": 1}), ErrorClass::GenericError, "'execute' must be a string"),
            (json!({"execute": "stop", "arguments": [], "id": 1}), ErrorClass::GenericError, "must be an object"),
            (json!({"execute": "stop", "argument": {}, "id": 1}), ErrorClass::GenericError, "'argument' is unexpected"),
            (json!({"exec-oob": "stop", "id": 1}), ErrorClass::GenericError, "'exec-oob' is unexpected"),
            (json!({"execute": "stop", "arguments": {"now": true}, "id": 1}), ErrorClass::GenericError, "now"),
        ];
        for (command, class, text) in cases {
            let reply = answer(&mut session, &command);
            assert_eq!(reply["error"]["class"], serde_json::to_value(class).unwrap(), "{command}");
            assert!(reply["error"]["desc"].as_str().unwrap().contains(text), "{command} → {reply}");
            assert_eq!(reply["id"], 1, "{command}");
        }
    }

    #[test]
    fn broken_and_deep_json_is_an_error_and_the_session_goes_on() {
        let (mut session, _control) = negotiated();
        let deep = [b"{\"id\":".as_slice(), &b"[".repeat(100_000), &b"]".repeat(100_000), b"}"].concat();
        let twice = b"{\"execute\":\"query-status\",\"execute\":\"quit\"}";
        for bad in [b"{\"execute\": stop}".as_slice(), twice, b"{]", b"{\"a\":\"\xc3\x28\"}", b"hello\n", &deep] {
            let steps = all(&mut session, bad);
            assert!(
                matches!(&steps[..], [Step::Reply(r)] if r.error_class() == Some(ErrorClass::GenericError)),
                "{steps:?}"
            );
        }
        assert_eq!(answer(&mut session, &json!({"execute": "query-name"}))["return"]["name"], "t");
    }

    proptest! {
        /// Any bytes: no panic, and a good command after a separator is still understood.
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let (mut session, _control) = negotiated();
            all(&mut session, &bytes);
            all(&mut session, b"\xff\n");
            prop_assert_eq!(answer(&mut session, &json!({"execute": "query-name"})), json!({"return": {"name": "t"}}));
        }

        /// Any JSON in any member: one reply, an error unless it is a command.
        #[test]
        fn any_members(member in "execute|arguments|id|[a-z]{1,3}", value in json_value()) {
            let (mut session, _control) = negotiated();
            let mut command = json!({"execute": "query-name"});
            command[&member] = value.clone();
            let reply = answer(&mut session, &command);
            let fine = member == "id" || member == "arguments" && value == json!({})
                || member == "execute" && value.as_str().is_some_and(|name| command::find(name).is_ok());
            prop_assert_eq!(reply.get("return").is_some(), fine, "{} → {}", command, reply);
        }
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "query-name|query-kvm|.{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z]{0,4}", inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }
}
