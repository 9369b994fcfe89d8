//! What a command line of QEMU's asks of the machine beyond what `soc-vmm run` can say: devices in places of their own, back ends with
//! names, descriptors that were passed.

use std::path::PathBuf;

use super::small::AddFd;
use super::{Blockdev, Chardev, Device, Netdev, Object};

/// The devices, and what they stand on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hardware {
    /// Root ports.
    pub ports: Vec<PortPlace>,
    /// Descriptors for sets.
    pub add_fds: Vec<AddFd>,
    /// Objects: of memory, limits, and others that are only names.
    pub objects: Vec<Object>,
    /// Character devices.
    pub chardevs: Vec<Chardev>,
    /// QMP monitors: names of character devices.
    pub monitors: Vec<String>,
    /// COM1's character device.
    pub serial: Option<String>,
    /// The debug console's.
    pub debugcon: Option<String>,
    /// Devices that have their place on the board: name, driver.
    pub on_board: Vec<(String, String)>,
    /// Block nodes.
    pub blockdevs: Vec<Blockdev>,
    /// Those that are flash.
    pub flash: Vec<String>,
    /// Networks.
    pub netdevs: Vec<Netdev>,
    /// Devices on PCI, on the AHCI controller, ports of serial devices, processors.
    pub devices: Vec<Device>,
}

/// A root port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPlace {
    /// Its name, which is that of the bus behind it.
    pub name: String,
    /// Slot × 8 + function on the root bus.
    pub devfn: u8,
    /// The number of its slot.
    pub slot: u16,
}

/// A device that firmware may boot from, as [`BootPlace::path`] spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootPlace {
    /// When it is tried: the lowest first.
    pub index: u32,
    /// Where firmware finds it.
    pub path: String,
}

/// `-machine none`: a process that only answers what it could do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// Where its monitors are.
    pub monitors: Vec<Chardev>,
    /// Where its process id goes.
    pub pid_file: Option<PathBuf>,
    /// Whether it goes on in the background.
    pub daemonize: bool,
}

impl Hardware {
    /// The limits of the object of that name, if it is of limits.
    pub fn limits(&self, group: &str) -> Option<super::Limits> {
        self.objects.iter().filter(|object| object.id == group).find_map(|object| match object.kind {
            super::ObjectKind::ThrottleGroup(limits) => Some(limits),
            _ => None,
        })
    }

    /// What firmware may boot from, in the order in which it is to be tried.
    pub fn boot_order(&self) -> Vec<BootPlace> {
        let place = |device: &Device| Some(BootPlace { index: device.boot_index?, path: self.firmware_path(device)? });
        let mut places: Vec<BootPlace> = self.devices.iter().filter_map(place).collect();
        places.sort_by_key(|place| place.index);
        places
    }

    /// The device's path in the words of Open Firmware, which SeaBIOS and OVMF look for (IEEE 1275 PCI binding §2.2.1.3): each step a
    /// class's name and a slot, with a function that isn't 0.
    fn firmware_path(&self, device: &Device) -> Option<String> {
        use super::DeviceKind::{Cd, Disk, Net, VhostDisk};
        const ROOT: &str = "/pci@i0cf8";
        let step = |name: &str, devfn: u8| match (devfn >> 3, devfn & 7) {
            (slot, 0) => format!("/{name}@{slot:x}"),
            (slot, function) => format!("/{name}@{slot:x},{function:x}"),
        };
        if let Cd(_) = device.kind {
            let port = device.bus.as_deref().and_then(ahci_port)?;
            return Some(format!("{ROOT}/pci8086,2922@1f,2/drive@{port:x}/disk@0"));
        }
        let (class, unit) = match device.kind {
            Disk(_) | VhostDisk(_) => ("scsi", "/disk@0,0"),
            Net(_) => ("ethernet", "/ethernet-phy@0"),
            _ => return None,
        };
        let devfn = device.address.map_or(0, |address| address.devfn());
        let bus = device.bus.as_deref()?;
        let bridge = self.ports.iter().find(|port| port.name == bus).map(|port| step("pci-bridge", port.devfn));
        Some(format!("{ROOT}{}{}{unit}", bridge.unwrap_or_default(), step(class, devfn)))
    }
}

/// The AHCI port that a bus `ide.N` is.
pub(crate) fn ahci_port(bus: &str) -> Option<usize> {
    let port = bus.strip_prefix("ide.")?.parse::<usize>().ok()?;
    (port < crate::ahci::PORTS).then_some(port)
}
