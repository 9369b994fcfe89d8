//! The machine: which devices stand on its buses.

use std::sync::{Arc, Mutex, PoisonError};

use api_channel::call::{CpuidEntry, PostedRange};

use super::chipset::{self, PciParts, PciSide, Trays};
use super::media::Media;
use super::shape::Shape;
use super::split::{Remapped, Split};
use super::worker::Buses;
use super::zone;
use crate::acpi::{self, AcpiConfig, AcpiError};
use crate::bus::{Bus, Claim, Device, MapError, Wake};
use crate::cli::TestDevice;
use crate::control::CdromDrive;
use crate::cpus::{CpuListener, Cpus};
use crate::devices::fw_cfg::FwCfgError;
use crate::devices::{
    AcpiHandle, AcpiPm, Cmos, Com, CpuHotplug, CpuHotplugHandle, DebugConsole, DebugExit, DelayPort, FwCfg,
    HypervTestdev, I8042, InputQueue, IoApic, OutputQueue, PcTestMemory, PcTestPorts, PmTimerWidth, Port92, Pvpanic,
    Ranges, ResetControl, Rtc, SCI_GSI, Serial, SystemClock,
};
use crate::flash::{Flash, FlashMemory};
use crate::hyperv::Hyperv;
use crate::interrupt::{InterruptLine, LineSink, MessageSink};
use crate::iommu::VtdRegisters;
use crate::memory::GuestMemory;
use crate::pci::{Fabric, FabricSide, NoRoom, Platform, PlugError};
use crate::power::{CrashSink, PowerSink};
use crate::slots::{DeviceListeners, NewBalloon, NodeError, SlotError, SlotListener, Slots};
use crate::smbios::{Smbios, SmbiosError};
use crate::virtio::NotifyPages;

/// What a machine is made of.
pub(super) struct Parts<'a> {
    /// The VM's name.
    pub(super) name: &'a str,
    /// No firmware will set the machine up.
    pub(super) prepared: bool,
    /// What arranges address spaces for the chipset.
    pub(super) platform: Arc<dyn Platform>,
    /// Where messages go.
    pub(super) messages: Arc<dyn MessageSink>,
    /// With an IOMMU, what the host leaves of its interrupt controllers.
    pub(super) split: Option<Split>,
    /// Guest memory, for devices that use DMA.
    pub(super) memory: Arc<dyn GuestMemory>,
    /// Where kicks may come from.
    pub(super) notify: Arc<NotifyPages>,
    /// The guest's physical address bits.
    pub(super) physical_bits: u8,
    /// What the guest is told of it.
    pub(super) shape: Shape,
    /// A vCPU's CPUID.
    pub(super) cpuid: &'a [CpuidEntry],
    /// The host's TSC frequency, which the PM timer divides.
    pub(super) tsc_khz: u32,
    /// COM1's far end.
    pub(super) serial: (OutputQueue, InputQueue),
    /// The debug console's, if there is one.
    pub(super) debugcon: Option<OutputQueue>,
    /// Whether the devices of kvm-unit-tests are there: isa-debug-exit and pc-testdev.
    pub(super) debug_exit: bool,
    /// More test devices.
    pub(super) test_devices: &'a [TestDevice],
    /// Hyper-V's connections, if the vCPUs have a SynIC.
    pub(super) hyperv: Option<Arc<Hyperv>>,
    /// Where interrupts go.
    pub(super) lines: Arc<dyn LineSink>,
    /// Where power events go.
    pub(super) power: Arc<dyn PowerSink>,
    /// Where the guest's kernel tells of its panic.
    pub(super) crash: Arc<dyn CrashSink>,
    /// Wakes the thread that serves the buses.
    pub(super) wake: Arc<dyn Wake>,
    /// The balloon, if there is one.
    pub(super) balloon: Option<NewBalloon>,
    /// What disks, media and flash hold.
    pub(super) media: Media,
    /// Where the guest reads flash.
    pub(super) flash: Arc<dyn FlashMemory>,
    /// What flash holds comes with the guest.
    pub(super) incoming: bool,
    /// Makes those who hear of CD-ROM drives' trays.
    pub(super) trays: Trays,
    /// Hears of devices that were taken out.
    pub(super) listener: Arc<dyn SlotListener>,
    /// Who hears of what devices meet.
    pub(super) device_listeners: DeviceListeners,
    /// Hears of processors.
    pub(super) cpu_listener: Arc<dyn CpuListener>,
}

/// A built machine.
pub(super) struct Machine {
    /// Its buses, for the worker.
    pub(super) buses: Buses,
    /// Its power button.
    pub(super) acpi: AcpiHandle,
    /// Its processors.
    pub(super) cpus: Cpus,
    /// The slots of its ports.
    pub(super) slots: Slots,
    /// Its CD-ROM drives.
    pub(super) cdroms: Vec<CdromDrive>,
    /// Its I/O APIC, if it is not the host's.
    pub(super) io_apic: Option<IoApic>,
    /// What the host may post.
    pub(super) posted: Vec<PostedRange>,
}

