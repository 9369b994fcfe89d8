//! Programs that run a payload on this machine's /dev/kvm: ours, its peers, and the floor.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use payloads::{EXIT_PASS, Payload};
use testbed::fetch::{self, QemuRoot};
use testbed::process::{Child, CommandError};

use crate::bare::{self, Irqchip, Machine, Options};

/// Guest memory that every contender gives, MiB.
const MEMORY_MIB: u64 = 64;

/// Why a contender gave no console.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not here.
    #[error("{0}")]
    Absent(String),
    /// It can't be started.
    #[error("it does not start")]
    Start(#[from] CommandError),
    /// The payload does not assemble.
    #[error("the payload")]
    Payload(#[from] payloads::IcedError),
    /// KVM, used directly.
    #[error("the bare loop")]
    Bare(#[from] bare::Error),
    /// A file of the run.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The guest did not come to its good end.
    #[error("the payload did not pass: {0}")]
    Guest(String),
}

/// One who takes part in a benchmark.
pub struct Entrant {
    /// Its name in a figure.
    pub name: &'static str,
    /// Where it stands in a figure.
    pub side: Side,
    /// Itself, or why it can't take part.
    pub contender: Result<Box<dyn Contender>, String>,
}

/// Where an entrant stands in a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// This project.
    Ours,
    /// Another that does the same.
    Peer,
    /// What nobody can be below.
    Floor,
}

impl Entrant {
    fn new<C: Contender + 'static>(name: &'static str, side: Side, contender: Result<C, Error>) -> Self {
        let contender = match contender {
            Ok(contender) => Ok(Box::new(contender) as Box<dyn Contender>),
            Err(error) => Err(with_sources(&error)),
        };
        Entrant { name, side, contender }
    }

    /// All there are, in the order of their turns; `soc_vmm` is our program.
    pub fn all(soc_vmm: &Path) -> Vec<Self> {
        vec![
            Entrant::new("floor", Side::Floor, Ok(Floor)),
            Entrant::new("outboard", Side::Ours, Outboard::new(soc_vmm)),
            Entrant::new("qemu", Side::Peer, Qemu::new()),
        ]
    }

    /// Runs a payload, or says why not.
    pub fn run(&mut self, payload: &Payload, limit: Duration) -> Result<String, String> {
        let contender = self.contender.as_mut().map_err(|why| why.clone())?;
        contender.run(payload, limit).map_err(|error| with_sources(&error))
    }
}

/// An error in one line.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line = format!("{line}: {cause}");
        source = cause.source();
    }
    line
}

/// Someone who runs a payload to its end and tells what it wrote to the debug console.
pub trait Contender {
    /// Runs it once, in a VM of its own.
    fn run(&mut self, payload: &Payload, limit: Duration) -> Result<String, Error>;
}

/// KVM_RUN in a loop, answered on the spot.
#[derive(Debug)]
pub struct Floor;

impl Contender for Floor {
    fn run(&mut self, payload: &Payload, limit: Duration) -> Result<String, Error> {
        // With the interrupt controllers that the others have: they are on KVM's way into the guest.
        let options = Options { irqchip: Irqchip::Full, memory: MEMORY_MIB << 20, dirty_log: false };
        passed(Machine::new(payload, options)?.run_floor(limit)?)
    }
}

/// soc-vmm with a shim on this machine.
#[derive(Debug)]
pub struct Outboard {
    program: PathBuf,
}

impl Outboard {
    /// The program, which must be there; it finds its shim itself.
    pub fn new(program: &Path) -> Result<Self, Error> {
        if !program.is_file() {
            return Err(Error::Absent(format!("{} is not built", program.display())));
        }
        Ok(Outboard { program: program.to_path_buf() })
    }
}

impl Contender for Outboard {
    fn run(&mut self, payload: &Payload, limit: Duration) -> Result<String, Error> {
        let mut command = Command::new(&self.program);
        command.args(["run", "--name"]).arg(format!("bench-{}", std::process::id()));
        command.arg("--cpus").arg(payload.vcpus.to_string()).arg("--memory").arg(MEMORY_MIB.to_string());
        command.args(["--serial", "null", "--debug-exit"]);
        run_program(command, payload, limit, |command, option, image, console| {
            command.arg(option).arg(image);
            let mut debugcon = std::ffi::OsString::from("file:");
            debugcon.push(console);
            command.arg("--debugcon").arg(debugcon);
        })
    }
}

/// QEMU of the testbed's root, with KVM.
#[derive(Debug)]
pub struct Qemu {
    root: QemuRoot,
}

impl Qemu {
    /// Fetches it if need be.
    pub fn new() -> Result<Self, Error> {
        let root = fetch::qemu().map_err(|error| Error::Absent(error.to_string()))?;
        Ok(Qemu { root })
    }

    /// What it says of itself: `QEMU emulator version …`.
    pub fn version(&self) -> Result<String, Error> {
        let mut command = self.root.command("qemu-system-x86_64");
        let text = testbed::process::run(command.arg("--version"))?;
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }
}

impl Contender for Qemu {
    fn run(&mut self, payload: &Payload, limit: Duration) -> Result<String, Error> {
        let mut command = self.root.command("qemu-system-x86_64");
        command.args(["-no-user-config", "-nodefaults", "-display", "none", "-M", "q35,accel=kvm"]);
        command.args(["-m", &MEMORY_MIB.to_string(), "-smp", &payload.vcpus.to_string()]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-device", "pc-testdev"]);
        run_program(command, payload, limit, |command, option, image, console| {
            let option = if option == "--firmware" { "-bios" } else { "-kernel" };
            command.arg(option).arg(image);
            let mut chardev = std::ffi::OsString::from("file,id=debugcon,path=");
            chardev.push(console);
            command.arg("-chardev").arg(chardev).args(["-device", "isa-debugcon,iobase=0x402,chardev=debugcon"]);
        })
    }
}

/// Runs a VMM whose command line `finish` completes: which option takes the image, where that is, where the console's
/// text goes.
fn run_program(
    mut command: Command,
    payload: &Payload,
    limit: Duration,
    finish: impl FnOnce(&mut Command, &str, &Path, &Path),
) -> Result<String, Error> {
    const STATUS: i32 = (EXIT_PASS as i32) << 1 | 1;
    let directory = tempfile::tempdir().map_err(at(&std::env::temp_dir()))?;
    let [image, console, errors] = ["image", "console", "errors"].map(|name| directory.path().join(name));
    let (option, bytes) = payload.file();
    fs::write(&image, bytes).map_err(at(&image))?;
    finish(&mut command, option, &image, &console);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&errors).map_err(at(&errors))?);

    let mut child = Child::spawn(command)?;
    let status = child.wait(limit).map_err(at(&errors))?;
    let said = fs::read_to_string(&errors).unwrap_or_default();
    let text = fs::read(&console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    match status {
        Some(status) if status.code() == Some(STATUS) => passed(text),
        Some(status) => Err(Error::Guest(format!("{status}; {} {}", last_line(&text), last_line(&said)))),
        None => Err(Error::Guest(format!("no end within {limit:?}; {}", last_line(&text)))),
    }
}

fn passed(console: String) -> Result<String, Error> {
    if console.lines().any(|line| line == "pass") {
        return Ok(console);
    }
    Err(Error::Guest(last_line(&console).to_owned()))
}

fn last_line(text: &str) -> &str {
    text.trim_end().lines().last().unwrap_or_default()
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::File { path: path.to_path_buf(), source }
}
