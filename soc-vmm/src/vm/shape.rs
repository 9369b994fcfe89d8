//! What the guest is told about its machine by tables: ACPI, SMBIOS, fw_cfg. One description feeds all three.

use std::collections::BTreeSet;

use api_channel::call::CpuidEntry;

use super::chipset;
use crate::acpi::AcpiConfig;
use crate::cli::{MachineConfig, RunConfig};
use crate::cpuid::{self, Topology};
use crate::devices::fw_cfg::{Builder, E820Entry, E820Kind};
use crate::devices::{BootDevice, CpuHotplugHandle};
use crate::layout::{FOUR_GIB, KVM_PAGES, KVM_PAGES_SIZE, MemoryLayout};
use crate::numa::Numa;
use crate::qemu::{Hardware, PortPlace};
use crate::smbios::{Processors, SmbiosConfig};

/// The description.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    /// RAM.
    pub(super) layout: MemoryLayout,
    /// vCPUs, those that can come too.
    pub(super) topology: Topology,
    /// How many of them are there from the start.
    pub(super) cpus: u16,
    /// Which memory and which vCPUs are near each other.
    pub(super) numa: Numa,
    /// Root ports.
    pub(super) ports: Vec<PortPlace>,
    /// What the machine is told of itself.
    pub(super) machine: MachineConfig,
    /// Firmware device paths, in the order in which they are to be tried.
    pub(super) boot_order: Vec<String>,
    /// Whether there is an IOMMU.
    pub(super) iommu: bool,
}

impl Shape {
    /// The machine that `config` asks for.
    pub(super) fn new(config: &RunConfig, layout: &MemoryLayout) -> Self {
        let numa = Numa::new(&config.numa, layout);
        let (ports, iommu) = (chipset::ports(config), config.iommu.is_some());
        let (machine, cpus) = (config.machine.clone(), config.cpus);
        let order = config.hardware.iter().flat_map(Hardware::boot_order);
        let boot_order = order.map(|place| place.path).collect();
        Self { layout: *layout, topology: config.topology, cpus, numa, ports, machine, boot_order, iommu }
    }

    /// What ACPI tells at the start; `physical_bits` are the guest's, where its firmware will ask for tables.
    pub(super) fn acpi(&self, physical_bits: Option<u8>) -> AcpiConfig {
        AcpiConfig {
            apic_ids: self.topology.apic_ids().collect(),
            absent: self.absent(&(0..self.cpus.into()).collect::<Vec<_>>()),
            serial_ports: 1,
            keyboard: true,
            fw_cfg: true,
            pvpanic: true,
            pci: Some(chipset::acpi(&self.layout, &self.ports, physical_bits)),
            iommu: self.iommu,
            numa: self.numa.acpi(),
        }
    }

    /// The vCPUs that are not among these.
    pub(super) fn absent(&self, present: &[usize]) -> BTreeSet<usize> {
        (0..self.topology.cpus() as usize).filter(|index| present.binary_search(index).is_err()).collect()
    }

    /// What SMBIOS tells; `cpuid` is a vCPU's table.
    pub(super) fn smbios(&self, cpuid: &[CpuidEntry]) -> SmbiosConfig {
        let leaf = |function| cpuid::find(cpuid, function, 0);
        let text = |words: Vec<u32>| {
            let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).filter(|byte| *byte != 0).collect();
            String::from_utf8_lossy(&bytes).trim().to_owned()
        };
        let brand = (0x8000_0002..=0x8000_0004).filter_map(leaf).flat_map(|e| [e.eax, e.ebx, e.ecx, e.edx]);
        SmbiosConfig {
            uuid: self.machine.uuid,
            system: self.machine.system.clone(),
            processors: Processors {
                sockets: self.topology.sockets() as u16,
                cores: self.topology.cores() as u16,
                threads: (self.topology.cpus() / self.topology.sockets()) as u16,
                signature: leaf(1).map_or([0; 2], |e| [e.eax, e.edx]),
                manufacturer: text(leaf(0).map_or(Vec::new(), |e| vec![e.ebx, e.edx, e.ecx])),
                version: text(brand.collect()),
            },
            memory: self.layout,
        }
    }

    /// Adds what firmware is told of booting.
    pub(super) fn describe_boot(&self, builder: Builder) -> Builder {
        /// Firmware gives up there.
        const HALT: &str = "HALT";
        let boot = &self.machine.boot;
        let mut builder = builder.uuid(self.machine.uuid).boot_menu(boot.menu);
        let strict = boot.strict && !self.boot_order.is_empty();
        let paths: Vec<&str> = self.boot_order.iter().map(String::as_str).chain(strict.then_some(HALT)).collect();
        if !paths.is_empty() {
            builder = builder.boot_order(paths);
        }
        if let Some(wait) = boot.splash_time {
            builder = builder.file("etc/boot-menu-wait", wait.to_le_bytes());
        }
        if let Some(wait) = boot.reboot_timeout {
            builder = builder.file("etc/boot-fail-wait", wait.to_le_bytes());
        }
        builder
    }

    /// The classes of devices that CMOS RAM tells firmware to try.
    pub(super) fn boot_devices(&self) -> [Option<BootDevice>; 3] {
        let device = |letter| match letter {
            'a' => Some(BootDevice::Floppy),
            'c' => Some(BootDevice::Disk),
            'd' => Some(BootDevice::CdRom),
            _ => Some(BootDevice::Network),
        };
        let mut letters = self.machine.boot.order.as_deref().unwrap_or_default().chars();
        [(); 3].map(|()| letters.next().and_then(device))
    }

    /// Adds RAM, processors and nodes to what firmware is told.
    pub(super) fn describe(&self, builder: Builder, cpus: &CpuHotplugHandle) -> Builder {
        let ram = |start, len| E820Entry { start, len, kind: E820Kind::Ram };
        let kvm = E820Entry { start: KVM_PAGES, len: KVM_PAGES_SIZE, kind: E820Kind::Reserved };
        let mut map = vec![ram(0, self.layout.low_end()), kvm];
        if self.layout.high_bytes() != 0 {
            map.push(ram(FOUR_GIB, self.layout.high_bytes()));
        }
        let ids: Vec<u32> = self.topology.apic_ids().collect();
        let limit = ids.iter().max().map_or(0, |id| id + 1);
        let builder = builder.memory(self.layout.ram(), &map);
        let cpus = cpus.clone();
        let builder = builder.cpus(move || cpus.present().len() as u16, limit as u16);
        if self.numa.nodes.is_empty() {
            return builder;
        }
        let mut nodes_of = vec![0u32; limit as usize];
        for (number, node) in (0u32..).zip(&self.numa.nodes) {
            for id in node.vcpus.iter().filter_map(|vcpu| ids.get(usize::from(*vcpu))) {
                nodes_of[*id as usize] = number;
            }
        }
        let bytes = |node: &crate::numa::Node| node.memory.iter().map(|range| range.len).sum();
        builder.numa(&nodes_of, &self.numa.nodes.iter().map(bytes).collect::<Vec<u64>>())
    }
}
