use std::collections::VecDeque;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::*;
use crate::bus::Wake;
use crate::control::{VmControl, VmInfo, channel};
use crate::devices::{InputQueue, OutputQueue, input_pipe, output_pipe};

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct NoDevice;

impl Wake for NoDevice {
    fn wake(&self) {}
}

/// The device's ends, and the console at the others.
struct Joined {
    output: OutputQueue,
    input: InputQueue,
    console: Attached,
    _control: VmControl,
}

fn join(backend: SerialBackend) -> Joined {
    let (vm, control) = channel(VmInfo { name: "t".into(), cpus: 1, memory: 1 << 20, function: "local".into() });
    let (output, reader) = output_pipe(1 << 10, Arc::new(NoDevice));
    let (writer, input) = input_pipe(1 << 10, Arc::new(NoDevice));
    let console = backend.attach(reader, writer, &vm).unwrap();
    console.begin().unwrap();
    Joined { output, input, console, _control: control }
}

impl Joined {
    /// Sends as a device does that looks for room.
    async fn send(&mut self, bytes: &[u8]) {
        for byte in bytes {
            timeout(PATIENCE, async {
                while !self.output.push(*byte) {
                    tokio::task::yield_now().await;
                }
            })
            .await
            .expect("the console takes nothing");
        }
    }

    async fn receive(&mut self, count: usize) -> Vec<u8> {
        let mut got = VecDeque::new();
        timeout(PATIENCE, async {
            while got.len() < count {
                let wanted = count - got.len();
                self.input.take(wanted, &mut got);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .expect("no input comes");
        got.into()
    }

    /// The VM ends.
    async fn finish(self) {
        drop((self.output, self.input));
        timeout(PATIENCE, self.console.finish()).await.unwrap();
    }
}

fn text(lines: usize) -> Vec<u8> {
    (0..lines).flat_map(|n| format!("line {n}\r\n").into_bytes()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_has_every_byte_when_the_vm_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::fs::write(&path, "of an earlier run").unwrap();
    let backend = SerialBackend::open(&SerialSpec::File(path.clone())).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"of an earlier run", "emptied before its VM runs");
    let mut joined = join(backend);
    joined.send(&text(5000)).await;
    joined.finish().await;
    assert!(std::fs::read(path).unwrap() == text(5000));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_to_write_to_never_holds_the_guest_up() {
    let dir = tempfile::tempdir().unwrap();
    let full = SerialSpec::File("/dev/full".into());
    let unix = SerialSpec::Unix(dir.path().join("s"));
    for spec in [SerialSpec::Null, SerialSpec::Pty, unix, full] {
        let mut joined = join(SerialBackend::open(&spec).unwrap());
        joined.send(&text(5000)).await;
        joined.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_a_socket_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut joined = join(SerialBackend::open(&SerialSpec::Unix(path.clone())).unwrap());
    for round in 0..3 {
        let mut client = UnixStream::connect(&path).await.unwrap();
        client.write_all(b"typed").await.unwrap();
        assert_eq!(joined.receive(5).await, b"typed", "round {round}");
        joined.send(b"answer").await;
        let mut answer = [0; 6];
        timeout(PATIENCE, client.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(&answer, b"answer");
    }
    let mut last = UnixStream::connect(&path).await.unwrap();
    last.write_all(b"!").await.unwrap();
    joined.receive(1).await;
    joined.send(b"power down").await;
    joined.finish().await;
    let mut rest = Vec::new();
    timeout(PATIENCE, last.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, b"power down");
    assert!(!path.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deaf_client_fills_the_queue_and_is_left_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut joined = join(SerialBackend::open(&SerialSpec::Unix(path.clone())).unwrap());
    let mut deaf = UnixStream::connect(&path).await.unwrap();
    deaf.write_all(b"!").await.unwrap();
    joined.receive(1).await;
    let mut sent = 0_u64;
    timeout(PATIENCE, async {
        let mut refused = 0;
        while refused < 100 {
            if joined.output.push(b'x') {
                (sent, refused) = (sent + 1, 0);
            } else {
                refused += 1;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    })
    .await
    .expect("the queue has no end");
    assert!(sent > 1 << 10);
    joined.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pseudo_terminal_is_opened_again_and_again() {
    let backend = SerialBackend::open(&SerialSpec::Pty).unwrap();
    let path = backend.pty_path().unwrap().to_owned();
    let mut joined = join(backend);
    for round in 0..3 {
        let mut slave = tokio::fs::File::from_std(
            std::fs::OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NOCTTY).open(&path).unwrap(),
        );
        slave.write_all(b"\x03\x01ab\r").await.unwrap();
        slave.flush().await.unwrap();
        assert_eq!(joined.receive(5).await, b"\x03\x01ab\r", "round {round}: the line is not raw");
        joined.send(b"answer\n").await;
        let mut heard = Vec::new();
        while !heard.ends_with(b"answer\n") {
            heard.push(timeout(PATIENCE, slave.read_u8()).await.unwrap().unwrap());
        }
        drop(slave);
        // Until the console has noticed, output waits for the next reader; then it vanishes.
        joined.send(&text(2000)).await;
    }
    joined.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_of_a_pseudo_terminal_gets_the_last_words() {
    let backend = SerialBackend::open(&SerialSpec::Pty).unwrap();
    let path = backend.pty_path().unwrap().to_owned();
    let mut joined = join(backend);
    let mut slave =
        std::fs::OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NOCTTY).open(&path).unwrap();
    std::io::Write::write_all(&mut slave, b"!").unwrap();
    joined.receive(1).await;
    joined.send(b"power down").await;
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        let mut last = [0; 10];
        std::io::Read::read_exact(&mut slave, &mut last).map(|()| last)
    });
    joined.finish().await;
    assert_eq!(reader.join().unwrap().unwrap(), *b"power down");
}

#[test]
fn what_cannot_be_opened_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("no/such/dir");
    assert!(
        matches!(SerialBackend::open(&SerialSpec::File(missing.clone())), Err(ConsoleError::Create(path, _)) if path == missing)
    );
    assert!(matches!(SerialBackend::open(&SerialSpec::Unix(missing.clone())), Err(ConsoleError::Listen(_))));
    assert!(matches!(DebugconBackend::open(&DebugconSpec::File(missing)), Err(ConsoleError::Create(..))));
}

#[test]
fn a_fifo_is_a_console_while_somebody_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let open = || DebugconBackend::open(&DebugconSpec::File(path.clone()));
    assert!(matches!(open(), Err(ConsoleError::NoReader(nobody)) if nobody == path));
    let _reader = std::fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&path).unwrap();
    let backend = open().unwrap();
    let flags = fcntl(backend.file().unwrap(), FcntlArg::F_GETFL).unwrap();
    assert!(!OFlag::from_bits_truncate(flags).contains(OFlag::O_NONBLOCK));
}
