//! ACPI fixed hardware as the ICH9 has it (ACPI 6.5 §4.8; ICH9 datasheet §13.8): PM1a event and control, PM timer, GPE0, and the
//! SMI command port that turns ACPI on.
//!
//! The PM timer derives from the host's TSC at the guest's access, never from the SoC's clock: a guest that measures one against
//! the other sees no drift. Only its overflow interrupt, which nobody's access triggers, is timed by the SoC.

mod state;
mod timer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::time::Instant;

use super::wire::Wire;
use super::{Clock, Ranges, bytes, claim};
use crate::bus::{Access, Answer, Deferred, Device, Wake};
use crate::interrupt::InterruptLine;
use crate::power::{PowerEvent, PowerSink};
use timer::{PmTimer, Reading};

pub use state::{AcpiPmState, AcpiWaiting, TscMoment};
pub use timer::PmTimerWidth;

/// First port of the block.
pub const PM_BASE: u16 = 0x600;
/// PM1a event block for the FADT: 2 bytes status, 2 bytes enable.
pub const PM1A_EVENT: u16 = PM_BASE;
/// PM1a control block: 2 bytes.
pub const PM1A_CONTROL: u16 = PM_BASE + CONTROL as u16;
/// PM timer: 4 bytes.
pub const PM_TIMER: u16 = PM_BASE + TIMER as u16;
/// GPE0 block.
pub const GPE0_BLOCK: u16 = PM_BASE + GPE_STATUS as u16;
/// Bytes of the GPE0 block: half status, half enable.
pub const GPE0_LEN: u8 = 16;
/// SMI command port.
pub const SMI_COMMAND: u16 = 0xb2;
/// What turns ACPI on (sets SCI_EN) at the SMI command port.
pub const ACPI_ENABLE: u8 = 0x02;
/// What turns it off.
pub const ACPI_DISABLE: u8 = 0x03;
/// SLP_TYP of S5 (soft off) for the DSDT's `_S5`.
pub const SLEEP_TYPE_S5: u8 = 0;
/// SLP_TYP of S3 (suspend to RAM), where the machine can wake up from it: QEMU's.
const SLEEP_TYPE_S3: u8 = 1;
/// The SCI's GSI: level, active high, shared.
pub const SCI_GSI: u32 = 9;

// Offsets of registers; beyond the block of 0x80 ports, the SMI command port and its status byte.
const STATUS: u64 = 0x00;
const ENABLE: u64 = 0x02;
const CONTROL: u64 = 0x04;
const TIMER: u64 = 0x08;
const GPE_STATUS: u64 = 0x20;
const GPE_ENABLE: u64 = 0x28;
const SMI_ENABLE: u64 = 0x30;
const BLOCK: u64 = 0x80;
const APM: u64 = BLOCK;
const END: u64 = BLOCK + 2;

/// PM1 status and enable.
mod event {
    pub(super) const TIMER: u16 = 1 << 0;
    pub(super) const GLOBAL: u16 = 1 << 5;
    pub(super) const POWER_BUTTON: u16 = 1 << 8;
    pub(super) const SLEEP_BUTTON: u16 = 1 << 9;
    pub(super) const RTC: u16 = 1 << 10;
    /// Status alone: the guest slept, and was woken.
    pub(super) const WAKE: u16 = 1 << 15;
    /// What wakes a guest that enabled it.
    pub(super) const WAKERS: u16 = POWER_BUTTON | RTC;
    pub(super) const ENABLES: u16 = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC;
}

/// PM1 control.
mod control {
    pub(super) const SCI_ENABLE: u16 = 1 << 0;
    pub(super) const BUS_MASTER_RELOAD: u16 = 1 << 1;
    pub(super) const SLEEP_TYPE: u16 = 7 << 10;
    pub(super) const SLEEP_TYPE_SHIFT: u32 = 10;
    pub(super) const SLEEP: u16 = 1 << 13;
    /// What can be read back.
    pub(super) const KEPT: u16 = SCI_ENABLE | BUS_MASTER_RELOAD | SLEEP_TYPE;
}

/// SMI_EN says APMC_EN: whoever set up SMM did so, and firmware leaves it alone. There is none.
const SMI_ENABLE_VALUE: u64 = 1 << 5;

/// The block at [`PM_BASE`], and ports 0xb2 and 0xb3.
pub struct AcpiPm {
    registers: Registers,
    timer: PmTimer,
    /// The host's TSC at the last access.
    seen: Option<Reading>,
    /// The timer as it was on the host that the guest came from, until the first access tells this host's TSC.
    before: Option<Before>,
    deadline: Option<Instant>,
    pending: Arc<Pending>,
    clock: Arc<dyn Clock>,
    power: Arc<dyn PowerSink>,
    sci: Wire,
    sleep: Sleep,
}

