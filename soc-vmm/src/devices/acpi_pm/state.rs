//! ACPI's registers on their way to another host, and the PM timer, which must not stop or jump on it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::timer::Reading;
use super::{AcpiPm, Before, Pending, Registers, Sleep, control, event};
use crate::devices::{Persist, RestoreError, check};

/// Saved state of an [`AcpiPm`].
///
/// The PM timer goes by the TSC of a host, and is on another one a number of another TSC. So the state says what the host's TSC was when
/// the state was taken, and what time it was then: the timer has gone on with real time when it is restored, and with monotonic time from
/// then to the guest's first access, which tells the new host's TSC. Its error is the difference between the two clocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPmState {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control.
    pub control: u16,
    /// GPE0 status.
    pub gpe_status: u64,
    /// GPE0 enable.
    pub gpe_enable: u64,
    /// Ports 0xb2 and 0xb3.
    pub apm: [u8; 2],
    /// The guest is in S3.
    pub asleep: bool,
    /// What came from outside, and was not polled yet.
    pub waiting: AcpiWaiting,
    /// The host's TSC rate under which `timer_offset` holds, in kHz.
    pub tsc_khz: u64,
    /// The PM timer's count at host TSC 0 (modulo 2⁶⁴).
    pub timer_offset: u64,
    /// The count (modulo 2⁶⁴) at which the timer's status bit is set next; none before the first access.
    pub timer_carry: Option<u64>,
    /// The host's TSC when the state was taken; none: the guest has never looked at the block, and can't tell what its timer does.
    pub moment: Option<TscMoment>,
    /// ns until the overflow interrupt, where it is enabled.
    pub carry_in: Option<u64>,
}

/// Events on their way into an [`AcpiPm`], which makes them interrupts when it is polled next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiWaiting {
    /// The power button was pressed.
    pub power_button: bool,
    /// The RTC interrupted.
    pub rtc_alarm: bool,
    /// PM1 status bits that the machine woke up by.
    pub woken_by: u16,
    /// General-purpose events.
    pub gpes: u64,
}

/// What a host's TSC was at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TscMoment {
    /// The TSC, as it follows from the last access and the time since.
    pub host_tsc: u64,
    /// Real time, in ns since 1970.
    pub realtime: u64,
}

impl AcpiPm {
    fn realtime(&self) -> u64 {
        // Until 2554.
        u64::try_from(self.clock.realtime().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Pending {
    fn save(&self) -> AcpiWaiting {
        AcpiWaiting {
            power_button: self.power_button.load(Ordering::Acquire),
            rtc_alarm: self.rtc_alarm.load(Ordering::Acquire),
            woken_by: self.woken_by.load(Ordering::Acquire),
            gpes: self.gpes.load(Ordering::Acquire),
        }
    }

    fn restore(&self, waiting: AcpiWaiting) {
        self.power_button.store(waiting.power_button, Ordering::Release);
        self.rtc_alarm.store(waiting.rtc_alarm, Ordering::Release);
        self.woken_by.store(waiting.woken_by, Ordering::Release);
        self.gpes.store(waiting.gpes, Ordering::Release);
    }
}

impl Persist for AcpiPm {
    const NAME: &'static str = "acpi-pm";
    type State = AcpiPmState;

    fn save(&self) -> AcpiPmState {
        let Registers { status, enable, control, gpe_status, gpe_enable, apm } = self.registers;
        let own = Before {
            tsc: self.seen.unwrap_or(Reading { tsc: 0, when: self.clock.monotonic() }),
            tsc_khz: self.timer.tsc_khz(),
            offset: self.timer.offset(),
        };
        let Before { tsc, tsc_khz, offset } = self.before.unwrap_or(own);
        let now = self.clock.monotonic();
        let moment = TscMoment { host_tsc: tsc.at(now, tsc_khz), realtime: self.realtime() };
        AcpiPmState {
            status,
            enable,
            control,
            gpe_status,
            gpe_enable,
            apm,
            asleep: self.sleep == Sleep::Asleep,
            waiting: self.pending.save(),
            tsc_khz,
            timer_offset: offset,
            timer_carry: self.timer.next_carry(),
            moment: (self.before.is_some() || self.seen.is_some()).then_some(moment),
            // The longest wait is the timer's range, twenty minutes: it fits.
            carry_in: self.deadline.map(|deadline| deadline.saturating_duration_since(now).as_nanos() as u64),
        }
    }

    /// What waits for a poll is what waited at the source: the RTC, restored before, may have left something.
    fn restore(&mut self, state: &AcpiPmState) -> Result<(), RestoreError> {
        let ok = |condition, what| check(condition, "acpi pm", what);
        ok(state.enable & !event::ENABLES == 0, "PM1 enable has reserved bits")?;
        ok(state.control & !control::KEPT == 0, "PM1 control has reserved bits")?;
        ok(!state.asleep || self.sleep != Sleep::Never, "the guest sleeps in S3, which this machine doesn't have")?;
        ok(state.tsc_khz != 0, "the host's TSC stands still")?;
        let longest = self.timer.longest_wait();
        ok(state.carry_in.is_none_or(|ns| Duration::from_nanos(ns) <= longest), "the timer overflows too late")?;
        let AcpiPmState { status, enable, control, gpe_status, gpe_enable, apm, tsc_khz, .. } = *state;
        self.registers = Registers { status, enable, control, gpe_status, gpe_enable, apm };
        self.sleep = match self.sleep {
            Sleep::Never => Sleep::Never,
            _ if state.asleep => Sleep::Asleep,
            _ => Sleep::Awake,
        };
        self.pending.restore(state.waiting);
        let now = self.clock.monotonic();
        // Two hosts' clocks differ: a time before that of the source is the same time.
        let since = |moment: TscMoment| Duration::from_nanos(self.realtime().saturating_sub(moment.realtime));
        let passed = state.moment.map_or(Duration::ZERO, since);
        self.before = state.moment.map(|moment| {
            let there = Reading { tsc: moment.host_tsc, when: now };
            let tsc = Reading { tsc: there.at(now + passed, tsc_khz), when: now };
            Before { tsc, tsc_khz, offset: state.timer_offset }
        });
        self.seen = None;
        self.timer.restore(state.timer_offset, state.timer_carry);
        let wait = |ns| Duration::from_nanos(ns).saturating_sub(passed);
        self.deadline = state.carry_in.filter(|_| self.wants_carry()).map(|ns| now + wait(ns));
        self.sci.force(self.registers.sci());
        Ok(())
    }
}
