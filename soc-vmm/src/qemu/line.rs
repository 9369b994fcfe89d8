//! The command line as QEMU's users write it, every option read and checked by itself.

use std::ffi::OsString;
use std::path::PathBuf;

use super::chardev::Chardev;
use super::machine::{MachineOption, NumaOption};
use super::options::{self, Takes};
use super::small::{ActionOption, AddFd, BootOption, FlashDrive, FwCfgFile, Monitor, Outboard, RtcBase, SmbiosSystem};
use super::{Blockdev, Device, Netdev, Object, Uuid, Wrong};
use crate::cli::DirtyRing;
use crate::cpuid::CpuSpec;
use crate::sandbox::SandboxSpec;

/// All that the options say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// `-name guest=`.
    pub name: Option<String>,
    /// `-S`.
    pub paused: bool,
    /// `-machine`.
    pub machine: Option<MachineOption>,
    /// `-cpu`.
    pub cpu: Option<CpuSpec>,
    /// `-m`: bytes.
    pub memory: Option<u64>,
    /// `-smp`, in the words of `run --cpus`.
    pub processors: Option<String>,
    /// `-accel`, what is said there of dirty rings.
    pub dirty_ring: Option<DirtyRing>,
    /// `-numa node`.
    pub numa: Vec<NumaOption>,
    /// `-uuid`.
    pub uuid: Option<Uuid>,
    /// `-object`.
    pub objects: Vec<Object>,
    /// `-chardev`, and what `-serial`, `-qmp` and `-debugcon` stand for.
    pub chardevs: Vec<Chardev>,
    /// `-mon` and `-qmp`: their character devices.
    pub monitors: Vec<Monitor>,
    /// `-rtc`.
    pub rtc: Option<RtcBase>,
    /// `-action`, `-no-reboot`, `-no-shutdown`.
    pub actions: ActionOption,
    /// `-no-acpi`.
    pub no_acpi: bool,
    /// `-boot`.
    pub boot: Option<BootOption>,
    /// `-kernel`.
    pub kernel: Option<PathBuf>,
    /// `-initrd`.
    pub initrd: Option<PathBuf>,
    /// `-append`.
    pub append: Option<String>,
    /// `-bios`.
    pub bios: Option<PathBuf>,
    /// `-L`.
    pub directories: Vec<PathBuf>,
    /// `-drive if=pflash`.
    pub flash: Vec<FlashDrive>,
    /// `-blockdev`.
    pub blockdevs: Vec<Blockdev>,
    /// `-netdev`.
    pub netdevs: Vec<Netdev>,
    /// `-device`, and what `-serial` and `-debugcon` stand for.
    pub devices: Vec<Device>,
    /// `-add-fd`.
    pub add_fds: Vec<AddFd>,
    /// `-smbios type=1`.
    pub smbios: Option<SmbiosSystem>,
    /// `-fw_cfg`.
    pub fw_cfg: Vec<FwCfgFile>,
    /// `-sandbox`; within, none: off.
    pub sandbox: Option<Option<SandboxSpec>>,
    /// `-incoming`.
    pub incoming: Option<String>,
    /// `-pidfile`.
    pub pid_file: Option<PathBuf>,
    /// `-daemonize`.
    pub daemonize: bool,
    /// `-nographic`.
    pub no_graphic: bool,
    /// `-nodefaults`.
    pub no_defaults: bool,
    /// Whether `-global` moves the debug console of `-debugcon` to where one can be.
    pub debugcon_moved: bool,
    /// `-outboard`.
    pub outboard: Option<Outboard>,
}

impl Line {
    /// Reads all arguments behind the process's own name.
    ///
    /// # Errors
    /// An option is unknown, can't be meant, or is not there: which, and why.
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, Wrong> {
        let mut line = Self::default();
        let mut args = args.into_iter();
        while let Some(argument) = args.next() {
            let text = utf8(&argument, "an option")?;
            let Some(name) = text.strip_prefix("--").or(text.strip_prefix('-')).filter(|name| !name.is_empty()) else {
                let text = text.escape_default();
                return Err(Wrong::new(format!("'{text:.60}' is no option; docs/qemu-command-line.md lists them")));
            };
            let option = format!("-{name}");
            let found = options::find(&option)?;
            let read = match found {
                Takes::Nothing(read) => read(&mut line),
                Takes::Value(read) => {
                    let Some(value) = args.next() else { return Err(Wrong::new("it needs a value").at(option)) };
                    let value = utf8(&value, &option)?.to_owned();
                    read(&mut line, &value)
                }
            };
            read.map_err(|wrong| wrong.at(option))?;
        }
        Ok(line)
    }

    /// The object of that name.
    pub fn object(&self, id: &str) -> Option<&Object> {
        self.objects.iter().find(|object| object.id == id)
    }
}

fn utf8<'a>(argument: &'a OsString, what: &str) -> Result<&'a str, Wrong> {
    argument.to_str().ok_or_else(|| {
        let shown = argument.to_string_lossy().escape_default().to_string();
        Wrong::new(format!("{what}: '{shown:.60}' is no UTF-8"))
    })
}
