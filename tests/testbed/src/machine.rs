//! A running QEMU machine whose first process is ours.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use testbed_init::{
    Answer, CONFIG_PATH, CONTROL_PORT, Config, Ended, Inventory, Memory, Module, PciId, Program, Request, Start,
    Status, Thread,
};

use crate::busy;
use crate::console::Console;
use crate::control::{CallError, Control};
use crate::fetch::{self, Kernel, QemuRoot};
use crate::initramfs::Initramfs;
use crate::process::{Child, CommandError};
use crate::{build, guest, modules, paths, scratch};

/// How long a machine may take to its first line of control: seconds on an idle host, more where two cores are shared.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// How long an ordinary call may take, where two cores are shared.
const CALL_LIMIT: Duration = Duration::from_secs(90);

/// In [`Machine::epitaph`]: a processor of the machine met a triple fault. No user space does that to a kernel; QEMU's TCG does
/// (docs/testbed.md).
pub const SHUT_DOWN: &str = "a triple fault of its processor";
/// In [`Machine::last_words`]: its processors are there, and its user space does nothing. A kernel under TCG comes to that by itself
/// (docs/testbed.md); what each of QEMU's threads did is told with it.
pub const SILENT: &str = "runs and doesn't answer";
/// How QEMU logs one.
const TRIPLE_FAULT: &str = "Triple fault";

