//! The PC's platform devices, as a q35 machine of QEMU has them: names, ports and behaviour.
//!
//! | device | ports or memory | GSI | posted |
//! | --- | --- | --- | --- |
//! | [`Serial`] COM1–COM4 | 0x3f8, 0x2f8, 0x3e8, 0x2e8 | 4, 3, 4, 3 | none |
//! | [`Rtc`] | 0x70–0x71 | 8 | none |
//! | [`I8042`] | 0x60, 0x64 | 1, 12 | none |
//! | [`Port92`] | 0x92 | | none |
//! | [`ResetControl`] | 0xcf9 | | none |
//! | [`AcpiPm`] | 0x600–0x67f, 0xb2–0xb3 | 9 | none |
//! | [`DebugConsole`] | 0x402 | | all |
//! | [`DebugExit`] | 0xf4–0xf7 | | none |
//! | [`DelayPort`] | 0x80 | | all |
//! | [`CpuHotplug`] | 0xcd8–0xce3 | (9, by [`AcpiPm`]) | none |
//! | [`PciHotplug`] | 0xcc0–0xccf | (9, by [`AcpiPm`]) | none |
//! | [`Pvpanic`] | 0x505 | | none |
//! | [`FwCfg`] | 0x510–0x511, 0x514–0x51b | | none |
//! | [`PcTestPorts`] | 0xe0–0xeb, 0x2000–0x2017 | 0–23 | none |
//! | [`PcTestMemory`] | 0xff000000–0xff00ffff | | none |
//! | [`HypervTestdev`] | 0x3000–0x3003 | (SINTs) | none |
//! | [`IoApic`], with an IOMMU only | 0xfec00000–0xfec00fff | (it takes them) | none |
//!
//! Else PIC, IOAPIC, PIT and port 0x61 are not here: KVM's in-kernel irqchip and PIT (with `KVM_PIT_SPEAKER_DUMMY`) answer those, KVM
//! api.rst §4.71. With an IOMMU KVM has the local APICs alone, and there is no PIC and no PIT.
//!
//! [`Edu`] is no platform device but a PCI function, for tests.
//!
//! Each device lives on the thread that serves IOREQs. What other threads have for it (input, a button) goes through a handle
//! into a bounded queue and wakes that thread, which polls the device; timers are deadlines that the same thread keeps. A device
//! says what it claims ([`Ranges`]), and can be saved and restored ([`Persist`]) between two accesses.

#[cfg(test)]
pub(crate) mod acpi_bench;
mod acpi_pm;
mod bytes;
mod clock;
mod cpu_hotplug;
mod debug_console;
mod debug_exit;
mod delay_port;
mod edu;
pub mod fw_cfg;
mod hyperv_testdev;
mod i8042;
mod io_apic;
mod pc_testdev;
mod pci_hotplug;
mod pipe;
mod port92;
mod pvpanic;
mod reset_control;
mod rtc;
mod serial;
mod wire;

use crate::bus::Claim;
use crate::persist::check;
pub use crate::persist::{Persist, RestoreError};

pub use acpi_pm::{AcpiHandle, AcpiPm, AcpiPmState, AcpiWaiting, PmTimerWidth, TscMoment};
pub use clock::{Clock, SystemClock};
pub use cpu_hotplug::{
    CPU_HOTPLUG_GPE, CPU_HOTPLUG_LEN, CPU_HOTPLUG_PORT, Cpu, CpuHotplug, CpuHotplugHandle, CpuHotplugState, CpuReport,
    CpuSink, Standing,
};
pub use debug_console::DebugConsole;
pub use debug_exit::DebugExit;
pub use delay_port::DelayPort;
pub use edu::{Edu, EduState};
pub use fw_cfg::{FW_CFG_LEN, FW_CFG_PORT, FwCfg, FwCfgState};
pub use hyperv_testdev::{HypervPortState, HypervTestdev, HypervTestdevState};
pub use i8042::{I8042, I8042State, Keyboard};
pub use io_apic::{IO_APIC_PINS, IoApic, IoApicState};
pub use pc_testdev::{PcTestMemory, PcTestMemoryState, PcTestPorts, PcTestPortsState};
pub use pci_hotplug::{
    BANK as PCI_HOTPLUG_BANK, EjectSink, PCI_HOTPLUG_GPE, PCI_HOTPLUG_LEN, PCI_HOTPLUG_PORT, PCI_HOTPLUG_SLOTS,
    PciHotplug, PciHotplugHandle, PciHotplugState,
};
pub use pipe::{Closed, InputQueue, InputWriter, OutputQueue, OutputReader, input_pipe, output_pipe};
pub use port92::{Port92, Port92State};
pub use pvpanic::{PVPANIC_PORT, Pvpanic, PvpanicState};
pub use reset_control::{ResetControl, ResetControlState};
pub use rtc::{BootDevice, Cmos, Rtc, RtcState};
pub use serial::{Com, Serial, SerialState};

pub use acpi_pm::{
    ACPI_DISABLE, ACPI_ENABLE, GPE0_BLOCK, GPE0_LEN, PM_BASE, PM_TIMER, PM1A_CONTROL, PM1A_EVENT, SCI_GSI,
    SLEEP_TYPE_S5, SMI_COMMAND,
};
pub use reset_control::{RESET_PORT, RESET_VALUE};

/// What a device claims, and which of it is *postable*: a write there may finish at once, because nothing relies on its order
/// (no DMA, interrupt, ioeventfd or sibling register). The machine builds its buses and the host's posted ranges from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranges {
    /// Ports, in the order of the device's offsets.
    pub ports: &'static [Claim],
    /// Guest-physical memory, likewise.
    pub memory: &'static [Claim],
    /// The part of `ports` whose writes may be posted.
    pub posted_ports: &'static [Claim],
    /// The part of `memory` whose writes may be posted.
    pub posted_memory: &'static [Claim],
}

impl Ranges {
    const fn ports(ports: &'static [Claim]) -> Self {
        Self { ports, memory: &[], posted_ports: &[], posted_memory: &[] }
    }

    const fn posted(ports: &'static [Claim]) -> Self {
        Self { ports, memory: &[], posted_ports: ports, posted_memory: &[] }
    }

    const fn memory(memory: &'static [Claim]) -> Self {
        Self { ports: &[], memory, posted_ports: &[], posted_memory: &[] }
    }
}

const fn claim(base: u64, len: u64) -> Claim {
    Claim { base, len }
}
