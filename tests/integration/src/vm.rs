//! A VM run by `soc-vmm run`, as a user would.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use payloads::Payload;
use tempfile::TempDir;

use crate::program;

/// No VM of a test lives longer: a hang is a failure, not a wait.
const LIMIT: Duration = Duration::from_secs(120);

/// A running soc-vmm with files of its own, ended when dropped.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    directory: TempDir,
}

/// How a VM ended.
#[derive(Debug)]
pub struct Ended {
    /// soc-vmm's exit status.
    pub status: ExitStatus,
    /// What the guest wrote to the debug console.
    pub debugcon: String,
    /// What it wrote to the serial port.
    pub serial: String,
    /// What soc-vmm said.
    pub stderr: String,
}

impl Vm {
    /// Runs a payload with the test devices, on as many vCPUs as it wants and in 64 MiB unless `more` says otherwise.
    pub fn payload(payload: &Payload, more: &[&str]) -> Self {
        Self::started(&["run"], None, payload, more)
    }

    /// The same by `soc-vmm clone` of this one, which is called so.
    pub fn cloned(&self, name: &str, payload: &Payload, more: &[&str]) -> Self {
        Self::started(&["clone", name], Some(self.directory.path()), payload, more)
    }

    fn started(command: &[&str], runtime: Option<&Path>, payload: &Payload, more: &[&str]) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let (option, bytes) = payload.file();
        let image = directory.path().join(payload.name);
        std::fs::write(&image, bytes).expect("the payload is written");
        let cpus = payload.vcpus.to_string();
        let image = image.to_str().expect("a UTF-8 path").to_owned();
        let mut args = vec![option, &image, "--debug-exit"];
        let given = |option| more.contains(&option);
        if !given("--cpus") {
            args.extend(["--cpus", &cpus]);
        }
        if !given("--memory") && !given("--numa") {
            args.extend(["--memory", "64M"]);
        }
        args.extend(more);
        Self::start_in(directory, command, runtime, &args)
    }

    /// Runs `soc-vmm run ARGS…`; serial port and debug console go to files.
    pub fn run(args: &[&str]) -> Self {
        Self::start_in(TempDir::new().expect("a temporary directory"), &["run"], None, args)
    }

    fn start_in(directory: TempDir, command: &[&str], runtime: Option<&Path>, args: &[&str]) -> Self {
        let at = |name: &str| directory.path().join(name).display().to_string();
        let child = Command::new(program("soc-vmm"))
            .args(command)
            .args(["--serial", &format!("file:{}", at("serial"))])
            .args(["--debugcon", &format!("file:{}", at("debugcon"))])
            .args(["--qmp", &format!("unix:{}", at("qmp"))])
            .args(args)
            .env("XDG_RUNTIME_DIR", runtime.unwrap_or(directory.path()))
            .env("TMPDIR", directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("soc-vmm starts");
        Self { child, directory }
    }

    /// A file of this VM: `serial`, `debugcon`, `qmp`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// soc-vmm's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process id of the shim that it has started: of all its threads one has.
    ///
    /// # Panics
    /// It has none.
    pub fn shim(&self) -> u32 {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("its threads");
        let children = |thread: std::io::Result<std::fs::DirEntry>| {
            let list = std::fs::read_to_string(thread.ok()?.path().join("children")).ok()?;
            list.split_whitespace().next()?.parse().ok()
        };
        threads.filter_map(children).next().expect("it has a shim of its own")
    }

    /// Waits until the debug console holds `text`.
    ///
    /// # Panics
    /// The VM ends first, or it takes too long.
    pub fn debugcon_has(&mut self, text: &str) {
        self.file_has("debugcon", text);
    }

    /// Waits until the serial port has written `text`.
    ///
    /// # Panics
    /// The VM ends first, or it takes too long.
    pub fn serial_has(&mut self, text: &str) {
        self.file_has("serial", text);
    }

    fn file_has(&mut self, name: &str, text: &str) {
        let path = self.file(name);
        self.wait_until(&format!("{name} has {text:?}"), |_| read(&path).contains(text));
    }

    /// Waits until `condition` holds.
    ///
    /// # Panics
    /// The VM ends first, or it takes too long.
    pub fn wait_until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            let ended = self.child.try_wait().expect("the child can be waited for");
            if ended.is_some() && !condition(self) {
                let stderr = self.stderr();
                panic!("soc-vmm ended ({ended:?}) before {what}: {stderr}\n{}", read(&self.file("debugcon")));
            }
            assert!(start.elapsed() < LIMIT, "{what} did not come about; debugcon: {}", read(&self.file("debugcon")));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs one of soc-vmm's commands on this VM, such as `pause`; its standard output.
    ///
    /// # Panics
    /// It fails.
    pub fn command(&self, words: &[&str]) -> String {
        self.try_command(words).unwrap_or_else(|why| panic!("{words:?}: {why}"))
    }

    /// Runs one of soc-vmm's commands on this VM; its standard output.
    ///
    /// # Errors
    /// It fails: its standard error.
    pub fn try_command(&self, words: &[&str]) -> Result<String, String> {
        let qmp = self.file("qmp").display().to_string();
        self.soc_vmm(&[words, &["--qmp", &qmp]].concat())
    }

    /// Runs soc-vmm where VMs of this one's user are; its standard output.
    ///
    /// # Errors
    /// It fails: its standard error.
    pub fn soc_vmm(&self, words: &[&str]) -> Result<String, String> {
        let output = Command::new(program("soc-vmm"))
            .args(words)
            .env("XDG_RUNTIME_DIR", self.directory.path())
            .output()
            .expect("soc-vmm starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Waits for the VM's end.
    ///
    /// # Panics
    /// It takes too long.
    pub fn wait(mut self) -> Ended {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
                break status;
            }
            if start.elapsed() > LIMIT {
                let _ = self.child.kill();
                panic!("the VM did not end; debugcon: {}", read(&self.file("debugcon")));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let stderr = self.stderr();
        Ended { status, debugcon: read(&self.file("debugcon")), serial: read(&self.file("serial")), stderr }
    }

    fn stderr(&mut self) -> String {
        let mut text = String::new();
        if let Some(stderr) = &mut self.child.stderr {
            // What is no UTF-8 is no message of ours.
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::io::stderr().flush();
    }
}

fn read(path: &Path) -> String {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}