impl Machine {
    /// Builds the machine.
    ///
    /// # Errors
    /// There are more devices than places.
    pub(super) fn new(parts: Parts<'_>) -> Result<Self, BuildError> {
        let Parts {
            name,
            prepared,
            platform,
            messages,
            split,
            memory,
            notify,
            physical_bits,
            shape,
            cpuid,
            tsc_khz,
            serial,
            debugcon,
            debug_exit,
            test_devices,
            hyperv,
            lines,
            power,
            crash,
            wake,
            balloon,
            media,
            flash,
            incoming,
            trays,
            listener,
            device_listeners,
            cpu_listener,
        } = parts;
        let mut builder = Builder::default();
        let remapped = split.map(|split| split.remap(memory.clone(), &*messages, wake.clone()));
        let (lines, iommu, io_apic) = match remapped {
            None => (lines, None, None),
            Some(Remapped { io_apic, iommu, registers }) => {
                builder.add(&IoApic::RANGES, io_apic.clone())?;
                builder.add(&VtdRegisters::RANGES, registers)?;
                (Arc::new(io_apic.clone()) as Arc<dyn LineSink>, Some(iommu), Some(io_apic))
            }
        };
        let line = |gsi| InterruptLine::new(gsi, lines.clone());
        let layout = shape.layout;
        let (below, above) = (layout.low_end(), layout.high_bytes());
        let cmos = Cmos { ram_below_4g: below, ram_above_4g: above, cpus: shape.cpus, boot: shape.boot_devices() };
        let clock = Arc::new(SystemClock);
        builder.add(&I8042::RANGES, I8042::new(line(1), line(12), power.clone()))?;
        builder.add(&Port92::RANGES, Port92::new(power.clone()))?;
        builder.add(&ResetControl::RANGES, ResetControl::new(power.clone()))?;
        builder.add(&DelayPort::RANGES, DelayPort)?;
        let (acpi_pm, acpi) = AcpiPm::new(
            tsc_khz.into(),
            PmTimerWidth::Bits32,
            clock.clone(),
            line(SCI_GSI),
            power.clone(),
            wake.clone(),
        );
        // Without firmware the loader's FACS is there to wake up by.
        let acpi_pm = if prepared { acpi_pm.with_sleep() } else { acpi_pm };
        let (cpus, registers) = Cpus::new(shape.topology, shape.cpus, acpi.clone(), cpu_listener);
        builder.add(&CpuHotplug::RANGES, registers)?;
        let alarm = Arc::new(RtcLine { lines: lines.clone(), acpi: acpi.clone() });
        let rtc = Rtc::new(&cmos, clock, InterruptLine::new(RTC_GSI, alarm)).counting(cpus.registers().clone());
        let rtc = rtc.ahead(zone::ahead(shape.machine.rtc));
        builder.add(&Rtc::RANGES, rtc)?;
        let PciSide { fabric, slots, drives } = chipset::build(PciParts {
            name,
            prepared,
            layout,
            platform,
            messages,
            iommu,
            lines: lines.clone(),
            memory: memory.clone(),
            notify,
            acpi: acpi_pm,
            wake: wake.clone(),
            cpus: shape.topology.cpus() as usize,
            ports: shape.ports.clone(),
            named: media.named,
            devices: media.devices,
            balloon,
            reserved: media.reserved,
            listener,
            device_listeners,
            cdroms: media.cdroms,
            trays,
            test_devices,
        })?;
        builder.add(
            &FwCfg::RANGES,
            fw_cfg(&shape, media.fw_cfg, physical_bits, cpuid, memory, &fabric, cpus.registers())?,
        )?;
        builder.add(&Pvpanic::RANGES, Pvpanic::new(crash))?;
        let (output, input) = serial;
        builder.add(&Com::Com1.ranges(), Serial::new(output, input, line(Com::Com1.gsi())))?;
        if let Some(output) = debugcon {
            builder.add(&DebugConsole::RANGES, DebugConsole::new(output))?;
        }
        if debug_exit {
            builder.add(&DebugExit::RANGES, DebugExit::new(power))?;
            builder.add(&PcTestPorts::RANGES, PcTestPorts::new(&lines))?;
            builder.add(&PcTestMemory::RANGES, PcTestMemory::new())?;
        }
        for device in test_devices {
            match (device, &hyperv) {
                (TestDevice::Hyperv, Some(hyperv)) => {
                    builder.add(&HypervTestdev::RANGES, HypervTestdev::new(hyperv.clone()))?;
                }
                // A PCI function.
                (TestDevice::Edu, _) => {}
                // As on a machine of QEMU's, where it has nothing to do.
                (TestDevice::Hyperv, None) => tracing::warn!("--test-device hyperv: the vCPUs have no SynIC"),
            }
        }
        if let Some(banks) = media.flash {
            let chips = Flash::new(banks, flash, wake.clone());
            if !incoming {
                chips.fill();
            }
            builder.buses.memory.insert(&chips.claims(), Box::new(chips))?;
        }
        let [ports, rest] = FabricSide::both(&fabric);
        builder.buses.ports.insert_rest(Box::new(ports));
        builder.buses.memory.insert_rest(Box::new(rest));
        Ok(Self { buses: builder.buses, acpi, cpus, slots, cdroms: drives, io_apic, posted: builder.posted })
    }
}

