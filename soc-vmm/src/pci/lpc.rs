//! The LPC bridge of an ICH9: 8086:2918 at 00:1f.0 (ICH9 datasheet §13), which holds ACPI's registers and routes PIRQs.

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::bar::Window;
use super::config::{ConfigSpace, ConfigState, Identity, header};
use super::function::PciFunction;
use super::routing::{PIRQS, Pirqs, ROUTE_OFF};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::devices::{AcpiPm, AcpiPmState, PM_BASE, SMI_COMMAND};
use crate::persist::{Persist, RestoreError, check};

/// Where the LPC bridge sits: slot × 8 + function.
pub const LPC: u8 = 0x1f << 3;

// Offsets.
const PM_BASE_REGISTER: u16 = 0x40;
const ACPI_CONTROL: u16 = 0x44;
const PIRQ_A: u16 = 0x60;
const PIRQ_E: u16 = 0x68;
const RCBA: u16 = 0xf0;

/// ACPI control: the block at PMBASE answers.
const ACPI_ON: u8 = 0x80;
/// Ports of ACPI's block.
const PM_LEN: u64 = 0x80;
/// Bytes behind RCBA, the chipset's configuration.
const RCBA_LEN: u64 = 0x4000;

// Regions.
const PM: usize = 6;
const APM: usize = 7;
const CHIPSET: usize = 8;

/// Chipset configuration: the wiring of slots 25–31 to PIRQs (D31IR … D25IR), two bytes each, which stays as it is.
const WIRING: [u64; 7] = [0x3140, 0x3142, 0x3144, 0x3146, 0x3148, 0x314c, 0x3150];
/// INTA is PIRQA, and so on.
const STRAIGHT: u16 = 0x3210;
/// General control and status: the watchdog can't reset the machine, because there is none.
const GENERAL_CONTROL: u64 = 0x3410;
const NO_REBOOT: u8 = 1 << 5;
/// Where firmware puts the chipset's configuration, and that it answers.
const RCBA_VALUE: u32 = 0xfed1_c001;

/// The LPC bridge.
pub struct LpcBridge {
    config: ConfigSpace,
    acpi: AcpiPm,
    pirqs: Arc<Pirqs>,
    prepared: bool,
}

impl LpcBridge {
    /// The bridge. `prepared`: no firmware will set it up.
    pub fn new(acpi: AcpiPm, pirqs: Arc<Pirqs>, prepared: bool) -> Self {
        let identity =
            Identity { vendor: 0x8086, device: 0x2918, revision: 2, class: 0x06_0100, subsystem: (0x1af4, 0x1100) };
        let mut config = ConfigSpace::endpoint(&identity);
        config.set(PM_BASE_REGISTER, &[1, 0, 0, 0]);
        config.allow(PM_BASE_REGISTER, &[0x80, 0xff]);
        config.allow(ACPI_CONTROL, &[ACPI_ON | 0b111]);
        for pirqs in [PIRQ_A, PIRQ_E] {
            config.set(pirqs, &[ROUTE_OFF; 4]);
            config.allow(pirqs, &[0x8f; 4]);
        }
        // Serial IRQ control, LPC's decoders: kept for who wrote them.
        config.allow(0x64, &[0xff]);
        config.allow(0x80, &[0x77, 0x33, 0xff, 0x3f]);
        config.allow(RCBA, &[0x01, 0xc0, 0xff, 0xff]);
        let mut bridge = Self { config, acpi, pirqs, prepared };
        bridge.prepare();
        bridge
    }

    fn prepare(&mut self) {
        if self.prepared {
            self.config.put(PM_BASE_REGISTER, &(PM_BASE | 1).to_le_bytes());
            self.config.put(ACPI_CONTROL, &[ACPI_ON]);
            self.config.put(RCBA, &RCBA_VALUE.to_le_bytes());
        }
        self.route();
    }

