//! From the options to what `soc-vmm run` is told: where they fit each other.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::hardware::ahci_port;
use super::machine::MachineKind;
use super::small::RtcBase;
use super::{
    Blockdev, ChardevKind, Device, DeviceKind, FileRef, Hardware, Line, MachineOption, MemoryBackend, Object,
    ObjectKind, PciAddress, PortPlace, Probe, Switch, Wrong,
};
use crate::boot::BootSource;
use crate::cli::{
    BalloonSpec, FunctionSpec, HugePages, Invocation, MachineConfig, Memory, ProcessConfig, RunConfig, SerialSpec,
};
use crate::control::VmName;
use crate::migrate::Uri;
use crate::smbios::SystemNames;

/// Where SeaBIOS is looked for behind the directories of `-L`.
const FIRMWARE_DIRECTORIES: [&str; 2] = ["/usr/share/seabios", "/usr/share/qemu"];
/// Its image with all that it has.
const SEABIOS: &str = "bios-256k.bin";
/// The root bus.
const ROOT_BUS: &str = "pcie.0";
/// Bytes of guest memory where none are given, as QEMU has it.
const DEFAULT_MEMORY: u64 = 128 << 20;

/// Understands a command line of QEMU's; `args` are all of the process but its own name.
///
/// # Errors
/// Which option, and why.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, Wrong> {
    let mut line = Line::read(args)?;
    let Some(machine) = line.machine.take() else {
        return Err(Wrong::new("it is needed: write -machine q35,accel=kvm").at("-machine"));
    };
    if machine.kind == MachineKind::None {
        return Ok(Invocation::Probe(probe(line)?));
    }
    run(line, &machine).map(|config| Invocation::Run(Box::new(config)))
}

fn probe(line: Line) -> Result<Probe, Wrong> {
    let Line { chardevs, monitors, pid_file, daemonize, .. } = line;
    let mut found = Vec::new();
    for monitor in monitors {
        let chardev = chardevs.iter().find(|chardev| chardev.id == monitor.chardev);
        found.push(chardev.cloned().ok_or_else(|| missing("chardev", &monitor.chardev).at("-mon"))?);
    }
    Ok(Probe { monitors: found, pid_file, daemonize })
}

fn missing(what: &str, id: &str) -> Wrong {
    Wrong::new(format!("there is no {what} '{}'", id.escape_default()))
}

