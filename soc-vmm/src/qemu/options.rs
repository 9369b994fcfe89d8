//! The table of options.

use super::chardev::Chardev;
use super::device::{DebugConsole, DeviceKind, Serial};
use super::inert::{INERT_GLOBALS, INERT_OPTIONS};
use super::line::Line;
use super::machine::{self, MachineOption, NumaOption};
use super::small::{
    self, ActionOption, AddFd, BootOption, FlashDrive, FwCfgFile, Monitor, Name, Outboard, RebootAction, RtcBase,
    ShutdownAction, SmbiosSystem, stripped,
};
use super::{Blockdev, Device, Netdev, Object, Properties, Wrong};
use crate::sandbox::SandboxSpec;

/// What an option takes, and who reads it.
#[derive(Clone, Copy)]
pub(super) enum Takes {
    /// Nothing.
    Nothing(fn(&mut Line) -> Result<(), Wrong>),
    /// A value.
    Value(fn(&mut Line, &str) -> Result<(), Wrong>),
}

use Takes::{Nothing, Value};

/// The options that mean something.
const OPTIONS: &[(&str, Takes)] = &[
    ("-name", Value(|line, text| once(&mut line.name, stripped("-name", text, Some("guest"))?.read::<Name>()?.guest))),
    ("-S", Nothing(|line| flag(&mut line.paused))),
    ("-machine", Value(|line, text| once(&mut line.machine, MachineOption::parse(text)?))),
    ("-M", Value(|line, text| once(&mut line.machine, MachineOption::parse(text)?))),
    ("-accel", Value(|line, text| machine::accel(text)?.map_or(Ok(()), |ring| once(&mut line.dirty_ring, ring)))),
    ("-cpu", Value(|line, text| once(&mut line.cpu, machine::cpu(text)?))),
    ("-m", Value(|line, text| once(&mut line.memory, machine::memory(text)?))),
    ("-smp", Value(|line, text| once(&mut line.processors, machine::processors(text)?))),
    ("-numa", Value(|line, text| push(&mut line.numa, NumaOption::parse(text)?))),
    ("-uuid", Value(|line, text| once(&mut line.uuid, text.parse()?))),
    ("-object", Value(|line, text| push(&mut line.objects, Object::parse(text)?))),
    ("-overcommit", Value(|_, text| nothing_left("-overcommit", text))),
    ("-msg", Value(|_, text| nothing_left("-msg", text))),
    ("-chardev", Value(|line, text| push(&mut line.chardevs, Chardev::parse(text)?))),
    ("-mon", Value(|line, text| push(&mut line.monitors, Monitor::parse(text)?))),
    ("-qmp", Value(qmp)),
    ("-serial", Value(serial)),
    ("-debugcon", Value(debugcon)),
    ("-rtc", Value(|line, text| once(&mut line.rtc, RtcBase::parse(text)?))),
    ("-no-shutdown", Nothing(no_shutdown)),
    ("-no-reboot", Nothing(no_reboot)),
    ("-action", Value(action)),
    ("-no-acpi", Nothing(|line| flag(&mut line.no_acpi))),
    ("-boot", Value(|line, text| once(&mut line.boot, BootOption::parse(text)?))),
    ("-kernel", Value(|line, text| once(&mut line.kernel, text.into()))),
    ("-initrd", Value(|line, text| once(&mut line.initrd, text.into()))),
    ("-append", Value(|line, text| once(&mut line.append, text.to_owned()))),
    ("-bios", Value(|line, text| once(&mut line.bios, text.into()))),
    ("-L", Value(|line, text| push(&mut line.directories, text.into()))),
    ("-drive", Value(drive)),
    ("-blockdev", Value(|line, text| push(&mut line.blockdevs, Blockdev::parse(text)?))),
    ("-netdev", Value(|line, text| push(&mut line.netdevs, Netdev::parse(text)?))),
    ("-device", Value(|line, text| push(&mut line.devices, Device::parse(text)?))),
    ("-audiodev", Value(|_, text| small::audio(text))),
    ("-add-fd", Value(|line, text| push(&mut line.add_fds, Properties::parse(text, None)?.read::<AddFd>()?))),
    ("-smbios", Value(|line, text| once(&mut line.smbios, SmbiosSystem::parse(text)?))),
    ("-fw_cfg", Value(|line, text| push(&mut line.fw_cfg, FwCfgFile::parse(text)?))),
    ("-sandbox", Value(|line, text| once(&mut line.sandbox, sandbox(text)?))),
    ("-incoming", Value(|line, text| once(&mut line.incoming, text.to_owned()))),
    ("-pidfile", Value(|line, text| once(&mut line.pid_file, text.into()))),
    ("-daemonize", Nothing(|line| flag(&mut line.daemonize))),
    ("-nographic", Nothing(|line| flag(&mut line.no_graphic))),
    ("-nodefaults", Nothing(|line| flag(&mut line.no_defaults))),
    ("-global", Value(global)),
    ("-outboard", Value(|line, text| once(&mut line.outboard, Properties::parse(text, None)?.read::<Outboard>()?))),
];