/// A PM timer that another host's TSC drove.
#[derive(Clone, Copy, Debug)]
struct Before {
    tsc: Reading,
    tsc_khz: u64,
    offset: u64,
}

/// Whether the guest can sleep in S3, and whether it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sleep {
    Never,
    Awake,
    Asleep,
}

#[derive(Clone, Copy, Debug, Default)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u64,
    gpe_enable: u64,
    apm: [u8; 2],
}

impl Registers {
    fn sci(&self) -> bool {
        self.control & control::SCI_ENABLE != 0
            && (self.status & self.enable != 0 || self.gpe_status & self.gpe_enable != 0)
    }
}

/// What other threads have for the device; bits, so that it is bounded.
#[derive(Debug, Default)]
struct Pending {
    power_button: AtomicBool,
    rtc_alarm: AtomicBool,
    /// PM1 status bits that the machine woke up by.
    woken_by: AtomicU16,
    gpes: AtomicU64,
}

/// The outside of an [`AcpiPm`], for any thread.
#[derive(Clone, Debug)]
pub struct AcpiHandle {
    pending: Arc<Pending>,
    wake: Arc<dyn Wake>,
}

impl AcpiHandle {
    /// Presses the power button. What follows is the guest's decision.
    pub fn press_power_button(&self) {
        self.pending.power_button.store(true, Ordering::Release);
        self.wake.wake();
    }

    /// The RTC interrupts: in S3 that wakes the guest, if it wants it.
    pub fn rtc_alarm(&self) {
        self.pending.rtc_alarm.store(true, Ordering::Release);
        self.wake.wake();
    }

    /// The machine has woken up and was reset: shows by what.
    pub fn woke(&self) {
        let by = self.pending.woken_by.load(Ordering::Acquire);
        self.pending.woken_by.store(by | event::WAKE, Ordering::Release);
        self.wake.wake();
    }

    /// Sets the status bit of general-purpose event `gpe`, 0–63.
    pub fn raise_gpe(&self, gpe: u8) {
        self.pending.gpes.fetch_or(1 << (gpe % 64), Ordering::AcqRel);
        self.wake.wake();
    }
}

impl AcpiPm {
    /// What it claims where the LPC bridge is set up as firmware does.
    pub const RANGES: Ranges = Ranges::ports(&[claim(PM_BASE as u64, BLOCK), claim(SMI_COMMAND as u64, 2)]);

    /// The block after power on, on a host whose TSC runs at `tsc_khz` kHz (at least 1), with a PM timer of `width` bits.
    /// `wake` brings the thread that serves IOREQs to poll the device.
    pub fn new(
        tsc_khz: u64,
        width: PmTimerWidth,
        clock: Arc<dyn Clock>,
        sci: InterruptLine,
        power: Arc<dyn PowerSink>,
        wake: Arc<dyn Wake>,
    ) -> (Self, AcpiHandle) {
        let pending = Arc::new(Pending::default());
        let handle = AcpiHandle { pending: pending.clone(), wake };
        let timer = PmTimer::new(tsc_khz.max(1), width);
        let registers = Registers::default();
        let sci = Wire::new(sci);
        let pm = Self {
            registers,
            timer,
            seen: None,
            before: None,
            deadline: None,
            pending,
            clock,
            power,
            sci,
            sleep: Sleep::Never,
        };
        (pm, handle)
    }

    /// The same, where the guest may suspend to RAM: who takes [`PowerEvent::Suspend`] can bring it back.
    #[must_use]
    pub fn with_sleep(self) -> Self {
        Self { sleep: Sleep::Awake, ..self }
    }

