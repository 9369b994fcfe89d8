//! Devices: `-device` and QMP `device_add`.

use schemars::JsonSchema;
use serde::Deserialize;

use super::{PciAddress, Properties, Switch, Wrong, inert};
use crate::cli::Mac;
use crate::virtio::block::{MAX_QUEUES, OnError};
use crate::virtio::vhost::MAX_TAG;

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The driver, as it was written.
    pub driver: String,
    /// Its name.
    pub id: Option<String>,
    /// The bus that it is on.
    pub bus: Option<String>,
    /// Its place there.
    pub address: Option<PciAddress>,
    /// When firmware tries to boot from it: the lowest first.
    pub boot_index: Option<u32>,
    /// What it is.
    pub kind: DeviceKind,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// `pcie-root-port`.
    RootPort(RootPort),
    /// `virtio-blk-pci`.
    Disk(Disk),
    /// `virtio-net-pci`.
    Net(Net),
    /// `virtio-rng-pci`.
    Entropy(Entropy),
    /// `virtio-balloon-pci`.
    Balloon(Balloon),
    /// `virtio-serial-pci`.
    Ports,
    /// `virtserialport`.
    Port(Port),
    /// `vhost-user-blk-pci`.
    VhostDisk(VhostDisk),
    /// `vhost-user-fs-pci`.
    FileSystem(FileSystem),
    /// `ide-cd`.
    Cd(Cd),
    /// `isa-serial`.
    Serial(Serial),
    /// `isa-debugcon`.
    DebugConsole(DebugConsole),
    /// `isa-debug-exit`.
    DebugExit,
    /// `pvpanic`.
    Pvpanic,
    /// A processor.
    Cpu(Cpu),
}

/// Properties of a `pcie-root-port`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RootPort {
    /// The number that tells it from others; none: its place does.
    pub chassis: Option<u8>,
    /// The number of its slot.
    pub slot: Option<u16>,
}

/// Properties of a `virtio-blk-pci`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Disk {
    /// Its block node.
    pub drive: String,
    /// Its serial number; none: its name.
    pub serial: Option<String>,
    /// Queues.
    pub num_queues: Option<u16>,
    /// The object that would be its thread.
    pub iothread: Option<String>,
    /// Whether what the guest has written is durable after a flush only.
    #[serde(default)]
    pub write_cache: Switch,
    /// What errors of writes come to.
    #[serde(default)]
    pub werror: Policy,
    /// What errors of reads come to.
    #[serde(default)]
    pub rerror: Policy,
}

/// QMP `BlockdevOnError`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// As QEMU does it.
    #[default]
    Auto,
    /// The guest is told.
    Report,
    /// The VM stops.
    Stop,
    /// The guest is told that all is well.
    Ignore,
    /// Stop where there is no room, else report.
    Enospc,
}

impl Policy {
    /// The same, none being the default.
    pub fn on_error(self) -> Option<OnError> {
        match self {
            Self::Auto => None,
            Self::Report => Some(OnError::Report),
            Self::Stop => Some(OnError::Stop),
            Self::Ignore => Some(OnError::Ignore),
            Self::Enospc => Some(OnError::Enospc),
        }
    }
}

/// Properties of a `virtio-net-pci`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct Net {
    /// Its network.
    pub netdev: String,
    /// Its address.
    pub mac: Option<String>,
    /// Whether it has as many pairs of queues as its network.
    pub mq: Option<Switch>,
    /// The largest packet that the guest shall send.
    pub host_mtu: Option<u16>,
}

impl Net {
    /// Its address.
    ///
    /// # Errors
    /// It is none.
    pub fn address(&self) -> Result<Option<Mac>, Wrong> {
        self.mac
            .as_ref()
            .map(|mac| mac.parse().map_err(|e: crate::cli::ValueError| Wrong::new(e.to_string())))
            .transpose()
    }
}

/// Properties of a `virtio-rng-pci`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Entropy {
    /// The object that is its source.
    pub rng: Option<String>,
    /// Bytes that the guest may have in a period.
    pub max_bytes: Option<u64>,
    /// Milliseconds of a period.
    pub period: Option<u32>,
}