/// Options that this program hasn't, and what to do instead.
const ABSENT: &[(&str, &str)] = &[
    ("-dtb", "x86 guests have no device tree: leave it out"),
    ("-hda", "give a disk by -blockdev and -device virtio-blk-pci"),
    ("-cdrom", "give a medium by -blockdev and -device ide-cd"),
    ("-net", "give an interface by -netdev and -device virtio-net-pci"),
    ("-nic", "give an interface by -netdev and -device virtio-net-pci"),
    ("-vnc", "there is no display: write -display none (in libvirt no <graphics>)"),
    ("-spice", "there is no display: write -display none (in libvirt no <graphics>)"),
    ("-k", "there is no display: leave it out"),
    ("-usb", "there is no USB: leave it out (in libvirt <controller type='usb' model='none'/>)"),
    ("-D", "the log goes to standard error: leave it out, or write -outboard log=debug"),
    ("-d", "the log goes to standard error: leave it out, or write -outboard log=debug"),
    ("-trace", "the log goes to standard error: leave it out, or write -outboard log=trace"),
    ("-loadvm", "there are no snapshots inside of images: leave it out"),
    ("-snapshot", "images are written: make a qcow2 image over them first"),
    ("-runas", "start it as that user"),
    ("-chroot", "start it there"),
    ("-set", "say it in -device"),
    ("-readconfig", "there are no configuration files: say it in options"),
    ("-qmp-pretty", "write -qmp"),
    ("-gdb", "there is no debugger's stub: leave it out"),
    ("-s", "there is no debugger's stub: leave it out"),
    ("-icount", "guests run on KVM, whose instructions are not counted: leave it out"),
    ("-tpmdev", "there is no TPM: leave it out"),
    ("-version", "write soc-vmm --version"),
    ("-help", "write soc-vmm --help; docs/qemu-command-line.md lists QEMU's options that there are"),
];

/// The row of an option.
pub(super) fn find(option: &str) -> Result<Takes, Wrong> {
    if let Some((_, takes)) = OPTIONS.iter().find(|(name, _)| *name == option) {
        return Ok(*takes);
    }
    if let Some(takes) = inert_option(option) {
        return Ok(takes);
    }
    let why = match ABSENT.iter().find(|(name, _)| *name == option) {
        Some((_, instead)) => (*instead).to_owned(),
        None => "there is no such option; docs/qemu-command-line.md lists those that there are".to_owned(),
    };
    let shown = option.escape_default().to_string();
    Err(Wrong::new(why).at(format!("{shown:.60}")))
}

/// Options of [`INERT_OPTIONS`], by whether they take a value.
fn inert_option(option: &str) -> Option<Takes> {
    /// Of those without values in the list, the ones that take any.
    const ANY: [&str; 1] = ["-watchdog-action"];
    let (_, values, _) = INERT_OPTIONS.iter().find(|(name, ..)| *name == option)?;
    Some(match (*values, ANY.contains(&option)) {
        ([], false) => Nothing(|_| Ok(())),
        ([], true) => Value(|_, _| Ok(())),
        // All of them say that something isn't there.
        (_, _) => Value(|_, text| match text {
            "none" => Ok(()),
            other => Err(Wrong::new(format!("'{}' is not there: write none", other.escape_default()))),
        }),
    })
}

