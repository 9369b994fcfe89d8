//! Debian 12's unmodified libvirtd and virtlogd, run privately: what drives soc-vmm as a cloud's control plane does.
//!
//! Each [`Libvirt`] has a root of its own (Debian's packages, unpacked under `target/testbed/libvirt`, seen read-only, with `/etc`,
//! `/run`, `/srv`, `/tmp` and `/var` in a directory of the test's), a network, processes and cgroups of its own. No service of the machine takes
//! part: no systemd, no D-Bus, no polkit. All of it ends with the handle, or with the process that holds it: domains, passt, both
//! daemons. It takes root.

mod cgroups;
mod console;
mod namespace;
mod programs;
mod soc;
mod tree;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use tempfile::TempDir;

use crate::process::{Child, CommandError, run};
use crate::{fetch, scratch};
use cgroups::Cgroups;
use namespace::Namespace;

pub use console::Console;
pub use programs::Process;
pub use soc::SocLibvirt;
pub use tree::{soc_disk, tree};

/// How long a daemon may take to listen or to end, and a `virsh` to answer: also one that waits until a guest has moved.
const LIMIT: Duration = Duration::from_secs(180);
/// Between two looks at something that is waited for.
const PAUSE: Duration = Duration::from_millis(20);

/// Where both find programs, as env takes it.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where libvirtd listens.
const SOCKET: &str = "/run/libvirt/libvirt-sock";
/// What libvirtd writes down of itself.
const LOG: &str = "/var/log/libvirt/libvirtd.log";
/// libvirtd's own settings: what it logs, and where. Every message between it and its emulators is there.
const LIBVIRTD_CONF: &str = "\
log_filters = \"1:qemu.qemu_monitor 1:util.command\"
log_outputs = \"1:file:/var/log/libvirt/libvirtd.log\"
";
/// qemu.conf where it isn't Debian's own: everything that separates an emulator from the daemon is off.
const OPEN_QEMU_CONF: &str = "\
user = \"root\"
group = \"root\"
namespaces = []
cgroup_controllers = []
seccomp_sandbox = 0
";

/// Why libvirt doesn't run, or not as told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its packages aren't there.
    #[error(transparent)]
    Fetch(#[from] fetch::Error),
    /// A program can't be started, or failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A file of it can't be read or written.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It was waited for in vain.
    #[error("{what} within {LIMIT:?}; {story}")]
    Late {
        /// What didn't come about.
        what: String,
        /// What the daemon said last.
        story: String,
    },
}

impl Error {
    fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::File { path, source }
    }
}

/// What a libvirt is started with.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// qemu.conf is Debian's own: emulators run as libvirt-qemu, without privileges, in a `/dev` and in cgroups of their own.
    pub stock: bool,
    /// The emulator: it is [`Libvirt::EMULATOR`].
    pub emulator: Option<PathBuf>,
    /// The shim: it is [`Libvirt::SHIM`].
    pub shim: Option<PathBuf>,
    /// Another one's first process ([`Libvirt::network`]): both have one network.
    pub beside: Option<i32>,
    /// Directories of this machine, and the names below [`Libvirt::SHARED`] that they have inside.
    pub shared: Vec<(PathBuf, String)>,
}

/// How a program inside ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// Its exit status; a signal counts as 128 and its number.
    pub status: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

/// Running daemons.
#[derive(Debug)]
pub struct Libvirt {
    // In this order: the processes end, then what held them goes.
    namespace: Namespace,
    cgroups: Result<Cgroups, Error>,
    dir: TempDir,
}

impl Libvirt {
    /// Where domains' XML finds the emulator.
    pub const EMULATOR: &str = "/usr/bin/soc-vmm";
    /// Where the emulator finds the shim: beside it.
    pub const SHIM: &str = "/usr/bin/host-kvm-shim";
    /// Where [`Config::shared`] is.
    pub const SHARED: &str = "/srv";
    /// Where disk images are, as libvirt's own tools place them. Emulators may read them, and libvirtd makes them own theirs.
    pub const IMAGES: &str = "/var/lib/libvirt/images";
    /// The network's own address: domains reach it through passt, or by their TAP interface.
    pub const ADDRESS: &str = "10.0.9.1";