fn run(mut line: Line, machine: &MachineOption) -> Result<RunConfig, Wrong> {
    let incoming = line.incoming.take().map(|uri| uri.parse::<Uri>()).transpose();
    let incoming = incoming.map_err(|e| Wrong::new(e.to_string()).at("-incoming"))?;
    if let Some(Uri::Tls(..)) = incoming {
        let why = "which certificates are meant is said by a monitor: take -incoming defer, migrate-set-parameters and migrate-incoming";
        return Err(Wrong::new(why).at("-incoming"));
    }
    let topology = line.processors.take().unwrap_or_else(|| "1".to_owned());
    let (cpus, topology) = crate::cli::processors(&topology).map_err(|e| Wrong::new(e.to_string()).at("-smp"))?;
    let (memory, numa) = memory(&line, machine, topology.cpus() as u16)?;
    let boot = boot_source(&line, machine)?;
    let (function, log) = outboard(&line)?;
    let name = line.name.clone();
    let smbios = line.smbios.take().unwrap_or_default();
    let names = SystemNames::default();
    let system = SystemNames {
        manufacturer: smbios.manufacturer.unwrap_or(names.manufacturer),
        product: smbios.product.unwrap_or(names.product),
        version: smbios.version.unwrap_or(names.version),
        serial: smbios.serial.unwrap_or(names.serial),
        sku: smbios.sku.unwrap_or(names.sku),
        family: smbios.family.unwrap_or(names.family),
    };
    let uuid = line.uuid.or(smbios.uuid).map_or([0; 16], |uuid| uuid.0);
    if line.no_graphic && !line.no_defaults && !line.devices.iter().any(|it| matches!(it.kind, DeviceKind::Serial(_))) {
        super::options::find("-serial").and_then(|takes| match takes {
            super::options::Takes::Value(read) => read(&mut line, "mon:stdio"),
            super::options::Takes::Nothing(_) => Ok(()),
        })?;
    }
    if line.daemonize && line.chardevs.iter().any(|chardev| chardev.kind == ChardevKind::Stdio) {
        let why = "a process in the background has no terminal, which stdio is (and -nographic without -serial): write -serial pty";
        return Err(Wrong::new(why).at("-daemonize"));
    }
    let config = MachineConfig {
        uuid,
        system,
        rtc: line.rtc.unwrap_or(RtcBase::Utc),
        acpi: machine.acpi && !line.no_acpi,
        boot: line.boot.clone().unwrap_or_default(),
        actions: line.actions,
        fw_cfg: std::mem::take(&mut line.fw_cfg),
    };
    let process = ProcessConfig {
        emulator: true,
        function_by_configuration: line.outboard.as_ref().is_none_or(|said| said.function.is_none()),
        guest: name.clone(),
        pid_file: line.pid_file.clone(),
        daemonize: line.daemonize,
    };
    let balloon = line.devices.iter().find_map(|device| match &device.kind {
        DeviceKind::Balloon(balloon) => {
            Some(BalloonSpec { deflate_on_oom: balloon.deflate_on_oom, reporting: balloon.free_page_reporting })
        }
        _ => None,
    });
    let debug_exit = line.devices.iter().any(|device| device.kind == DeviceKind::DebugExit);
    let (paused, cpu) = (line.paused, line.cpu.take().unwrap_or(crate::cpuid::CpuSpec::HOST));
    let sandbox = line.sandbox.flatten();
    let dirty_ring = line.dirty_ring.unwrap_or_default();
    let hardware = hardware(line, machine)?;
    Ok(RunConfig {
        name: name.as_deref().and_then(|name| name.parse().ok()).unwrap_or_else(VmName::of_process),
        cpus,
        topology,
        cpu,
        cpu_affinity: Default::default(),
        memory,
        dirty_ring,
        numa,
        boot,
        disks: Vec::new(),
        cdrom: None,
        nets: Vec::new(),
        file_systems: Vec::new(),
        entropy: None,
        channels: Vec::new(),
        vsock: None,
        balloon,
        iommu: None,
        test_devices: Vec::new(),
        serial: SerialSpec::Null,
        debugcon: None,
        debug_exit,
        qmp: Vec::new(),
        function,
        sandbox,
        paused,
        incoming,
        original: None,
        tls_dir: None,
        log,
        machine: config,
        process,
        hardware: Some(hardware),
    })
}

fn outboard(line: &Line) -> Result<(FunctionSpec, tracing::level_filters::LevelFilter), Wrong> {
    let said = line.outboard.clone().unwrap_or_default();
    let at = |key: &str, why: String| Wrong::new(why).at(key).at("-outboard");
    let function = said.function.as_deref().unwrap_or("local").parse();
    let function = function.map_err(|e: crate::cli::ValueError| at("function", e.to_string()))?;
    let log = said.log.as_deref().unwrap_or("warn");
    let log = log.parse().map_err(|_| at("log", "write off, error, warn, info, debug or trace".to_owned()))?;
    Ok((function, log))
}

/// RAM and nodes.
fn memory(line: &Line, machine: &MachineOption, cpus: u16) -> Result<(Memory, Vec<crate::numa::NodeSpec>), Wrong> {
    let size = line.memory.unwrap_or(DEFAULT_MEMORY);
    let backend = |id: &str| match line.object(id) {
        Some(Object { kind: ObjectKind::Memory(memory), .. }) => Ok(memory.clone()),
        Some(_) => Err(Wrong::new(format!("'{id}' is no memory"))),
        None => Err(missing("object", id)),
    };
    let (mut huge, mut node, mut prealloc) = (None, None, false);
    if let Some(id) = &machine.memory {
        let memory = backend(id).map_err(|wrong| wrong.at("memory-backend").at("-machine"))?;
        if memory.size != size {
            let why = format!("'{id}' has {} bytes, -m says {size}: make them equal", memory.size);
            return Err(Wrong::new(why).at("memory-backend").at("-machine"));
        }
        huge = huge_pages(&memory)?;
        node = memory.node;
        prealloc = memory.prealloc;
    }
    let mut texts = Vec::new();
    for numa in &line.numa {
        let memory = backend(&numa.memory).map_err(|wrong| wrong.at("memdev").at("-numa"))?;
        let pages = huge_pages(&memory)?;
        if !texts.is_empty() && pages != huge {
            return Err(Wrong::new("all memory is of pages of one size").at("memdev").at("-numa"));
        }
        huge = pages;
        prealloc |= memory.prealloc;
        if !memory.size.is_multiple_of(1 << 10) {
            return Err(Wrong::new("memory is whole pages of 4 KiB").at("size").at("-object"));
        }
        let mut text = format!("memory={}K", memory.size >> 10);
        numa.node.iter().for_each(|number| text += &format!(",node={number}"));
        memory.node.iter().for_each(|host| text += &format!(",host={host}"));
        numa.cpus.iter().for_each(|cpus| text += &format!(",cpus={cpus}"));
        texts.push(text);
    }
    let page = huge.map_or(4096, HugePages::size);
    if !size.is_multiple_of(page) {
        return Err(Wrong::new(format!("{size} bytes are not whole pages of {page} bytes")).at("-m"));
    }
    let memory = Memory { size, hugepages: huge, node, prealloc };
    crate::cli::nodes(&texts, memory, cpus).map_err(|why| Wrong::new(why.replace("--numa", "nodes")).at("-numa"))
}