/// Why a machine can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A part of it isn't there.
    #[error(transparent)]
    Fetch(#[from] fetch::Error),
    /// A program for it can't be built.
    #[error("building for the testbed")]
    Build(#[from] build::Error),
    /// The guest's image can't be made.
    #[error(transparent)]
    Guest(#[from] guest::Error),
    /// A kernel module for it isn't there.
    #[error(transparent)]
    Modules(#[from] modules::Error),
    /// QEMU can't be started.
    #[error(transparent)]
    Start(#[from] CommandError),
    /// A file or socket of it can't be used.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It didn't come up, or came down.
    #[error("{name} {what}; its console's end:\n{console}\n{said}")]
    Dead {
        /// Which machine.
        name: String,
        /// What happened.
        what: String,
        /// The last lines of its console.
        console: String,
        /// What runs it wrote to its own standard error.
        said: String,
    },
    /// A call failed.
    #[error("{name}: {request}")]
    Call {
        /// Which machine.
        name: String,
        /// What was asked.
        request: String,
        /// Why.
        source: CallError,
    },
}

impl Error {
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}

/// What every machine has, whatever its architecture.
#[derive(Clone, Debug)]
pub struct Basics {
    /// Its name, for its host name and its logs.
    pub name: String,
    /// Processors.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Sockets of the card's functions, each plugged into a slot of its own.
    pub cards: Vec<PathBuf>,
    /// Programs and files of this machine that it gets: path there, path here.
    pub files: Vec<(String, PathBuf)>,
    /// Names of further virtio-serial ports, for [`Machine::channel`].
    pub channels: Vec<String>,
    /// Functions it binds to vfio-pci.
    pub bind: Vec<PciId>,
    /// Programs it starts for each of them.
    pub start: Vec<Start>,
    /// Added to its kernel's command line.
    pub command_line: String,
    /// Added to QEMU's arguments.
    pub qemu_args: Vec<String>,
}

impl Basics {
    /// A machine with nothing but processors and memory.
    #[must_use]
    pub fn new(name: &str, cpus: u32, memory_mib: u32) -> Self {
        Self {
            name: name.to_owned(),
            cpus,
            memory_mib,
            cards: Vec::new(),
            files: Vec::new(),
            channels: Vec::new(),
            bind: Vec::new(),
            start: Vec::new(),
            command_line: String::new(),
            qemu_args: Vec::new(),
        }
    }
}

/// What depends on the architecture.
pub(crate) struct Model<'a> {
    pub(crate) qemu: &'a QemuRoot,
    pub(crate) kernel: &'a Kernel,
    pub(crate) program: &'static str,
    pub(crate) args: Vec<String>,
    pub(crate) init: PathBuf,
    pub(crate) modules: &'a [&'a str],
    pub(crate) command_line: String,
}

/// A running machine. It ends with this handle, and with this process.
#[derive(Debug)]
pub struct Machine {
    name: String,
    // Fields are dropped in this order: QEMU first, then its sockets.
    qemu: Mutex<Child>,
    console: Console,
    control: Control,
    qemu_log: PathBuf,
    /// Where QEMU logs resets of processors.
    resets: PathBuf,
    sockets: tempfile::TempDir,
}

impl Machine {
    /// Starts a machine and waits until it takes calls.
    pub(crate) fn start(basics: &Basics, model: &Model<'_>) -> Result<Self, Error> {
        let logs = log_dir(&basics.name)?;
        // The path of a socket is short, so they don't lie under the target directory.
        let sockets =
            tempfile::Builder::new().prefix("testbed-").tempdir().map_err(Error::file(std::env::temp_dir()))?;
        let initramfs =
            initramfs(basics, model)?.write(logs.join("initramfs")).map_err(Error::file(logs.join("initramfs")))?;

        let console = Console::new(logs.join("console.log"), sockets.path().join("console"));
        let control_socket = sockets.path().join(CONTROL_PORT);
        let mut command = model.qemu.command(model.program);
        command
            .args(["-name", &basics.name])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none"])
            .args(&model.args)
            .args(["-smp", &basics.cpus.to_string()])
            .args(["-m", &format!("{}M", basics.memory_mib)])
            // The card reaches the machine's memory by the descriptor of it; memfd because it can be sealed.
            .args(["-object", &format!("memory-backend-memfd,id=ram,size={}M,share=on", basics.memory_mib)])
            .arg("-kernel")
            .arg(&model.kernel.image)
            .arg("-initrd")
            .arg(&initramfs)
            .args(["-append", &format!("{} {}", model.command_line, basics.command_line)])
            .arg("-chardev")
            .arg(socket_chardev("console", console.socket(), Some(console.log())))
            .args(["-serial", "chardev:console"])
            .args(["-device", "virtio-serial-pci,id=ports"]);
        for name in std::iter::once(CONTROL_PORT).chain(basics.channels.iter().map(String::as_str)) {
            let id = format!("port-{name}");
            command
                .arg("-chardev")
                .arg(socket_chardev(&id, &sockets.path().join(name), None))
                .arg("-device")
                .arg(format!("virtserialport,bus=ports.0,chardev={id},name={name}"));
        }
        plug_cards(&mut command, &basics.cards);
        command.args(&basics.qemu_args);

        let (qemu_log, resets) = (logs.join("qemu.log"), logs.join("resets.log"));
        command.args(["-d", "cpu_reset", "-D"]).arg(&resets);
        let output = File::create(&qemu_log).map_err(Error::file(&qemu_log))?;
        let errors = output.try_clone().map_err(Error::file(&qemu_log))?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let mut qemu = Child::spawn(command)?;

        let control = match connect(&mut qemu, &control_socket) {
            Ok(control) => control,
            Err(what) => return Err(dead(&basics.name, what, &console, &qemu_log)),
        };
        let machine =
            Self { name: basics.name.clone(), qemu: Mutex::new(qemu), console, control, qemu_log, resets, sockets };
        if machine.control.wait_ready(BOOT_LIMIT) { Ok(machine) } else { Err(machine.dead("didn't come up")) }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// QEMU's process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.qemu().id()
    }

    /// Its console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Its control channel.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Connects to one of its further virtio-serial ports.
    ///
    /// # Errors
    /// There is none of that name, or somebody else is connected.
    pub fn channel(&self, name: &str) -> Result<UnixStream, Error> {
        let path = self.sockets.path().join(name);
        UnixStream::connect(&path).map_err(Error::file(path))
    }

    /// Asks its first process for something.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn call(&self, request: Request, limit: Duration) -> Result<Answer, Error> {
        let asked = format!("{request:?}");
        self.control.call(request, limit).map_err(|source| self.failed(asked, source))
    }

    /// What it has.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn inventory(&self) -> Result<Inventory, Error> {
        match self.call(Request::Inventory, CALL_LIMIT)? {
            Answer::Inventory(inventory) => Ok(inventory),
            other => Err(self.unexpected("inventory", other)),
        }
    }

    /// Its whole user space, its first process included.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn programs(&self) -> Result<Vec<Program>, Error> {
        match self.call(Request::List, CALL_LIMIT)? {
            Answer::Programs(programs) => Ok(programs),
            other => Err(self.unexpected("list", other)),
        }
    }

    /// Starts a program and returns its process id. Its standard streams are the further port `channel`, if given, else its
    /// output is what [`Control::output`] returns.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn run(&self, program: &str, args: &[&str], channel: Option<&str>) -> Result<i32, Error> {
        let request = Request::Run {
            program: program.to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            channel: channel.map(str::to_owned),
        };
        match self.call(request, CALL_LIMIT)? {
            Answer::Pid(pid) => Ok(pid),
            other => Err(self.unexpected("run", other)),
        }
    }

    /// Runs a program to its end; it is killed after `limit` (whole seconds).
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn exec(&self, program: &str, args: &[&str], limit: Duration) -> Result<Ended, Error> {
        let request = Request::Exec {
            program: program.to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            seconds: limit.as_secs(),
        };
        match self.call(request, limit + CALL_LIMIT)? {
            Answer::Ended(ended) => Ok(ended),
            other => Err(self.unexpected("exec", other)),
        }
    }

    /// Sends signal number `signal` to a process.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn signal(&self, pid: i32, signal: i32) -> Result<(), Error> {
        self.done(Request::Signal { pid, signal })
    }

    /// A process' memory.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn memory(&self, pid: i32) -> Result<Memory, Error> {
        match self.call(Request::Memory { pid }, CALL_LIMIT)? {
            Answer::Memory(memory) => Ok(memory),
            other => Err(self.unexpected("memory", other)),
        }
    }

    /// A process' threads and their CPU time.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn threads(&self, pid: i32) -> Result<Vec<Thread>, Error> {
        match self.call(Request::Threads { pid }, CALL_LIMIT)? {
            Answer::Threads(threads) => Ok(threads),
            other => Err(self.unexpected("threads", other)),
        }
    }

    /// What a process has open, as [`testbed_init::descriptors`] has it.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn descriptors(&self, pid: i32) -> Result<Vec<String>, Error> {
        match self.call(Request::Descriptors { pid }, CALL_LIMIT)? {
            Answer::Descriptors(open) => Ok(open),
            other => Err(self.unexpected("descriptors", other)),
        }
    }

    /// A file's text.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn read(&self, path: &str) -> Result<String, Error> {
        let path = path.to_owned();
        match self.call(Request::Read { path }, CALL_LIMIT)? {
            Answer::Text(text) => Ok(text),
            other => Err(self.unexpected("read", other)),
        }
    }

    /// Writes text to a file.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn write(&self, path: &str, text: &str) -> Result<(), Error> {
        self.done(Request::Write { path: path.to_owned(), text: text.to_owned() })
    }

    /// Binds a PCI function to vfio-pci.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn bind(&self, function: &str) -> Result<(), Error> {
        self.done(Request::Bind { function: function.to_owned() })
    }

    /// Waits for a program's end, at most for `limit`.
    ///
    /// # Errors
    /// [`Error::Dead`] if it hasn't ended by then.
    pub fn wait_for_exit(&self, pid: i32, limit: Duration) -> Result<Status, Error> {
        self.control
            .wait_for_exit(pid, limit)
            .ok_or_else(|| self.dead(&format!("still runs process {pid} after {limit:?}")))
    }

    /// Waits for a line of the console that holds `needle`, at most for `limit`.
    ///
    /// # Errors
    /// [`Error::Dead`] if there is none by then.
    pub fn wait_for_line(&self, needle: &str, limit: Duration) -> Result<String, Error> {
        self.console
            .wait_for_line(needle, limit)
            .ok_or_else(|| self.dead(&format!("didn't print {needle:?} within {limit:?}")))
    }

    /// Switches it off and waits for QEMU's end, at most for `limit`.
    ///
    /// # Errors
    /// It doesn't answer, or doesn't end by then.
    pub fn power_off(self, limit: Duration) -> Result<(), Error> {
        self.done(Request::PowerOff)?;
        let ended = self.qemu().wait(limit);
        match ended {
            Ok(Some(status)) if status.success() => Ok(()),
            Ok(Some(status)) => Err(self.dead(&format!("ended with {status}"))),
            Ok(None) => Err(self.dead(&format!("didn't switch off within {limit:?}"))),
            Err(source) => Err(Error::file(&self.qemu_log)(source)),
        }
    }

    /// If it has ended by itself: how, and its last words.
    #[must_use]
    pub fn epitaph(&self) -> Option<String> {
        let status = self.qemu().try_wait().ok().flatten()?;
        let resets = fs::read_to_string(&self.resets).unwrap_or_default();
        let why = if resets.lines().any(|line| line == TRIPLE_FAULT) { SHUT_DOWN } else { "nobody asked it to" };
        Some(self.dead(&format!("has ended by itself ({status}; {why})")).to_string())
    }

    /// [`Self::epitaph`], or, if it runs and doesn't answer, that.
    #[must_use]
    pub fn last_words(&self) -> Option<String> {
        self.epitaph().or_else(|| match self.call(Request::Inventory, CALL_LIMIT) {
            Err(Error::Call { source: CallError::Silent(_), .. }) => {
                let threads = busy::threads(self.id(), Duration::from_secs(1));
                Some(self.dead(&format!("{SILENT}; QEMU's threads in a second: {}", threads.join(", "))).to_string())
            }
            _ => None,
        })
    }

    fn qemu(&self) -> MutexGuard<'_, Child> {
        self.qemu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn done(&self, request: Request) -> Result<(), Error> {
        let asked = format!("{request:?}");
        match self.call(request, CALL_LIMIT)? {
            Answer::Done => Ok(()),
            other => Err(self.unexpected(&asked, other)),
        }
    }

    pub(crate) fn unexpected(&self, request: &str, answer: Answer) -> Error {
        self.failed(request.to_owned(), CallError::Unexpected(Box::new(answer)))
    }

    fn failed(&self, request: String, source: CallError) -> Error {
        Error::Call { name: self.name.clone(), request, source }
    }

    pub(crate) fn dead(&self, what: &str) -> Error {
        dead(&self.name, what.to_owned(), &self.console, &self.qemu_log)
    }
}