    /// Whether one can be started here. If not, why.
    ///
    /// # Errors
    /// The packages can't be had though the archive is there.
    pub fn lacks() -> Result<Option<String>, Error> {
        if !geteuid().is_root() {
            return Ok(Some("libvirtd takes root".to_owned()));
        }
        if let Err(error) = run(&mut namespace::probe()) {
            return Ok(Some(format!("libvirtd takes mounts and a network of its own: {error}")));
        }
        match tree() {
            Ok(_) => Ok(None),
            Err(error @ fetch::Error::Unreachable(_)) => Ok(Some(error.to_string())),
            Err(error) => Err(error.into()),
        }
    }

    /// Starts both daemons, and waits until libvirtd answers.
    ///
    /// # Errors
    /// [`Error`].
    pub fn start(config: &Config) -> Result<Self, Error> {
        let tree = tree()?;
        let dir = scratch::dir().map_err(Error::file(&std::env::temp_dir()))?;
        let cgroups = Cgroups::make(&dir.path().file_name().unwrap_or_default().to_string_lossy());
        let namespace = Namespace::make(&tree, dir.path(), config, cgroups.as_ref().ok())?;
        let libvirt = Self { namespace, cgroups, dir };
        libvirt.write("/etc/libvirt/libvirtd.conf", format!("{LIBVIRTD_CONF}host_uuid = \"{}\"\n", libvirt.host()))?;
        if !config.stock {
            libvirt.write("/etc/libvirt/qemu.conf", OPEN_QEMU_CONF)?;
        }
        libvirt.run("virtlogd", &["--daemon"])?;
        libvirt.start_libvirtd()?;
        Ok(libvirt)
    }

    /// Its first process: who has that for [`Config::beside`] has its network.
    #[must_use]
    pub fn network(&self) -> i32 {
        self.namespace.init()
    }

    /// A host's UUID, so that two of them are two hosts.
    fn host(&self) -> String {
        let name = self.dir.path().as_os_str().as_encoded_bytes();
        let hash = name
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
        format!("{:08x}-{:04x}-4000-8000-{:012x}", hash >> 32, hash >> 16 & 0xffff, hash & 0xffff_ffff_ffff)
    }

    /// Why domains have no cgroups here, if they don't.
    #[must_use]
    pub fn no_cgroups(&self) -> Option<String> {
        self.cgroups.as_ref().err().map(|error| match error {
            Error::File { path, source } => format!("{}: {source}", path.display()),
            other => other.to_string(),
        })
    }

    /// Runs `virsh` with `args`.
    ///
    /// # Errors
    /// It can't be started, or doesn't end.
    pub fn virsh(&self, args: &[&str]) -> Result<Output, Error> {
        self.output("virsh", &[&["--quiet"], args].concat())
    }

