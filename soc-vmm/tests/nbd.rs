//! NBD with QEMU's own programs at the other end.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use soc_vmm::block::{BlockBackend, ImageSpec, open};
use soc_vmm::nbd::{Address, Export, Exports, NbdDisk};
use testbed::debian::instruments;
use testbed::process::Child;
use tokio::sync::broadcast;

const SIZE: usize = 8 << 20;
/// How long a program may take to listen.
const LIMIT: Duration = Duration::from_secs(60);

fn content() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..SIZE).map(|place| (place % 251) as u8 ^ (place >> 16) as u8).collect();
    bytes[3 << 20..5 << 20].fill(0);
    bytes
}

fn qemu(program: &str) -> Command {
    instruments().expect("QEMU's programs").command(&format!("usr/bin/{program}"))
}

fn succeeds(output: &Output) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
}

/// A raw image of that content.
fn image(path: &Path, bytes: &[u8]) -> Arc<dyn BlockBackend> {
    std::fs::write(path, bytes).unwrap();
    open(&ImageSpec::new(path)).unwrap()
}

#[test]
fn qemus_clients_read_and_write_what_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let (events, _) = broadcast::channel(16);
    let exports = Arc::new(Exports::new(events.downgrade()));
    let shown = |id: &str, writable, image| Export::new(id.into(), id.into(), format!("{id}-node"), writable, image);
    let socket = dir.path().join("socket");
    exports.open(&Address::Unix(socket.clone()), None).unwrap();
    exports.add(shown("written", true, image(&dir.path().join("a"), &vec![9; SIZE]))).unwrap();
    exports.add(shown("read", false, image(&dir.path().join("b"), &content()))).unwrap();
    let uri = |name: &str| format!("nbd+unix:///{name}?socket={}", socket.display());

    let copy = dir.path().join("copy");
    succeeds(&qemu("qemu-img").args(["convert", "-f", "raw", "-O", "raw", &uri("read")]).arg(&copy).output().unwrap());
    assert!(std::fs::read(&copy).unwrap() == content());
    let compare = ["compare", "-f", "raw", "-F", "raw", &uri("read")];
    succeeds(&qemu("qemu-img").args(compare).arg(&copy).output().unwrap());
    succeeds(
        &qemu("qemu-img")
            .args(["convert", "-n", "-f", "raw", "-O", "raw"])
            .arg(&copy)
            .arg(uri("written"))
            .output()
            .unwrap(),
    );
    assert!(std::fs::read(dir.path().join("a")).unwrap() == content());

    let commands = [
        "write -f -P 0x42 512 1M",
        "write -z -u 2M 64k",
        "discard 4M 64k",
        "flush",
        "read -P 0x42 512 1M",
        "read -P 0 2M 64k",
    ];
    let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    let done = qemu("qemu-io").args(["-f", "raw"]).args(commands).arg(uri("written")).output().unwrap();
    succeeds(&done);
    assert!(!String::from_utf8_lossy(&done.stdout).contains("failed"), "{done:?}");
    assert!(std::fs::read(dir.path().join("a")).unwrap()[512..512 + (1 << 20)].iter().all(|byte| *byte == 0x42));
    let refused = qemu("qemu-io").args(["-f", "raw", "-c", "write 0 512"]).arg(uri("read")).output().unwrap();
    assert!(!refused.status.success(), "{refused:?}");
    exports.end();
    assert!(std::fs::read(dir.path().join("b")).unwrap() == content());
}

#[test]
fn what_qemus_server_shows_is_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (file, socket) = (dir.path().join("file"), dir.path().join("socket"));
    std::fs::write(&file, content()).unwrap();
    let mut command = qemu("qemu-nbd");
    command.args(["-f", "raw", "-x", "disk", "-t", "-k"]).arg(&socket).arg(&file).stdout(Stdio::null());
    let _server = Child::spawn(command).unwrap();
    let address = Address::Unix(socket);
    let end = Instant::now() + LIMIT;
    let disk = loop {
        match NbdDisk::connect(&address, "disk", false) {
            Ok(disk) => break disk,
            Err(e) => assert!(Instant::now() < end, "{e:?}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(disk.size(), SIZE as u64);
    let mut found = vec![0; SIZE];
    disk.read_at(&mut found, 0).unwrap();
    assert!(found == content());
    disk.write_at(&[0x77; 70_000], 1024).unwrap();
    disk.write_zeroes(6 << 20, 1 << 20, true).unwrap();
    disk.discard(0, 512).unwrap();
    disk.flush().unwrap();
    let written = std::fs::read(&file).unwrap();
    assert!(written[1024..71_024].iter().all(|byte| *byte == 0x77));
    assert!(written[6 << 20..7 << 20].iter().all(|byte| *byte == 0));
}