fn dead(name: &str, what: String, console: &Console, qemu_log: &Path) -> Error {
    let said = fs::read_to_string(qemu_log).unwrap_or_default();
    Error::Dead { name: name.to_owned(), what, console: console.tail(30), said: format!("QEMU said: {}", said.trim()) }
}

/// Connects as soon as QEMU listens, which is before the machine runs: its first line must find a listener.
fn connect(qemu: &mut Child, socket: &Path) -> Result<Control, String> {
    let end = Instant::now() + CALL_LIMIT;
    loop {
        if let Ok(control) = Control::connect(socket) {
            return Ok(control);
        }
        match qemu.try_wait() {
            Ok(None) => {}
            Ok(Some(status)) => return Err(format!("ended at once ({status})")),
            Err(error) => return Err(error.to_string()),
        }
        if Instant::now() >= end {
            return Err("doesn't listen".to_owned());
        }
        sleep(Duration::from_millis(5));
    }
}

/// Each function in a slot of its own: functions behind one port share an IOMMU group.
fn plug_cards(command: &mut Command, cards: &[PathBuf]) {
    for (index, socket) in cards.iter().enumerate() {
        let slot = index + 1;
        let device = serde_json::json!({
            "driver": "vfio-user-pci",
            "bus": format!("slot{slot}"),
            "socket": { "type": "unix", "path": socket },
        });
        command
            .arg("-device")
            .arg(format!("pcie-root-port,id=slot{slot},bus=pcie.0,chassis={slot},slot={slot}"))
            .arg("-device")
            .arg(device.to_string());
    }
}