    /// Runs a program of the root to its end.
    ///
    /// # Errors
    /// It can't be started, or doesn't end.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<Output, Error> {
        let seconds = LIMIT.as_secs().to_string();
        let mut command = self.command("busybox");
        command.args(["timeout", "-s", "KILL", &seconds, program]).args(args).stdin(Stdio::null());
        let output = command.output().map_err(Error::file(Path::new("nsenter")))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        // A shell's convention for what a signal ended; nsenter passes a program's own on.
        let status = output.status.code().unwrap_or(128);
        Ok(Output { status, stdout: text(&output.stdout), stderr: text(&output.stderr) })
    }

    /// A command that runs `program` of the root inside.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        self.namespace.command(program)
    }

    /// Starts `program` of the root; it ends with its handle.
    ///
    /// # Errors
    /// It can't be started.
    pub fn spawn(&self, program: &str, args: &[&str], stdout: Stdio) -> Result<Child, Error> {
        let mut command = self.command(program);
        command.args(args).stdin(Stdio::null()).stdout(stdout).stderr(Stdio::null());
        Ok(Child::spawn(command)?)
    }

    /// Uses a domain's console by `virsh console`.
    ///
    /// # Errors
    /// No terminal for it.
    pub fn console(&self, domain: &str) -> Result<Console, Error> {
        Console::open(self, domain)
    }

    /// The path on this machine of a file in `/etc`, `/run`, `/tmp` or `/var` inside.
    #[must_use]
    pub fn path(&self, inside: &str) -> PathBuf {
        self.dir.path().join(inside.trim_start_matches('/'))
    }

    /// Writes a file of `/etc`, `/run`, `/tmp` or `/var` inside.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(&self, inside: &str, content: impl AsRef<[u8]>) -> Result<(), Error> {
        let path = self.path(inside);
        fs::write(&path, content).map_err(Error::file(&path))
    }

    /// What libvirtd has logged, every message to and from emulators among it.
    #[must_use]
    pub fn libvirtd_log(&self) -> String {
        self.read(LOG)
    }

    /// What a domain's emulator was started with and has said, as virtlogd wrote it down.
    #[must_use]
    pub fn log(&self, domain: &str) -> String {
        self.read(&format!("/var/log/libvirt/qemu/{domain}.log"))
    }

    fn read(&self, inside: &str) -> String {
        fs::read(self.path(inside)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Ends libvirtd as an administrator would, and starts it again. Domains run on meanwhile.
    ///
    /// # Errors
    /// It doesn't end, or doesn't come back.
    pub fn restart_libvirtd(&self) -> Result<(), Error> {
        self.end_libvirtd(Signal::SIGTERM)?;
        self.start_libvirtd()
    }

    /// Ends libvirtd by a signal.
    ///
    /// # Errors
    /// It doesn't end.
    pub fn end_libvirtd(&self, signal: Signal) -> Result<(), Error> {
        for daemon in self.running("libvirtd") {
            self.signal(&daemon, signal)?;
        }
        self.wait("libvirtd didn't end", || self.running("libvirtd").is_empty())
    }

    /// Starts libvirtd, and waits until it answers.
    ///
    /// # Errors
    /// It doesn't.
    pub fn start_libvirtd(&self) -> Result<(), Error> {
        // One that was killed left it behind.
        let _ = fs::remove_file(self.path(SOCKET));
        self.run("libvirtd", &["--daemon"])?;
        self.wait("libvirtd didn't answer", || {
            self.path(SOCKET).exists() && self.virsh(&["uri"]).is_ok_and(|output| output.status == 0)
        })
    }

    /// Every process inside, but its first.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        programs::of(self.namespace.init())
    }

    /// The processes inside whose program is called `name`.
    #[must_use]
    pub fn running(&self, name: &str) -> Vec<Process> {
        self.processes().into_iter().filter(|process| process.name() == name).collect()
    }

    /// Sends a signal to a process inside.
    ///
    /// # Errors
    /// It isn't there any more.
    pub fn signal(&self, process: &Process, signal: Signal) -> Result<(), Error> {
        let gone = |error: nix::errno::Errno| Error::file(Path::new(&process.arguments[0]))(error.into());
        kill(Pid::from_raw(process.pid), signal).map_err(gone)
    }

    /// Makes a TAP interface that domains may use by name.
    ///
    /// # Errors
    /// It can't be made.
    pub fn make_tap(&self, name: &str) -> Result<(), Error> {
        self.run("ip", &["tuntap", "add", "mode", "tap", "name", name])?;
        self.run("ip", &["link", "set", name, "up"])
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<(), Error> {
        run(self.command(program).args(args).stdin(Stdio::null()))?;
        Ok(())
    }

    fn wait(&self, what: &str, condition: impl Fn() -> bool) -> Result<(), Error> {
        let end = Instant::now() + LIMIT;
        while !condition() {
            if Instant::now() >= end {
                let log = self.libvirtd_log();
                let lines: Vec<&str> = log.lines().collect();
                let story = lines[lines.len().saturating_sub(20)..].join("\n");
                return Err(Error::Late { what: what.to_owned(), story });
            }
            sleep(PAUSE);
        }
        Ok(())
    }
}
