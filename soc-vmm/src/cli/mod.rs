//! The command line: from arguments to a checked [`Invocation`], and the commands that are clients of running VMs.

mod args;
mod balloon;
mod channel;
mod client;
mod clone;
mod cpu;
mod disk;
mod entropy;
mod exit;
mod iommu;
mod migrate;
mod net;
mod numa;
mod pool;
mod test_device;
mod values;
mod vhost;
mod vsock;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use tracing::level_filters::LevelFilter;

use args::{CommandLine, RunArgs, TargetArgs};

use crate::boot::BootSource;
use crate::control::VmName;
use crate::cpuid::{CpuSpec, Topology};
use crate::migrate::Uri;
use crate::numa::NodeSpec;
use crate::qemu::small::{ActionOption, BootOption, FwCfgFile, RtcBase};
use crate::qemu::{self, Hardware, Probe};
use crate::sandbox::SandboxSpec;
use crate::smbios::SystemNames;

pub use args::{Keeps, MigrateArgs};
pub use balloon::BalloonSpec;
pub use channel::ChannelSpec;
pub use client::{list, perform, print};
pub use clone::Original;
pub use disk::{CdromSpec, DiskSpec, DiskTuning};
pub use entropy::EntropySpec;
pub use exit::{ExitStatus, Failure};
pub(crate) use exit::{one_line, with_causes};
pub use iommu::IommuModel;
pub use net::{Mac, NetSpec};
pub use pool::PoolVerb;
pub use test_device::TestDevice;
pub use values::{Bdf, CpuAffinity, DebugconSpec, DirtyRing, FunctionSpec, HugePages, Memory, SerialSpec, ValueError};
pub use vhost::{AnyDisk, AnyNet, FsSpec, VhostRole, VhostSpec};
pub use vsock::VsockSpec;

/// What a command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invocation {
    /// `run`.
    Run(Box<RunConfig>),
    /// `host`.
    Host {
        /// The host function.
        function: FunctionSpec,
        /// Print JSON.
        json: bool,
    },
    /// `list`.
    List {
        /// Print JSON.
        json: bool,
    },
    /// `pool`.
    Pool(PoolVerb),
    /// QEMU's `-machine none`.
    Probe(Probe),
    /// One of the commands to a running VM.
    Perform(Verb, Target),
    /// `--help`, `--version`: the text to print.
    Print(String),
}

/// A command to a running VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `status`.
    Status {
        /// Print JSON.
        json: bool,
    },
    /// `pause`.
    Pause,
    /// `resume`.
    Resume,
    /// `reset`.
    Reset,
    /// `powerdown`.
    Powerdown,
    /// `quit`.
    Quit,
    /// `eject`.
    Eject {
        /// Also where the guest has locked the tray.
        force: bool,
    },
    /// `add-disk`.
    AddDisk(String),
    /// `add-net`.
    AddNet(String),
    /// Adds a vCPU.
    AddCpu,
    /// `remove`.
    Remove {
        /// The device.
        id: String,
    },
    /// `resize`.
    Resize {
        /// The disk.
        id: String,
        /// Bytes that it shall have.
        size: u64,
    },
    /// `balloon`: bytes that the guest shall have.
    Balloon(u64),
    /// `migrate`.
    Migrate(Box<MigrateArgs>),
    /// `save`.
    Save {
        /// Where to.
        file: PathBuf,
        /// What becomes of the guest here; none: the VM ends.
        keep: Option<Keeps>,
        /// Return as soon as it has begun.
        detach: bool,
    },
    /// `cancel-migration`.
    CancelMigration,
    /// `insert`.
    Insert {
        /// The medium's image.
        file: PathBuf,
        /// Also where the guest has locked the tray.
        force: bool,
    },
}

/// A running VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// By its name.
    Name(VmName),
    /// By its control socket.
    Socket(PathBuf),
}

