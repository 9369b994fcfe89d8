//! The machine: which devices stand on its buses.

use std::sync::Arc;

use api_channel::call::PostedRange;

use super::worker::Buses;
use crate::acpi::AcpiConfig;
use crate::bus::{Bus, Claim, Device, MapError, Wake};
use crate::cpuid::Topology;
use crate::devices::{
    AcpiHandle, AcpiPm, Cmos, Com, DebugConsole, DebugExit, DelayPort, I8042, InputQueue, OutputQueue, PcTestMemory,
    PcTestPorts, PmTimerWidth, Port92, Ranges, ResetControl, Rtc, SCI_GSI, Serial, SystemClock,
};
use crate::interrupt::{InterruptLine, LineSink};
use crate::layout::MemoryLayout;
use crate::power::PowerSink;

/// What a machine is made of.
pub(super) struct Parts {
    /// RAM.
    pub(super) layout: MemoryLayout,
    /// vCPUs.
    pub(super) cpus: u16,
    /// The host's TSC frequency, which the PM timer divides.
    pub(super) tsc_khz: u32,
    /// COM1's far end.
    pub(super) serial: (OutputQueue, InputQueue),
    /// The debug console's, if there is one.
    pub(super) debugcon: Option<OutputQueue>,
    /// Whether the test devices are there: isa-debug-exit and pc-testdev.
    pub(super) test_devices: bool,
    /// Where interrupts go.
    pub(super) lines: Arc<dyn LineSink>,
    /// Where power events go.
    pub(super) power: Arc<dyn PowerSink>,
    /// Wakes the thread that serves the buses.
    pub(super) wake: Arc<dyn Wake>,
}

/// A built machine.
pub(super) struct Machine {
    /// Its buses, for the worker.
    pub(super) buses: Buses,
    /// Its power button.
    pub(super) acpi: AcpiHandle,
    /// What the host may post.
    pub(super) posted: Vec<PostedRange>,
}

/// What ACPI tells of the machine.
pub(super) fn acpi_config(topology: Topology) -> AcpiConfig {
    AcpiConfig { apic_ids: topology.apic_ids().collect(), serial_ports: 1, keyboard: true }
}

impl Machine {
    /// Builds the machine.
    ///
    /// # Errors
    /// Two devices claim the same address: a mistake in the devices' tables.
    pub(super) fn new(parts: Parts) -> Result<Self, MapError> {
        let Parts { layout, cpus, tsc_khz, serial, debugcon, test_devices, lines, power, wake } = parts;
        let line = |gsi| InterruptLine::new(gsi, lines.clone());
        let mut builder = Builder::default();
        let cmos = Cmos { ram_below_4g: layout.low_end(), ram_above_4g: layout.high_bytes(), cpus, boot: [None; 3] };
        let clock = Arc::new(SystemClock);
        builder.add(&Rtc::RANGES, Rtc::new(&cmos, clock.clone(), line(8)))?;
        builder.add(&I8042::RANGES, I8042::new(line(1), line(12), power.clone()))?;
        builder.add(&Port92::RANGES, Port92::new(power.clone()))?;
        builder.add(&ResetControl::RANGES, ResetControl::new(power.clone()))?;
        builder.add(&DelayPort::RANGES, DelayPort)?;
        let (acpi_pm, acpi) =
            AcpiPm::new(tsc_khz.into(), PmTimerWidth::Bits32, clock, line(SCI_GSI), power.clone(), wake);
        builder.add(&AcpiPm::RANGES, acpi_pm)?;
        let (output, input) = serial;
        builder.add(&Com::Com1.ranges(), Serial::new(output, input, line(Com::Com1.gsi())))?;
        if let Some(output) = debugcon {
            builder.add(&DebugConsole::RANGES, DebugConsole::new(output))?;
        }
        if test_devices {
            builder.add(&DebugExit::RANGES, DebugExit::new(power))?;
            builder.add(&PcTestPorts::RANGES, PcTestPorts::new(&lines))?;
            builder.add(&PcTestMemory::RANGES, PcTestMemory::new())?;
        }
        Ok(Self { buses: builder.buses, acpi, posted: builder.posted })
    }
}

#[derive(Default)]
struct Builder {
    buses: Buses,
    posted: Vec<PostedRange>,
}

impl Builder {
    fn add(&mut self, ranges: &Ranges, device: impl Device + 'static) -> Result<(), MapError> {
        let insert = |bus: &mut Bus, claims: &[Claim], device| bus.insert(claims, device);
        match (ranges.ports, ranges.memory) {
            (ports, []) => insert(&mut self.buses.ports, ports, Box::new(device))?,
            ([], memory) => insert(&mut self.buses.memory, memory, Box::new(device))?,
            (ports, memory) => {
                let shared = Arc::new(std::sync::Mutex::new(device));
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