    fn read_register(&self, offset: u64, timer: u32) -> u8 {
        let registers = &self.registers;
        match offset {
            STATUS..ENABLE => bytes::get(registers.status.into(), offset - STATUS),
            ENABLE..CONTROL => bytes::get(registers.enable.into(), offset - ENABLE),
            CONTROL..0x06 => bytes::get(registers.control.into(), offset - CONTROL),
            TIMER..0x0c => bytes::get(timer.into(), offset - TIMER),
            GPE_STATUS..GPE_ENABLE => bytes::get(registers.gpe_status, offset - GPE_STATUS),
            GPE_ENABLE..SMI_ENABLE => bytes::get(registers.gpe_enable, offset - GPE_ENABLE),
            SMI_ENABLE..0x34 => bytes::get(SMI_ENABLE_VALUE, offset - SMI_ENABLE),
            APM.. => registers.apm[(offset - APM) as usize % 2],
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, byte: u8) {
        let registers = &mut self.registers;
        match offset {
            STATUS..ENABLE => registers.status &= !(bytes::put(0, offset - STATUS, byte) as u16),
            ENABLE..CONTROL => {
                registers.enable = bytes::put(registers.enable.into(), offset - ENABLE, byte) as u16 & event::ENABLES;
            }
            CONTROL..0x06 => {
                let value = bytes::put(registers.control.into(), offset - CONTROL, byte) as u16;
                registers.control = value & control::KEPT;
                let kind = (value & control::SLEEP_TYPE) >> control::SLEEP_TYPE_SHIFT;
                if value & control::SLEEP != 0 {
                    self.fall_asleep(kind as u8);
                }
            }
            GPE_STATUS..GPE_ENABLE => registers.gpe_status &= !bytes::put(0, offset - GPE_STATUS, byte),
            GPE_ENABLE..SMI_ENABLE => {
                registers.gpe_enable = bytes::put(registers.gpe_enable, offset - GPE_ENABLE, byte);
            }
            APM.. => {
                match (offset - APM, byte) {
                    (0, ACPI_ENABLE) => registers.control |= control::SCI_ENABLE,
                    (0, ACPI_DISABLE) => registers.control &= !control::SCI_ENABLE,
                    _ => {}
                }
                registers.apm[(offset - APM) as usize % 2] = byte;
            }
            _ => {}
        }
    }

    fn fall_asleep(&mut self, kind: u8) {
        match kind {
            SLEEP_TYPE_S5 => self.power.power(PowerEvent::PowerOff),
            SLEEP_TYPE_S3 if self.sleep == Sleep::Awake => {
                self.sleep = Sleep::Asleep;
                self.pending.rtc_alarm.store(false, Ordering::Release);
                self.power.power(PowerEvent::Suspend);
            }
            _ => {}
        }
    }

    /// Wakes the guest up, if what it sleeps for is there.
    fn wake_up(&mut self) {
        let by = self.registers.status & self.registers.enable & event::WAKERS;
        if self.sleep == Sleep::Asleep && by != 0 {
            self.sleep = Sleep::Awake;
            self.pending.woken_by.store(by, Ordering::Release);
            self.power.power(PowerEvent::WakeUp);
        }
    }

    /// The SCI and the overflow's deadline, after a change at `host_tsc`.
    fn update(&mut self, host_tsc: u64) {
        self.sci.set(self.registers.sci());
        self.deadline = self.wants_carry().then(|| self.clock.monotonic() + self.timer.until_carry(host_tsc));
    }

    /// The timer's overflow would be an interrupt.
    fn wants_carry(&self) -> bool {
        self.registers.enable & !self.registers.status & event::TIMER != 0
    }

    /// Brings the timer up to `host_tsc`, and its status bit.
    fn observe(&mut self, host_tsc: u64) {
        let now = self.clock.monotonic();
        if let Some(Before { tsc, tsc_khz, offset }) = self.before.take() {
            self.timer.set(timer::ticks(tsc.at(now, tsc_khz), tsc_khz).wrapping_add(offset), host_tsc);
        }
        self.seen = Some(Reading { tsc: host_tsc, when: now });
        if self.timer.carried(host_tsc) {
            self.registers.status |= event::TIMER;
            self.deadline = None;
        }
    }
}

/// The end of the claim that `offset` lies in.
fn end(offset: u64) -> u64 {
    if offset < BLOCK { BLOCK } else { END }
}

impl Device for AcpiPm {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        self.observe(access.host_tsc);
        let timer = self.timer.read(access.host_tsc);
        let value = bytes::read(access, offset, end(offset), |at| self.read_register(at, timer));
        self.sci.set(self.registers.sci());
        Answer::Done(value)
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, _: Deferred<'_>) -> Answer {
        self.observe(access.host_tsc);
        bytes::write(access, offset, end(offset), data, |at, byte| self.write_register(at, byte));
        self.update(access.host_tsc);
        Answer::Done(0)
    }

    fn poll(&mut self) {
        if self.pending.power_button.swap(false, Ordering::AcqRel) {
            self.registers.status |= event::POWER_BUTTON;
        }
        if self.pending.rtc_alarm.swap(false, Ordering::AcqRel) && self.sleep == Sleep::Asleep {
            self.registers.status |= event::RTC;
        }
        if self.pending.woken_by.load(Ordering::Acquire) & event::WAKE != 0 {
            self.registers.status |= self.pending.woken_by.swap(0, Ordering::AcqRel);
        }
        self.wake_up();
        self.registers.gpe_status |= self.pending.gpes.swap(0, Ordering::AcqRel);
        if self.deadline.is_some_and(|deadline| deadline <= self.clock.monotonic()) {
            self.deadline = None;
            self.timer.carry();
            self.registers.status |= event::TIMER;
        }
        self.sci.set(self.registers.sci());
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The timer runs on; events that were under way are gone.
    fn reset(&mut self) {
        self.pending.power_button.store(false, Ordering::Release);
        self.pending.gpes.store(0, Ordering::Release);
        self.registers = Registers::default();
        self.deadline = None;
        if self.sleep == Sleep::Asleep {
            self.sleep = Sleep::Awake;
        }
        self.sci.set(false);
    }
}