/// All that `run` was told; each value is possible by itself and fits the others. Files were not looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunConfig {
    /// Its name among this user's VMs.
    pub name: VmName,
    /// vCPUs at the start, 1 to [`MAX_CPUS`](crate::cpuid::MAX_CPUS).
    pub cpus: u16,
    /// How those that there can be are arranged.
    pub topology: Topology,
    /// The guest's CPU.
    pub cpu: CpuSpec,
    /// Host CPUs of vCPUs, each below `cpus`.
    pub cpu_affinity: CpuAffinity,
    /// RAM.
    pub memory: Memory,
    /// Entries of the vCPUs' dirty rings.
    pub dirty_ring: DirtyRing,
    /// NUMA nodes, which are all of RAM and hold each vCPU once; none: the guest is told of none.
    pub numa: Vec<NodeSpec>,
    /// What to boot.
    pub boot: BootSource,
    /// Disks.
    pub disks: Vec<AnyDisk>,
    /// The CD-ROM drive's medium.
    pub cdrom: Option<CdromSpec>,
    /// Network interfaces.
    pub nets: Vec<AnyNet>,
    /// File systems of the SoC's.
    pub file_systems: Vec<FsSpec>,
    /// The source of entropy, if there is one.
    pub entropy: Option<EntropySpec>,
    /// Channels to programs in the guest.
    pub channels: Vec<ChannelSpec>,
    /// The device for sockets, if there is one.
    pub vsock: Option<VsockSpec>,
    /// The balloon, if there is one.
    pub balloon: Option<BalloonSpec>,
    /// The IOMMU, if there is one; firmware isn't booted then.
    pub iommu: Option<IommuModel>,
    /// Devices for tests, each once.
    pub test_devices: Vec<TestDevice>,
    /// The other end of COM1.
    pub serial: SerialSpec,
    /// The debug console, if there is one.
    pub debugcon: Option<DebugconSpec>,
    /// Whether there is an isa-debug-exit device.
    pub debug_exit: bool,
    /// More control sockets.
    pub qmp: Vec<PathBuf>,
    /// The function.
    pub function: FunctionSpec,
    /// What this process gives up before the guest runs.
    pub sandbox: Option<SandboxSpec>,
    /// Don't start the vCPUs.
    pub paused: bool,
    /// Where its guest comes from; none: it is a new one.
    pub incoming: Option<Uri>,
    /// The VM whose guest it is to have too, if it is a clone: `incoming` is told later then.
    pub original: Option<VmName>,
    /// The certificates for that, if they are needed.
    pub tls_dir: Option<PathBuf>,
    /// What to log.
    pub log: LevelFilter,
    /// What the machine is told of itself.
    pub machine: MachineConfig,
    /// What this process is told of itself.
    pub process: ProcessConfig,
    /// Devices in places of their own, of QEMU's command line.
    pub hardware: Option<Hardware>,
}

/// What a machine is told of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// Its UUID, as it is written.
    pub uuid: [u8; 16],
    /// Its names.
    pub system: SystemNames,
    /// What its clock is set to.
    pub rtc: RtcBase,
    /// Whether it has ACPI tables.
    pub acpi: bool,
    /// What its firmware is told of booting.
    pub boot: BootOption,
    /// What resets, powering off and panics come to.
    pub actions: ActionOption,
    /// More files of fw_cfg.
    pub fw_cfg: Vec<FwCfgFile>,
}

/// A machine of whose start nothing special is said.
impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            uuid: [0; 16],
            system: SystemNames::default(),
            rtc: RtcBase::Utc,
            acpi: true,
            boot: BootOption::default(),
            actions: ActionOption::default(),
            fw_cfg: Vec::new(),
        }
    }
}

/// What a process is told of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessConfig {
    /// It stands in for QEMU: it is not found by its name, and ends as QEMU does.
    pub emulator: bool,
    /// Its command line names no function: the configuration does.
    pub function_by_configuration: bool,
    /// The guest's name, which any text may be.
    pub guest: Option<String>,
    /// Where its process id goes.
    pub pid_file: Option<PathBuf>,
    /// Whether it goes on in the background.
    pub daemonize: bool,
}

