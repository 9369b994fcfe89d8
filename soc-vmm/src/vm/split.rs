//! The interrupt controllers of a machine with an IOMMU: the host has the local APICs alone, so that every message on its way to one
//! goes through the unit here. There are no 8259s and no PIT.

use std::sync::Arc;

use api_channel::call::Irqchip;

use crate::bus::Wake;
use crate::cli::RunConfig;
use crate::devices::IoApic;
use crate::interrupt::{MessageRoute, MessageSink, Settling};
use crate::iommu::{Iommu, Sender, VtdRegisters};
use crate::memory::GuestMemory;

/// Which controllers are the host's.
pub(super) fn irqchip(config: &RunConfig) -> Irqchip {
    if config.iommu.is_some() { Irqchip::Split } else { Irqchip::Full }
}

/// What the host leaves to the machine.
pub(super) struct Split {
    /// Where the I/O APIC's messages go, by pin.
    pub(super) pins: Vec<Box<dyn MessageRoute>>,
    /// How far the host is with their changes.
    pub(super) settling: Arc<Settling>,
}

/// The controllers, and the unit between them.
pub(super) struct Remapped {
    pub(super) io_apic: IoApic,
    pub(super) iommu: Arc<Iommu>,
    pub(super) registers: VtdRegisters,
}

impl Split {
    /// Puts an IOMMU before the host's local APICs.
    pub(super) fn remap(
        self,
        memory: Arc<dyn GuestMemory>,
        messages: &dyn MessageSink,
        wake: Arc<dyn Wake>,
    ) -> Remapped {
        let Self { pins, settling } = self;
        let iommu = Iommu::new(memory, messages);
        let pins = pins.into_iter().map(|pin| iommu.remapped(Sender::IoApic, pin)).collect();
        let io_apic = IoApic::new(pins, settling.clone());
        let registers = VtdRegisters::new(iommu.clone(), messages, settling, wake);
        Remapped { io_apic, iommu, registers }
    }
}