/// Properties of a `virtio-balloon-pci`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Balloon {
    /// Whether the guest may take pages back before it kills programs for want of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest is to report free pages.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// Properties of a `virtserialport`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Its character device.
    pub chardev: String,
    /// What the guest calls it.
    pub name: String,
    /// Its number; none: the first that is free.
    pub nr: Option<u8>,
}

/// Properties of a `vhost-user-blk-pci`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VhostDisk {
    /// Its socket's character device.
    pub chardev: String,
    /// Queues.
    pub num_queues: Option<u16>,
}

/// Properties of a `vhost-user-fs-pci`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FileSystem {
    /// Its socket's character device.
    pub chardev: String,
    /// By what the guest mounts it.
    pub tag: String,
    /// Queues of requests.
    pub num_request_queues: Option<u16>,
}

/// Properties of an `ide-cd`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Cd {
    /// The medium's block node; none: the tray is empty.
    pub drive: Option<String>,
    /// Its unit: a port has one.
    pub unit: Option<u8>,
}

/// Properties of an `isa-serial`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// Its character device.
    pub chardev: String,
    /// Which one: COM1 is 0.
    pub index: Option<u8>,
}

/// Properties of an `isa-debugcon`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DebugConsole {
    /// Its character device.
    pub chardev: String,
    /// Its port; none: 0xe9, where there is none.
    pub iobase: Option<u16>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DebugExitProperties {
    iobase: Option<u16>,
    iosize: Option<u8>,
}

/// Properties of a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Cpu {
    /// Its socket.
    pub socket_id: Option<u32>,
    /// Its core in that.
    pub core_id: Option<u32>,
    /// Its thread of that.
    pub thread_id: Option<u32>,
    /// Its die: a socket is one.
    pub die_id: Option<u32>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NoProperties {}

/// What devices of several kinds have.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Common {
    id: Option<String>,
    bus: Option<String>,
    addr: Option<PciAddress>,
    bootindex: Option<u32>,
}

/// Where the debug console is.
const DEBUG_CONSOLE: u16 = 0x402;
/// Where isa-debug-exit is, and its size.
const DEBUG_EXIT: (u16, u8) = (0xf4, 4);
/// How each processor's type ends.
const CPU_SUFFIX: &str = "-x86_64-cpu";

/// Drivers that this machine hasn't, and what to do instead.
const ABSENT: &[(&str, &str)] = &[
    ("ide-hd", "the AHCI controller has CD-ROM drives: take virtio-blk-pci (in libvirt bus='virtio')"),
    ("scsi-hd", "there is no SCSI: take virtio-blk-pci (in libvirt bus='virtio')"),
    ("scsi-cd", "there is no SCSI: take ide-cd (in libvirt bus='sata')"),
    ("virtio-scsi-pci", "there is no SCSI: take virtio-blk-pci (in libvirt bus='virtio')"),
    ("qemu-xhci", "there is no USB: leave it out (in libvirt <controller type='usb' model='none'/>)"),
    ("nec-usb-xhci", "there is no USB: leave it out (in libvirt <controller type='usb' model='none'/>)"),
    ("vhost-vsock-pci", "the guest's memory is out of reach of Linux' vhost: run soc-vmm with --vsock"),
    ("virtconsole", "there is no virtio console: take isa-serial (in libvirt <console type='pty'> with <serial>)"),
    ("virtio-blk-device", "there is no virtio over MMIO: take virtio-blk-pci"),
    ("virtio-net-device", "there is no virtio over MMIO: take virtio-net-pci"),
    ("virtio-gpu-pci", "there is no display: leave it out (in libvirt no <video> and no <graphics>)"),
    ("VGA", "there is no display: leave it out (in libvirt no <video> and no <graphics>)"),
    ("e1000e", "take virtio-net-pci (in libvirt <model type='virtio'/>)"),
    ("e1000", "take virtio-net-pci (in libvirt <model type='virtio'/>)"),
    ("rtl8139", "take virtio-net-pci (in libvirt <model type='virtio'/>)"),
    ("vfio-pci", "devices of the host are not passed through yet"),
    ("intel-iommu", "run soc-vmm with --iommu"),
    ("i6300esb", "there is no watchdog: leave it out"),
];

