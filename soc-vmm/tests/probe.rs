//! The probe: `-machine none`, as libvirt starts it.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use soc_vmm::qmp::{Client, ClientError};

const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon's process id; it is killed at the end.
struct Daemon(Pid);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
    }
}

impl Daemon {
    fn is_there(&self) -> bool {
        kill(self.0, None) != Err(Errno::ESRCH)
    }
}

/// Starts it as libvirt does, with pipes that it must let go of, and with a configuration of its own.
fn probe(dir: &Path, configuration: &str) -> (Daemon, String) {
    let (socket, pid_file, file) = (dir.join("qmp.monitor"), dir.join("qmp.pid"), dir.join("soc-vmm.toml"));
    std::fs::write(&file, configuration).unwrap();
    let mut front = Command::new(env!("CARGO_BIN_EXE_soc-vmm"))
        .args(["-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none,accel=kvm:tcg"])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
        .args(["-pidfile", pid_file.to_str().unwrap(), "-daemonize"])
        .env("OUTBOARD_CONFIG", file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // To the end: it comes only when nobody has the pipes any more.
    let mut said = String::new();
    front.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    front.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    let status = front.wait().unwrap();
    assert!(status.success(), "{status}: {said}");
    let pid = std::fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
    assert_ne!(pid, front.id() as i32);
    (Daemon(Pid::from_raw(pid)), said)
}

fn ends(daemon: &Daemon, dir: &Path) {
    kill(daemon.0, Signal::SIGTERM).unwrap();
    let start = Instant::now();
    while daemon.is_there() && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!daemon.is_there(), "it ignores SIGTERM");
    for left in ["qmp.monitor", "qmp.pid"] {
        assert!(!dir.join(left).exists(), "{left}");
    }
}

#[test]
fn a_control_plane_learns_what_there_is_and_no_function_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let (daemon, said) = probe(dir.path(), "");
    let mut monitor = Client::connect(&dir.path().join("qmp.monitor"), PATIENCE).unwrap();
    let ask = |monitor: &mut Client, command: &str| monitor.execute::<Value>(command).unwrap();
    assert_eq!(ask(&mut monitor, "query-target"), json!({ "arch": "x86_64" }));
    let machines = ask(&mut monitor, "query-machines");
    assert_eq!((&machines[0]["name"], &machines[0]["alias"]), (&json!("pc-q35-7.2"), &json!("q35")));
    let kvm = ask(&mut monitor, "query-kvm");
    let has_kvm = Path::new("/dev/kvm").exists();
    assert_eq!(kvm, json!({ "enabled": has_kvm, "present": has_kvm }), "{said}");
    if has_kvm {
        assert_eq!(said, "");
        let models = ask(&mut monitor, "query-cpu-definitions");
        let models = models.as_array().unwrap();
        assert_eq!((&models[0]["name"], &models[0]["unavailable-features"]), (&json!("host"), &json!([])));
        assert!(models.iter().any(|model| model["name"] == "Skylake-Server"));
    }
    let properties = |monitor: &mut Client, typename: &str| {
        monitor.execute_with::<Value>("device-list-properties", &json!({ "typename": typename }))
    };
    assert!(properties(&mut monitor, "virtio-blk-pci").unwrap().as_array().unwrap().len() > 10);
    let absent = properties(&mut monitor, "usb-host").unwrap_err();
    assert!(matches!(absent, ClientError::Refused(e) if e.class == soc_vmm::qmp::ErrorClass::DeviceNotFound));
    let refused = monitor.execute::<Value>("cont").unwrap_err();
    assert!(refused.to_string().contains("-machine none"), "{refused}");
    ends(&daemon, dir.path());
}

#[test]
fn a_host_that_can_t_be_asked_has_no_kvm_to_offer() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = dir.path().join("nobody");
    let pool = format!("[pool]\nsocket = {nobody:?}\nfunctions = [\"unix:/nowhere\"]\n");
    let (daemon, said) = probe(dir.path(), &pool);
    assert!(said.contains("no pool serves at"), "{said}");
    let mut monitor = Client::connect(&dir.path().join("qmp.monitor"), PATIENCE).unwrap();
    assert_eq!(monitor.execute::<Value>("query-kvm").unwrap(), json!({ "enabled": false, "present": false }));
    // libvirtd 9.0 crashes where there is none.
    let models = monitor.execute::<Value>("query-cpu-definitions").unwrap();
    assert_eq!((models.as_array().unwrap().len(), &models[0]["name"]), (1, &json!("host")));
    ends(&daemon, dir.path());
}

#[test]
fn a_daemon_that_fails_fails_who_started_it() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("there-is-no-such-directory/s");
    let ended = Command::new(env!("CARGO_BIN_EXE_soc-vmm"))
        .args(["-machine", "none", "-daemonize", "-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
        .output()
        .unwrap();
    assert_eq!(ended.status.code(), Some(2));
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(said.lines().count() == 1 && said.contains("can't listen on"), "{said}");
}
