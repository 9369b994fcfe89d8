//! Programs run with all that they may leave behind in sight: files, processes, what they said.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use payloads::Payload;
use tempfile::TempDir;

use crate::program;

/// Longer than anything may take that is waited for here, on a busy machine.
const MOST: Duration = Duration::from_secs(120);

/// Marks the processes of a trial: those that they start inherit it.
const MARK: &str = "OUTBOARD_TRIAL";

/// A directory for a test's programs, and a mark by which they and their children are found.
#[derive(Debug)]
pub struct Trial {
    directory: TempDir,
    mark: String,
    /// The process id of each program whose VM, if it has one, is named after it.
    started: Mutex<Vec<Option<u32>>>,
}

/// A program of a trial; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stderr: PathBuf,
}

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it said on standard error.
    pub stderr: String,
}

impl Default for Trial {
    fn default() -> Self {
        static TRIALS: AtomicU32 = AtomicU32::new(0);
        let mark = format!("{}-{}", std::process::id(), TRIALS.fetch_add(1, Ordering::Relaxed));
        let directory = TempDir::new().expect("a temporary directory");
        std::fs::create_dir(directory.path().join("run")).expect("a runtime directory");
        Self { directory, mark, started: Mutex::default() }
    }
}

impl Trial {
    /// A path in the trial's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The same, as text.
    pub fn at(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Writes a file and gives its path.
    pub fn file(&self, name: &str, bytes: &[u8]) -> String {
        std::fs::write(self.path(name), bytes).expect("a file is written");
        self.at(name)
    }

    /// Starts `soc-vmm ARGS…`.
    pub fn soc_vmm(&self, args: &[&str]) -> Running {
        self.start(Command::new(program("soc-vmm")).args(args))
    }

    /// Starts a VM of `payload` with 64 MiB; its monitor listens on `NAME.qmp` in the trial's directory.
    pub fn vm(&self, name: &str, payload: &Payload, more: &[&str]) -> Running {
        let (option, bytes) = payload.file();
        let image = self.file(&format!("{name}.image"), &bytes);
        let qmp = format!("unix:{}", self.at(&format!("{name}.qmp")));
        let cpus = payload.vcpus.to_string();
        let debugcon = format!("file:{}", self.at(&format!("{name}.debugcon")));
        let own = self.name(name);
        let named: &[&str] = if more.contains(&"--name") { &[] } else { &["--name", &own] };
        let all = ["run", option, &image, "--cpus", &cpus, "--memory", "64M", "--serial", "null", "--debug-exit"];
        self.soc_vmm(&[&all[..], &["--qmp", &qmp, "--debugcon", &debugcon], named, more].concat())
    }

    /// What `soc-vmm status --json` says of a VM of [`Trial::vm`]; `None` while it doesn't answer.
    pub fn status(&self, name: &str) -> Option<serde_json::Value> {
        let mut command = Command::new(program("soc-vmm"));
        let output = command.args(["status", "--json", "--qmp", &self.at(&format!("{name}.qmp"))]).output();
        serde_json::from_slice(&output.expect("soc-vmm starts").stdout).ok()
    }

    /// Waits until a VM of [`Trial::vm`] is in a state.
    ///
    /// # Panics
    /// It takes too long.
    pub fn becomes(&self, name: &str, state: &str) {
        let start = Instant::now();
        while self.status(name).is_none_or(|status| status["status"] != state) {
            let last = self.started.lock().expect("no panic holds it").len() - 1;
            let said = std::fs::read_to_string(self.path(&format!("stderr-{last}"))).unwrap_or_default();
            assert!(start.elapsed() < MOST, "{name} never is {state}; who started last said: {said}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How many port accesses of a VM were served so far.
    ///
    /// # Panics
    /// The VM doesn't answer.
    pub fn exits(&self, name: &str) -> u64 {
        let status = self.status(name).expect("the VM answers");
        status["counters"]["exits.pio"].as_u64().expect("a counter")
    }

    /// Starts `host-kvm-shim ARGS…`.
    pub fn shim(&self, args: &[&str]) -> Running {
        self.start(Command::new(program("host-kvm-shim")).args(args))
    }

    /// Starts a shim that listens on `NAME` in the trial's directory, and waits until it does.
    pub fn listening_shim(&self, name: &str, more: &[&str]) -> Running {
        let function = format!("unix:{}", self.at(name));
        let shim = self.shim(&[&["--function", &function], more].concat());
        wait_until("the shim listens", MOST, || is_listened_on(&self.path(name)));
        shim
    }

    /// What its programs have said so far, in the order in which they were started.
    pub fn said(&self) -> String {
        let programs = self.started.lock().expect("no panic holds it").len();
        let text = |program| std::fs::read(self.path(&format!("stderr-{program}"))).unwrap_or_default();
        (0..programs).map(|program| format!("{program}: {}\n", String::from_utf8_lossy(&text(program)))).collect()
    }

    /// Starts a command as a program of this trial.
    pub fn start(&self, command: &mut Command) -> Running {
        let mut started = self.started.lock().expect("no panic holds it");
        let stderr = self.path(&format!("stderr-{}", started.len()));
        let child = command
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("RUST_BACKTRACE", "1")
            .env(MARK, &self.mark)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr).expect("a file for standard error"))
            .spawn()
            .expect("the program starts");
        // A process id comes back, and a killed VM's files stay: nothing of that name belongs to a VM that has another.
        started.push(command.get_args().all(|arg| arg != "--name").then(|| child.id()));
        Running { child, stderr }
    }

    /// Process ids of the trial's programs and of those that they started.
    pub fn processes(&self) -> Vec<u32> {
        let wanted = format!("{MARK}={}", self.mark);
        let all = std::fs::read_dir("/proc").expect("/proc").flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let marked = |pid: &u32| {
            // One that ends meanwhile, or has ended and waits for its parent, is none of ours any more.
            let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environ.split(|&b| b == 0).any(|variable| variable == wanted.as_bytes())
        };
        pids.filter(marked).collect()
    }

    /// # Panics
    /// A process, a socket or a state directory is left behind.
    pub fn leaves_nothing(&self, what: &str) {
        // A process that was killed goes a moment after its parent knows.
        wait_until(&format!("{what}: every process is gone"), MOST, || self.processes().is_empty());
        let left = self.left_in_runtime_directory();
        assert!(left.is_empty(), "{what} left {left:?}");
    }
}

impl Trial {
    /// A VM's name that no other test uses: root's VMs are all in one place.
    pub fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.mark)
    }