impl Device {
    /// Reads the value of `-device`.
    ///
    /// # Errors
    /// It can't be meant, or is not there.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        Self::of(Properties::parse(text, Some("driver"))?)
    }

    /// Reads one from its properties.
    ///
    /// # Errors
    /// It can't be meant, or is not there.
    pub fn of(mut properties: Properties) -> Result<Self, Wrong> {
        let driver = properties.take("driver")?;
        let name = driver.strip_suffix("-non-transitional").map_or(driver.clone(), |plain| format!("{plain}-pci"));
        let name = name.replace("-pci-pci", "-pci");
        let at = |wrong: Wrong| wrong.at(driver.as_str());
        inert::strip(&name, &mut properties).map_err(at)?;
        let common: Common = properties.split_off(&["id", "bus", "addr", "bootindex"]).read().map_err(at)?;
        if let Some(id) = &common.id {
            super::check_id(id).map_err(at)?;
        }
        let kind = kind(&name, &properties).map_err(at)?;
        let device = Self {
            id: common.id,
            bus: common.bus,
            address: common.addr,
            boot_index: common.bootindex,
            kind,
            driver: driver.clone(),
        };
        device.check().map_err(at)?;
        Ok(device)
    }

    /// One that has its place on the board.
    pub(super) fn on_board(driver: &str, kind: DeviceKind) -> Self {
        Self { driver: driver.to_owned(), id: None, bus: None, address: None, boot_index: None, kind }
    }

    /// Whether it has its place on the board: on the chipset's buses.
    pub fn is_on_board(&self) -> bool {
        use DeviceKind::{Cd, DebugConsole, DebugExit, Pvpanic, Serial};
        matches!(self.kind, Serial(_) | DebugConsole(_) | DebugExit | Pvpanic | Cd(_))
    }

    /// Whether it is a PCI function.
    pub fn is_pci(&self) -> bool {
        use DeviceKind::{Balloon, Disk, Entropy, FileSystem, Net, Ports, RootPort, VhostDisk};
        matches!(
            self.kind,
            RootPort(_) | Disk(_) | Net(_) | Entropy(_) | Balloon(_) | Ports | VhostDisk(_) | FileSystem(_)
        )
    }

    /// Whether what it says of its place can be.
    fn check(&self) -> Result<(), Wrong> {
        let on_bus = self.is_pci() || matches!(self.kind, DeviceKind::Port(_) | DeviceKind::Cd(_));
        if !on_bus && let Some(bus) = &self.bus {
            // libvirt writes none; people may.
            if !matches!(&**bus, "isa.0") {
                return Err(Wrong::new("it is on no bus that could be named: leave it out").at("bus"));
            }
        }
        if !self.is_pci() && self.address.is_some() {
            return Err(Wrong::new("it is no PCI function: leave it out").at("addr"));
        }
        let boots = matches!(
            self.kind,
            DeviceKind::Disk(_) | DeviceKind::VhostDisk(_) | DeviceKind::Net(_) | DeviceKind::Cd(_)
        );
        if !boots && self.boot_index.is_some() {
            return Err(Wrong::new("nothing boots from it: leave it out").at("bootindex"));
        }
        Ok(())
    }
}

