//! FADT (ACPI 6.5 §5.2.9): fixed hardware of the full, not the hardware-reduced, programming model.

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{AcpiConfig, OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes_of};
use crate::devices::{
    ACPI_DISABLE, ACPI_ENABLE, GPE0_BLOCK, GPE0_LEN, PM_TIMER, PM1A_CONTROL, PM1A_EVENT, RESET_PORT, RESET_VALUE,
    SCI_GSI, SMI_COMMAND,
};

/// IAPC_BOOT_ARCH: there are ISA devices that the user can see.
const LEGACY_DEVICES: u16 = 1 << 0;
/// IAPC_BOOT_ARCH: there is an i8042.
const HAS_8042: u16 = 1 << 1;
/// IAPC_BOOT_ARCH: no VGA, don't probe for it.
const NO_VGA: u16 = 1 << 2;
/// C2 and C3 latencies above these mean that there are no such states (§5.2.9).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;
/// CMOS register of the century.
const CENTURY: u8 = 0x32;
/// Flat logical destinations reach eight processors.
const FLAT_LOGICAL_MAX: usize = 8;

/// Where addresses are (offset, bytes): of the FACS and of the DSDT, the latter twice.
pub(super) const POINTERS: [(usize, u8); 3] = [(36, 4), (40, 4), (140, 8)];

/// Builds the table; FACS and DSDT lie below 4 GiB.
pub(super) fn build(config: &AcpiConfig, facs: u32, dsdt: u32) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .firmware_ctrl_32(facs)
        .dsdt_64(dsdt.into())
        .gpe_info(GPE0_BLOCK.into(), 0, GPE0_LEN, 0, 0)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // A power button as fixed hardware (PwrButton clear), no sleep button, RTC wake not in fixed hardware.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    if config.apic_ids.len() > FLAT_LOGICAL_MAX {
        fadt = fadt.flag(Flags::ForceApicClusterModel);
    }
    // Who knows 32-bit addresses alone looks there.
    fadt.dsdt = dsdt.into();
    fadt.sci_int = (SCI_GSI as u16).into();
    fadt.smi_cmd = u32::from(SMI_COMMAND).into();
    fadt.acpi_enable = ACPI_ENABLE;
    fadt.acpi_disable = ACPI_DISABLE;
    fadt.pm1a_evt_blk = u32::from(PM1A_EVENT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = io(PM1A_EVENT, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(PM1A_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = io(PM1A_CONTROL, 16, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(PM_TIMER).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = io(PM_TIMER, 32, AccessSize::DwordAccess);
    fadt.x_gpe0_blk = io(GPE0_BLOCK, GPE0_LEN * 8, AccessSize::ByteAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | if config.keyboard { HAS_8042 } else { 0 }).into();
    fadt.reset_reg = io(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    bytes_of(&fadt.finalize())
}

fn io(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}