fn huge_pages(memory: &MemoryBackend) -> Result<Option<HugePages>, Wrong> {
    match memory.huge {
        None => Ok(None),
        Some(None) => Ok(Some(HugePages::Size2M)),
        Some(Some(size)) => match [HugePages::Size2M, HugePages::Size1G].into_iter().find(|pages| pages.size() == size)
        {
            Some(pages) => Ok(Some(pages)),
            None => Err(Wrong::new("huge pages are 2M or 1G").at("hugetlbsize").at("-object")),
        },
    }
}

/// What to boot.
fn boot_source(line: &Line, machine: &MachineOption) -> Result<BootSource, Wrong> {
    let flash = flash(line, machine)?;
    let bios = line.bios.clone().or_else(|| machine.firmware.clone());
    if let Some(kernel) = &line.kernel {
        if bios.is_some() || flash.is_some() {
            let why = "a kernel is started without firmware: leave one of them out (in libvirt <kernel> or <loader>)";
            return Err(Wrong::new(why).at("-kernel"));
        }
        let cmdline = line.append.clone().unwrap_or_default();
        return Ok(BootSource::Kernel { kernel: kernel.clone(), initrd: line.initrd.clone(), cmdline });
    }
    for (option, given) in [("-initrd", line.initrd.is_some()), ("-append", line.append.is_some())] {
        if given {
            return Err(Wrong::new("it needs -kernel").at(option));
        }
    }
    match (flash, bios) {
        (Some(_), Some(_)) => Err(Wrong::new("firmware is in flash already: leave it out").at("-bios")),
        (Some((code, nvram)), None) => Ok(BootSource::Firmware { code, nvram }),
        (None, Some(bios)) => Ok(BootSource::Firmware { code: find_firmware(line, &bios), nvram: None }),
        (None, None) => Ok(BootSource::Firmware { code: find_firmware(line, Path::new(SEABIOS)), nvram: None }),
    }
}

/// Where firmware of that name lies; the name itself where it doesn't, which opening it will tell.
fn find_firmware(line: &Line, name: &Path) -> PathBuf {
    let own = line.directories.iter().map(PathBuf::as_path);
    let all = own.chain(FIRMWARE_DIRECTORIES.iter().map(Path::new)).map(|directory| directory.join(name));
    let named = std::iter::once(name.to_owned()).filter(|_| name.components().count() > 1);
    let mut places = named.chain(all);
    let last = Path::new(FIRMWARE_DIRECTORIES[0]).join(name);
    places.find(|path| path.exists()).unwrap_or(if name.components().count() > 1 { name.to_owned() } else { last })
}

/// Code and variables in flash.
fn flash(line: &Line, machine: &MachineOption) -> Result<Option<(PathBuf, Option<PathBuf>)>, Wrong> {
    let [code, variables] = [0u8, 1].map(|unit| line.flash.iter().find(|drive| drive.unit == unit));
    let by_drive = (code.map(|drive| drive.file.clone()), variables);
    if machine.flash.iter().any(Option::is_some) && !line.flash.is_empty() {
        return Err(Wrong::new("flash is said by -machine already: leave it out").at("-drive"));
    }
    let node = |name: &Option<String>| name.as_ref().map(|name| flash_file(line, name)).transpose();
    let (code, variables) = match (by_drive, &machine.flash) {
        ((None, None), [code, variables]) => {
            let code = node(code).map_err(|wrong| wrong.at("pflash0").at("-machine"))?.map(|(path, _)| path);
            (code, node(variables).map_err(|wrong| wrong.at("pflash1").at("-machine"))?)
        }
        ((code, variables), _) => (code, variables.map(|drive| (drive.file.clone(), drive.read_only))),
    };
    match (code, variables) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(Wrong::new("variables need their code as unit 0 (pflash0)").at("-drive")),
        (Some(_), Some((_, true))) => {
            Err(Wrong::new("firmware writes its variables: leave readonly out for unit 1 (pflash1)").at("-drive"))
        }
        (Some(code), variables) => Ok(Some((code, variables.map(|(path, _)| path)))),
    }
}