fn kind(name: &str, properties: &Properties) -> Result<DeviceKind, Wrong> {
    let at_most = |key: &str, count: Option<u16>, most: u16| match count {
        Some(count) if !(1..=most).contains(&count) => {
            Err(Wrong::new(format!("{count}: it is a number from 1 to {most}")).at(key))
        }
        _ => Ok(()),
    };
    Ok(match name {
        "pcie-root-port" => DeviceKind::RootPort(properties.read()?),
        "virtio-blk-pci" => {
            let disk: Disk = properties.read()?;
            at_most("num-queues", disk.num_queues, MAX_QUEUES)?;
            if disk.rerror == Policy::Enospc {
                return Err(Wrong::new("reads need no room: write report, stop or ignore").at("rerror"));
            }
            if disk.serial.as_ref().is_some_and(|serial| serial.chars().any(char::is_control)) {
                return Err(Wrong::new("a serial number is printable").at("serial"));
            }
            DeviceKind::Disk(disk)
        }
        "virtio-net-pci" => {
            let net: Net = properties.read()?;
            net.address()?;
            if net.host_mtu.is_some_and(|mtu| mtu < 68) {
                return Err(Wrong::new("a packet has 68 bytes at least").at("host_mtu"));
            }
            DeviceKind::Net(net)
        }
        "virtio-rng-pci" => {
            let entropy: Entropy = properties.read()?;
            if entropy.max_bytes == Some(0) || entropy.period == Some(0) {
                return Err(Wrong::new("a limit is not 0"));
            }
            DeviceKind::Entropy(entropy)
        }
        "virtio-balloon-pci" => DeviceKind::Balloon(properties.read()?),
        "virtio-serial-pci" => properties.read().map(|NoProperties {}| DeviceKind::Ports)?,
        "virtserialport" => DeviceKind::Port(properties.read()?),
        "vhost-user-blk-pci" => {
            let disk: VhostDisk = properties.read()?;
            at_most("num-queues", disk.num_queues, crate::virtio::vhost::MAX_QUEUES)?;
            DeviceKind::VhostDisk(disk)
        }
        "vhost-user-fs-pci" => {
            let fs: FileSystem = properties.read()?;
            at_most("num-request-queues", fs.num_request_queues, crate::virtio::vhost::MAX_QUEUES)?;
            if fs.tag.is_empty() || fs.tag.len() > MAX_TAG {
                return Err(Wrong::new(format!("a tag has 1 to {MAX_TAG} bytes")).at("tag"));
            }
            DeviceKind::FileSystem(fs)
        }
        "ide-cd" => {
            let cd: Cd = properties.read()?;
            if cd.unit.is_some_and(|unit| unit != 0) {
                return Err(Wrong::new("a port has unit 0 alone").at("unit"));
            }
            DeviceKind::Cd(cd)
        }
        "isa-serial" => {
            let serial: Serial = properties.read()?;
            if serial.index.is_some_and(|index| index != 0) {
                return Err(Wrong::new("there is COM1 alone, which is 0").at("index"));
            }
            DeviceKind::Serial(serial)
        }
        "isa-debugcon" => {
            let console: DebugConsole = properties.read()?;
            only("iobase", console.iobase.or(Some(0xe9)), DEBUG_CONSOLE)?;
            DeviceKind::DebugConsole(console)
        }
        "isa-debug-exit" => {
            let DebugExitProperties { iobase, iosize } = properties.read()?;
            only("iobase", iobase.or(Some(0x501)), DEBUG_EXIT.0)?;
            only("iosize", iosize.map(u16::from), DEBUG_EXIT.1.into())?;
            DeviceKind::DebugExit
        }
        "pvpanic" => properties.read().map(|NoProperties {}| DeviceKind::Pvpanic)?,
        cpu if cpu.ends_with(CPU_SUFFIX) => {
            let cpu: Cpu = properties.read()?;
            if cpu.die_id.is_some_and(|die| die != 0) {
                return Err(Wrong::new("a socket is one die, which is 0").at("die-id"));
            }
            DeviceKind::Cpu(cpu)
        }
        other => return Err(absent(other)),
    })
}

/// The value that a property must have; without it, it is what QEMU's default is.
fn only(key: &str, given: Option<u16>, value: u16) -> Result<(), Wrong> {
    match given {
        Some(other) if other != value => Err(Wrong::new(format!("it is at {value:#x}, not at {other:#x}")).at(key)),
        _ => Ok(()),
    }
}

fn absent(driver: &str) -> Wrong {
    if driver.ends_with("-transitional") {
        return Wrong::new("there is no legacy virtio: take the driver without -transitional");
    }
    match ABSENT.iter().find(|(absent, _)| *absent == driver) {
        Some((_, instead)) => Wrong::new(*instead),
        None => Wrong::new("there is no such device; docs/qemu-command-line.md lists those that there are"),
    }
}

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        of_map(deserializer, Self::of)
    }
}

impl<'de> Deserialize<'de> for super::BlockdevAdd {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        of_map(deserializer, super::Blockdev::of).map(Self)
    }
}

impl<'de> Deserialize<'de> for super::NetdevAdd {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        of_map(deserializer, super::Netdev::of).map(Self)
    }
}

fn of_map<'de, D: serde::Deserializer<'de>, T>(
    deserializer: D,
    read: impl FnOnce(Properties) -> Result<T, Wrong>,
) -> Result<T, D::Error> {
    let properties = serde_json::Map::deserialize(deserializer)?;
    read(Properties::of_json(properties)).map_err(serde::de::Error::custom)
}
