//! The QMP server over real sockets, in front of a VM whose control loop is played by the test.

use std::io::{ErrorKind, IoSlice};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use serde_json::{Value, json};
use soc_vmm::control::{Action, ListeningSocket, ShutdownCause, VmControl, VmHandle, VmInfo, channel};
use soc_vmm::qmp::types::{Empty, Greeting, OutboardVm, StatusInfo};
use soc_vmm::qmp::{Client, ClientError, Greet, MAX_COMMAND, MAX_MONITORS, Server};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinHandle;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(60);

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
    let server = Server::start(&handle, vec![ListeningSocket::bind(&path).unwrap()], Greet::AtOnce).unwrap();
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
async fn of_too_many_descriptors_none_is_taken_and_the_monitor_goes_on() {
    let vm = serve();
    let mut monitor = Monitor::negotiated(&vm.path).await;
    let null = std::fs::File::open("/dev/null").unwrap();
    let command = br#"{"execute":"getfd","arguments":{"fdname":"a"}}"#;
    for (count, words) in [(16, None), (17, Some("No file descriptor supplied via SCM_RIGHTS"))] {
        let raw = vec![null.as_raw_fd(); count];
        let rights = [ControlMessage::ScmRights(&raw)];
        let socket = monitor.write.as_ref().as_raw_fd();
        sendmsg::<UnixAddr>(socket, &[IoSlice::new(command)], &rights, MsgFlags::empty(), None).unwrap();
        let reply = monitor.receive().await.unwrap();
        match words {
            None => assert_eq!(reply, json!({"return": {}})),
            Some(words) => assert!(reply["error"]["desc"].as_str().unwrap().starts_with(words), "{reply}"),
        }
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

#[tokio::test(flavor = "multi_thread")]
async fn one_monitor_too_many_is_told_so_and_room_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (dir.path().join("qmp"), dir.path().join("other"));
    let (handle, control) = new_vm();
    let sockets = [&path, &other].map(|path| ListeningSocket::bind(path).unwrap());
    let _server = Server::start(&handle, sockets.into(), Greet::AtOnce).unwrap();
    let _plays = tokio::spawn(play(control));
    let mut held = Vec::new();
    for _ in 0..MAX_MONITORS {
        held.push(Monitor::negotiated(&path).await);
    }
    let mut late = UnixStream::connect(&path).await.unwrap();
    let mut heard = Vec::new();
    timeout(PATIENCE, late.read_to_end(&mut heard)).await.unwrap().unwrap();
    let heard: Value = serde_json::from_slice(&heard).unwrap();
    assert_eq!(heard["error"]["class"], "GenericError");
    let (full, free) = tokio::task::spawn_blocking({
        let path = path.clone();
        move || (Client::connect(&path, PATIENCE).map(drop), Client::connect(&other, PATIENCE).map(drop))
    })
    .await
    .unwrap();
    assert!(matches!(&full, Err(ClientError::Refused(e)) if e.desc.contains("32 monitors")), "{full:?}");
    assert!(free.is_ok(), "a full socket is no other's matter: {free:?}");
    held.pop();
    timeout(PATIENCE, async {
        // The server notices the free place when it reads the end of that stream.
        loop {
            let mut stream = BufReader::new(UnixStream::connect(&path).await.unwrap()).lines();
            if stream.next_line().await.unwrap().unwrap().contains("QMP") {
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
    let server = Server::start(&handle, vec![ListeningSocket::bind(&path).unwrap()], Greet::AtOnce).unwrap();
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

/// What a peer of the client may do instead of answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    Silence,
    Blanks,
    Events,
    EventsAfterQuit,
}

/// Tells `lie` to one client, until it has gone.
fn tell(listener: &std::os::unix::net::UnixListener, lie: Lie) {
    use std::io::{Read, Write};
    let greeting = Greeting::ours();
    let greeting = format!("{}\n", serde_json::to_string(&greeting).unwrap());
    let event = "{\"event\":\"STOP\",\"timestamp\":{\"seconds\":1,\"microseconds\":1}}\n";
    let done = "{\"return\":{}}\n";
    let (first, then) = match lie {
        Lie::Silence => (greeting, ""),
        Lie::Blanks => (greeting, " "),
        Lie::Events => (greeting, event),
        Lie::EventsAfterQuit => (greeting + done + done, event),
    };
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(first.as_bytes()).unwrap();
    if then.is_empty() {
        let _ = stream.read_to_end(&mut Vec::new());
    }
    while !then.is_empty() && stream.write_all(then.as_bytes()).is_ok() {
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_peer_that_lies_holds_the_client_no_longer_than_its_patience() {
    let patience = Duration::from_millis(500);
    let dir = tempfile::tempdir().unwrap();
    for lie in [Lie::Silence, Lie::Blanks, Lie::Events, Lie::EventsAfterQuit] {
        let path = dir.path().join(format!("{lie:?}"));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let told = std::thread::spawn(move || tell(&listener, lie));
        let (done, result) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let asked = Client::connect(&path, patience).and_then(|mut client| {
                client.execute::<Empty>("quit")?;
                assert_eq!(lie, Lie::EventsAfterQuit);
                client.wait_for_end(patience)
            });
            done.send(asked)
        });
        let asked = result.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{lie:?} holds it"));
        assert!(matches!(&asked, Err(ClientError::Lost(e)) if e.kind() == ErrorKind::TimedOut), "{lie:?}: {asked:?}");
        told.join().unwrap();
    }
}

#[test]
fn a_peer_that_is_stopped_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stopped");
    let _deaf = ListeningSocket::bind(&path).unwrap();
    // As many as wait for accept(2) at most.
    let _queue: Vec<_> = (0..=16).map(|_| std::os::unix::net::UnixStream::connect(&path).unwrap()).collect();
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(Client::connect(&path, Duration::from_millis(500)).map(drop)));
    let asked = result.recv_timeout(PATIENCE).expect("connect(2) waits");
    assert!(matches!(&asked, Err(ClientError::Lost(e)) if e.kind() == ErrorKind::TimedOut), "{asked:?}");
}