/// The file of a block node that is flash, and whether it is only read.
fn flash_file(line: &Line, name: &str) -> Result<(PathBuf, bool), Wrong> {
    let find = |name: &str| line.blockdevs.iter().find(|node| node.node_name == name);
    let node = find(name).ok_or_else(|| missing("block node", name))?;
    if node.driver == super::BlockDriver::Qcow2 {
        return Err(Wrong::new(format!("'{name}': flash is raw")));
    }
    let of_file = |node: &Blockdev| node.filename.clone();
    let file = match &node.file {
        None => of_file(node),
        Some(FileRef::Inline(file)) => Some(file.filename.clone()),
        Some(FileRef::Node(under)) => of_file(find(under).ok_or_else(|| missing("block node", under))?),
    };
    file.map(|file| (file, node.read_only)).ok_or_else(|| Wrong::new(format!("'{name}' is in no file")))
}

/// Devices, their places, and what they stand on.
fn hardware(line: Line, machine: &MachineOption) -> Result<Hardware, Wrong> {
    let mut hardware = Hardware {
        add_fds: line.add_fds,
        objects: line.objects,
        chardevs: line.chardevs,
        monitors: line.monitors.into_iter().map(|monitor| monitor.chardev).collect(),
        blockdevs: line.blockdevs,
        flash: machine.flash.iter().flatten().cloned().collect(),
        netdevs: line.netdevs,
        ..Hardware::default()
    };
    let mut devices = line.devices;
    place(&mut devices)?;
    for device in devices {
        let at = |wrong: Wrong| wrong.at(device.driver.as_str()).at("-device");
        if let Some(id) = device.id.as_ref().filter(|_| device.is_on_board()) {
            hardware.on_board.push((id.clone(), device.driver.clone()));
        }
        match &device.kind {
            DeviceKind::RootPort(port) => {
                if device.bus.as_deref() != Some(ROOT_BUS) {
                    return Err(at(Wrong::new("root ports are on pcie.0").at("bus")));
                }
                let address = device.address.ok_or_else(|| at(Wrong::new("it needs 'addr'")))?;
                let name = device.id.clone().ok_or_else(|| at(Wrong::new("it needs 'id', the name of its bus")))?;
                let number = hardware.ports.len() as u16 + 1;
                let slot = port.slot.filter(|slot| *slot > 0).or(port.chassis.map(u16::from)).unwrap_or(number);
                hardware.ports.push(PortPlace { name, devfn: address.devfn(), slot });
            }
            DeviceKind::Serial(serial) => once(&mut hardware.serial, &serial.chardev).map_err(at)?,
            DeviceKind::DebugConsole(console) => {
                if console.iobase.is_none() && !line.debugcon_moved {
                    let why = "it is at port 0x402 alone: add -global isa-debugcon.iobase=0x402";
                    return Err(Wrong::new(why).at("-debugcon"));
                }
                once(&mut hardware.debugcon, &console.chardev).map_err(at)?;
            }
            DeviceKind::DebugExit | DeviceKind::Pvpanic => {}
            _ => hardware.devices.push(device),
        }
    }
    check(&hardware)?;
    Ok(hardware)
}

fn once(place: &mut Option<String>, chardev: &str) -> Result<(), Wrong> {
    match place.replace(chardev.to_owned()) {
        None => Ok(()),
        Some(_) => Err(Wrong::new("there is one of it")),
    }
}