fn once<T>(place: &mut Option<T>, value: T) -> Result<(), Wrong> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(Wrong::new("it is there twice: say it once")),
    }
}

fn flag(place: &mut bool) -> Result<(), Wrong> {
    *place = true;
    Ok(())
}

fn push<T>(list: &mut Vec<T>, value: T) -> Result<(), Wrong> {
    list.push(value);
    Ok(())
}

/// An option of which every property changes nothing.
fn nothing_left(option: &str, text: &str) -> Result<(), Wrong> {
    let properties = stripped(option, text, None)?;
    let unknown = properties.keys().next().map(|key| key.escape_default().to_string());
    unknown.map_or(Ok(()), |key| Err(Wrong::new(format!("there is no '{key}' here"))))
}

fn action(line: &mut Line, text: &str) -> Result<(), Wrong> {
    let ActionOption { reboot, shutdown, panic, .. } = Properties::parse(text, None)?.read()?;
    let actions = &mut line.actions;
    actions.reboot = reboot.or(actions.reboot);
    actions.shutdown = shutdown.or(actions.shutdown);
    actions.panic = panic.or(actions.panic);
    Ok(())
}

fn no_shutdown(line: &mut Line) -> Result<(), Wrong> {
    line.actions.shutdown = Some(ShutdownAction::Pause);
    Ok(())
}

fn no_reboot(line: &mut Line) -> Result<(), Wrong> {
    line.actions.reboot = Some(RebootAction::Shutdown);
    Ok(())
}

fn qmp(line: &mut Line, text: &str) -> Result<(), Wrong> {
    let id = format!("compat_monitor{}", line.monitors.len());
    line.chardevs.push(Chardev::parse_short(text, &id)?);
    push(&mut line.monitors, Monitor::on(id))
}

fn serial(line: &mut Line, text: &str) -> Result<(), Wrong> {
    if text == "none" {
        return Ok(());
    }
    let chardev = "serial0".to_owned();
    line.chardevs.push(Chardev::parse_short(text, &chardev)?);
    push(&mut line.devices, Device::on_board("isa-serial", DeviceKind::Serial(Serial { chardev, index: Some(0) })))
}

fn debugcon(line: &mut Line, text: &str) -> Result<(), Wrong> {
    let chardev = "debugcon".to_owned();
    line.chardevs.push(Chardev::parse_short(text, &chardev)?);
    let console = DebugConsole { chardev, iobase: None };
    push(&mut line.devices, Device::on_board("isa-debugcon", DeviceKind::DebugConsole(console)))
}

fn drive(line: &mut Line, text: &str) -> Result<(), Wrong> {
    let drive = FlashDrive::parse(text, line.flash.len())?;
    if line.flash.iter().any(|other| other.unit == drive.unit) {
        return Err(Wrong::new("that unit is there twice").at("unit"));
    }
    push(&mut line.flash, drive)
}

/// `-sandbox`: what this process is to do without.
fn sandbox(text: &str) -> Result<Option<SandboxSpec>, Wrong> {
    SandboxSpec::of_qemu(text).map_err(|e| Wrong::new(e.to_string()))
}

/// `-global`: what can be said of devices that are there once.
fn global(line: &mut Line, text: &str) -> Result<(), Wrong> {
    match text {
        "isa-debugcon.iobase=0x402" => flag(&mut line.debugcon_moved),
        text if INERT_GLOBALS.iter().any(|(inert, _)| *inert == text) => Ok(()),
        other => Err(Wrong::new(format!(
            "'{}' can't be said; docs/qemu-command-line.md lists what can, all else is said in -device",
            other.escape_default()
        ))),
    }
}
