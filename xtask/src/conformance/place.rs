//! Where the entries run: on this machine's KVM, or in an emulated server with everything in it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::libc::SIGKILL;
use testbed::build;
use testbed::fetch::Arch;
use testbed::machine::Machine;
use testbed::process::Child;
use testbed::protocol::Status;
use testbed::server::ServerConfig;

use super::qemu::Qemu;
use crate::step::with_sources;

/// How often a program's output is looked at for words that say it won't end by itself.
const LOOK: Duration = Duration::from_millis(200);
/// QEMU's words when KVM gives up on a vCPU: it stops the VM and waits.
const STUCK: &str = "KVM internal error";
/// The server's RAM: the largest test's, and the files.
const SERVER_MIB: u32 = 4096;

/// How a program ended.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    /// `None`: it didn't, and was killed.
    pub(crate) status: Option<Status>,
    /// What it printed, on both of its streams.
    pub(crate) output: String,
}

pub(crate) enum Place {
    Here { dir: tempfile::TempDir, programs: Vec<String>, qemu: Vec<String>, images: PathBuf },
    Server { machine: Box<Machine>, qemu: Vec<String> },
}

/// Where soc-vmm and the images lie in the server.
const SOC_VMM: &str = "/bin/soc-vmm";
const IMAGES: &str = "/images";

impl Place {
    /// This machine.
    pub(crate) fn here(qemu: &Qemu, images: &Path) -> Result<Self, String> {
        let soc_vmm =
            build::programs(Arch::Amd64, &["soc-vmm", "host-kvm-shim"]).map_err(|e| with_sources(&e))?.remove(0);
        let dir = tempfile::tempdir().map_err(|e| format!("temporary directory: {e}"))?;
        Ok(Self::Here {
            dir,
            programs: vec![soc_vmm.display().to_string()],
            qemu: qemu.here(),
            images: images.to_owned(),
        })
    }

    /// An emulated server that is started now.
    pub(crate) fn server(qemu: &Qemu, images: &Path, files: &[String]) -> Result<Self, String> {
        let programs = build::programs(Arch::Amd64, &["soc-vmm", "host-kvm-shim"]).map_err(|e| with_sources(&e))?;
        let mut config = ServerConfig::new("conformance");
        config.hugepages = 0;
        config.basics.memory_mib = SERVER_MIB;
        let (needed, words) = qemu.elsewhere();
        let there = [SOC_VMM, "/bin/host-kvm-shim"].map(str::to_owned).into_iter().zip(programs);
        config.basics.files.extend(there.chain(needed));
        config.basics.files.extend(files.iter().map(|file| (format!("{IMAGES}/{file}"), images.join(file))));
        let machine = config.start().map_err(|e| with_sources(&e))?;
        Ok(Self::Server { machine: Box::new(machine), qemu: words })
    }

    /// The path of an image.
    pub(crate) fn image(&self, file: &str) -> String {
        match self {
            Self::Here { images, .. } => images.join(file).display().to_string(),
            Self::Server { .. } => format!("{IMAGES}/{file}"),
        }
    }

    /// What the file at `path` holds, without space around it.
    pub(crate) fn read(&self, path: &str) -> Option<String> {
        let text = match self {
            Self::Here { .. } => fs::read_to_string(path).ok(),
            Self::Server { machine, .. } => machine.read(path).ok(),
        };
        text.map(|text| text.trim().to_owned())
    }

    pub(crate) fn soc_vmm(&self, arguments: &[String], limit: Duration) -> Result<Ended, String> {
        match self {
            Self::Here { programs, .. } => self.run(programs, arguments, limit),
            Self::Server { .. } => self.run(&[SOC_VMM.to_owned()], arguments, limit),
        }
    }

    pub(crate) fn qemu(&self, arguments: &[String], limit: Duration) -> Result<Ended, String> {
        match self {
            Self::Here { qemu, .. } | Self::Server { qemu, .. } => self.run(qemu, arguments, limit),
        }
    }

    fn run(&self, words: &[String], arguments: &[String], limit: Duration) -> Result<Ended, String> {
        let words: Vec<&str> = words.iter().chain(arguments).map(String::as_str).collect();
        match self {
            Self::Here { dir, .. } => run_here(&words, limit, &dir.path().join("output")),
            Self::Server { machine, .. } => run_there(machine, &words, limit),
        }
    }
}

fn run_here(words: &[&str], limit: Duration, log: &Path) -> Result<Ended, String> {
    let failed = |e: std::io::Error| format!("{}: {e}", log.display());
    let output = File::create(log).map_err(failed)?;
    let errors = output.try_clone().map_err(failed)?;
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).stdout(output).stderr(errors);
    let mut child = Child::spawn(command).map_err(|e| with_sources(&e))?;
    let text = || String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let end = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.wait(LOOK).map_err(failed)? {
            break Some(status);
        }
        if Instant::now() >= end || text().contains(STUCK) {
            break None;
        }
    };
    drop(child);
    Ok(Ended { status: status.map(status_of), output: text() })
}

fn run_there(machine: &Machine, words: &[&str], limit: Duration) -> Result<Ended, String> {
    let pid = machine.run(words[0], &words[1..], None).map_err(|e| with_sources(&e))?;
    let control = machine.control();
    let text = || control.output(pid).join("\n");
    let end = Instant::now() + limit;
    let status = loop {
        if let Some(status) = control.wait_for_exit(pid, LOOK) {
            break Some(status);
        }
        if Instant::now() >= end || text().contains(STUCK) {
            machine.signal(pid, SIGKILL).map_err(|e| with_sources(&e))?;
            machine.wait_for_exit(pid, limit).map_err(|e| with_sources(&e))?;
            break None;
        }
    };
    Ok(Ended { status, output: text() })
}

fn status_of(status: std::process::ExitStatus) -> Status {
    use std::os::unix::process::ExitStatusExt as _;
    match status.code() {
        Some(code) => Status::Code(code),
        None => Status::Signal(status.signal().unwrap_or_default()),
    }
}