/// Gives devices on the root bus, and drives on the controller, a place if they have none.
fn place(devices: &mut [Device]) -> Result<(), Wrong> {
    /// The last slot that devices may have: behind it are those of the chipset.
    const LAST: u8 = 0x1e;
    for device in devices.iter_mut().filter(|device| device.is_pci()) {
        device.bus.get_or_insert_with(|| ROOT_BUS.to_owned());
    }
    let taken = |devices: &[Device]| -> BTreeSet<u8> {
        let on_root = devices.iter().filter(|device| device.is_pci() && device.bus.as_deref() == Some(ROOT_BUS));
        on_root.filter_map(|device| device.address.map(|address| address.slot)).collect()
    };
    for index in 0..devices.len() {
        let (bus, is_pci) = (devices[index].bus.clone(), devices[index].is_pci());
        if is_pci && devices[index].address.is_none() {
            let slot = match bus.as_deref() {
                Some(ROOT_BUS) => {
                    let taken = taken(devices);
                    let free = (1..=LAST).find(|slot| !taken.contains(slot));
                    free.ok_or_else(|| Wrong::new("the root bus is full: put devices behind root ports").at("-device"))?
                }
                _ => 0,
            };
            devices[index].address = Some(PciAddress { slot, function: 0 });
        }
        if matches!(devices[index].kind, DeviceKind::Cd(_)) && bus.is_none() {
            let used: Vec<usize> = devices.iter().filter_map(|it| it.bus.as_deref().and_then(ahci_port)).collect();
            let port = (0..crate::ahci::PORTS).find(|port| !used.contains(port));
            let port = port.ok_or_else(|| Wrong::new("the AHCI controller has no more ports").at("-device"))?;
            devices[index].bus = Some(format!("ide.{port}"));
        }
    }
    Ok(())
}

/// `Ok` if all names are different, and what is named is there and free.
fn check(hardware: &Hardware) -> Result<(), Wrong> {
    distinct("-chardev", hardware.chardevs.iter().map(|it| it.id.as_str()))?;
    distinct("-object", hardware.objects.iter().map(|it| it.id.as_str()))?;
    distinct("-blockdev", hardware.blockdevs.iter().map(|it| it.node_name.as_str()))?;
    distinct("-netdev", hardware.netdevs.iter().map(|it| it.id.as_str()))?;
    let ports = hardware.ports.iter().map(|port| port.name.as_str());
    let isa = hardware.on_board.iter().filter(|(id, _)| !hardware.devices.iter().any(|it| it.id.as_ref() == Some(id)));
    let others = isa.map(|(id, _)| id.as_str()).chain(hardware.devices.iter().filter_map(|it| it.id.as_deref()));
    distinct("-device", ports.chain(others))?;
    let slots: Vec<u16> = hardware.ports.iter().map(|port| port.slot).collect();
    if let Some(n) = (0..slots.len()).find(|n| slots[..*n].contains(&slots[*n])) {
        let why = format!("chassis {} is there twice: give each port its own", slots[n]);
        return Err(Wrong::new(why).at("pcie-root-port").at("-device"));
    }
    let indices: Vec<u32> = hardware.devices.iter().filter_map(|device| device.boot_index).collect();
    if let Some(n) = (0..indices.len()).find(|n| indices[..*n].contains(&indices[*n])) {
        return Err(Wrong::new(format!("{} is there twice", indices[n])).at("bootindex").at("-device"));
    }
    let mut used = hardware.monitors.clone();
    used.extend(hardware.serial.iter().chain(&hardware.debugcon).cloned());
    let mut drives: Vec<&str> = hardware.flash.iter().map(String::as_str).collect();
    let mut networks = Vec::new();
    let serials: Vec<String> = hardware
        .devices
        .iter()
        .filter(|it| it.kind == DeviceKind::Ports)
        .filter_map(|it| Some(format!("{}.0", it.id.as_ref()?)))
        .collect();
    for device in &hardware.devices {
        let at = |wrong: Wrong| wrong.at(device.driver.as_str()).at("-device");
        check_bus(hardware, &serials, device).map_err(at)?;
        match &device.kind {
            DeviceKind::Disk(disk) => {
                drives.push(&disk.drive);
                if let Some(iothread) = &disk.iothread {
                    let found = hardware.objects.iter().find(|object| object.id == *iothread);
                    if found.is_none_or(|object| object.kind != ObjectKind::IoThread) {
                        return Err(at(missing("iothread", iothread).at("iothread")));
                    }
                }
            }
            DeviceKind::Cd(cd) => drives.extend(cd.drive.as_deref()),
            DeviceKind::Net(net) => {
                networks.push(net.netdev.as_str());
                let netdev = hardware.netdevs.iter().find(|it| it.id == net.netdev);
                let netdev = netdev.ok_or_else(|| at(missing("netdev", &net.netdev).at("netdev")))?;
                used.extend(netdev.chardev.clone());
                let pairs = netdev.queues.unwrap_or(1).max(netdev.descriptors().len() as u16);
                if net.mq == Some(Switch::Off) && pairs > 1 {
                    return Err(at(Wrong::new("its network has several pairs of queues: write on").at("mq")));
                }
            }
            DeviceKind::Entropy(entropy) => {
                if let Some(rng) = &entropy.rng {
                    let found = hardware.objects.iter().find(|object| object.id == *rng);
                    if found.is_none_or(|object| object.kind != ObjectKind::Entropy) {
                        return Err(at(missing("rng", rng).at("rng")));
                    }
                }
            }
            DeviceKind::Port(port) => used.push(port.chardev.clone()),
            DeviceKind::VhostDisk(disk) => used.push(disk.chardev.clone()),
            DeviceKind::FileSystem(fs) => used.push(fs.chardev.clone()),
            _ => {}
        }
    }
    for (index, id) in used.iter().enumerate() {
        if !hardware.chardevs.iter().any(|chardev| chardev.id == *id) {
            return Err(missing("chardev", id).at("chardev"));
        }
        if used[..index].contains(id) {
            return Err(Wrong::new(format!("'{id}' is used twice: each has one user")).at("chardev"));
        }
    }
    for monitor in &hardware.monitors {
        let chardev = hardware.chardevs.iter().find(|chardev| chardev.id == *monitor);
        if !chardev.is_some_and(|chardev| matches!(chardev.kind, ChardevKind::Listen(_))) {
            let why =
                format!("'{monitor}': a monitor is on a UNIX socket that listens: write unix:PATH,server=on,wait=off");
            return Err(Wrong::new(why).at("chardev").at("-mon"));
        }
    }
    for (index, name) in drives.iter().enumerate() {
        if !hardware.blockdevs.iter().any(|node| node.node_name == *name) {
            return Err(missing("block node", name).at("drive"));
        }
        if drives[..index].contains(name) {
            return Err(Wrong::new(format!("'{name}' is used twice: give each device a node of its own")).at("drive"));
        }
    }
    if let Some(n) = (0..networks.len()).find(|n| networks[..*n].contains(&networks[*n])) {
        return Err(Wrong::new(format!("'{}' is used twice", networks[n])).at("netdev"));
    }
    if hardware.devices.iter().filter(|device| matches!(device.kind, DeviceKind::Balloon(_))).count() > 1 {
        return Err(Wrong::new("a VM has one").at("virtio-balloon-pci").at("-device"));
    }
    Ok(())
}