    /// Control sockets and state directories of the trial's VMs that are there.
    fn left_in_runtime_directory(&self) -> Vec<PathBuf> {
        let directory = match nix::unistd::geteuid().is_root() {
            true => PathBuf::from("/run/outboard"),
            false => self.path("run/outboard"),
        };
        let started = self.started.lock().expect("no panic holds it");
        let unnamed = started.iter().flatten().map(|pid| format!("vm-{pid}."));
        let ours: Vec<_> = unnamed.chain([format!("{}-", self.mark)]).collect();
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
        let is_ours = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            ours.iter().any(|prefix| name.starts_with(prefix))
        };
        entries.filter(is_ours).collect()
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // What killed programs could not remove.
        for path in self.left_in_runtime_directory() {
            let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        }
    }
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it said so far.
    pub fn stderr(&self) -> String {
        std::fs::read(&self.stderr).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("the program is there");
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().expect("the program can be waited for").is_none()
    }

    /// Waits until it has said `text`.
    ///
    /// # Panics
    /// It ends first, or it takes longer than `most`.
    pub fn says(&mut self, text: &str, most: Duration) {
        let start = Instant::now();
        while !self.stderr().contains(text) {
            let runs = self.runs();
            assert!(runs || self.stderr().contains(text), "it ended before it said {text:?}: {}", self.stderr());
            assert!(start.elapsed() < most, "it never said {text:?}: {}", self.stderr());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It takes longer than `most`.
    pub fn wait(&mut self, most: Duration) -> Ended {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the program can be waited for") {
                return Ended { status, stderr: self.stderr() };
            }
            assert!(start.elapsed() < most, "{} does not end within {most:?}: {}", self.child.id(), self.stderr());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The number after `field` in its /proc/PID/status: kibibytes, or a count.
    pub fn proc_status(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }

    /// Processor time that it has taken, user and system.
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        // Fields 14 and 15, behind the name in parentheses, in ticks of 10 ms.
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
        Duration::from_millis(fields.filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>() * 10)
    }

    /// The processes that it started and that are still there.
    pub fn children(&self) -> Vec<u32> {
        let pid = self.child.id();
        let of = |thread: PathBuf| std::fs::read_to_string(thread.join("children")).unwrap_or_default();
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        threads
            .flat_map(|thread| of(thread.path()).split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .filter_map(|child| child.parse().ok())
            .collect()
    }

    /// What it holds: descriptors and threads.
    fn holds(&self) -> (usize, u64) {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).map_or(0, Iterator::count);
        (descriptors, self.proc_status("Threads"))
    }

    /// What it holds once that changes no more, as when it has started and waits.
    pub fn holds_at_rest(&self) -> (usize, u64) {
        let mut last = self.holds();
        loop {
            std::thread::sleep(Duration::from_millis(200));
            let now = self.holds();
            if now == last {
                return now;
            }
            last = now;
        }
    }

    /// # Panics
    /// It doesn't come back to holding `what`.
    pub fn holds_again(&self, what: (usize, u64)) {
        let start = Instant::now();
        while self.holds() != what {
            let now = self.holds();
            assert!(start.elapsed() < MOST, "descriptors and threads: {now:?}, at first {what:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether somebody listens on a path. The socket that a killed program left there is none; nor is one that was made this moment.
pub fn is_listened_on(path: &Path) -> bool {
    // Number, references, protocol, flags, type, state, inode, path; flag 0x10000: it listens.
    let sockets = std::fs::read_to_string("/proc/net/unix").expect("/proc");
    sockets.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(3);
        fields.next() == Some("00010000") && fields.last().map(Path::new) == Some(path)
    })
}

/// # Panics
/// The program did not end with `status` and one line that holds every one of `words`.
pub fn one_line(what: &str, ended: &Ended, status: i32, words: &[&str]) {
    free_of_trouble(what, ended);
    assert_eq!(ended.status.code(), Some(status), "{what}: {}", ended.stderr);
    let lines: Vec<_> = ended.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{what} is told in {} lines: {}", lines.len(), ended.stderr);
    for word in words {
        assert!(lines[0].contains(word), "{what}: no {word:?} in {:?}", lines[0]);
    }
}

/// # Panics
/// The program was killed by a signal, or panicked.
pub fn free_of_trouble(what: &str, ended: &Ended) {
    assert_eq!(ended.status.signal(), None, "{what}: {}", ended.stderr);
    assert!(!ended.stderr.contains("panicked") && !ended.stderr.contains("backtrace"), "{what}: {}", ended.stderr);
}

/// # Panics
/// The condition does not come about in time.
pub fn wait_until(what: &str, most: Duration, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < most, "{what}: not within {most:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
