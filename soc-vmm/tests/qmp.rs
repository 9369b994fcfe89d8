//! The QMP server over real sockets, in front of a VM whose control loop is played by the test.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use soc_vmm::control::{Action, ListeningSocket, ShutdownCause, VmControl, VmHandle, VmInfo, channel};
use soc_vmm::qmp::types::{Empty, OutboardVm, StatusInfo};
use soc_vmm::qmp::{Client, ClientError, MAX_COMMAND, MAX_MONITORS, Server};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinHandle;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);

/// A served VM and the loop that plays it: it does everything it is told, and ends when told to.
struct Vm {
    server: Server,
    plays: JoinHandle<Vec<Action>>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn serve() -> Vm {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let (handle, control) = new_vm();
    let server = Server::start(&handle, vec![ListeningSocket::bind(&path).unwrap()]).unwrap();
    Vm { server, plays: tokio::spawn(play(control)), path, _dir: dir }
}

fn new_vm() -> (VmHandle, VmControl) {
    channel(VmInfo { name: "played".into(), cpus: 2, memory: 512 << 20, function: "local".into() })
}

async fn play(mut control: VmControl) -> Vec<Action> {
    control.started();
    let mut done = Vec::new();
    while let Some(order) = control.next().await {
        let action = order.action();
        done.push(action);
        control.finish(order, Ok(()));
        if matches!(action, Action::Quit(_)) {
            break;
        }
    }
    done
}

/// A client that sees every byte.
struct Monitor {
    lines: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
}

impl Monitor {
    async fn connect(path: &Path) -> Self {
        let (read, write) = UnixStream::connect(path).await.unwrap().into_split();
        let mut monitor = Self { lines: BufReader::new(read).lines(), write };
        let greeting = monitor.receive().await.unwrap();
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64() && greeting["QMP"]["capabilities"] == json!([]));
        monitor
    }

    async fn negotiated(path: &Path) -> Self {
        let mut monitor = Self::connect(path).await;
        assert_eq!(monitor.execute(json!({"execute": "qmp_capabilities"})).await, json!({"return": {}}));
        monitor
    }

    async fn send(&mut self, text: &str) {
        self.write.write_all(text.as_bytes()).await.unwrap();
    }

    /// The next message; `None`: the server closed the connection.
    async fn receive(&mut self) -> Option<Value> {
        let line = timeout(PATIENCE, self.lines.next_line()).await.expect("the server is silent").ok()??;
        Some(serde_json::from_str(&line).unwrap())
    }

    async fn execute(&mut self, command: Value) -> Value {
        self.send(&command.to_string()).await;
        loop {
            let message = self.receive().await.expect("the server closed the connection");
            if message.get("event").is_none() {
                return message;
            }
        }
    }

    async fn event(&mut self) -> String {
        let message = self.receive().await.expect("the server closed the connection");
        assert!(message["timestamp"]["seconds"].as_u64().unwrap() > 1_600_000_000, "{message}");
        message["event"].as_str().unwrap_or_else(|| panic!("{message} is no event")).to_owned()
    }
}

#[tokio::test]
async fn a_life_seen_by_two_monitors() {
    let vm = serve();
    let mut one = Monitor::negotiated(&vm.path).await;
    let mut two = Monitor::negotiated(&vm.path).await;
    let mut unborn = Monitor::connect(&vm.path).await;

    one.send("{\"execute\":\"stop\",\"id\":\"a\"}{\"execute\":\"query-status\",\"id\":\"b\"}").await;
    assert_eq!(one.event().await, "STOP", "the event comes before the reply");
    assert_eq!(one.receive().await.unwrap(), json!({"return": {}, "id": "a"}));
    assert_eq!(one.receive().await.unwrap(), json!({"return": {"running": false, "status": "paused"}, "id": "b"}));
    for command in ["cont", "system_reset", "system_powerdown"] {
        assert_eq!(two.execute(json!({"execute": command, "id": command})).await, json!({"return": {}, "id": command}));
    }
    for event in ["RESUME", "RESET", "POWERDOWN"] {
        assert_eq!(one.event().await, event);
    }
    one.send("{\"execute\":\"quit\"}").await;
    let shutdown = one.receive().await.unwrap();
    assert_eq!(
        (&shutdown["event"], &shutdown["data"]),
        (&json!("SHUTDOWN"), &json!({"guest": false, "reason": "host-qmp-quit"}))
    );
    assert_eq!(one.event().await, "STOP");
    assert_eq!(one.receive().await.unwrap(), json!({"return": {}}));
    assert_eq!(one.receive().await, None, "the VM has ended");
    assert_eq!(unborn.receive().await, None, "no event before the negotiation");

    let done = vm.plays.await.unwrap();
    let quit = Action::Quit(ShutdownCause::HostQmpQuit);
    assert_eq!(done, [Action::Pause, Action::Resume, Action::Reset, Action::PowerButton, quit]);
    vm.server.close().await;
    assert!(!vm.path.exists());
}