    fn route(&self) {
        let mut routes = [ROUTE_OFF; PIRQS];
        for (n, route) in routes.iter_mut().enumerate() {
            let register = if n < 4 { PIRQ_A } else { PIRQ_E };
            let value = self.config.read(register + n as u16 % 4, 1) as u8;
            *route = if value & ROUTE_OFF != 0 { ROUTE_OFF } else { value & 0xf };
        }
        self.pirqs.route(routes);
    }

    /// A byte of the chipset's configuration: fixed.
    fn chipset(offset: u64) -> u8 {
        if offset == GENERAL_CONTROL {
            return NO_REBOOT;
        }
        let wired = WIRING.iter().find(|at| (**at..**at + 2).contains(&offset));
        wired.map_or(0, |at| STRAIGHT.to_le_bytes()[(offset - at) as usize])
    }
}

/// Saved state of an [`LpcBridge`]. The PIRQs' levels are their functions' to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LpcState {
    /// Its configuration space, which has the PIRQs' routes.
    pub config: ConfigState,
    /// ACPI's registers.
    pub acpi: AcpiPmState,
}

impl Persist for LpcBridge {
    const NAME: &'static str = "lpc";
    type State = LpcState;

    fn save(&self) -> LpcState {
        LpcState { config: self.config.save(), acpi: self.acpi.save() }
    }

    fn restore(&mut self, state: &LpcState) -> Result<(), RestoreError> {
        let before = self.config.clone();
        check(self.config.restore(&state.config), Self::NAME, "no configuration space of an LPC bridge")?;
        if let Err(error) = self.acpi.restore(&state.acpi) {
            self.config = before;
            return Err(error);
        }
        self.route();
        Ok(())
    }
}

impl PciFunction for LpcBridge {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn write_config(&mut self, offset: u16, len: u8, value: u32) {
        self.config.write(offset, len, value);
        if (PIRQ_A..PIRQ_E + 4).contains(&(offset & !3)) {
            self.route();
        }
    }

    fn windows(&self) -> Vec<Window> {
        let mut windows = vec![Window { io: true, base: SMI_COMMAND.into(), len: 2, region: APM }];
        let base = u64::from(self.config.u16(PM_BASE_REGISTER) & 0xff80);
        if self.config.read(ACPI_CONTROL, 1) as u8 & ACPI_ON != 0 && base != 0 {
            windows.push(Window { io: true, base, len: PM_LEN, region: PM });
        }
        let rcba = self.config.read(RCBA, 4);
        if rcba & 1 != 0 {
            windows.push(Window { io: false, base: (rcba & 0xffff_c000).into(), len: RCBA_LEN, region: CHIPSET });
        }
        windows
    }

    fn read(&mut self, region: usize, offset: u64, access: &Access, reply: Deferred<'_>) -> Answer {
        match region {
            PM => self.acpi.read(access, offset, reply),
            APM => self.acpi.read(access, PM_LEN + offset, reply),
            _ => {
                let bytes = (offset..).take(access.len.into()).enumerate();
                Answer::Done(bytes.fold(0, |value, (n, at)| value | u64::from(Self::chipset(at)) << (8 * n)))
            }
        }
    }

    fn write(&mut self, region: usize, offset: u64, data: u64, access: &Access, reply: Deferred<'_>) -> Answer {
        match region {
            PM => self.acpi.write(access, offset, data, reply),
            APM => self.acpi.write(access, PM_LEN + offset, data, reply),
            _ => Answer::Done(0),
        }
    }

    fn poll(&mut self) {
        self.acpi.poll();
    }

    fn deadline(&self) -> Option<Instant> {
        self.acpi.deadline()
    }

    fn reset(&mut self) {
        self.config.reset();
        self.acpi.reset();
        self.prepare();
    }
}

impl std::fmt::Debug for LpcBridge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LpcBridge").field("command", &self.config.u16(header::COMMAND)).finish_non_exhaustive()
    }
}
