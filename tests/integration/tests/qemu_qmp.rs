//! QEMU's own QMP client, PyPI's `qemu.qmp`, and its qmp-shell at a control socket of soc-vmm's.

use std::io::Write;
use std::process::{Command, Stdio};

use integration::{Vm, kvm, test_name};
use payloads::operated::{self, UP};
use serde_json::Value;
use testbed::fetch;
use testbed::qmp_client::{QmpClient, qmp_client};

/// Connects, negotiates, executes, is refused, and sees events. A line of JSON tells what came of each.
const SCRIPT: &str = r#"
import asyncio, json, sys
from qemu.qmp import EventListener, ExecuteError, QMPClient

def tell(name, value):
    print(json.dumps([name, value]), flush=True)

async def main():
    client = QMPClient("outboard")
    await client.connect(sys.argv[1])
    tell("greeting", client.greeting._asdict())
    tell("version", await client.execute("query-version"))
    tell("schema", len(await client.execute("query-qmp-schema")))
    with client.listener(("STOP", "RESUME")) as listener:
        await client.execute("stop")
        tell("event", (await listener.get())["event"])
        tell("status", (await client.execute("query-status"))["running"])
        await client.execute("cont")
        tell("event", (await listener.get())["event"])
    for command, arguments in (("no-such-command", None), ("device_del", {"id": "nobody"}), ("stop", {"odd": 1})):
        try:
            await client.execute(command, arguments)
        except ExecuteError as error:
            tell("refused", error.error_class)
    tell("status", (await client.execute("query-status"))["running"])
    await client.disconnect()

asyncio.run(main())
"#;

#[test]
fn qemu_s_client_executes_and_sees_events() {
    let Some((client, vm)) = start() else { return };
    let mut python = client.python();
    python.args(["-c", SCRIPT]).arg(vm.file("qmp"));
    let (told, complaints) = run(python, "");
    let told: Vec<(String, Value)> = told.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let all =
        |name: &str| -> Vec<&Value> { told.iter().filter(|(told, _)| told == name).map(|(_, value)| value).collect() };
    assert_eq!(complaints, "");
    assert!(all("greeting")[0]["QMP"]["version"]["qemu"]["major"].is_u64(), "{told:?}");
    assert!(all("version")[0]["package"].is_string(), "{told:?}");
    assert!(all("schema")[0].as_u64() > Some(100), "{told:?}");
    assert_eq!(all("event"), ["STOP", "RESUME"]);
    assert_eq!(all("status"), [false, true]);
    assert_eq!(all("refused"), ["CommandNotFound", "DeviceNotFound", "GenericError"]);
}

#[test]
fn qmp_shell_runs_commands_and_shows_events() {
    let Some((client, vm)) = start() else { return };
    let mut shell = client.shell();
    shell.arg(vm.file("qmp"));
    let (shown, complaints) = run(shell, "query-status\nstop\n\nquery-status\nno-such-command\ncont\nquery-status\n");
    for words in ["Connected to QEMU", "\"status\": \"running\"", "\"status\": \"paused\"", "CommandNotFound", "STOP"] {
        assert!(shown.contains(words), "no {words} in {shown}{complaints}");
    }
    assert_eq!(vm.command(&["status"]).lines().next().map(|line| line.contains("running")), Some(true));
}

/// The client, and a VM that runs.
fn start() -> Option<(QmpClient, Vm)> {
    if !kvm(&test_name()) {
        return None;
    }
    let client = match qmp_client() {
        Ok(client) => client,
        Err(error @ fetch::Error::Unreachable(_)) => {
            testbed::skip(&test_name(), &error.to_string());
            return None;
        }
        Err(error) => panic!("{error:?}"),
    };
    let mut vm = Vm::payload(&operated::operated().unwrap(), &[]);
    vm.serial_has(UP);
    Some((client, vm))
}

/// Runs a program that is typed `input`; what it wrote to both of its streams.
fn run(mut command: Command, input: &str) -> (String, String) {
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().expect("Python starts");
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}
