//! The command line as clap reads it. What is meant by it, all checks done, is [`super::Invocation`].

use std::ffi::OsString;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum, builder::PossibleValuesParser, builder::TypedValueParser};
use tracing::level_filters::LevelFilter;

use super::balloon::BalloonSpec;
use super::channel::ChannelSpec;
use super::cpu::Cpus;
use super::disk::{CdromSpec, parse_id};
use super::entropy::EntropySpec;
use super::iommu::IommuModel;
use super::numa::NumaNode;
use super::pool::PoolVerb;
use super::test_device::TestDevice;
use super::values::{
    CpuAffinity, DebugconSpec, DirtyRing, DiskSize, FunctionSpec, Memory, QmpSocket, SerialSpec, ValueError,
};
use super::vhost::{AnyDisk, AnyNet, FsSpec};
use super::vsock::VsockSpec;
use crate::control::VmName;
use crate::cpuid::CpuSpec;
use crate::migrate::Uri;
use crate::sandbox::SandboxSwitch;

/// Runs VMs whose vCPUs are on the host and whose devices are here, on the SoC.
#[derive(Debug, Parser)]
#[command(name = "soc-vmm", version, disable_help_subcommand = true)]
pub(super) struct CommandLine {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Runs a VM until it powers off
    Run(Box<RunArgs>),
    /// Runs a second VM whose guest is another one's as it is just now; that one goes on
    #[command(override_usage = "soc-vmm clone <NAME> [OPTIONS]")]
    Clone {
        /// The VM whose guest it is; the options are those that it was started with, but for a name of its own
        #[arg(value_name = "NAME")]
        original: VmName,
        #[command(flatten)]
        run: Box<RunArgs>,
    },
    /// Shows the server's inventory, by its host function
    Host {
        /// The host function: local, unix:SOCKET, card:SOCKET, pci:BDF
        #[arg(long, value_name = "SPEC", default_value = "local")]
        function: FunctionSpec,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Lists this user's running VMs
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Shows a VM's state
    Status {
        #[command(flatten)]
        target: TargetArgs,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Stops a VM's vCPUs
    Pause(TargetArgs),
    /// Lets a VM's vCPUs run
    Resume(TargetArgs),
    /// Resets a VM
    Reset(TargetArgs),
    /// Presses a VM's power button
    Powerdown(TargetArgs),
    /// Ends a VM at once
    Quit(TargetArgs),
    /// Takes the medium out of a VM's CD-ROM drive
    Eject {
        /// The VM's name
        name: VmName,
        /// Also where the guest has locked the tray
        #[arg(long)]
        force: bool,
    },
    /// Puts a medium into a VM's CD-ROM drive, in place of what is there
    Insert {
        /// The VM's name
        name: VmName,
        /// The medium's image
        file: PathBuf,
        /// Also where the guest has locked the tray
        #[arg(long)]
        force: bool,
    },
    /// Adds a disk to a VM, and prints its id
    AddDisk {
        /// The VM's name
        name: VmName,
        /// file=F[,format=raw|qcow2][,readonly=on][,id=I][,…] or vhost-user=SOCKET[,queues=N][,id=I], as of run --disk
        #[arg(value_name = "SPEC")]
        spec: DiskText,
    },
    /// Adds a network interface to a VM, and prints its id
    AddNet {
        /// The VM's name
        name: VmName,
        /// tap=NAME or stream=SOCKET, then [,queues=N][,reconnect=S][,mtu=N][,limit-bytes=N][,limit-frames=N][,mac=M][,id=I]; or
        /// vhost-user=SOCKET[,queues=N][,mac=M][,id=I], as of run --net
        #[arg(value_name = "SPEC")]
        spec: NetText,
    },
    /// Adds a vCPU to a VM, and prints its id
    AddCpu {
        /// The VM's name
        name: VmName,
    },
    /// Takes a disk, a network interface or a vCPU out of a VM, once its guest lets go of it
    Remove {
        /// The VM's name
        name: VmName,
        /// The device
        #[arg(value_parser = parse_id)]
        id: String,
    },
    /// Makes a VM's disk larger, while its guest uses it
    Resize {
        /// The VM's name
        name: VmName,
        /// The disk
        #[arg(value_parser = parse_id)]
        id: String,
        /// The size that it shall have: MiB, or with K, M, G, T
        size: DiskSize,
    },
    /// Has a VM's guest make do with less memory, by its balloon, or gives some back
    Balloon {
        /// The VM's name
        name: VmName,
        /// The memory that it shall have: MiB, or with K, M, G, T
        size: DiskSize,
    },
    /// Moves a VM's guest to another one that waits for it (run --incoming), live, and shows how it goes
    #[command(override_usage = "soc-vmm migrate [OPTIONS] <URI> <NAME|--qmp <SOCKET>>")]
    Migrate {
        #[command(flatten)]
        how: MigrateArgs,
        #[command(flatten)]
        target: TargetArgs,
    },
    /// Keeps a VM's guest in a file, from which run --incoming file:FILE has it go on, and ends the VM
    #[command(allow_missing_positional = true, override_usage = "soc-vmm save [OPTIONS] <NAME|--qmp <SOCKET>> <FILE>")]
    Save {
        #[command(flatten)]
        target: TargetArgs,
        /// The file, which isn't there yet
        file: PathBuf,
        /// Keep the guest here too, as it was (running) or standing still (paused), which a guest that writes to disks needs
        #[arg(long, value_name = "running|paused", num_args = 0..=1, require_equals = true, default_missing_value = "running")]
        keep: Option<Keeps>,
        /// Return as soon as it has begun
        #[arg(long)]
        detach: bool,
    },
    /// Ends a move or a save that is under way: the guest stays
    CancelMigration(TargetArgs),
    /// Functions for programs that may not open them
    #[command(subcommand)]
    Pool(PoolVerb),
    #[command(external_subcommand)]
    Other(Vec<OsString>),
}

/// What becomes of a guest that is in a file too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Keeps {
    /// It goes on.
    Running,
    /// It stands still until it is resumed.
    Paused,
}

/// How a guest is moved.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct MigrateArgs {
    /// Where the other one waits: tcp:HOST:PORT, tls:HOST:PORT or unix:SOCKET; or file:FILE, which keeps the guest and ends the VM, as save
    pub(super) uri: Uri,
    /// Connections, 1 to 16 [default: 2, or 1 where it is a file]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(super) connections: Option<u8>,
    /// Most bytes a second: MiB, or with K, M, G, T [default: no limit]
    #[arg(long, value_name = "SIZE")]
    pub(super) bandwidth: Option<DiskSize>,
    /// Milliseconds that what is left of memory may take while the guest stands still
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(..=2_000_000), default_value_t = 50)]
    pub(super) downtime: u64,
    /// Slow a guest down that writes faster than its pages move: on, off
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = ["on", "off"])]
    pub(super) auto_converge: String,
    /// Instead have each vCPU of such a guest write so many MiB a second at most: of VMs with --dirty-ring
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20), conflicts_with = "auto_converge")]
    pub(super) dirty_limit: Option<u64>,
    /// Compress pages
    #[arg(long)]
    pub(super) zstd: bool,
    /// Certificates for tls: ca-cert.pem, client-cert.pem, client-key.pem, which the VM reads
    #[arg(long, value_name = "DIR")]
    pub(super) tls_dir: Option<PathBuf>,
    /// Whom the other one's certificate has to be for [default: HOST]
    #[arg(long, value_name = "HOST", requires = "tls_dir")]
    pub(super) tls_hostname: Option<String>,
    /// Have the guest run there after the first round, and its other pages follow
    #[arg(long, conflicts_with_all = ["detach", "resume"])]
    pub(super) postcopy: bool,
    /// Go on with such a move whose connection broke, as it began
    #[arg(long, conflicts_with_all = ["connections", "bandwidth", "downtime", "auto_converge", "dirty_limit", "zstd"])]
    pub(super) resume: bool,
    /// Return as soon as it has begun
    #[arg(long)]
    pub(super) detach: bool,
}