/// The kernel command line where none is given.
const DEFAULT_CMDLINE: &str = "console=ttyS0";

impl Invocation {
    /// Understands a command line; `args` are all of the process, its own name first.
    ///
    /// # Errors
    /// One line, and [`ExitStatus::Usage`].
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, Failure> {
        let args: Vec<OsString> = args.into_iter().collect();
        if args.get(1).is_some_and(is_qemu_option) {
            return qemu::parse(args.into_iter().skip(1)).or_else(|wrong| usage(wrong.to_string()));
        }
        if args.len() < 2 {
            return usage("no command; see soc-vmm --help");
        }
        match CommandLine::try_parse_from(&args) {
            Ok(line) => Self::check(line.command),
            Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
                Ok(Self::Print(e.to_string()))
            }
            Err(e) if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                let command = args[1].to_string_lossy();
                usage(format!("{command}: no command; see soc-vmm {command} --help"))
            }
            Err(e) if e.kind() == ErrorKind::InvalidUtf8 => usage(not_utf8(&args)),
            Err(e) => usage(slip(&args, &e).unwrap_or_else(|| in_one_line(&e))),
        }
    }

    fn check(command: args::Command) -> Result<Self, Failure> {
        use args::Command;
        Ok(match command {
            Command::Run(args) => Self::Run(Box::new(RunConfig::check(*args)?)),
            Command::Clone { original, run } => {
                if run.incoming.is_some() {
                    return usage(format!("--incoming: the guest is that of {original}: leave it out"));
                }
                let config = RunConfig::check(RunArgs { incoming: Some(Uri::Defer), ..*run })?;
                Self::Run(Box::new(RunConfig { original: Some(original), ..config }))
            }
            Command::Host { function, json } => Self::Host { function, json },
            Command::List { json } => Self::List { json },
            Command::Pool(verb) => Self::Pool(verb),
            Command::Status { target, json } => Self::Perform(Verb::Status { json }, target.into()),
            Command::Pause(target) => Self::Perform(Verb::Pause, target.into()),
            Command::Resume(target) => Self::Perform(Verb::Resume, target.into()),
            Command::Reset(target) => Self::Perform(Verb::Reset, target.into()),
            Command::Powerdown(target) => Self::Perform(Verb::Powerdown, target.into()),
            Command::Eject { name, force } => Self::Perform(Verb::Eject { force }, Target::Name(name)),
            Command::Insert { name, file, force } => Self::Perform(Verb::Insert { file, force }, Target::Name(name)),
            Command::AddDisk { name, spec } => Self::Perform(Verb::AddDisk(spec.0), Target::Name(name)),
            Command::AddNet { name, spec } => Self::Perform(Verb::AddNet(spec.0), Target::Name(name)),
            Command::Resize { name, id, size } => Self::Perform(Verb::Resize { id, size: size.0 }, Target::Name(name)),
            Command::Balloon { name, size } => Self::Perform(Verb::Balloon(size.0), Target::Name(name)),
            Command::Migrate { how, target } => {
                check_tls(Some(&how.uri), how.tls_dir.is_some(), "")?;
                Self::Perform(Verb::Migrate(Box::new(how)), target.into())
            }
            Command::Save { target, file, keep, detach } => {
                Self::Perform(Verb::Save { file, keep, detach }, target.into())
            }
            Command::CancelMigration(target) => Self::Perform(Verb::CancelMigration, target.into()),
            Command::AddCpu { name } => Self::Perform(Verb::AddCpu, Target::Name(name)),
            Command::Remove { name, id } => Self::Perform(Verb::Remove { id }, Target::Name(name)),
            Command::Quit(target) => Self::Perform(Verb::Quit, target.into()),
            Command::Other(words) => {
                let name = words.first().map(|word| word.to_string_lossy()).unwrap_or_default();
                return usage(format!("there is no command '{name}'; see soc-vmm --help"));
            }
        })
    }
}