/// The RTC's interrupt.
const RTC_GSI: u32 = 8;

/// The RTC's interrupt line, of which ACPI hears too: it wakes a sleeping guest.
struct RtcLine {
    lines: Arc<dyn LineSink>,
    acpi: AcpiHandle,
}

impl LineSink for RtcLine {
    fn set_level(&self, gsi: u32, high: bool) {
        self.lines.set_level(gsi, high);
        if high {
            self.acpi.rtc_alarm();
        }
    }
}

/// The device from which firmware learns what machine it is on.
fn fw_cfg(
    shape: &Shape,
    files: Vec<(String, Vec<u8>)>,
    physical_bits: u8,
    cpuid: &[CpuidEntry],
    memory: Arc<dyn GuestMemory>,
    fabric: &Arc<Mutex<Fabric>>,
    cpus: &CpuHotplugHandle,
) -> Result<FwCfg, BuildError> {
    let builder = shape.describe_boot(shape.describe(FwCfg::builder(memory), cpus));
    let mut builder = Smbios::for_firmware(&shape.smbios(cpuid))?.add_files(builder);
    for (name, bytes) in files {
        builder = builder.file(&name, bytes);
    }
    if !shape.machine.acpi {
        return Ok(builder.build()?);
    }
    let (fabric, cpus) = (fabric.clone(), cpus.clone());
    let acpi = shape.acpi(Some(physical_bits));
    let shape = shape.clone();
    let update = move |acpi: &mut AcpiConfig| {
        if let Some(pci) = &mut acpi.pci {
            pci.ecam = fabric.lock().unwrap_or_else(PoisonError::into_inner).host().ecam();
        }
        acpi.absent = shape.absent(&cpus.present());
    };
    Ok(acpi::add_files(builder, &acpi, update)?.build()?)
}

/// Why a machine can't be built.
#[derive(Debug, thiserror::Error)]
pub(super) enum BuildError {
    /// A mistake in the devices' tables.
    #[error("its devices overlap")]
    Overlap(#[from] MapError),
    #[error("{devices} devices are more than the {ports} slots: give the VM fewer")]
    TooMany {
        /// Devices asked for.
        devices: usize,
        /// Slots.
        ports: usize,
    },
    #[error("no thread or descriptor is left for a device")]
    Thread(#[source] std::io::Error),
    #[error(transparent)]
    Plug(#[from] PlugError),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Place(#[from] NoRoom),
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    #[error(transparent)]
    Smbios(#[from] SmbiosError),
    #[error(transparent)]
    FwCfg(#[from] FwCfgError),
}

#[derive(Default)]
struct Builder {
    buses: Buses,
    posted: Vec<PostedRange>,
}

impl BuildError {
    /// Whether what is wrong is what was asked for: names, addresses, numbers of devices.
    pub(super) fn is_usage(&self) -> bool {
        match self {
            Self::TooMany { .. } | Self::Plug(PlugError::Taken { .. }) => true,
            Self::Node(NodeError::Slot(e)) | Self::Slot(e) => {
                !matches!(e, SlotError::Thread(_) | SlotError::Plug(_) | SlotError::Balloon(_) | SlotError::Ended)
            }
            Self::Node(_) => true,
            _ => false,
        }
    }
}

impl Builder {
    fn add(&mut self, ranges: &Ranges, device: impl Device + 'static) -> Result<(), MapError> {
        let insert = |bus: &mut Bus, claims: &[Claim], device| bus.insert(claims, device);
        match (ranges.ports, ranges.memory) {
            (ports, []) => insert(&mut self.buses.ports, ports, Box::new(device))?,
            ([], memory) => insert(&mut self.buses.memory, memory, Box::new(device))?,
            (ports, memory) => {
                let shared = Arc::new(Mutex::new(device));
                insert(&mut self.buses.ports, ports, Box::new(shared.clone()))?;
                insert(&mut self.buses.memory, memory, Box::new(shared))?;
            }
        }
        let posted = |claims: &[Claim], ports| {
            claims.iter().map(move |c| PostedRange { base: c.base, len: c.len, ports }).collect::<Vec<_>>()
        };
        self.posted.extend(posted(ranges.posted_ports, 1));
        self.posted.extend(posted(ranges.posted_memory, 0));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