/// Which VM.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct TargetArgs {
    /// Its name
    pub(super) name: Option<VmName>,
    /// Its control socket
    #[arg(long, value_name = "SOCKET")]
    pub(super) qmp: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Name, for the other commands [default: vm-PID]
    #[arg(long, value_name = "N")]
    pub(super) name: Option<VmName>,
    /// vCPUs, how many can be added, and how all are arranged: N[,maxcpus=M][,sockets=S][,cores=C][,threads=T]
    #[arg(long, value_name = "N", default_value = "1")]
    pub(super) cpus: Cpus,
    /// CPU that the guest sees: host, max, x86-64-v2, -v3, -v4, or a model of QEMU's; [,+FEATURE][,-FEATURE][,hv-…]
    #[arg(long, value_name = "host|MODEL", default_value = "host")]
    pub(super) cpu: CpuSpec,
    /// Host CPU that each vCPU stays on, as 0=4,1=5
    #[arg(long, value_name = "VCPU=CPU,…")]
    pub(super) cpu_affinity: Option<CpuAffinity>,
    /// RAM: MiB, or with K, M, G; [,hugepages=2M|1G][,node=N][,prealloc=on] [default: 512M]
    #[arg(long, value_name = "SIZE")]
    pub(super) memory: Option<Memory>,
    /// Log dirty pages in a ring of each vCPU, of so many entries (a power of two from 1024 to 65536): it tells which vCPU wrote
    #[arg(long, value_name = "ENTRIES")]
    pub(super) dirty_ring: Option<DirtyRing>,
    /// A NUMA node: [node=N,]memory=SIZE[,cpus=A-B]…[,host=H[,pin=on]]
    #[arg(long, value_name = "NODE")]
    pub(super) numa: Vec<NumaNode>,
    /// bzImage, ELF with a PVH note, or multiboot-1 image
    #[arg(long, value_name = "FILE", conflicts_with = "firmware")]
    pub(super) kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", conflicts_with = "firmware")]
    pub(super) initrd: Option<PathBuf>,
    /// Kernel command line [default: console=ttyS0]
    #[arg(long, value_name = "S", conflicts_with = "firmware", allow_hyphen_values = true)]
    pub(super) cmdline: Option<String>,
    /// Firmware image
    #[arg(long, value_name = "CODE")]
    pub(super) firmware: Option<PathBuf>,
    /// Variable store of the firmware, a file that it writes
    #[arg(long, value_name = "VARS", requires = "firmware")]
    pub(super) nvram: Option<PathBuf>,
    /// A disk: file=F[,format=raw|qcow2][,readonly=on][,id=I][,queues=N][,cache=writeback|writethrough|none|directsync][,aio=io_uring|threads]
    /// [,iops=N[,iops_max=N]][,bps=N[,bps_max=N]][,werror=enospc|report|stop|ignore][,rerror=report|stop|ignore]; or vhost-user=SOCKET[,queues=N][,id=I]
    #[arg(long, value_name = "SPEC")]
    pub(super) disk: Vec<AnyDisk>,
    /// The medium of a CD-ROM drive
    #[arg(long, value_name = "FILE")]
    pub(super) cdrom: Option<CdromSpec>,
    /// A network interface: tap=NAME, tap=fd:N or stream=SOCKET, then [,queues=N][,reconnect=S][,mtu=N][,limit-bytes=N][,limit-frames=N][,mac=M][,id=I];
    /// or vhost-user=SOCKET[,queues=N][,mac=M][,id=I]
    #[arg(long, value_name = "SPEC")]
    pub(super) net: Vec<AnyNet>,
    /// A file system of the SoC's, by virtiofsd: vhost-user=SOCKET,tag=TAG[,queues=N][,id=I]
    #[arg(long, value_name = "SPEC")]
    pub(super) fs: Vec<FsSpec>,
    /// A source of entropy: on, or max-bytes=N[,period=MS]
    #[arg(long, value_name = "SPEC")]
    pub(super) entropy: Option<EntropySpec>,
    /// A channel to a program in the guest, qemu-guest-agent say: unix:SOCKET,name=NAME[,connect=on][,id=I]
    #[arg(long, value_name = "SPEC")]
    pub(super) channel: Vec<ChannelSpec>,
    /// Sockets between guest and SoC: cid=N,socket=SOCKET
    #[arg(long, value_name = "SPEC")]
    pub(super) vsock: Option<VsockSpec>,
    /// A balloon: on[,deflate-on-oom=on][,free-page-reporting=on]
    #[arg(long, value_name = "SPEC")]
    pub(super) balloon: Option<BalloonSpec>,
    /// An IOMMU: intel
    #[arg(long, value_name = "MODEL")]
    pub(super) iommu: Option<IommuModel>,
    /// A device for tests: edu, hyperv
    #[arg(long, value_name = "DEVICE")]
    pub(super) test_device: Vec<TestDevice>,
    /// Serial port: stdio, null, pty, file:FILE, unix:SOCKET
    #[arg(long, value_name = "SPEC", default_value = "stdio")]
    pub(super) serial: SerialSpec,
    /// Debug console at port 0x402: file:FILE, stdio
    #[arg(long, value_name = "SPEC")]
    pub(super) debugcon: Option<DebugconSpec>,
    /// A guest's write of V to port 0xf4 ends the VM with status (V << 1) | 1
    #[arg(long)]
    pub(super) debug_exit: bool,
    /// One more control socket: unix:SOCKET
    #[arg(long, value_name = "SPEC")]
    pub(super) qmp: Vec<QmpSocket>,
    /// PCIe function: local, unix:SOCKET, card:SOCKET, pci:BDF, pool
    #[arg(long, value_name = "SPEC", default_value = "local")]
    pub(super) function: FunctionSpec,
    /// Whether soc-vmm gives up, before the guest runs, calls that it has no need of: on, off
    #[arg(long, value_name = "on|off", default_value = "off")]
    pub(super) sandbox: SandboxSwitch,
    /// Take over a guest from elsewhere: tcp:HOST:PORT, tls:HOST:PORT, unix:SOCKET, fd:N, file:FILE, or defer (a monitor says where);
    /// file:FILE,pages=first: not before all of its pages are read
    #[arg(long, value_name = "URI")]
    pub(super) incoming: Option<Uri>,
    /// Certificates for --incoming tls: ca-cert.pem, server-cert.pem, server-key.pem
    #[arg(long, value_name = "DIR")]
    pub(super) tls_dir: Option<PathBuf>,
    /// Don't start the vCPUs
    #[arg(long)]
    pub(super) paused: bool,
    /// What to log on standard error: off, error, warn, info, debug, trace
    #[arg(long, value_name = "LEVEL", default_value = "warn", value_parser = level_parser())]
    pub(super) log: LevelFilter,
    #[command(flatten)]
    pub(super) later: LaterArgs,
}