impl RunConfig {
    fn check(args: RunArgs) -> Result<Self, Failure> {
        if let Some(line) = args.later.refusal() {
            return usage(line);
        }
        check_tls(args.incoming.as_ref(), args.tls_dir.is_some(), "--incoming ")?;
        // What is said of a vCPU is said of those that can come too.
        let cpus = args.cpus.topology.cpus() as u16;
        let cpu_affinity = args.cpu_affinity.unwrap_or_default();
        if let Some((vcpu, _)) = cpu_affinity.0.iter().find(|(vcpu, _)| *vcpu >= cpus) {
            return usage(format!("--cpu-affinity names vCPU {vcpu}, but --cpus is {cpus}: vCPUs count from 0"));
        }
        let (memory, numa) = match numa::check(args.numa, args.memory, cpus) {
            Ok(checked) => checked,
            Err(why) => return usage(why),
        };
        let once = [
            ("rng0", args.entropy.is_some()),
            ("serial0", !args.channel.is_empty()),
            ("vsock0", args.vsock.is_some()),
            ("balloon0", args.balloon.is_some()),
        ];
        let once = once.into_iter().filter_map(|(id, there)| there.then_some(id));
        let checked = disk::check_ids(&args.disk, &args.net, &args.fs, once);
        if let Err(why) = checked.and_then(|()| channel::check(&args.channel)) {
            return usage(why);
        }
        let tests = &args.test_device;
        if let Some(twice) =
            tests.iter().enumerate().find_map(|(i, device)| tests[..i].contains(device).then_some(device))
        {
            return usage(format!("--test-device {twice} is there twice: once is enough"));
        }
        if args.iommu.is_some() && args.firmware.is_some() {
            return usage(
                "--iommu needs --kernel: with an IOMMU the machine has no 8259 and no PIT, which firmware counts on",
            );
        }
        let boot = match (args.kernel, args.firmware) {
            (Some(kernel), _) => {
                let given = args.cmdline.filter(|cmdline| !cmdline.is_empty());
                BootSource::Kernel {
                    kernel,
                    initrd: args.initrd,
                    cmdline: given.unwrap_or_else(|| DEFAULT_CMDLINE.to_owned()),
                }
            }
            (None, Some(code)) => BootSource::Firmware { code, nvram: args.nvram },
            (None, None) => return usage("nothing to boot: give --kernel FILE or --firmware CODE"),
        };
        Ok(Self {
            name: args.name.unwrap_or_else(VmName::of_process),
            cpus: args.cpus.present,
            topology: args.cpus.topology,
            cpu: args.cpu,
            cpu_affinity,
            memory,
            dirty_ring: args.dirty_ring.unwrap_or_default(),
            numa,
            boot,
            disks: args.disk,
            cdrom: args.cdrom,
            nets: args.net,
            file_systems: args.fs,
            entropy: args.entropy,
            channels: args.channel,
            vsock: args.vsock,
            balloon: args.balloon,
            iommu: args.iommu,
            test_devices: args.test_device,
            serial: args.serial,
            debugcon: args.debugcon,
            debug_exit: args.debug_exit,
            qmp: args.qmp.into_iter().map(|socket| socket.0).collect(),
            function: args.function,
            sandbox: args.sandbox.0,
            paused: args.paused,
            incoming: args.incoming,
            original: None,
            tls_dir: args.tls_dir,
            log: args.log,
            machine: MachineConfig::default(),
            process: ProcessConfig::default(),
            hardware: None,
        })
    }
}