#[tokio::test]
async fn a_client_may_come_again() {
    let vm = serve();
    for _ in 0..100 {
        let mut monitor = Monitor::negotiated(&vm.path).await;
        monitor.send("{\"execute\": \"query-st").await;
    }
    let mut monitor = Monitor::negotiated(&vm.path).await;
    assert_eq!(monitor.execute(json!({"execute": "query-name"})).await["return"]["name"], "played");
}

#[tokio::test]
async fn an_endless_command_is_refused_and_cut() {
    let vm = serve();
    let mut monitor = Monitor::negotiated(&vm.path).await;
    monitor.send("{\"execute\": \"").await;
    let piece = "x".repeat(64 << 10);
    // The server closes while the client still sends: its writes may fail then.
    for _ in 0..=MAX_COMMAND / piece.len() {
        if monitor.write.write_all(piece.as_bytes()).await.is_err() {
            break;
        }
    }
    if let Some(reply) = monitor.receive().await {
        assert_eq!(reply["error"]["class"], "GenericError");
        assert!(reply["error"]["desc"].as_str().unwrap().contains("longer"), "{reply}");
        assert_eq!(monitor.receive().await, None);
    }
    Monitor::negotiated(&vm.path).await;
}

#[tokio::test]
async fn one_monitor_too_many_is_turned_away_and_room_comes_back() {
    let vm = serve();
    let mut held = Vec::new();
    for _ in 0..MAX_MONITORS {
        held.push(Monitor::negotiated(&vm.path).await);
    }
    let mut late = UnixStream::connect(&vm.path).await.unwrap();
    let mut heard = Vec::new();
    timeout(PATIENCE, late.read_to_end(&mut heard)).await.unwrap().unwrap();
    assert_eq!(heard, b"");
    held.pop();
    timeout(PATIENCE, async {
        // The server notices the free place when it reads the end of that stream.
        loop {
            let mut stream = UnixStream::connect(&vm.path).await.unwrap();
            if stream.read(&mut [0; 64]).await.unwrap() > 0 {
                break;
            }
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_client_that_never_reads_is_dropped_and_hurts_nobody() {
    let vm = serve();
    let mut deaf = UnixStream::connect(&vm.path).await.unwrap();
    deaf.write_all(b"{\"execute\":\"qmp_capabilities\"}").await.unwrap();
    let flood = b"{\"execute\":\"query-commands\"}\n".repeat(64);
    let dropped = timeout(PATIENCE, async { while deaf.write_all(&flood).await.is_ok() {} });
    let others = async {
        for _ in 0..10 {
            let mut monitor = Monitor::negotiated(&vm.path).await;
            assert_eq!(monitor.execute(json!({"execute": "stop"})).await, json!({"return": {}}));
            assert_eq!(monitor.execute(json!({"execute": "cont"})).await, json!({"return": {}}));
        }
    };
    let (dropped, ()) = tokio::join!(dropped, others);
    dropped.expect("the server holds on to a client that never reads");
}

#[tokio::test]
async fn a_failed_command_tells_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let (handle, mut control) = new_vm();
    let server = Server::start(&handle, vec![ListeningSocket::bind(&path).unwrap()]).unwrap();
    control.started();
    let mut monitor = Monitor::negotiated(&path).await;
    monitor.send("{\"execute\":\"stop\",\"id\":1}").await;
    let order = control.next().await.unwrap();
    control.finish(order, Err("vCPU 0 doesn't leave the guest".into()));
    assert_eq!(
        monitor.receive().await.unwrap(),
        json!({"error": {"class": "GenericError", "desc": "vCPU 0 doesn't leave the guest"}, "id": 1})
    );
    // An order that is dropped with its VM is answered too.
    monitor.send("{\"execute\":\"system_reset\",\"id\":2}").await;
    let order = control.next().await.unwrap();
    drop((order, control));
    assert_eq!(monitor.receive().await.unwrap()["error"]["desc"], "the VM has ended");
    assert_eq!(monitor.receive().await, None);
    server.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_of_the_command_line() {
    let vm = serve();
    let path = vm.path.clone();
    tokio::task::spawn_blocking(move || {
        let mut client = Client::connect(&path, PATIENCE).unwrap();
        client.execute::<Empty>("stop").unwrap();
        let status: StatusInfo = client.execute("query-status").unwrap();
        assert!(!status.running);
        let shown: OutboardVm = client.execute("x-query-outboard-vm").unwrap();
        assert_eq!((shown.name.as_str(), shown.cpus, shown.memory), ("played", 2, 512 << 20));
        assert!(
            matches!(client.execute::<Empty>("no-such"), Err(ClientError::Refused(e)) if e.desc.contains("no-such"))
        );
        client.execute::<Empty>("quit").unwrap();
        client.wait_for_end(PATIENCE).unwrap();
    })
    .await
    .unwrap();
    vm.plays.await.unwrap();
    vm.server.close().await;
    assert!(matches!(Client::connect(&vm.path, PATIENCE), Err(ClientError::Connect(_))));
}