/// `Ok` if the bus is there, and the place on it can be.
fn check_bus(hardware: &Hardware, serials: &[String], device: &Device) -> Result<(), Wrong> {
    let bus = device.bus.as_deref().unwrap_or_default();
    let shown = bus.escape_default().to_string();
    match &device.kind {
        DeviceKind::Cd(_) if ahci_port(bus).is_none() => {
            Err(Wrong::new(format!("'{shown:.60}': drives are on ide.0 to ide.5")).at("bus"))
        }
        DeviceKind::Port(_) if !bus.is_empty() && !serials.iter().any(|serial| serial == bus) => {
            Err(Wrong::new(format!("'{shown:.60}': there is no such virtio-serial-pci")).at("bus"))
        }
        DeviceKind::Port(_) if !hardware.devices.iter().any(|it| it.kind == DeviceKind::Ports) => {
            Err(Wrong::new("it needs a virtio-serial-pci before it"))
        }
        _ if !device.is_pci() || bus == ROOT_BUS => Ok(()),
        _ if !hardware.ports.iter().any(|port| port.name == bus) => {
            Err(Wrong::new(format!("'{shown:.60}': there is no such bus")).at("bus"))
        }
        _ => match device.address {
            Some(address) if address.devfn() != 0 => Err(Wrong::new("a port has slot 0 alone").at("addr")),
            _ => Ok(()),
        },
    }
}

fn distinct<'a>(option: &str, ids: impl Iterator<Item = &'a str>) -> Result<(), Wrong> {
    let mut seen = BTreeSet::new();
    for id in ids {
        if !seen.insert(id) {
            return Err(Wrong::new(format!("'{}' is there twice", id.escape_default())).at("id").at(option));
        }
    }
    Ok(())
}
