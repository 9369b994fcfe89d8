//! Programs that run a payload on this machine's /dev/kvm: ours, its peers, and the floor.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use payloads::{EXIT_PASS, Payload};
use testbed::fetch::{self, QemuRoot};
use testbed::guest::GuestImage;
use testbed::process::{Child, CommandError};

use crate::bare::{self, Irqchip, Machine, Options};

/// Guest memory that every contender gives a payload, MiB.
const MEMORY_MIB: u64 = 64;
/// Guest memory of a Linux, MiB.
const LINUX_MEMORY_MIB: u64 = 256;
/// What a Linux is told.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1";

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
    #[error("the guest came to no good end: {0}")]
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

    /// All there are, in the order of their turns; `soc_vmm` is our program, and `qemu` the peer's, if it was said which.
    pub fn all(soc_vmm: &Path, qemu: Option<&Path>) -> Vec<Self> {
        vec![
            Entrant::new("floor", Side::Floor, Ok(Floor)),
            Entrant::new("outboard", Side::Ours, Outboard::new(soc_vmm)),
            Entrant::new("qemu", Side::Peer, qemu.map_or_else(Qemu::new, |root| Ok(Qemu::at(root)))),
        ]
    }

    /// Those of [`Entrant::all`] that have devices: all but the bare loop, whose turn is the first.
    pub fn with_devices(all: &mut [Self]) -> &mut [Self] {
        let first = all.iter().position(|entrant| entrant.side != Side::Floor).unwrap_or(all.len());
        &mut all[first..]
    }

    /// Does a job, or says why not.
    pub fn run(&mut self, job: &Job<'_>) -> Result<String, String> {
        let contender = self.contender.as_mut().map_err(|why| why.clone())?;
        contender.run(job).map_err(|error| with_sources(&error))
    }

    /// Boots a Linux, or says why not.
    pub fn boot(&mut self, linux: &Linux<'_>) -> Result<String, String> {
        let contender = self.contender.as_mut().map_err(|why| why.clone())?;
        contender.boot(linux).map_err(|error| with_sources(&error))
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

/// A payload to be run.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// Itself.
    pub payload: &'a Payload,
    /// The raw file of its virtio disk, if it has one.
    pub disk: Option<&'a Path>,
    /// The socket of its virtio network interface's peer, if it has one.
    pub net: Option<&'a Path>,
    /// How long it may take.
    pub limit: Duration,
}

/// A Linux that works by itself and then switches its machine off.
#[derive(Debug, Clone, Copy)]
pub struct Linux<'a> {
    /// Its kernel and initramfs.
    pub image: &'a GuestImage,
    /// The raw file of its first virtio disk.
    pub disk: &'a Path,
    /// The raw file of its second one, which it only reads.
    pub instruments: &'a Path,
    /// How long it may take.
    pub limit: Duration,
}

/// Someone who runs a guest to its end and tells what it wrote.
pub trait Contender {
    /// Runs a payload once, in a VM of its own, and gives its debug console's text.
    ///
    /// # Errors
    /// It can't, or the payload didn't pass.
    fn run(&mut self, job: &Job<'_>) -> Result<String, Error>;

    /// Boots a Linux once, in a VM of its own, and gives its serial line's text.
    ///
    /// # Errors
    /// It can't, or the guest came to no good end.
    fn boot(&mut self, linux: &Linux<'_>) -> Result<String, Error>;
}

/// KVM_RUN in a loop, answered on the spot.
#[derive(Debug)]
pub struct Floor;

impl Contender for Floor {
    fn run(&mut self, job: &Job<'_>) -> Result<String, Error> {
        // With the interrupt controllers that the others have: they are on KVM's way into the guest.
        let options = Options { irqchip: Irqchip::Full, memory: MEMORY_MIB << 20, dirty_log: false };
        passed(Machine::new(job.payload, options)?.run_floor(job.limit)?)
    }

    fn boot(&mut self, _: &Linux<'_>) -> Result<String, Error> {
        Err(Error::Absent("the bare loop has no devices for a Linux".to_owned()))
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

    fn command(&self, vcpus: u8, memory_mib: u64) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["run", "--name"]).arg(format!("bench-{}", std::process::id()));
        command.arg("--cpus").arg(vcpus.to_string()).arg("--memory").arg(memory_mib.to_string());
        command
    }
}

impl Contender for Outboard {
    fn run(&mut self, job: &Job<'_>) -> Result<String, Error> {
        let mut command = self.command(job.payload.vcpus, MEMORY_MIB);
        command.args(["--serial", "null", "--debug-exit"]);
        if let Some(disk) = job.disk {
            command.arg("--disk").arg(format!("file={}", disk.display()));
        }
        if let Some(net) = job.net {
            command.arg("--net").arg(format!("stream={}", net.display()));
        }
        run_program(command, job, |command, option, image, console| {
            command.arg(option).arg(image);
            command.arg("--debugcon").arg(in_file(console));
        })
    }