/// Options of which the interface is fixed and the device isn't there.
#[derive(Debug, Args)]
pub(super) struct LaterArgs {
    #[arg(long, hide = true, allow_hyphen_values = true)]
    vfio: Vec<OsString>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "on", allow_hyphen_values = true)]
    tpm: Vec<OsString>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "on", allow_hyphen_values = true)]
    secure_boot: Vec<OsString>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "on", allow_hyphen_values = true)]
    smm: Vec<OsString>,
}

impl LaterArgs {
    /// The first one that was given, as it is refused.
    pub(super) fn refusal(&self) -> Option<String> {
        let later = [(&self.vfio, "--vfio is not there yet".to_owned())];
        let never = [
            ("--tpm", &self.tpm, "TPM"),
            ("--secure-boot", &self.secure_boot, "Secure Boot, which needs SMM"),
            ("--smm", &self.smm, "System Management Mode"),
        ];
        let never =
            never.map(|(name, values, what)| (values, format!("{name}: this machine has no {what}; leave it out")));
        later.into_iter().chain(never).find(|(values, _)| !values.is_empty()).map(|(_, line)| line)
    }
}

/// The text of a disk or an interface: good by itself, and for the VM to read.
#[derive(Clone, Debug)]
pub(super) struct Checked<T>(pub(super) String, PhantomData<T>);

/// Of `--disk`.
pub(super) type DiskText = Checked<AnyDisk>;
/// Of `--net`.
pub(super) type NetText = Checked<AnyNet>;

impl<T: FromStr<Err = ValueError>> FromStr for Checked<T> {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        s.parse::<T>().map(|_| Self(s.to_owned(), PhantomData))
    }
}

fn level_parser() -> impl TypedValueParser<Value = LevelFilter> {
    PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"])
        .try_map(|level| level.parse::<LevelFilter>())
}