/// Whether certificates are there where they are needed, and nowhere else.
fn check_tls(uri: Option<&Uri>, has_dir: bool, option: &str) -> Result<(), Failure> {
    match (uri, has_dir) {
        (Some(uri @ Uri::Tls(..)), false) => {
            usage(format!("{option}{uri} needs certificates: say where they are by --tls-dir DIR"))
        }
        (Some(Uri::Tls(..)), true) | (_, false) => Ok(()),
        (_, true) => usage(format!("--tls-dir is for {option}tls:HOST:PORT")),
    }
}

/// vCPUs at the start, and how those that there can be are arranged, from the value of `--cpus`.
pub(crate) fn processors(text: &str) -> Result<(u16, Topology), ValueError> {
    text.parse().map(|cpu::Cpus { present, topology }| (present, topology))
}

/// Memory and nodes, from values of `--numa`.
pub(crate) fn nodes(texts: &[String], memory: Memory, cpus: u16) -> Result<(Memory, Vec<NodeSpec>), String> {
    let nodes = texts.iter().map(|text| text.parse()).collect::<Result<Vec<_>, ValueError>>();
    numa::check(nodes.map_err(|e| e.to_string())?, Some(memory), cpus)
}

impl From<TargetArgs> for Target {
    fn from(args: TargetArgs) -> Self {
        match (args.name, args.qmp) {
            (Some(name), _) => Self::Name(name),
            (None, socket) => Self::Socket(socket.unwrap_or_default()),
        }
    }
}

fn usage<T>(line: impl AsRef<str>) -> Result<T, Failure> {
    Err(Failure::new(ExitStatus::Usage, line))
}

/// One dash and no help or version: QEMU's way of writing options.
fn is_qemu_option(first: &OsString) -> bool {
    let first = first.as_encoded_bytes();
    first.starts_with(b"-") && !first.starts_with(b"--") && first != b"-h" && first != b"-V"
}

/// Which arguments are no UTF-8, each behind the option that it belongs to. One of them is where only UTF-8 will do; clap doesn't say which.
fn not_utf8(args: &[OsString]) -> String {
    let options = std::iter::once(None).chain(args.iter().map(Some));
    let named = options.zip(args).filter(|(_, arg)| arg.to_str().is_none()).map(|(before, arg)| {
        let option = before.and_then(|before| before.to_str()).filter(|before| before.starts_with("--"));
        let option = option.map(|option| format!("{option} ")).unwrap_or_default();
        format!("{option}'{}'", arg.to_string_lossy())
    });
    format!(
        "no UTF-8: {}; give another name (paths of their own, as of --kernel, may be so)",
        named.collect::<Vec<_>>().join(", ")
    )
}

/// What somebody meant whose line isn't understood, where that is plain.
fn slip(args: &[OsString], e: &clap::Error) -> Option<String> {
    let words: Vec<&str> = args.iter().skip(1).filter_map(|arg| arg.to_str()).collect();
    let (command, rest) = words.split_first()?;
    let is_uri = |word: &str| word.parse::<Uri>().is_ok_and(|uri| uri != Uri::Defer);
    let uri_is_wrong = matches!(e.get(ContextKind::InvalidArg), Some(ContextValue::String(arg)) if arg == "<URI>");
    rest.windows(2).find_map(|two| match (*command, two) {
        ("migrate", [name, uri]) if uri_is_wrong && name.parse::<VmName>().is_ok() && is_uri(uri) => {
            Some(format!("'{name}' comes where the guest is to go: say soc-vmm migrate {uri} {name}"))
        }
        ("save", ["--keep", keeps @ ("running" | "paused")]) => Some(format!("--keep {keeps}: say --keep={keeps}")),
        _ => None,
    })
}

/// What clap says, without its tips and its usage.
fn in_one_line(e: &clap::Error) -> String {
    let text = e.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let line = text.split("\n\n").next().unwrap_or(text);
    // What is missing is seen where all is.
    let usage = text.lines().find_map(|line| line.strip_prefix("Usage: "));
    match usage.filter(|_| e.kind() == ErrorKind::MissingRequiredArgument) {
        Some(usage) => format!("an argument is missing: say {usage}"),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests;