fn socket_chardev(id: &str, path: &Path, log: Option<&Path>) -> OsString {
    let mut option = OsString::from(format!("socket,id={id},server=on,wait=off,path="));
    option.push(path);
    if let Some(log) = log {
        option.push(",logfile=");
        option.push(log);
    }
    option
}

fn initramfs(basics: &Basics, model: &Model<'_>) -> Result<Initramfs, Error> {
    let mut image = Initramfs::new();
    image.program("/init", &model.init).map_err(Error::file(&model.init))?;
    let mut loaded = Vec::new();
    for module in modules::gather(model.kernel, model.qemu, model.modules)? {
        let path = format!("/lib/modules/{}.ko", module.name);
        image.file(&path, 0o644, &module.content);
        loaded.push(Module { path, parameters: String::new() });
    }
    for (there, here) in &basics.files {
        image.program(there, here).map_err(Error::file(here))?;
    }
    let config =
        Config { name: basics.name.clone(), modules: loaded, bind: basics.bind.clone(), start: basics.start.clone() };
    let text = serde_json::to_string(&config).expect("a configuration is plain data");
    image.file(CONFIG_PATH, 0o644, text.as_bytes());
    Ok(image)
}

/// A fresh directory for the logs of a machine `name`. Those of machines of that name whose process is gone are removed.
fn log_dir(name: &str) -> Result<PathBuf, Error> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let logs = paths::cache().join("logs");
    fs::create_dir_all(&logs).map_err(Error::file(&logs))?;
    for entry in fs::read_dir(&logs).map_err(Error::file(&logs))?.flatten() {
        let entry_name = entry.file_name().to_string_lossy().into_owned();
        let mut parts = entry_name.rsplitn(3, '.');
        let (_count, pid, of) = (parts.next(), parts.next(), parts.next());
        let alive = pid.and_then(|pid| pid.parse().ok()).is_some_and(scratch::is_alive);
        if of == Some(name) && !alive {
            // Another process may be removing it too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let dir = logs.join(format!("{name}.{}.{count}", std::process::id()));
    fs::create_dir_all(&dir).map_err(Error::file(&dir))?;
    Ok(dir)
}