    fn boot(&mut self, linux: &Linux<'_>) -> Result<String, Error> {
        let mut command = self.command(1, LINUX_MEMORY_MIB);
        command.arg("--kernel").arg(&linux.image.kernel).arg("--initrd").arg(&linux.image.initrd);
        command.args(["--cmdline", COMMAND_LINE]);
        command.arg("--disk").arg(format!("file={}", linux.disk.display()));
        command.arg("--disk").arg(format!("file={},readonly=on", linux.instruments.display()));
        run_linux(command, linux, |command, serial| {
            command.arg("--serial").arg(in_file(serial));
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

    /// The one whose root is in a directory.
    pub fn at(root: &Path) -> Self {
        Qemu { root: QemuRoot::at(root) }
    }

    /// What it says of itself: `QEMU emulator version …`.
    pub fn version(&self) -> Result<String, Error> {
        let mut command = self.root.command("qemu-system-x86_64");
        let text = testbed::process::run(command.arg("--version"))?;
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }
}

impl Qemu {
    /// The program with a q35 of so much.
    pub(crate) fn command(&self, vcpus: u8, memory_mib: u64) -> Command {
        let mut command = self.root.command("qemu-system-x86_64");
        command.args(["-no-user-config", "-nodefaults", "-display", "none", "-M", "q35,accel=kvm"]);
        command.args(["-m", &memory_mib.to_string(), "-smp", &vcpus.to_string()]);
        command
    }
}

impl Contender for Qemu {
    fn run(&mut self, job: &Job<'_>) -> Result<String, Error> {
        let mut command = self.command(job.payload.vcpus, MEMORY_MIB);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-device", "pc-testdev"]);
        if let Some(disk) = job.disk {
            add_disk(&mut command, "disk", disk, false);
        }
        if let Some(net) = job.net {
            let netdev = format!("stream,id=net,addr.type=unix,addr.path={}", net.display());
            command.args(["-netdev", &netdev, "-device", "virtio-net-pci,netdev=net,disable-legacy=on,romfile="]);
        }
        run_program(command, job, |command, option, image, console| {
            let option = if option == "--firmware" { "-bios" } else { "-kernel" };
            command.arg(option).arg(image);
            let mut chardev = OsString::from("file,id=debugcon,path=");
            chardev.push(console);
            command.arg("-chardev").arg(chardev).args(["-device", "isa-debugcon,iobase=0x402,chardev=debugcon"]);
        })
    }

    fn boot(&mut self, linux: &Linux<'_>) -> Result<String, Error> {
        let mut command = self.command(1, LINUX_MEMORY_MIB);
        // soc-vmm's guests have all of the processor that they can.
        command.args(["-cpu", "host", "-no-reboot"]);
        command.arg("-kernel").arg(&linux.image.kernel).arg("-initrd").arg(&linux.image.initrd);
        command.args(["-append", COMMAND_LINE]);
        add_disk(&mut command, "disk", linux.disk, false);
        add_disk(&mut command, "instruments", linux.instruments, true);
        run_linux(command, linux, |command, serial| {
            command.arg("-serial").arg(in_file(serial));
        })
    }
}

/// A raw file as QEMU's next virtio disk, with a thread of its own.
fn add_disk(command: &mut Command, name: &str, file: &Path, read_only: bool) {
    let read_only = if read_only { "on" } else { "off" };
    let file = file.display();
    let node = format!("driver=raw,node-name={name},read-only={read_only},file.driver=file,file.filename={file}");
    command.args(["-object", &format!("iothread,id={name}-thread"), "-blockdev", &node]);
    let device = format!("virtio-blk-pci,drive={name},iothread={name}-thread,disable-legacy=on");
    command.args(["-device", &device]);
}

/// `file:PATH`, as both take it.
fn in_file(path: &Path) -> OsString {
    let mut value = OsString::from("file:");
    value.push(path);
    value
}

/// Runs a VMM whose payload, and its debug console, `finish` adds to the command line: which option takes the image, where that is, where the console's
/// text goes.
fn run_program(
    mut command: Command,
    job: &Job<'_>,
    finish: impl FnOnce(&mut Command, &str, &Path, &Path),
) -> Result<String, Error> {
    const STATUS: i32 = (EXIT_PASS as i32) << 1 | 1;
    let directory = tempfile::tempdir().map_err(at(&std::env::temp_dir()))?;
    let [image, console] = ["image", "console"].map(|name| directory.path().join(name));
    let (option, bytes) = job.payload.file();
    fs::write(&image, bytes).map_err(at(&image))?;
    finish(&mut command, option, &image, &console);
    passed(ended(command, STATUS, &console, job.limit)?)
}

/// Runs a VMM until its Linux has switched itself off; `finish` adds to the command line where its serial line's text goes.
fn run_linux(
    mut command: Command,
    linux: &Linux<'_>,
    finish: impl FnOnce(&mut Command, &Path),
) -> Result<String, Error> {
    let directory = tempfile::tempdir().map_err(at(&std::env::temp_dir()))?;
    let serial = directory.path().join("serial");
    finish(&mut command, &serial);
    ended(command, 0, &serial, linux.limit)
}

/// Runs a program that has to end with `status`, and gives what is in the file `console` then.
fn ended(mut command: Command, status: i32, console: &Path, limit: Duration) -> Result<String, Error> {
    let errors = console.with_file_name("errors");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&errors).map_err(at(&errors))?);
    let mut child = Child::spawn(command)?;
    let end = child.wait(limit).map_err(at(&errors))?;
    let said = fs::read_to_string(&errors).unwrap_or_default();
    let text = fs::read(console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    match end {
        Some(end) if end.code() == Some(status) => Ok(text),
        Some(end) => Err(Error::Guest(format!("{end}; {} {}", last_line(&text), last_line(&said)))),
        None => Err(Error::Guest(format!("no end within {limit:?}; {}", last_line(&text)))),
    }
}

fn passed(console: String) -> Result<String, Error> {
    if console.lines().any(|line| line == "pass") {
        return Ok(console);
    }
    Err(Error::Guest(last_line(&console).to_owned()))
}

pub(crate) fn last_line(text: &str) -> &str {
    text.trim_end().lines().last().unwrap_or_default()
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::File { path: path.to_path_buf(), source }
}
